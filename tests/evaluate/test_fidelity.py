"""Fidelity: recall and errors of a layer against the full matrix; KL and top-1 against their formulas; pictures."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from test_runner import SPARSE, subject

from gossamer import AttentionCall, Extent, Policy, SparsePlan, methods, sparse_attention
from gossamer.backends.torch import attend
from gossamer.evaluate import fidelity
from gossamer.evaluate.fidelity import FIGURES, compare, compare_layer, compare_logits, plan_map
from gossamer.integrations.transformers import Observation
from gossamer.oracle import log_sum_exp
from gossamer.rotary import Rotary

LENGTH = 200
SMALL: dict[str, dict[str, Any]] = {
    "a_shape": {"sink": 3, "window": 40},
    "tri_shape": {"sink": 3, "window": 40, "last": 8},
    "vertical_slash": {"vertical_size": 9, "slash_size": 30},
    "mtraining": {"p": 0.3, "last": 16},
    "longgen": {"recent": 2, "sink": 0, "block": 16},
    "minference": {"vertical_size": 9, "slash_size": 30},
    "grid": {"stride": 29, "hline": False},
    "mminference": {"patterns": [methods.VerticalSlash(9, 30)]},
    "block_sparse": {"blocks": 1},
    "max_relative": {"last_rows": 0, "window_blocks": 1, "sink_blocks": 0, "alpha": 1.0, "block_q": 16, "block_k": 16},
    "duo_attention": {"gates": [[0.9, 0.1]], "sink": 3, "recent": 40},
    "lserve": {"gates": [[0.9, 0.1]], "sink": 3, "local": 40},
    "moa": {"alphas": [[40, 60, 80, 30]], "betas": [[0.0] * 4], "sink": 4, "least": 4, "block": 16},
    "seer_attention": {"threshold": 0.3, "last_blocks": 0},
    "flexprefill": {"gamma": 0.2, "tau": 0.2, "min_budget": 16, "block": 16},
    "xattention": {"threshold": 0.3, "stride": 4, "block": 16},
    "anchor_attention": {"theta": 1.0, "step": 2, "first_blocks": 1, "block": 16},
    "auto": {"error": 0.2, "sink": 4, "window": 16, "group": 2, "block": 16},
    "triangle_mix": {"sink": 3, "window": 40, "last": 8, "first_layer": 0},
    "vec_attention": {"threshold": 0.5, "block": 16},
    "flash_prefill": {"alpha": 1.0, "sink_blocks": 0, "window_blocks": 1, "last_tiles": 0, "block_k": 16, "version": 1},
    "sparge": {"similarity": 0.02, "p": 0.3, "block_q": 16, "block_k": 16},
    "prism": {"p_high": 0.3, "p_low": 0.3, "block": 16},
    "stem": {"share": 0.05, "extra": 1, "full_blocks": 0, "dense_layers": 0, "block": 16, "stride": 4},
    "cosa": {"p": 0.3, "block": 16, "stride": 4},
    "corrected": {"base": methods.BlockSparse(1)},
    "pbs": {"threshold": 0.3, "segment": 32, "block": 16},
    "per_head": {
        "layers": [
            [methods.AShape(3, 40), methods.BlockSparse(1), methods.VerticalSlash(9, 30), methods.BlockSparse(2, 32)]
        ]
    },
}


def one_call(limit: int | None = None) -> tuple[Observation, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(1, 4, LENGTH, 16, generator=generator)
    k, v = (torch.randn(1, 2, LENGTH, 16, generator=generator) for _ in range(2))
    call = AttentionCall.of(q, k, v, scale=0.25, limit=limit, layer=0, rotary=Rotary.of_base(16))
    out = sparse_attention(q, k, v, "dense", scale=0.25, limit=limit)
    return Observation(call, out), log_sum_exp(call)


def weights(call: AttentionCall) -> torch.Tensor:
    """The full softmax matrix in fp64, ``[H, S, T]``."""
    keys = call.k.double().repeat_interleave(2, dim=1)
    logits = (call.q.double() @ keys.mT)[0] * call.scale
    visible = call.extent.allowed(torch.arange(LENGTH), LENGTH)[0]
    return logits.masked_fill(~visible, float("-inf")).softmax(-1)


@pytest.mark.parametrize("name", [name for name in methods.available() if name != "dense"])
@pytest.mark.parametrize("limit", [None, 90])
def test_recall_and_errors_equal_those_of_the_full_matrix(name: str, limit: int | None) -> None:
    observed, lse = one_call(limit)
    call = observed.call
    plan = methods.create(name, **SMALL[name]).plan(call)
    figures = compare_layer(observed, plan, lse)
    full = weights(call)
    mask = plan.to_mask()[0].repeat_interleave(4 // plan.heads, dim=0)
    recall = (full * mask).sum(-1).mean(-1)
    assert 0.05 < recall.mean() < 0.999
    torch.testing.assert_close(torch.tensor(figures["recall"]).double(), recall, atol=1e-5, rtol=1e-5)
    if plan.pruned_mean:  # what is not in the mask counts, too
        return
    values = call.values.double().repeat_interleave(2, dim=1)[0]
    kept = full * mask
    sparse, dense = (kept / kept.sum(-1, keepdim=True)) @ values, full @ values
    error = (sparse - dense).norm(dim=(1, 2)) / dense.norm(dim=(1, 2))
    torch.testing.assert_close(torch.tensor(figures["relative_l2"]).double(), error, atol=1e-4, rtol=1e-4)
    cosine = torch.cosine_similarity(sparse, dense, dim=-1).mean(-1)
    torch.testing.assert_close(torch.tensor(figures["cosine"]).double(), cosine, atol=1e-4, rtol=1e-4)
    pairs = (full > 0).sum(dim=(1, 2))
    density = mask.sum(dim=(1, 2)) / pairs
    torch.testing.assert_close(torch.tensor(figures["head_density"]).double(), density.double(), atol=1e-4, rtol=1e-4)
    assert all(0 < value <= 1 + 1e-6 for value in figures["oracle_recall"])


@pytest.mark.parametrize("attribute", [{"pruned_mean": True}, {"skip": 0.5}, {"quantised": True}], ids=str)
def test_recall_is_of_the_plans_own_pairs(attribute: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an executor has in its sum: here the definition's, which rounds to integers where it may."""
    monkeypatch.setattr(fidelity.backends, "attend", attend)
    observed, lse = one_call()
    plan = methods.BlockSparse(2, 64).plan(observed.call)
    found = compare_layer(observed, plan.with_attributes(**attribute), lse)
    plain = compare_layer(observed, plan, lse)
    assert found["recall"] == plain["recall"]
    assert found["relative_l2"] != plain["relative_l2"]


