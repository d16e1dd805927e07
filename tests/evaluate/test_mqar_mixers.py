"""What mixes tokens for associative recall: causal, within its budget, and as its table says."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from gossamer.evaluate.mqar.layers import GatedConvolution, MaskedAttention, MaskedByValues
from gossamer.evaluate.mqar.mixers import MIXERS, Mixer, parse_mixer
from gossamer.modules import (
    Axial,
    CombinerAttention,
    DynamicMaskAttention,
    Fixed,
    Learnable,
    LogSparse,
    Mixture,
    SeqBoatLayer,
)

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")
WIDTH, TOKENS = 8, 21


def of(name: str, budget: int = 5) -> Mixer:
    return parse_mixer(f"{name}({budget})" if MIXERS[name].budget else name)


def layer(name: str, budget: int = 5, tokens: int = TOKENS) -> nn.Module:
    torch.manual_seed(0)
    return of(name, budget).build(0, WIDTH, tokens).eval()


def changed(name: str, at: int) -> tuple[Tensor, Tensor]:
    """Outputs of a sequence, and of one that differs from token ``at`` on."""
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[:, at:] = torch.randn(2, TOKENS - at, WIDTH, generator=torch.Generator().manual_seed(2))
    mixes = layer(name)
    with torch.no_grad():
        return mixes(x), mixes(other)


@pytest.mark.parametrize("name", [name for name, kind in MIXERS.items() if not kind.leaks])
@pytest.mark.parametrize("at", [1, 8, 20])
def test_what_comes_later_changes_nothing(name: str, at: int) -> None:
    out, other = changed(name, at)
    torch.testing.assert_close(out[:, :at], other[:, :at])
    assert not torch.allclose(out[:, at:], other[:, at:])


def test_clusters_of_equal_size_leak_what_comes_later() -> None:
    """Routing Transformer, as published: which tokens share a cluster is decided over the whole sequence."""
    assert [name for name, kind in MIXERS.items() if kind.leaks] == ["routing_balanced"]
    out, other = changed("routing_balanced", 20)
    assert not torch.allclose(out[:, :20], other[:, :20])


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_the_shape_of_its_input_and_gradients(name: str) -> None:
    mixes = layer(name).train()
    x = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    out = mixes(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert torch.as_tensor(x.grad).isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixes.parameters())


def seen_by(layer: MaskedAttention, batch: int = 3) -> Tensor:
    q, k = torch.randn(2, batch, 1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return layer.mask(q, k).expand(batch, 1, TOKENS, TOKENS)


@pytest.mark.parametrize("select", ["largest", "random", "window"])
@pytest.mark.parametrize("train", [True, False])
def test_a_query_reads_as_many_keys_as_the_budget_allows(select: str, train: bool) -> None:
    seen = seen_by(MaskedAttention(WIDTH, select, 6).train(train))
    place = torch.arange(TOKENS)
    assert not bool(seen[..., place[:, None] < place].any())
    assert torch.equal(seen.sum(-1), (place + 1).clamp(max=6).expand(3, 1, -1))


def test_spans_and_their_last_tokens_are_read() -> None:
    seen = seen_by(MaskedAttention(WIDTH, "fixed", 4))[0, 0]
    assert seen[9].nonzero()[:, 0].tolist() == [3, 7, 8, 9]
    sizes = of("fixed", 4).sizes(0, WIDTH, TOKENS)
    assert seen.sum(-1).tolist() == [sizes[0].reads(i, sizes[1]) for i in range(TOKENS)]


def test_the_oracle_keeps_the_largest_logits() -> None:
    attention = MaskedAttention(WIDTH, "largest", 4)
    q, k = torch.randn(2, 2, 1, TOKENS, WIDTH)
    logits, seen = q @ k.transpose(-1, -2), attention.mask(q, k)
    for row in range(4, TOKENS):
        before = logits[:, 0, row, : row + 1]
        assert bool((before[seen[:, 0, row, : row + 1]].view(2, 4).amin(1) >= before.sort(1).values[:, -4]).all())


def test_random_keys_are_drawn_anew_in_training_alone() -> None:
    attention = MaskedAttention(WIDTH, "random", 4)
    assert not torch.equal(seen_by(attention), seen_by(attention))
    assert torch.equal(seen_by(attention.eval()), seen_by(attention))


@pytest.mark.parametrize("select", ["largest", "random", "window"])
def test_a_budget_of_everything_is_dense(select: str) -> None:
    dense, few = MaskedAttention(WIDTH, "all", 1), MaskedAttention(WIDTH, select, TOKENS)
    few.load_state_dict(dense.state_dict())
    x = torch.randn(2, TOKENS, WIDTH)
    torch.testing.assert_close(few(x), dense(x))


def test_a_convolution_is_a_sum_over_the_last_taps() -> None:
    mixes = GatedConvolution(WIDTH, 4)
    x = torch.randn(1, TOKENS, WIDTH)
    mixed = torch.zeros(TOKENS, WIDTH)
    for i in range(TOKENS):
        for tap in range(min(4, i + 1)):
            mixed[i] += mixes.taps[:, tap].detach() * x[0, i - tap]
    torch.testing.assert_close(mixes(x)[0], mixes.gate(x[0]) * (mixed + mixes.bias))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("combiner", Fixed(5)),
        ("combiner_axial", Axial(5)),
        ("combiner_logsparse", LogSparse()),
        ("combiner_mixture", Mixture((Fixed(5), Axial(5)))),
        ("combiner_learnable", Learnable(TOKENS // 5)),
    ],
)
def test_combiners_are_built_with_the_pattern_that_their_budget_says(name: str, pattern: object) -> None:
    mixes = layer(name)
    assert isinstance(mixes, CombinerAttention)
    assert mixes.pattern == pattern


def test_a_dynamic_mask_is_the_layer_of_that_name() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(
        hidden_size=WIDTH, num_attention_heads=1, num_key_value_heads=1, attention_bias=True, keep_window_size=5
    )
    layer, masked = DynamicMaskAttention(config, shared=1), MaskedByValues(WIDTH, 5)
    torch.nn.init.normal_(layer.A)
    own = {"q_norm.weight", "k_norm.weight"}
    names = {"A": "scores.A", "dt_proj.weight": "scores.dt_proj.weight", "dt_proj.bias": "scores.dt_proj.bias"}
    state = layer.state_dict()
    masked.load_state_dict({names.get(n, n if n in own else f"projections.{n}"): x for n, x in state.items()})
    x = torch.randn(2, TOKENS, WIDTH)
    still = torch.ones(1, TOKENS, WIDTH)
    expected = layer(x, (still, torch.zeros_like(still)))[0]
    torch.testing.assert_close(masked(x), expected)
    wide = MaskedByValues(WIDTH, TOKENS)
    wide.load_state_dict(masked.state_dict())
    assert not torch.allclose(wide(x), expected)


def test_local_kinds_are_the_patterns_that_routers_stand_beside() -> None:
    routed, local = layer("seqboat"), layer("seqboat_local")
    assert isinstance(routed, SeqBoatLayer)
    assert isinstance(local, SeqBoatLayer)
    assert (routed.router, local.router) == (True, False)
    assert routed.window == local.window == 5
    heads = layer("window_heads")
    assert isinstance(heads, MaskedAttention)
    assert (heads.select, heads.projections.heads) == ("window", 2)


def test_what_is_read_and_held() -> None:
    """By hand, of 16 tokens, in one layer of width 8."""

    def costs(spec: str) -> tuple[float, int]:
        mixer = parse_mixer(spec)
        return mixer.reads(1, 8, 16) * 16, mixer.state(1, 8, 16) // 8

    assert costs("dense") == (136, 32)
    assert costs("window(4)") == (1 + 2 + 3 + 13 * 4, 8)
    assert costs("oracle_topk(4)") == costs("random_topk(4)") == (58, 32)
    assert costs("combiner(4)") == (4 * 10 + 4 * (0 + 1 + 2 + 3), 2 * (4 + 4) + 4)  # queries of the open span
    assert costs("fixed(4)")[0] == costs("combiner(4)")[0]
    # Rows of 4: 1 to 4 in the own row, rows above in the own column, and 3 other columns from the second row on.
    assert costs("combiner_axial(4)") == (4 * 10 + 4 * (0 + 1 + 2 + 3) + 12 * 3, 32)
    assert costs("combiner_logsparse") == (16 + 32, 32)
    # Both of those for each query; beside all keys and values the spans' own, and the open span's queries.
    assert costs("combiner_mixture(4)") == (64 + 100, 32 + 2 * 4 + 4)
    # Four clusters: the own tokens, a quarter of those before, and from 1 to 3 other clusters.
    assert costs("combiner_learnable(4)") == (16 + 30 + (0 + 1 + 2 + 13 * 3), 32)
    assert costs("dynamic_mask(4)") == (58, 8)
    assert costs("window_heads(4)") == costs("window(4)")
    assert costs("seqboat(4)") == costs("seqboat_local(4)") == (58 + 12, 16 + 12)  # 16 averages; four besides the own
    assert costs("convolution(4)") == (58, 4)


def test_layers_take_turns() -> None:
    mixer = parse_mixer("window(4) + dense")
    assert mixer.label == "window(4)+dense"
    selections = [mixer.build(index, WIDTH, TOKENS).select for index in range(3)]
    assert selections == ["window", "all", "window"]
    assert math.isclose(mixer.reads(2, 8, 16) * 32, 58 + 136)
    assert mixer.state(2, 8, 16) == 8 * (8 + 32)
    assert mixer.positions
    assert not parse_mixer("convolution(3)+dense").positions
    assert "cluster" in parse_mixer("dense+routing_balanced(4)").leaks


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonesuch", "unknown mixer 'nonesuch'"),
        ("dense(4)", "has no budget"),
        ("window(0)", "1 or more"),
        ("window(", "unknown"),
        ("dense+", "unknown mixer ''"),
    ],
)
def test_a_wrong_spec_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mixer(spec)


def test_wrong_selections_are_refused() -> None:
    with pytest.raises(ValueError, match="select must be one of"):
        MaskedAttention(8, "best", 4)
    with pytest.raises(ValueError, match="keep must be 1"):
        MaskedAttention(8, "window", 0)
    with pytest.raises(ValueError, match="keep must be 1"):
        MaskedByValues(8, 0)
