"""MoA's profiling against its formula on attention written out, and its programme against every choice there is."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from tiny import tiny_llama, tokens
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.calibrate.influence import answer_loss, block_influence, influence, mean_influence, with_answer
from gossamer.calibrate.spans import Choice, candidates, choose_spans, lost_influence
from gossamer.methods import MoA
from gossamer.plan import Grid
from gossamer.testing import make_call


def written_out(call: AttentionCall, weight: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Influence by blocks from A and dL/dA as autograd has them, for ``L = sum(tanh(out) * weight)``; out, dL/dout."""
    q, k, v = (t.double().nan_to_num() for t in (call.q, call.k, call.values))
    k, v = (t.repeat_interleave(call.share, dim=1) for t in (k, v))
    logits = q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    allowed = call.extent.allowed(torch.arange(call.query_len), call.key_len)[:, None]
    weights = torch.where(allowed, logits.exp(), 0.0)
    extra = 0.0 if call.sinks is None else call.sinks.double().exp()[None, :, None, None]
    a = (weights / (weights.sum(-1, keepdim=True) + extra)).nan_to_num().requires_grad_()
    out = a @ v
    (out.tanh() * weight).sum().backward()
    g = a.grad
    assert g is not None
    grid = Grid(call.extent, block, block)
    found = torch.zeros(call.batch, call.heads, grid.query_blocks, grid.key_blocks, dtype=torch.float64)
    for b in range(call.batch):
        start, first = int(call.extent.query_start[b]), int(call.extent.key_start[b])
        for i in call.extent.live_queries(call.query_len)[b].nonzero().flatten().tolist():
            mean = (g[b, :, i] * a[b, :, i]).sum(-1)
            seen = allowed[b, 0, i].nonzero().flatten().tolist()
            for j in seen:
                change = a[b, :, i, j] * (g[b, :, i, j] - mean) / (1 - a[b, :, i, j])
                if len(seen) == 1:
                    change = a[b, :, i, j] * g[b, :, i, j]
                m, n = (start + i) // block - int(grid.first_block[b]), (j - first) // block
                found[b, :, m, n] += change.abs().detach()
    return found, out.detach(), weight * (1 - out.detach().tanh() ** 2)


@pytest.mark.parametrize("situation", ["no padding", "padded chunk", "static cache", "scale, sinks and soft-cap"])
@pytest.mark.usefixtures("constants")
def test_influence_is_that_of_attention_written_out(situation: str) -> None:
    call = make_call(situation, length=40, heads=4, groups=2, dim=8)
    weight = torch.randn(call.q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, out, gradient = written_out(call, weight, 16)
    got = block_influence(call, out.float(), gradient.float(), Grid(call.extent, 16, 16))
    torch.testing.assert_close(got.double(), expected, atol=2e-4, rtol=2e-3)


def test_removing_a_key_changes_the_loss_by_as_much() -> None:
    """The formula itself, to first order: a key with little weight is left out of the softmax."""
    torch.manual_seed(2)
    q, k, v = (
        torch.randn(1, 1, 6, 4, dtype=torch.float64),
        torch.randn(1, 1, 6, 4, dtype=torch.float64),
        torch.randn(1, 1, 6, 4, dtype=torch.float64),
    )
    k[:, :, 2] = -4 * q[:, :, 5]  # the last query hardly attends key 2
    weight = torch.randn(1, 1, 6, 4, dtype=torch.float64)
    expected, _, _ = written_out(AttentionCall(q, k, v), weight, 1)

    def loss(without: int | None) -> float:
        logits = q[0, 0, 5] @ k[0, 0].T / 2
        if without is not None:
            logits[without] = -torch.inf
        return float(((logits.softmax(-1) @ v[0, 0]).tanh() * weight[0, 0, 5]).sum())

    changed = abs(loss(2) - loss(None))
    assert changed == pytest.approx(float(expected[0, 0, 5, 2]), rel=0.02)


def test_only_causal_attention_is_profiled() -> None:
    q = torch.randn(1, 1, 5, 4)
    call = AttentionCall(q, q, q, Extent.full(1, 5, 5, causal=False))
    with pytest.raises(ValueError, match="causal attention"):
        block_influence(call, q, q, Grid(call.extent, 4, 4))


def test_a_model_is_profiled_layer_by_layer() -> None:
    """Against attention with its weights in the graph: transformers' eager attention returns them."""
    model, ids, start = tiny_llama(), tokens(40), 30
    got = influence(model, ids, start, block=8)
    assert model.config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters())

    model.set_attn_implementation("eager")
    out = model(input_ids=ids, output_attentions=True)
    loss = torch.nn.functional.cross_entropy(out.logits[0, start - 1 : -1], ids[0, start:])
    gradients = torch.autograd.grad(loss, out.attentions)
    for layer, (a, g) in enumerate(zip(out.attentions, gradients, strict=True)):
        change = a * (g - (a * g).sum(-1, keepdim=True)) / (1 - a)
        change[:, :, 0] = (a * g)[:, :, 0]
        blocks = change.tril().abs()[0].unflatten(1, (5, 8)).unflatten(3, (5, 8)).sum((2, 4))
        torch.testing.assert_close(got[layer], blocks, atol=1e-5, rtol=1e-2)
    assert got.shape == (2, 4, 5, 5)
    assert bool((got.sum((2, 3)) > 0).all())


