"""Dynamic Mask Attention against its formula, transformers' Doge, and itself in chunks."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.modules import DynamicMask, DynamicMaskAttention, plan_of_scores
from gossamer.plan import Extent

NAMES: list[str] = ["A", "dt_proj.weight", "v_proj.weight"]
CONFIG = SimpleNamespace(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, keep_window_size=12)


def naive(scores: Tensor, extent: Extent, queries: int, keep: int, per: str, shared: int) -> Tensor:
    """``[B, G, S, T]``: the formulas, key by key."""
    batch, groups, keys = scores.shape
    mask = torch.zeros(batch, groups, queries, keys, dtype=torch.bool)
    for b in range(batch):
        start, count = int(extent.key_start[b]), int(extent.key_count[b])
        for g in range(groups):
            ranked = sorted(range(count), key=lambda n: (-float(scores[b, g, start + n]), -n))
            for i in range(queries):
                own = int(extent.query_start[b]) + i
                if not 0 <= own < count or i >= int((-extent.query_start[b]).clamp(min=0) + extent.query_count[b]):
                    continue
                first = own // shared * shared
                visible = [n for n in ranked if per == "sequence" or n <= first]
                chosen = {*visible[:keep]} | (set(range(first + 1, own + 1)) if per == "query" else set())
                for n in chosen if count > keep else range(count):
                    mask[b, g, i, start + n] = n <= own
    return mask


EXTENTS = {
    "whole": Extent.full(2, 50, 50),
    "padding on both sides": Extent([-7, 0], [43, 38], [7, 0], [43, 38]),
    "a chunk": Extent([31, 27], [19, 19], [0, 4], [50, 46]),
    "no longer than what is kept": Extent.full(2, 12, 12),
}


@pytest.mark.parametrize("name", EXTENTS)
@pytest.mark.parametrize(("per", "shared"), [("query", 1), ("query", 16), ("sequence", 64)])
def test_the_selection_is_the_formula(name: str, per: Any, shared: int) -> None:
    extent = EXTENTS[name]
    queries = 19 if name == "a chunk" else 12 if "longer" in name else 50
    keys = max(queries, 50) if name != "no longer than what is kept" else 12
    scores = torch.randn(2, 3, keys).round(decimals=1)  # some are equal
    dead = ~extent.live_keys(keys)
    scores.masked_fill_(dead[:, None], float("nan"))
    plan = plan_of_scores(scores, extent, queries, keep=12, per=per, shared=shared)
    assert torch.equal(plan.to_mask(), naive(scores, extent, queries, 12, per, shared))


def test_equal_scores_are_a_window() -> None:
    mask = plan_of_scores(torch.ones(1, 1, 40), Extent.full(1, 40, 40), 40, keep=5, shared=1).to_mask()[0, 0]
    assert torch.equal(mask, torch.ones(40, 40, dtype=torch.bool).tril().triu(-4))


def test_what_comes_later_changes_a_selection_by_sequence_alone() -> None:
    extent, scores = Extent.full(1, 40, 40), torch.randn(1, 2, 40)
    later = scores.clone()
    later[..., 30:] += 100
    expected: list[tuple[Any, bool]] = [("query", True), ("sequence", False)]
    for per, same in expected:
        before, after = (plan_of_scores(x, extent, 40, keep=6, per=per).to_mask()[:, :, :30] for x in (scores, later))
        assert torch.equal(before, after) == same


def test_both_forms_of_the_bias() -> None:
    values = torch.randn(2, 2, 9, 8)
    for form in ("linear", "exp"):
        module = DynamicMask(2, 8, form=form)
        nn.init.normal_(module.A)
        flat = values.transpose(1, 2).reshape(2, 9, 16)
        steps = module.A * torch.log1p((flat @ module.dt_proj.weight.T).exp())
        torch.testing.assert_close(module(values), (steps.exp() if form == "exp" else steps).transpose(1, 2))


def layer(**options: Any) -> DynamicMaskAttention:
    torch.manual_seed(0)
    made = DynamicMaskAttention(CONFIG, 0, **options)
    nn.init.normal_(made.A)
    return made


def turned(tokens: int, first: int = 0) -> tuple[Tensor, Tensor]:
    angles = torch.arange(first, first + tokens)[:, None] * 0.3 ** torch.arange(4)
    angles = torch.cat([angles, angles], dim=-1)[None]
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("form", ["exp", "linear"])
def test_the_gradient_reaches_all_parameters_and_is_right(form: Any) -> None:
    """Finite differences in fp64, of which no step is wide enough to select other keys."""
    made = layer(form=form, shared=4, dtype=torch.float64)
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    cos, sin = (part.double() for part in turned(30))

    def run(*given: Tensor) -> Tensor:
        replaced: dict[str, Tensor] = dict(zip(NAMES, given, strict=True))
        return torch.func.functional_call(made, replaced, (x, (cos, sin)))[0]

    given = [made.get_parameter(name).detach().requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(run, given, eps=1e-7, atol=1e-5, fast_mode=True)
    made(x, (cos, sin))[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())


class Cache:
    """Keys and values, as a cache of transformers gives them."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def update(self, k: Tensor, v: Tensor, _layer: int | None) -> tuple[Tensor, Tensor]:
        old = self.held
        self.held = (k, v) if old is None else (torch.cat([old[0], k], 2), torch.cat([old[1], v], 2))
        return self.held


