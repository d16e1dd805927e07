"""SeqBoat against its formula, token by token; what its router learns from; what it may not see, and what it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import backends
from gossamer.modules import MovingAverage, SeqBoatCache, SeqBoatLayer
from gossamer.modules.seqboat import attend_near, compacted, plan_of_window

KINDS: dict[str, dict[str, Any]] = {
    "enwik8": {},
    "images": {"activation": "relu2", "positions": "relative", "norm": "batch", "prenorm": False},
    "softmax with a bias": {"positions": "relative"},
    "no positions": {"positions": "none", "router": False},
    "relu2 turned": {"activation": "relu2", "prenorm": False},
}


def layer(**options: Any) -> SeqBoatLayer:
    given = {"key_dim": 4, "value_dim": 6, "averages": 3, "window": 2, "most_positions": 5, "dtype": torch.float64}
    made = SeqBoatLayer(5, **{**given, **options})
    with torch.no_grad():  # larger than at the start, so that nothing vanishes in a tolerance
        for proj in (made.hidden_proj, made.unit_proj, made.out_proj):
            proj.weight.normal_()
        made.gains.normal_()
        if made.relative is not None:
            made.relative.normal_()
    return made.eval()


def recursion(average: MovingAverage, x: Tensor) -> Tensor:
    """Mega's averages of one sequence ``[T, E]``, by what defines them."""
    delta, alpha, beta, gamma = (average.get_parameter(name) for name in ("delta", "alpha", "beta", "gamma"))
    out, width, scale = x * average.omega, x.shape[1], gamma.shape[1] ** -0.5
    for part, tokens in ((0, range(len(x))), (1, range(len(x) - 1, -1, -1)))[: 1 if average.causal else 2]:
        rows = slice(part * width, (part + 1) * width)
        p = delta[rows].sigmoid()
        state, found = torch.zeros_like(p), {}
        for t in tokens:
            state = (1 - p * alpha[rows].sigmoid()) * state + p * beta[rows] * x[t][:, None]
            found[t] = (gamma[rows] * state).sum(-1) * scale
        out = out + torch.stack([found[t] for t in range(len(x))])
    return out


def turned(x: Tensor, at: int) -> Tensor:
    """Rotary embedding of one token's neighbouring channels."""
    angle = at * 10_000.0 ** -(torch.arange(0, len(x), 2, dtype=x.dtype) / len(x))
    pair = torch.view_as_complex(x.view(-1, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(pair).flatten()


def naive(made: SeqBoatLayer, x: Tensor, causal: bool) -> Tensor:
    """One sequence ``[T, E]`` with an L x L mask, query by query."""
    phi = F.silu(recursion(made.average, made.norm(x) if made.prenorm else x))
    hidden = made.hidden_proj(phi)
    active, confidence = [True] * len(x), torch.ones(len(x), dtype=x.dtype)
    if made.log_temperature is not None:
        chance = (hidden[:, :2] / made.log_temperature.exp()).softmax(-1)
        active, confidence, hidden = (chance.argmax(-1) == 1).tolist(), chance.amax(-1), hidden[:, 2:]
    z, r, v = F.silu(made.unit_proj(phi)).split([4, 6, 6], dim=-1)
    q, k = (z * gain + shift for gain, shift in zip(made.gains, made.shifts, strict=True))
    if made.rotary is not None:
        q, k = (torch.stack([turned(row, at) for at, row in enumerate(y)]) for y in (q, k))
    places = [i for i in range(len(x)) if active[i]]
    out = torch.zeros_like(x)
    for n, i in enumerate(places):
        seen = places[max(0, n - made.window) : n + 1 if causal else n + made.window + 1]
        softmax = made.activation == "softmax"
        logits = k[seen] @ q[i] / (2.0 if softmax else made.window * (1 if causal else 2))
        if made.relative is not None:
            reach = len(made.relative) // 2
            logits = logits + torch.stack([made.relative[max(-reach, min(reach, j - i)) + reach] for j in seen])
        weights = logits.softmax(-1) if softmax else logits.relu().square()
        out[i] = made.out_proj((weights @ v[seen]) * r[i]) * confidence[i]
    out = F.silu(hidden + out + x)
    return out if made.prenorm else made.norm(out)


@pytest.mark.parametrize("causal", [True, False])
def test_averages_are_their_recursion(causal: bool) -> None:
    average, x = MovingAverage(3, 4, causal=causal, dtype=torch.float64), torch.randn(2, 9, 3, dtype=torch.float64)
    out = average(x)
    torch.testing.assert_close(out, torch.stack([recursion(average, row) for row in x]))
    if causal:
        state = average.state(x[:, :7])
        for t in (7, 8):
            step, state = average.step(x[:, t], state)
            torch.testing.assert_close(step, out[:, t])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_compaction_and_a_window_are_the_equivalent_mask(kind: str, causal: bool) -> None:
    torch.manual_seed(1)
    made, x = layer(causal=causal, **KINDS[kind]), torch.randn(3, 14, 5, dtype=torch.float64)
    lengths = torch.tensor([14, 9, 1])
    x.requires_grad_()
    rows = [naive(made, row[:length], causal) for row, length in zip(x, lengths.tolist(), strict=True)]
    expected = torch.stack([F.pad(row, (0, 0, 0, 14 - len(row))) for row in rows])
    out, given = made(x, lengths), [x, *(p for p in made.parameters() if p.requires_grad)]
    torch.testing.assert_close(out, expected)
    reaching = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(y, given, reaching) for y in (out, expected)), strict=True):
        torch.testing.assert_close(one, other)
    share = float(made.active(x.detach(), lengths).sum() / lengths.sum())
    assert share == 1.0 if kind == "no positions" else 0.2 < share < 0.9


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_gradients_of_router_and_bias_are_finite_differences(positions: Any) -> None:
    torch.manual_seed(2)
    made, x = layer(positions=positions), torch.randn(1, 8, 5, dtype=torch.float64)
    assert made.log_temperature is not None
    names = ["hidden_proj.weight", "hidden_proj.bias", "log_temperature", *(["relative"] * (positions == "relative"))]
    given = tuple(dict(made.named_parameters())[name].detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x,)), given
    )