def test_samples_are_averaged_and_must_have_one_length() -> None:
    model = tiny_llama()
    samples = [(tokens(24, seed), 20) for seed in (1, 2)]
    mean = mean_influence(model, samples, block=8)
    torch.testing.assert_close(mean, sum(influence(model, *one, block=8) for one in samples) / 2)
    with pytest.raises(ValueError, match="one length, got 24 and 25"):
        mean_influence(model, [*samples, (tokens(25), 20)])
    with pytest.raises(ValueError, match="at least one sample"):
        mean_influence(model, [])
    with pytest.raises(ValueError, match="1 <= answer_from < S"):
        influence(model, tokens(24), 24)


def test_answers_are_the_dense_models_own() -> None:
    model = tiny_llama()
    ids, start = with_answer(model, tokens(20), 4)
    assert (ids.shape, start) == ((1, 24), 20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits[0, 19:23].argmax(-1), ids[0, 20:])
        expected = torch.nn.functional.cross_entropy(model(ids).logits[0, 19:23], ids[0, 20:])
    assert answer_loss(model, ids, start) == pytest.approx(float(expected), rel=1e-5)
    few = MoA([[4.0] * 4] * 2, [[0.0] * 4] * 2, sink=1, least=1, block=1, new_tokens=0)
    assert abs(answer_loss(model, ids, start, few) - float(expected)) > 1e-3


# The programme


def test_lines_lie_within_the_lengths() -> None:
    lines = candidates([2048, 4096], step=1024, slopes=5, least=128)
    assert (0.0, 0.5) in lines
    assert (-1024.0, 1.0) in lines
    assert (-2048.0, 1.0) not in lines  # nothing at 2048
    assert (0.0, 0.0) not in lines
    assert all(128 <= a + b * n <= n for a, b in lines for n in (2048, 4096))
    assert {b for _, b in lines} == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_what_a_window_loses() -> None:
    influence = torch.rand(2, 3, 5, 5).tril()
    for first in (0, 1, 2):
        lost = lost_influence(influence, first=first)
        for window in range(6):
            expected = sum(
                influence[:, :, m, n].double() for m in range(5) for n in range(5) if n >= first and m - n >= window
            )
            torch.testing.assert_close(lost[..., window], torch.zeros(2, 3).double() + expected)
    with pytest.raises(ValueError, match=r"must be \[layers, heads, blocks, blocks\], got \(2, 3, 5, 4\)"):
        lost_influence(influence[..., :4])


LINES = [(8.0, 0.0), (16.0, 0.0), (0.0, 0.5), (0.0, 1.0)]
FIELDS: dict[str, Any] = {"sink": 4, "least": 8, "block": 4, "new_tokens": 0}
BOUNDS: dict[str, Any] = {"density": 0.6, "least_density": 0.3, "further": (64,), "lines": LINES}


