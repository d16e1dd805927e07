"""Prism's choice against one written from its formulas, and what its bands are for."""

import math
from dataclasses import replace

import pytest
import torch
from definitions import Row, rows_of
from naive import QueryBlock, assert_chosen, blocks_of, tokens
from torch import Tensor

from gossamer import AttentionCall
from gossamer.methods import BlockSparse, Prism
from gossamer.testing import SITUATIONS, make_call

pytestmark = pytest.mark.usefixtures("smallest_constants")


def rms(vectors: list[Tensor]) -> float:
    numbers = [float(x) for vector in vectors for x in vector]
    return math.sqrt(sum(x * x for x in numbers) / len(numbers))


def naive(call: AttentionCall, method: Prism):
    dim = call.q.shape[-1]
    half_high, half_low = round(method.high * dim / 2), round(method.low * dim / 2)
    bands = {
        method.p_high: [*range(half_high), *range(dim // 2, dim // 2 + half_high)],
        method.p_low: [*range(dim // 2 - half_low, dim // 2), *range(dim - half_low, dim)],
    }

    cache: dict[tuple[int, int], tuple[dict[int, Tensor], dict[int, Tensor], dict[float, float]]] = {}

    def means_of(b: int, row: Row, head: int) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[float, float]]:
        """Means of query and of key blocks, and what the logits of each band are divided by."""
        blocks = blocks_of(row, method.block, method.block)
        q = {m: tokens(call.q, b, head, -row.query_start, one.positions).mean(0) for m, one in blocks.items()}
        keys: dict[int, list[int]] = {}
        for position in range(row.key_count):
            keys.setdefault(position // method.block, []).append(position)
        k = {n: tokens(call.k, b, head // call.share, row.key_start, own).mean(0) for n, own in keys.items()}
        divisors = {}
        for p, dims in bands.items():
            ratio_q = rms([x[dims] for x in q.values()]) / rms(list(q.values()))
            ratio_k = rms([x[dims] for x in k.values()]) / rms(list(k.values()))
            divisors[p] = math.sqrt(len(dims)) * math.sqrt(len(dims) / dim) * ratio_q * ratio_k
        return q, k, divisors

    def chosen(b: int, row: Row, head: int, block: QueryBlock) -> set[int]:
        if (b, head) not in cache:
            cache[b, head] = means_of(b, row, head)
        q, k, divisors = cache[b, head]
        q_own = q[block.number - max(row.query_start, 0) // method.block]
        kept = block.own | set(range(method.sink_blocks))
        for p, dims in bands.items():
            # The paper's 1 / sqrt(d) is the call's scale.
            scale = call.scale * math.sqrt(dim) / divisors[p]
            logit = {n: scale * float(q_own[dims] @ k[n][dims]) for n in block.seen}
            total, held = sum(math.exp(x) for x in logit.values()), 0.0
            for n in sorted(logit, key=lambda n: (-logit[n], n)):
                if held < p:
                    kept.add(n)
                held += math.exp(logit[n]) / total
        return kept

    return chosen


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(
    "method", [Prism(0.5, 0.75, 0.6, 0.5, 1, 8), Prism(0.25, 0.5, 0.3, 0.8, 0, 16), Prism(1.0, 0.25, 0.7, 0.2, 2, 8)]
)
def test_blocks_are_those_of_the_formulas(situation: str, method: Prism) -> None:
    call = make_call(situation, length=120, heads=4, groups=2, dim=8)
    for scale in (call.scale, 2.0, -1.0):
        scaled = replace(call, scale=scale)
        assert_chosen(scaled, method.plan(scaled), naive(scaled, method))


def test_a_fast_band_finds_what_the_mean_of_all_dimensions_drowns() -> None:
    """Slow dimensions are large and nearly alike; a fast one tells which block is asked for."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.zeros(1, 1, 256, 8), torch.zeros(1, 1, 256, 8)
    q[..., 2], k[..., 2] = 30.0, 1 + 0.2 * torch.rand(256, generator=generator)
    q[..., 0], k[0, 0, 64:72, 0] = 1.0, 1.0
    k[0, 0, 64:72, 2] = 0.9
    call = AttentionCall(q, k)
    with_fast = Prism(0.25, 0.75, 0.5, 0.0, 0, 8).plan(call).block_mask()[0, 0]
    slow_alone = Prism(0.25, 0.75, 0.0, 0.3, 0, 8).plan(call).block_mask()[0, 0]
    means = BlockSparse(blocks=6, block=8).plan(call).block_mask()[0, 0]
    assert with_fast[9:, 8].all()
    assert not slow_alone[20:, 8].any()
    assert not means[20:, 8].any()


def test_calibration_is_of_each_row_of_a_batch() -> None:
    """Padding counts for nothing in the energies."""
    call = make_call("left padding", length=120, heads=2, groups=1, dim=8)
    row = rows_of(call.extent)[0]
    alone = AttentionCall(call.q[:1, :, row.live_queries()], call.k[:1, :, row.live_keys()], scale=call.scale)
    method = Prism(0.5, 0.75, 0.6, 0.5, 0, 8)
    together, single = method.plan(call).block_mask()[0], method.plan(alone).block_mask()[0]
    assert torch.equal(together[:, : single.shape[1], : single.shape[2]], single)


def test_a_band_without_energy_chooses_evenly() -> None:
    """No number is divided by zero."""
    q, k = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    plan = Prism(0.5, 0.5, 0.5, 0.5, 0, 8).plan(AttentionCall(q, k))
    assert plan.block_mask()[0, 0, 7].tolist() == [True] * 4 + [False] * 3 + [True]


def test_defaults_are_the_published_ones() -> None:
    fields = {"high": 64 / 128, "low": 96 / 128, "p_high": 0.95, "p_low": 0.95, "sink_blocks": 1, "block": 128}
    assert Prism().to_dict() == {"method": "prism", **fields}