def test_a_router_learns_through_its_confidence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    made, x = layer(), torch.randn(2, 12, 5, dtype=torch.float64)
    assert made.log_temperature is not None
    routed = made._routed

    def without(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        active, confidence, hidden = routed(state)
        return active, confidence.detach(), hidden

    made(x).square().sum().backward()
    assert made.hidden_proj.weight.grad is not None
    assert bool((made.hidden_proj.weight.grad[:2].abs().sum(1) > 0).all())
    made.zero_grad()
    monkeypatch.setattr(made, "_routed", without)
    made(x).square().sum().backward()
    assert made.hidden_proj.weight.grad is not None
    assert not bool(made.hidden_proj.weight.grad[:2].any())
    assert made.log_temperature.grad is None


@pytest.mark.parametrize("causal", [True, False])
def test_all_active_under_a_window_of_everything_are_dense_attention(causal: bool) -> None:
    tokens = 9
    q, k, v = (torch.randn(2, tokens, size, dtype=torch.float64) for size in (4, 4, 6))
    counts = torch.full((2,), tokens)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    whole = layer(causal=causal, router=False, window=tokens)
    torch.testing.assert_close(whole._attend(q, k, v, counts), expected)
    near = layer(causal=causal, router=False, window=2)
    assert not torch.allclose(near._attend(q, k, v, counts), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_kernels_and_tiles_agree(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    q, k = (torch.randn(2, 50, 16).requires_grad_() for _ in range(2))
    made = SeqBoatLayer(8, key_dim=16, value_dim=600, window=7, causal=causal, positions="none")
    v = torch.randn(2, 50, 600).requires_grad_()
    counts = torch.tensor([50, 31])
    kept = (torch.arange(50) < counts[:, None])[..., None]
    widths = []
    whole = backends.attend
    monkeypatch.setattr("gossamer.modules.seqboat.attend", lambda c, p: widths.append(c.values.shape) or whole(c, p))
    out = made._attend(q, k, v, counts)
    at = torch.arange(50).expand(2, -1)
    tiles = attend_near(q, k, v, at, counts, window=7, causal=causal, scale=0.25)
    torch.testing.assert_close(out * kept, tiles * kept, atol=1e-5, rtol=1e-4)
    assert widths == [(2, 3, 50, 200)]
    reaching = torch.randn_like(out) * kept
    for one, other in zip(*(torch.autograd.grad(y, (q, k, v), reaching) for y in (out, tiles)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_plan_is_a_window_of_activated_tokens() -> None:
    active = torch.tensor([[True, False, False, True, True, True], [False, False, True, False, False, False]])
    at, counts = compacted(active)
    assert at[0].tolist() == [0, 3, 4, 5]
    assert (int(at[1, 0]), counts.tolist()) == (2, [4, 1])
    pairs = plan_of_window(counts, 4, 2, causal=True).to_mask()[:, 0]
    assert pairs[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    assert int(pairs[1].sum()) == 1


@pytest.mark.parametrize("kind", ["enwik8", "images", "softmax with a bias", "relu2 turned"])
def test_nothing_of_the_future_is_read_by_seqboat(kind: str) -> None:
    torch.manual_seed(5)
    made, x = layer(**KINDS[kind]), torch.randn(1, 17, 5, dtype=torch.float64)
    base = made(x)
    for at in (1, 6, 16):
        moved = x.clone()
        moved[:, at:] += 3.0 * torch.randn_like(moved[:, at:])
        torch.testing.assert_close(made(moved)[:, :at], base[:, :at], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("norm", "leaks"), [("layer", False), ("batch", True)])
def test_batch_statistics_of_training_see_the_future(norm: Any, leaks: bool) -> None:
    torch.manual_seed(6)
    made, x = layer(norm=norm).train(), torch.randn(2, 12, 5, dtype=torch.float64)
    moved = x.clone()
    moved[:, 8:] += 3.0
    assert torch.allclose(made(moved)[:, :8], made(x)[:, :8], rtol=0, atol=1e-9) != leaks


def test_an_fft_rounds_by_what_comes_later() -> None:
    average, x = MovingAverage(4), torch.randn(1, 32, 4)
    moved = x.clone()
    moved[:, 16:] *= 1e4
    out, other = average(x)[:, :16], average(moved)[:, :16]
    assert not torch.equal(out, other)
    torch.testing.assert_close(out, other, rtol=0, atol=1e4 * 32 * torch.finfo(torch.float32).eps)
    state = torch.zeros(1, 4, 16)
    steps = []
    for token in x[:, :16].unbind(1):
        step, state = average.step(token, state)
        steps.append(step)
    torch.testing.assert_close(torch.stack(steps, 1), out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing_of_seqboat(kind: str, causal: bool) -> None:
    made, x = layer(causal=causal, **KINDS[kind]), torch.randn(2, 11, 5, dtype=torch.float64)
    live = torch.tensor([[False] * 3 + [True] * 8, [True] * 9 + [False] * 2])
    out = made(x, live)
    torch.testing.assert_close(out[0, 3:], made(x[:1, 3:])[0])
    torch.testing.assert_close(out[1, :9], made(x[1:, :9])[0])
    assert not bool(out[~live].any())
    assert not bool(made.active(x, live)[~live].any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [1, 3, 9])
def test_decoding_with_a_cache_is_the_whole_call_of_seqboat(kind: str, first: int) -> None:
    torch.manual_seed(7)
    made, cache = layer(**KINDS[kind]), SeqBoatCache()
    x = torch.randn(2, 14, 5, dtype=torch.float64)
    parts = [x[:, :first], x[:, first : first + 1], x[:, first + 1 :]]
    torch.testing.assert_close(torch.cat([made(part, cache=cache) for part in parts], 1), made(x))
    assert cache.seen == 14
    assert cache.memory is not None
    assert cache.memory[0].shape == (2, 2, 4)


@pytest.mark.parametrize("choice", [-100.0, 100.0])
def test_none_and_all_may_be_active(choice: float) -> None:
    made, x = layer(), torch.randn(2, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        made.hidden_proj.weight[:2] = 0.0
        made.hidden_proj.bias[:2] = torch.tensor([0.0, choice])
    assert bool((made.active(x) == (choice > 0)).all())
    torch.testing.assert_close(made(x)[0], naive(made, x[0], True))
    cache = SeqBoatCache()
    torch.testing.assert_close(torch.cat([made(x[:, :3], cache=cache), made(x[:, 3:], cache=cache)], 1), made(x))


def test_an_empty_call_of_seqboat_is_empty() -> None:
    assert layer()(torch.zeros(2, 0, 5, dtype=torch.float64)).shape == (2, 0, 5)


def test_wrong_arguments_of_seqboat_are_named() -> None:
    for options, message in (
        ({"window": 0}, "window must be 1 or more"),
        ({"value_dim": 0}, "value_dim must be 1 or more"),
        ({"averages": 0}, "averages must be 1 or more"),
        ({"activation": "laplace"}, "activation must be one of"),
        ({"positions": "t5"}, "positions must be one of"),
        ({"norm": "none"}, "norm must be one of"),
        ({"key_dim": 3}, "key_dim must be even"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(**options)
    x = torch.zeros(1, 3, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="a cache serves"):
        layer()(x, torch.tensor([3]), SeqBoatCache())
    with pytest.raises(ValueError, match="call eval"):
        layer(norm="batch").train()(x, cache=SeqBoatCache())


@pytest.mark.parametrize("options", [{}, {"activation": "relu2", "positions": "relative"}], ids=["softmax", "relu2"])
def test_under_autocast(options: dict[str, Any]) -> None:
    layer, x = SeqBoatLayer(16, key_dim=8, window=4, **options), torch.randn(2, 12, 16)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_padding_may_hold_anything() -> None:
    layer, x = SeqBoatLayer(16, key_dim=8, window=4), torch.randn(2, 12, 16)
    spoilt = x.clone()
    spoilt[1, 9:] = torch.nan
    lengths = torch.tensor([12, 9])
    assert torch.equal(layer(spoilt, lengths), layer(x, lengths))