def influences(seed: int, lengths: tuple[int, ...] = (24, 40)) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(2, 2, n // 4, n // 4, generator=generator).tril() ** 3 for n in lengths}


def every_choice(given: dict[int, Tensor], distinct: int) -> list[tuple[dict[int, float], MoA]]:
    """All choices within the bounds, with the share of the influence that they lose, pair of blocks by pair."""
    found = []
    for chosen in itertools.product(range(4), repeat=4):
        layers = [chosen[:2], chosen[2:]]
        alphas, betas = ([[LINES[line][part] for line in layer] for layer in layers] for part in (0, 1))
        if max(len(set(layer)) for layer in layers) > distinct:
            continue
        spans = {n: [[_span(LINES[line], n) for line in layer] for layer in layers] for n in (*given, 64)}
        densities = [sum(map(sum, spans[n])) / 4 / n for n in spans]
        if not all(0.3 - 1e-9 <= share <= 0.6 + 1e-9 for share in densities):
            continue
        lost = {}
        for n, heads in given.items():
            total = 0.0
            for layer, head in itertools.product(range(2), range(2)):
                window = max(1, (spans[n][layer][head] - 4) // 4)
                total += sum(
                    float(heads[layer, head, m, k]) for m in range(n // 4) for k in range(1, n // 4) if m - k >= window
                )
            lost[n] = total / float(heads.double().sum())
        found.append((lost, MoA(alphas, betas, **FIELDS)))
    return found


def _span(line: tuple[float, float], tokens: int) -> int:
    return min(tokens, -(-max(8, min(int(line[0] + line[1] * tokens), tokens)) // 4) * 4)


@pytest.mark.parametrize("distinct", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_of_every_choice_is_found(seed: int, distinct: int) -> None:
    pytest.importorskip("scipy")
    given = influences(seed)
    there = every_choice(given, distinct)
    assert len(there) > 4
    chosen = choose_spans(given, distinct=distinct, **BOUNDS, **FIELDS)
    losses = {method: lost for lost, method in there}
    for choice in chosen:
        assert choice.lost == pytest.approx(losses[choice.method])
        assert all(0.3 <= share <= 0.6 for share in choice.density.values())
        better = [lost for lost in losses.values() if all(lost[n] < choice.lost[n] - 1e-6 for n in given)]
        assert not better
    for n in given:
        assert min(choice.lost[n] for choice in chosen) == pytest.approx(min(lost[n] for lost in losses.values()))
    assert [c.lost[40] for c in chosen] == sorted(c.lost[40] for c in chosen)


def test_one_length_alone_gives_one_choice() -> None:
    pytest.importorskip("scipy")
    (only,) = choose_spans(influences(3, (24,)), **BOUNDS, **FIELDS)
    assert isinstance(only, Choice)
    assert set(only.density) == {24, 64}


def test_more_density_loses_less() -> None:
    pytest.importorskip("scipy")
    given = influences(4)
    lost = [choose_spans(given, **BOUNDS | {"density": d}, **FIELDS)[0].lost[40] for d in (0.45, 0.6, 1.0)]
    assert lost[0] > lost[1] > lost[2] == 0.0


def test_what_cannot_be_chosen_is_said() -> None:
    pytest.importorskip("scipy")
    with pytest.raises(ValueError, match=r"no choice of 4 lines keeps a density of 0\.01 to 0\.02 at 24, 40, 64"):
        choose_spans(influences(0), **BOUNDS | {"density": 0.02, "least_density": 0.01}, **FIELDS)
    with pytest.raises(ValueError, match="at one length at least"):
        choose_spans({})
    with pytest.raises(ValueError, match="no line fits the lengths 24"):
        choose_spans({24: torch.rand(1, 1, 6, 6)}, further=(), **FIELDS)
    with pytest.raises(ValueError, match="influence of 40 tokens must have 10 blocks of 4, got 6"):
        choose_spans({40: torch.rand(1, 1, 6, 6)}, **BOUNDS, **FIELDS)


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        choose_spans(influences(0), **BOUNDS, **FIELDS)