def test_dense_is_perfect() -> None:
    observed, lse = one_call()
    figures = compare_layer(observed, SparsePlan.dense(2, LENGTH, LENGTH, observed.call.extent), lse)
    # The oracle gets as many full blocks as the pairs would fill: it may lack those on the rim.
    for name, expected in zip(FIGURES, (1.0, 1.0, None, 0.0, 1.0), strict=True):
        assert expected is None or figures[name] == pytest.approx([expected] * 4, abs=1e-5), name


def test_a_model_against_itself_and_against_a_sparse_run() -> None:
    of = subject()
    tokens = torch.randint(3, 2900, (1, 300), generator=torch.Generator().manual_seed(1))
    same, sparse = compare(of, tokens, [Policy(methods.create("a_shape", window=300), 0, 2.0), SPARSE])
    assert same["logits"]["mean_top1"] == 1.0
    assert same["logits"]["mean_kl"] < 1e-6
    assert same["mean"]["recall"] == pytest.approx(1.0, abs=1e-5)
    assert sparse["mean"]["recall"] < 0.9
    assert sparse["logits"]["mean_kl"] > same["logits"]["mean_kl"]
    assert [len(sparse[name]) for name in FIGURES] == [2] * 5  # layers
    assert [len(row) for row in sparse["recall"]] == [4, 4]  # heads
    assert "maps" not in next(compare(of, tokens, [SPARSE], maps=False))
    assert {(m["layer"], m["head"]) for m in sparse["maps"]} <= {(layer, head) for layer in (0, 1) for head in range(4)}


def test_layers_that_the_policy_lets_run_dense_count_as_dense() -> None:
    of = subject()
    tokens = torch.randint(3, 2900, (1, 300), generator=torch.Generator().manual_seed(1))
    method = methods.create("a_shape", sink=4, window=64)
    policies = [Policy(method), Policy(method, min_tokens=0, max_density=0.1), Policy(method, min_tokens=0)]
    short, too_dense, sparse = compare(of, tokens, policies)
    for run, reason in ((short, "short prompt"), (too_dense, "plan too dense to pay")):
        assert run["dense_because"] == {reason: 2}
        assert run["mean"] == {name: float(name != "relative_l2") for name in FIGURES}
        assert run["logits"]["mean_top1"] == 1.0
        assert run["density"] == 1.0
    assert sparse["dense_because"] == {}
    assert sparse["density"] < 0.6


def test_kl_and_top1_are_the_formulas_by_position() -> None:
    of = subject()
    a, b = (torch.randn(300, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    b[:64] = a[:64]
    tokens = torch.randint(3, 2900, (1, 300), generator=torch.Generator().manual_seed(3))
    same, found = compare_logits(of, a, [a, b], tokens)
    with torch.inference_mode():
        p, q = (of.model.lm_head(x).double() for x in (a, b))
        loss = [torch.nn.functional.cross_entropy(x[:-1], tokens[0, 1:]) for x in (p, q)]
    assert [found["dense_nats"], found["nats"]] == pytest.approx([float(x) for x in loss], rel=1e-4)
    assert same["nats"] == same["dense_nats"] == found["dense_nats"]
    assert (same["mean_kl"], same["mean_top1"]) == (0.0, 1.0)
    assert "nats" not in compare_logits(of, a, [b])[0]
    divergence = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none")
    divergence = divergence.sum(-1)
    agreement = (p.argmax(-1) == q.argmax(-1)).double()
    assert found["edges"] == [0, 64, 256, 300]
    assert found["kl"][0] == 0.0
    assert found["top1"][0] == 1.0
    assert found["kl"][1:] == pytest.approx(
        [float(divergence[64:256].mean()), float(divergence[256:].mean())], rel=1e-3
    )
    assert found["top1"][1:] == pytest.approx([float(agreement[64:256].mean()), float(agreement[256:].mean())])
    assert found["mean_kl"] == pytest.approx(float(divergence.mean()), rel=1e-3)


def test_the_picture_of_a_plan() -> None:
    extent = Extent.full(1, 512, 512)
    blocks = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    blocks[0, 0, range(8), range(8)] = True
    blocks[0, 0, :, 0] = True
    plan = SparsePlan.from_block_mask(blocks, query_len=512, key_len=512, extent=extent, block_q=64, block_k=64)
    picture = plan_map(plan, head=2, heads=4, size=8)
    image = torch.tensor(list(base64.b64decode(picture["data"]))).view(8, 8)
    expected = torch.zeros(8, 8)
    expected[:, 0] = 255
    expected.fill_diagonal_(255)
    assert torch.equal(image.float(), expected)
