"""InfLLM whole, from its formula: the window as it is, units of the rest at one distance; also in chunks and steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import AttentionCall, Extent, Policy
from gossamer.attention import CallRecord, attend
from gossamer.cache import StoreLayer
from gossamer.methods import Dense, InfLLM, InfLLMLong, create, decoding
from gossamer.policy import NEAR, TRAINING
from gossamer.rotary import Rotary

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

SMALL: dict[str, Any] = {"blocks": 2, "block": 8, "count": 2, "init": 10, "local": 20, "every": 1, "together": 16}


@dataclass
class Text:
    """Tokens of rows with left padding that holds NaN: before they were turned, and as a model gives them."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts: list[int]
    rotary: Rotary

    @classmethod
    def random(cls, length: int, starts: list[int], heads: int, groups: int, dim: int, **rotary: Any) -> Text:
        generator = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(len(starts), n, length, dim, generator=generator) for n in (heads, groups, groups))
        for row, start in enumerate(starts):
            k[row, :, :start] = v[row, :, :start] = torch.nan
        frequencies = 100.0 ** -(torch.arange(dim // 2) / (dim // 2))
        return cls(2 * q, k, v, starts, Rotary(frequencies, **rotary))

    def call(self, first: int, stop: int, store: StoreLayer | None = None, **fields: Any) -> AttentionCall:
        extent = Extent.from_key_mask(torch.arange(stop)[None] >= torch.tensor(self.starts)[:, None], stop - first)
        q = self.rotary.turn(self.q[:, :, first:stop], extent.query_positions(stop - first))
        k = self.rotary.turn(self.k[:, :, :stop], extent.key_positions(stop))
        v = self.v[:, :, :stop]
        if store is not None:
            k, v = store.update(k[:, :, first:], v[:, :, first:])
            store.place(extent)
        state = None if store is None else store.state
        return AttentionCall(q, k, v, extent, rotary=self.rotary, store=store, state=state, **fields)


def run(text: Text, method: InfLLMLong, *chunks: int, store: StoreLayer | None = None, **fields: Any) -> Tensor:
    """Calls of so many tokens each, as the attention function makes them."""
    found, first = [], 0
    for count in chunks:
        call = text.call(first, first + count, store, **fields)
        if store is not None:
            for kind in method.watches(call):
                store.begin(kind)
            store.seen(call)
        found.append(attend(call, Policy(method)))
        first += count
    return torch.cat(found, dim=2)  # type: ignore[arg-type]


class Naive:
    """One row and query head, in fp64, its tokens counted without padding."""

    def __init__(self, text: Text, row: int, method: InfLLMLong, prompt: int, **fields: Any) -> None:
        start, self.method = text.starts[row], method
        self.q, k, v = (x[row, :, start:].double() for x in (text.q, text.k, text.v))
        share = self.q.shape[0] // k.shape[0]
        self.k, self.v = (x.repeat_interleave(share, dim=0) for x in (k, v))
        self.prompt, self.scale, self.cap = prompt - start, fields.get("scale", text.q.shape[3] ** -0.5), fields
        base = Rotary(text.rotary.frequencies.double(), 1.0, text.rotary.interleaved)
        place = torch.arange(self.q.shape[1])[None]
        factor = text.rotary.scaling**2
        q, k = (base.turn(x[None], place)[0] for x in (self.q, self.k))
        one = torch.full_like(place, method.local - 1)
        self.near = self.capped(factor * q @ k.transpose(1, 2))
        self.fars = factor * base.turn(self.q[None], one)[0] @ self.k.transpose(1, 2)
        self.far_q, self.distance = base.turn(self.q[None], one)[0], place[0][:, None] - place
        self.reps = self.represented()

    def capped(self, products: Tensor) -> Tensor:
        logits, cap = products * self.scale, self.cap.get("softcap")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def represented(self) -> Tensor:
        method = self.method
        local = (self.distance >= 0) & (self.distance < method.local)
        weights = self.near.masked_fill(~local, float("-inf")).softmax(dim=2)[:, : self.prompt]
        votes, units = weights.sum(dim=1), self.k.shape[1] // method.block
        found = []
        for unit in range(units):
            part = slice(unit * method.block, (unit + 1) * method.block)
            keys, own = self.k[:, part], votes[:, part]
            best = own.topk(method.count, dim=1).indices[..., None].expand(-1, -1, keys.shape[2])
            found.append(keys.gather(1, best).mean(dim=1) if bool(own.any()) else keys.mean(dim=1))
        return torch.stack(found, dim=1)

    def attended(self, query: int, together: range, sinks: Tensor | None = None) -> Tensor:
        """``[heads, D]`` of a query that chooses together with others."""
        method = self.method
        first_far = together.start - method.local
        if query - method.local < 0:
            far = []
        else:
            # A step's first query is its only one; queries of a prompt are counted from a multiple on.
            tokens = first_far + 1 if len(together) == 1 else first_far
            ended = max(0, tokens // method.block)
            init = -(-method.init // method.block)
            scores = {
                unit: float((self.far_q[:, together.start : together.stop].mean(dim=1) * self.reps[:, unit]).sum())
                for unit in range(init, ended)
            }
            units = set(sorted(scores, key=lambda n: -scores[n])[: method.blocks]) | set(range(init))
            far = [
                t for t in range(query - method.local + 1) if t // method.block in units or t >= ended * method.block
            ]
        near = list(range(max(0, query - method.local + 1), query + 1))
        logits = torch.cat([self.capped(self.fars)[:, query, far], self.near[:, query, near]], dim=1)
        values = torch.cat([self.v[:, far], self.v[:, near]], dim=1)
        if sinks is not None:
            weights = torch.cat([logits, sinks[:, None].double()], dim=1).softmax(dim=1)[:, :-1]
        else:
            weights = logits.softmax(dim=1)
        return (weights[:, None] @ values)[:, 0]


def groups_of(length: int, method: InfLLMLong) -> list[range]:
    """Queries that choose together: so many from each multiple on, counted from ``local`` on."""
    found = [range(0, min(method.local, length))]
    found += [range(n, min(n + method.together, length)) for n in range(method.local, length, method.together)]
    return found


@pytest.mark.parametrize(("heads", "groups", "dim"), [(2, 2, 16), (4, 2, 64), (8, 1, 80)])
@pytest.mark.parametrize("fields", [{}, {"scale": 0.2}, {"softcap": 3.0}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("kind", [{}, {"scaling": 1.2, "interleaved": True}], ids=["plain", "yarn"])
def test_a_prompt_attends_as_the_formula_says(heads: int, groups: int, dim: int, fields: dict, kind: dict) -> None:
    method, starts = InfLLMLong(**SMALL), [0, 5]
    given: Any = dict(fields) | ({"sinks": torch.linspace(-1, 1, heads)} if "sinks" in fields else {})
    text = Text.random(101, starts, heads, groups, dim, **kind)
    out = run(text, method, 101, **given)
    sinks = given.pop("sinks", None)
    for row, start in enumerate(starts):
        naive = Naive(text, row, method, 101, **given)
        assert not bool(out[row, :, :start].any())
        for together in groups_of(101 - start, method):
            for query in together:
                expected = naive.attended(query, together, sinks)
                torch.testing.assert_close(out[row, :, start + query].double(), expected, rtol=2e-5, atol=2e-5)


def test_chunks_at_multiples_are_as_one_piece_and_steps_follow() -> None:
    """Of the tokens after the prompt each chooses by itself."""
    method = InfLLMLong(**SMALL)
    text = Text.random(120, [0], 4, 2, 32)
    whole = run(text, method, 100)
    store = StoreLayer()
    chunks = run(text, method, 52, 32, 16, *[1] * 20, store=store)
    torch.testing.assert_close(chunks[:, :, :100], whole, rtol=1e-5, atol=1e-5)
    naive = Naive(text, 0, method, 100)
    for query in range(100, 120):
        expected = naive.attended(query, range(query, query + 1))
        torch.testing.assert_close(chunks[0, :, query].double(), expected, rtol=2e-5, atol=2e-5)


def test_rows_of_a_batch_are_read_as_alone() -> None:
    method, length = InfLLMLong(**SMALL), 90
    text = Text.random(length, [0, 17, 60], 4, 2, 32)
    out = run(text, method, length - 4, 1, 1, 2, store=StoreLayer())
    for row, start in enumerate(text.starts):
        q, k, v = (x[row : row + 1, :, start:] for x in (text.q, text.k, text.v))
        alone = Text(q, k, v, [0], text.rotary)
        own = run(alone, method, length - 4 - start, 1, 1, 2, store=StoreLayer())
        torch.testing.assert_close(out[row : row + 1, :, start:], own, rtol=1e-5, atol=1e-5)


def test_inside_the_window_it_is_dense() -> None:
    method = InfLLMLong(**SMALL | {"local": 64})
    text = Text.random(64, [0, 9], 4, 2, 32)
    records: list[CallRecord] = []
    out = attend(text.call(0, 64), Policy(method), record=records.append)
    assert torch.equal(out, attend(text.call(0, 64), Policy(Dense())))  # type: ignore[arg-type]
    assert records[0].reason == NEAR


def test_what_holds_every_unit_of_unturned_keys_is_dense() -> None:
    method = InfLLMLong(**SMALL | {"blocks": 100})
    text = Text.random(101, [0, 5], 4, 2, 32)
    text.rotary = Rotary(torch.full((16,), 1e-9))
    records: list[CallRecord] = []
    out = run(text, method, 90, *[1] * 11, store=StoreLayer())
    expected = torch.cat([attend(text.call(a, b), Policy(Dense())) for a, b in ((0, 90), (90, 101))], dim=2)  # type: ignore[arg-type]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    attend(text.call(0, 101), Policy(method), record=records.append)
    assert records[0].path == "sparse"  # it is no question of density
    assert records[0].density == pytest.approx(1.0)


def test_16_bits() -> None:
    """Of all units, so that rounding changes no choice."""
    method = InfLLMLong(**SMALL | {"blocks": 100})
    text = Text.random(120, [0, 5], 4, 2, 64)
    text.q, text.k, text.v = (x.bfloat16() for x in (text.q, text.k, text.v))
    out = run(text, method, 100, *[1] * 3, store=StoreLayer())
    assert out.dtype == torch.bfloat16
    naive = Naive(text, 0, method, 100)
    expected = torch.stack([naive.attended(n, range(n, n + 1)) for n in range(100, 103)], dim=1)
    # Keys are rounded twice: as a model gives them, and turned back.
    torch.testing.assert_close(out[0, :, 100:].double(), expected, rtol=0.05, atol=0.05)


def test_it_is_the_method_for_both() -> None:
    method = InfLLMLong(**SMALL)
    assert Policy(method).decode == method
    assert "infllm_long" in decoding()
    assert create("infllm_long", **SMALL) == method
    for policy in ({"method": method, "decode": InfLLM()}, {"method": Dense(), "decode": method}):
        with pytest.raises(ValueError, match="in prompts as in steps"):
            Policy(**policy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="together must be a multiple of block = 128, got 100"):
        InfLLMLong(together=100)
    with pytest.raises(ValueError, match=r"local must be at least 1, got 0"):
        InfLLMLong(local=0)


def test_why_it_is_dense() -> None:
    method, text = InfLLMLong(**SMALL), Text.random(60, [0], 2, 2, 16)
    call = text.call(0, 60)
    plain = AttentionCall(call.q, call.k, call.v)
    assert Policy(method).decide(plain).reason == "infllm_long needs rotary"
    limited = AttentionCall(call.q, call.k, call.v, Extent.full(1, 60, 60, limit=30), rotary=text.rotary)
    assert Policy(method).decide(limited).reason == "infllm_long needs a call without the model's own window"
    biased = AttentionCall(call.q, call.k, call.v, bias=torch.zeros(1, 2, 60), rotary=text.rotary)
    assert Policy(method).decide(biased).reason == "infllm_long needs a call without a bias"
    learning = AttentionCall(call.q.requires_grad_(), call.k, call.v, rotary=text.rotary)
    assert Policy(method).decide(learning).reason == TRAINING
