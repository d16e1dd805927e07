"""MoA's spans, pair by pair from their formula."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import call_in, everywhere, rows_of

from gossamer import AttentionCall, Extent
from gossamer.methods import MoA
from gossamer.testing import make_call

ALPHAS = ((10.0, -7.0, 3.5, 0.0), (4.0, 100.0, 0.0, 12.9))
BETAS = ((0.0, 0.5, 0.25, 0.0), (0.1, 0.0, 1.0, 0.0))
SMALL: dict[str, Any] = {"sink": 4, "least": 8, "block": 4, "new_tokens": 5}


def naive_span(alpha: float, beta: float, tokens: int, least: int, block: int) -> int:
    span = min(int(alpha + beta * tokens), tokens)
    return math.ceil(max(span, least) / block) * block


@everywhere
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("change", [{}, {"sink": 0}, {"sink": 6}, {"least": 17}, {"block": 5}, {"new_tokens": 40}])
def test_each_head_has_its_span(situation: str, layer: int, change: dict[str, int]) -> None:
    call = replace(call_in(situation, length=40), layer=layer, scale=-0.7)
    fields = SMALL | change
    block, sink = fields["block"], fields["sink"]
    plan = MoA(ALPHAS, BETAS, **fields).plan(call)
    mask = plan.to_mask()
    for b, row in enumerate(rows_of(call.extent)):
        for h in range(4):
            tokens = row.key_count + fields["new_tokens"]
            span = naive_span(ALPHAS[layer][h], BETAS[layer][h], tokens, fields["least"], block)
            window = max(1, math.ceil(max(0, span - (sink if row.causal else 0)) / block))
            first = math.ceil(sink / block)
            for i in row.live_queries():
                query = row.query_start + i
                # Of a block at the end of a chunk or of the prompt, its last query counts.
                last = max(p for p in row.positions() if p // block == query // block) // block
                nearest = max(row.key_count - 1, 0) // block
                seen = set()
                for j in row.live_keys():
                    key, n = j - row.key_start, (j - row.key_start) // block
                    distance = last - n if row.causal else abs(last - n)
                    own = n == last or (not row.causal and n == min(last, nearest))
                    if row.allows(query, key) and (n < first or 0 <= distance < window or own):
                        seen.add(j)
                assert set(mask[b, h, i].nonzero().flatten().tolist()) == seen, (b, h, i)


def test_the_span_of_the_paper() -> None:
    """The authors' numbers: at least 128, rounded up to 64, at most all, new tokens counted."""
    method = MoA([[0.0, 0.0, -1024.0, 5000.0, -1e300, 1e300, 129.0]], [[0.5, 1.0, 0.75, 0.0, 0.0, 0.0, 0.0]])
    assert method.spans(4096 + 1024, 0, 7).tolist() == [2560, 5120, 2816, 5056, 128, 5120, 192]
    assert method.spans(100, 0, 7).tolist() == [128] * 7
    assert method.spans(torch.tensor([1000, 4000]), 0, 7)[:, 0].tolist() == [512, 2048]


def test_room_for_new_tokens_widens_the_window_of_a_prompt() -> None:
    call = make_call("no padding", length=600, heads=2, groups=1, dim=8)
    wide, narrow = (MoA([[0.0] * 2], [[0.25] * 2], new_tokens=n).plan(call) for n in (1024, 0))
    assert wide.count_pairs().tolist() > narrow.count_pairs().tolist()


def test_rows_of_a_batch_have_spans_of_their_own() -> None:
    """A window of a whole plan could not say this."""
    extent = Extent([0, 0], [300, 100], [0, 0], [300, 100])
    q, k = torch.randn(2, 1, 300, 8), torch.randn(2, 1, 300, 8)
    method = MoA([[0.0]], [[0.3]], sink=0, least=4, block=4, new_tokens=0)
    mask = method.plan(AttentionCall(q, k, extent=extent, layer=0)).to_mask()
    assert int(mask[0, 0, 299].sum()) == 92
    assert int(mask[1, 0, 99].sum()) == 32


def test_spans_of_everything_are_dense() -> None:
    call = make_call("padded chunk", length=300, heads=4, groups=2, dim=8)
    assert MoA([[0.0] * 4], [[1.0] * 4], sink=0, new_tokens=0).plan(call).density() == 1.0


def test_spans_of_another_model_are_refused() -> None:
    call = make_call("no padding", length=20, heads=4, groups=2, dim=8)
    with pytest.raises(ValueError, match=r"moa\.alphas are for 0 layers of 0 heads, but layer 0 with 4 heads"):
        MoA().plan(call)
    with pytest.raises(ValueError, match=r"moa\.alphas are for 1 layers of 2 heads"):
        MoA([[1, 2]], [[1, 2]]).plan(call)
    with pytest.raises(ValueError, match="pass layer="):
        MoA(ALPHAS, BETAS).plan(replace(call, layer=None))
    with pytest.raises(ValueError, match=r"moa\.alphas and \.betas must be for the same layers and heads"):
        MoA(ALPHAS, BETAS[:1])
    with pytest.raises(ValueError, match=r"moa\.betas, layer 0, head 0: expected a finite number"):
        MoA([[1.0]], [[math.inf]])
