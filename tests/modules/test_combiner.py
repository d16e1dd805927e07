"""Combiner against its formula, row by row; the limits in which it is dense; what it may not see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.modules import Axial, CombinerAttention, CombinerCache, Fixed, Learnable, LogSparse, Mixture
from gossamer.modules.centroids import Centroids
from gossamer.modules.combiner import Pattern, combine, plans_of_spans
from gossamer.modules.tokens import Tokens

CLUSTERS = 3
PATTERNS: dict[str, Pattern] = {
    "fixed": Fixed(4),
    "vertical": Axial(4),
    "horizontal": Axial(4, "horizontal"),
    "rowmajor": Axial(4, "rowmajor"),
    "logsparse": LogSparse(),
    "learnable": Learnable(CLUSTERS),
    "mixture": Mixture((Fixed(5), Axial(3))),
}


def sets(pattern: Pattern, i: int, tokens: int, causal: bool, near: tuple[list[int], list[int]]) -> tuple[set, list]:
    """Direct keys and spans of query i, from the paper's definitions."""
    every = set(range(i + 1 if causal else tokens))
    if isinstance(pattern, Fixed):
        own = {j for j in every if j // pattern.span == i // pattern.span}
        others = [{j for j in every if j // pattern.span == n} for n in range(tokens) if n != i // pattern.span]
        return own, others
    if isinstance(pattern, Axial):
        row, column = divmod(i, pattern.width)
        grid = {j: divmod(j, pattern.width) for j in every}
        direct = {j for j, (r, c) in grid.items() if r == row or (c == column and pattern.order != "rowmajor")}
        axis = 0 if pattern.order == "horizontal" else 1
        return direct, [{j for j in every - direct if grid[j][axis] == n} for n in range(tokens)]
    if isinstance(pattern, LogSparse):
        halves = [{j for j in range(tokens) if j >> n == (i >> n) ^ 1} for n in range(tokens.bit_length())]
        return {i}, [half for half in halves if half <= every]
    assert isinstance(pattern, Learnable)
    of_query, of_key = near
    members = [{j for j in every if of_key[j] == n} for n in range(pattern.clusters)]
    return members[of_query[i]], [m for n, m in enumerate(members) if n != of_query[i]]


def weights_of_row(q: Tensor, k: Tensor, i: int, direct: set, spans: list, scale: float, by_size: bool) -> Tensor:
    """Row i of the effective matrix, ``[T]``, of one head."""
    row = torch.zeros(len(k), dtype=k.dtype)
    alone, spans = sorted(direct), [sorted(span) for span in spans if span]
    logits = [scale * (q[i] @ k[j]) for j in alone]
    inner = []
    for span in spans:
        size = torch.tensor(float(len(span)), dtype=k.dtype).log() if by_size else 0.0
        logits.append(scale * (q[i] @ k[span].amax(0)) + size)
        inner.append((scale * (k[span] @ q[span].amax(0))).softmax(0))
    weights = torch.stack(logits).softmax(0)
    row[alone] = weights[: len(alone)]
    for span, weight, part in zip(spans, weights[len(alone) :], inner, strict=True):
        row[span] += weight * part
    return row


def naive(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, lengths: list[int], causal: bool, by_size: bool, means: Centroids
) -> Tensor:
    if isinstance(pattern, Mixture):
        outs = [naive(q, k, v, part, lengths, causal, by_size, means) for part in pattern.patterns]
        return torch.stack(outs).mean(0)
    out, scale = torch.zeros_like(v), q.shape[-1] ** -0.5
    of_query, of_key = means.nearest(q), means.nearest(k)
    for b, tokens in enumerate(lengths):
        for h in range(q.shape[1]):
            near = of_query[b, h].tolist(), of_key[b, h].tolist()
            for i in range(tokens):
                given = sets(pattern, i, tokens, causal, near)
                row = weights_of_row(q[b, h, :tokens], k[b, h, :tokens], i, *given, scale, by_size)
                torch.testing.assert_close(row.sum(), torch.ones_like(row.sum()))
                out[b, h, i] = row @ v[b, h, :tokens]
    return out


def drawn(tokens: int, heads: int = 2, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(batch, heads, tokens, 4, dtype=dtype) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("causal", "by_size"), [(True, False), (True, True), (False, False), (False, True)])
def test_a_pattern_is_its_formula(name: str, causal: bool, by_size: bool) -> None:
    q, k, v = drawn(14)
    tokens = Tokens.of(q[:, 0], torch.tensor([14, 9]))
    means = Centroids(2, CLUSTERS, 4, dtype=torch.float64)
    out = combine(q, k, v, PATTERNS[name], tokens=tokens, causal=causal, by_size=by_size, centroids=means)
    torch.testing.assert_close(out, naive(q, k, v, PATTERNS[name], [14, 9], causal, by_size, means))


@pytest.mark.parametrize("causal", [True, False])
def test_the_kernels_agree_with_the_formula(causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(23, dtype=torch.float32))
    out = combine(q, k, v, Fixed(5), causal=causal)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    means = Centroids(2, 1, 4, dtype=torch.float64)
    expected = naive(wide[0], wide[1], wide[2], Fixed(5), [23, 23], causal, False, means)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-4)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for x, y in zip((q, k, v), wide, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad, y.grad.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["fixed", "vertical", "horizontal", "rowmajor", "logsparse", "learnable"])
def test_gradients_are_finite_differences(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(7, heads=1, batch=1))
    means = Centroids(1, CLUSTERS, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: combine(*x, pattern=PATTERNS[name], centroids=means), (q, k, v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [Fixed(13), Fixed(100), Fixed(1), Learnable(1)], ids=str)
def test_one_span_and_spans_of_one_token_are_dense(pattern: Pattern, causal: bool) -> None:
    q, k, v = drawn(13)
    means = Centroids(2, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(combine(q, k, v, pattern, causal=causal, centroids=means), dense(q, k, v, causal))


def test_equal_keys_of_a_span_are_dense_only_by_size() -> None:
    q, k, v = drawn(12)
    k = k[:, :, ::4].repeat_interleave(4, 2)
    torch.testing.assert_close(combine(q, k, v, Fixed(4), by_size=True), dense(q, k, v, True))
    assert not torch.allclose(combine(q, k, v, Fixed(4)), dense(q, k, v, True), atol=1e-3)


@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_of_the_future_is_read(name: str) -> None:
    layer = CombinerAttention(8, 2, PATTERNS[name], dtype=torch.float64).eval()
    x = torch.randn(1, 17, 8, dtype=torch.float64)
    base = layer(x)
    for at in (1, 6, 16):
        moved = x.clone()
        moved[:, at:] += 3.0 * torch.randn_like(moved[:, at:])
        torch.testing.assert_close(layer(moved)[:, :at], base[:, :at], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PATTERNS)
def test_padding_changes_nothing(name: str) -> None:
    layer = CombinerAttention(8, 2, PATTERNS[name], causal=False, dtype=torch.float64).eval()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    live = torch.tensor([[False] * 3 + [True] * 8, [True] * 9 + [False] * 2])
    out = layer(x, live)
    torch.testing.assert_close(out[0, 3:], layer(x[:1, 3:])[0])
    torch.testing.assert_close(out[1, :9], layer(x[1:, :9])[0])
    assert not bool(out[~live].any())
    torch.testing.assert_close(layer(x, torch.tensor([11, 9]))[1], out[1])


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize("first", [3, 4, 9])
def test_decoding_with_a_cache_is_the_whole_call(first: int, by_size: bool) -> None:
    layer = CombinerAttention(8, 2, Fixed(4), by_size=by_size, dtype=torch.float64)
    x, cache = torch.randn(2, 14, 8, dtype=torch.float64), CombinerCache()
    parts = [x[:, :first], x[:, first : first + 1], x[:, first + 1 :]]
    torch.testing.assert_close(torch.cat([layer(part, cache=cache) for part in parts], 1), layer(x))
    assert cache.seen == 14
    assert cache.keys is not None
    assert cache.keys.shape[2] == 3


def test_plans_hold_each_key_once() -> None:
    near, far = plans_of_spans(Tokens.of(torch.zeros(1, 10, 1)), 1, 4, causal=True)
    assert torch.equal(near.to_mask()[0, 0].sum(-1), torch.tensor([1, 2, 3, 4] * 2 + [1, 2]))
    assert torch.equal(far.to_mask()[0, 0].sum(-1), torch.tensor([0] * 4 + [1] * 4 + [2] * 2))


def test_centroids_start_and_follow_in_training_alone() -> None:
    layer = CombinerAttention(8, 2, Learnable(CLUSTERS)).eval()
    assert layer.centroids is not None
    before = layer.centroids.means.clone()
    layer(torch.randn(2, 12, 8))
    assert torch.equal(layer.centroids.means, before)
    layer.train()(torch.randn(2, 12, 8)).sum().backward()
    assert bool(layer.centroids.started)
    assert not torch.equal(layer.centroids.means, before)
    torch.testing.assert_close(layer.centroids.means.norm(dim=-1), torch.ones(2, CLUSTERS))


def test_an_empty_call_is_empty() -> None:
    assert CombinerAttention(8, 2, Fixed(4))(torch.zeros(2, 0, 8)).shape == (2, 0, 8)


def test_wrong_arguments_of_a_combiner_are_named() -> None:
    q = torch.zeros(1, 2, 8, 4)
    for make, message in (
        (lambda: Fixed(0), "span must be 1 or more"),
        (lambda: Axial(4, "diagonal"), "order must be"),  # type: ignore[arg-type]
        (lambda: Mixture(()), "at least one pattern"),
        (lambda: Mixture((Learnable(2), Learnable(3))), "one set of centroids"),
        (lambda: CombinerAttention(9, 2, Fixed(4)), "multiple of heads"),
        (lambda: combine(q, q[:, :1], q, Fixed(4)), "equal heads"),
        (lambda: combine(q, q, q, Learnable(2)), "needs as many centroids"),
        (lambda: CombinerAttention(8, 2, Axial(4))(q[0], cache=CombinerCache()), "x must be|a cache serves"),
        (lambda: Tokens.of(q[0], torch.tensor([9, 1])), "lengths must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="mask must be bool"):
        Tokens.of(q[0], torch.ones(2, 8))


def test_padding_may_hold_anything() -> None:
    layer, x = CombinerAttention(16, 2, Axial(4)).eval(), torch.randn(2, 12, 16)
    spoilt = x.clone()
    spoilt[1, 9:] = torch.nan
    lengths = torch.tensor([12, 9])
    assert torch.equal(layer(spoilt, lengths), layer(x, lengths))