def test_with_all_keys_kept_it_is_dense_attention_with_a_bias() -> None:
    torch.manual_seed(0)
    made = DynamicMaskAttention(CONFIG)
    x, still = torch.randn(2, 12, 32), (torch.ones(1, 12, 8), torch.zeros(1, 12, 8))  # as many keys as are kept

    def dense() -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, 8)) for proj in (made.q_proj, made.k_proj, made.v_proj))
        q, k, v = made.q_norm(q).transpose(1, 2), made.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        rates = made.A * torch.nn.functional.softplus(made.dt_proj(v.transpose(1, 2).flatten(2)))
        bias = rates.exp().transpose(1, 2)[:, :, None] + torch.full((12, 12), float("-inf")).triu(1)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=bias.repeat_interleave(2, 1)
        )
        return made.o_proj(out.transpose(1, 2).flatten(2))

    torch.testing.assert_close(made(x, still)[0], dense())  # A is 0: the same bias everywhere
    torch.nn.init.normal_(made.A)
    torch.testing.assert_close(made(x, still)[0], dense())
    made.keep, made.shared = 5, 1
    assert not torch.allclose(made(x, still)[0], dense(), atol=1e-3)


@pytest.mark.parametrize("shared", [1, 16])
@torch.no_grad()
def test_chunks_and_single_tokens_give_what_the_whole_prompt_gives(shared: int) -> None:
    made, x = layer(shared=shared), torch.randn(1, 60, 32)
    whole = made(x, turned(60))[0]
    cache, parts = Cache(), []
    for begin, end in ((0, 23), (23, 56), *((n, n + 1) for n in range(56, 60))):
        parts.append(made(x[:, begin:end], turned(end - begin, begin), past_key_values=cache)[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing_and_is_taken_in_each_form() -> None:
    made, x = layer(), torch.randn(2, 40, 32)
    live = torch.ones(2, 40, dtype=torch.bool)
    live[1, :9] = False
    square = live[:, None, None] & torch.ones(40, 40, dtype=torch.bool).tril()
    additive = torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)
    outs = [made(x, turned(40), mask)[0][live] for mask in (live, square, additive)]
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(outs[0], outs[2])
    torch.testing.assert_close(outs[0][40:], made(x[1:, 9:], turned(31, 9))[0][0], atol=1e-5, rtol=1e-5)


def test_a_model_of_doge_computes_the_same_with_these_layers() -> None:
    """Of tokens that do not recur: in the first layer those have equal scores, of which Doge keeps any."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DogeConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, keep_window_size=16, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    stock = transformers.AutoModelForCausalLM.from_config(config).eval()
    for block in stock.model.layers:
        nn.init.normal_(block.self_attn.A, std=2.0)
    ours = copy.deepcopy(stock)
    for n, block in enumerate(ours.model.layers):
        new = DynamicMaskAttention(config, n, shared=1)
        new.load_state_dict(block.self_attn.state_dict())
        block.self_attn = new.eval()
    ids = torch.stack([torch.randperm(190)[:50] + 5 for _ in range(2)])
    live = torch.ones_like(ids)
    live[1, :11] = 0
    with torch.no_grad():
        expected, got = (model(input_ids=ids, attention_mask=live).logits[live.bool()] for model in (stock, ours))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        stock.model.layers[0].self_attn.keep_window_size = 50  # a negative control: the selection matters
        assert (stock(input_ids=ids, attention_mask=live).logits[live.bool()] - got).abs().max() > 1e-3
        tokens = ours.generate(input_ids=ids, attention_mask=live, max_new_tokens=5, do_sample=False)
    assert tokens.shape == (2, 55)


def test_a_layer_trains_under_autocast() -> None:
    """Norms give fp32 there, projections bf16."""
    layer, x = DynamicMaskAttention(CONFIG, 0), torch.randn(1, 30, 32)
    angles = torch.arange(30)[:, None] * torch.logspace(0, -3, 4).repeat(2)
    given = (angles.cos()[None], angles.sin()[None])
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = layer(x, given)
    out.float().square().mean().backward()
    assert layer.A.grad is not None
    assert bool(layer.A.grad.isfinite().all())
    torch.testing.assert_close(out.float(), layer(x, given)[0], atol=2e-2, rtol=2e-2)


def test_wrong_arguments_are_named() -> None:
    extent, scores = Extent.full(1, 8, 8), torch.zeros(1, 2, 8)
    for options, message in (
        ({"keep": 0}, "keep and shared must be 1 or more"),
        ({"keep": 4, "shared": 0}, "keep and shared must be 1 or more"),
        ({"keep": 4, "per": "head"}, "per must be"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_of_scores(scores, extent, 8, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="causal"):
        plan_of_scores(scores, Extent.full(1, 8, 8, causal=False), 8, keep=4)
    with pytest.raises(ValueError, match=r"scores must be \[1, heads, keys\]"):
        plan_of_scores(torch.zeros(2, 2, 8), extent, 8, keep=4)
    with pytest.raises(ValueError, match="form must be"):
        DynamicMask(2, 8, form="log")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attention_dropout"):
        DynamicMaskAttention(SimpleNamespace(**vars(CONFIG), attention_dropout=0.1))
    with pytest.raises(ValueError, match="attention_mask must be"):
        layer()(torch.zeros(1, 5, 32), turned(5), torch.ones(1, 7, dtype=torch.bool))
