"""Stem's choice against one written from its formulas: scores, the bonus of large values, and the schedule."""

import math
from dataclasses import replace

import pytest
import torch
from definitions import Row
from naive import QueryBlock, assert_chosen, cell_rows

from gossamer import AttentionCall, Extent, Policy, sparse_attention
from gossamer.attention import CallRecord
from gossamer.methods import Stem
from gossamer.plan import Grid
from gossamer.testing import SITUATIONS, make_call

pytestmark = pytest.mark.usefixtures("smallest_constants")


def budget(method: Stem, blocks: int, number: int) -> int:
    """The authors' schedule for one query block: linear in equal steps from k to decay k."""
    if blocks < method.full_blocks:
        return blocks
    share = method.share if blocks >= 160 else 2 * method.share
    most = min(math.floor(blocks * share) + method.extra, blocks)
    steps, past = blocks - most, number - most
    if past <= 0:
        return max(1, most)
    at = min(1.0, past / max(1, steps - 1))
    return max(1, math.floor(most + (method.decay * most - most) * at))


def bonuses(call: AttentionCall, b: int, row: Row, group: int, stride: int) -> list[float]:
    norms: dict[int, float] = {}
    for j in range(row.key_count):
        length = float(call.values[b, group, j + row.key_start].double().norm())
        norms[j // stride] = max(norms.get(j // stride, 0.0), length)
    logs = [math.log(norms[u] + 1e-6) for u in sorted(norms)]
    if len(logs) < 2:
        return [0.0] * len(logs)
    mean = sum(logs) / len(logs)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / (len(logs) - 1))
    return [max(0.0, (x - mean) / (deviation + 1e-6)) for x in logs]


def naive(call: AttentionCall, method: Stem):
    per_block = method.block // method.stride
    kept: dict[tuple[int, int], list[float]] = {}

    def chosen(b: int, row: Row, head: int, block: QueryBlock) -> set[int]:
        group = head // call.share
        if (b, group) not in kept:
            kept[b, group] = bonuses(call, b, row, group, method.stride)
        cells: dict[int, list[float]] = {}
        for logits in cell_rows(call, b, row, head, block, method.stride):
            for u, logit in logits.items():
                cells.setdefault(u // per_block, []).append(logit + method.bonus * kept[b, group][u])
        score = {n: sum(own) / len(own) for n, own in cells.items()}
        count = budget(method, -(-row.key_count // method.block), block.number)
        best = set(sorted(score, key=lambda n: (-score[n], n))[:count])
        far = method.window_blocks - 1
        near = {n for own in block.own for n in range(own - far, own + (0 if row.causal else far) + 1)}
        return best | near | set(range(method.sink_blocks))

    return chosen


METHODS = [
    Stem(0.05, 2, 0.4, 0.2, 0, 1, 2, 0, 8, 4),
    Stem(0.1, 0, 1.0, 1.0, 0, 0, 1, 0, 4, 2),
    Stem(0.0, 5, 0.0, 0.0, 9, 0, 1, 0, 8, 8),
]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("method", METHODS, ids=["shared", "values", "short"])
def test_blocks_are_those_of_the_formulas(situation: str, method: Stem) -> None:
    call = make_call(situation, length=90, heads=2, groups=1, dim=8)
    for scale in (call.scale, -0.7):
        scaled = replace(call, scale=scale)
        assert_chosen(scaled, method.plan(scaled), naive(scaled, method))


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("blocks", [1, 55, 56, 100, 159, 160, 300])
def test_the_schedule_is_the_authors(blocks: int, decay: float) -> None:
    method = Stem(decay=decay, block=2, stride=2)
    schedule = method.schedule(Grid(Extent.full(1, 2 * blocks, 2 * blocks), 2, 2))[0].tolist()
    assert schedule == [budget(method, blocks, number) for number in range(blocks)]
    first = {1: 1, 55: 55, 56: 41, 100: 50, 159: 61, 160: 46, 300: 60}[blocks]
    assert schedule[0] == first
    assert schedule[-1] == (first if blocks < 56 else max(1, math.floor(decay * first)))


def test_the_schedule_of_a_chunk_goes_by_position_and_by_the_keys_so_far() -> None:
    method = Stem(decay=0.5, block=2, stride=2)
    whole = method.schedule(Grid(Extent.full(1, 400, 400), 2, 2))
    chunk = method.schedule(Grid(Extent.full(1, 100, 400), 2, 2))
    assert torch.equal(chunk, whole[:, 150:])
    rows = method.schedule(Grid(Extent([0, 300], [400, 100], [0, 0], [400, 400]), 2, 2))
    assert torch.equal(rows, torch.stack([whole[0], torch.cat([whole[0, 150:], rows[1, 50:]])]))


def test_large_values_bring_their_keys_in() -> None:
    call = make_call("no padding", length=160, heads=2, groups=1, dim=8)
    small = replace(call, q=0.01 * call.q)  # logits near 0
    large = small.values.clone()
    large[:, :, 64:72] *= 50
    before = Stem(0.0, 3, 1.0, 0.2, 0, 0, 1, 0, 8, 8).plan(replace(small, v=torch.ones_like(large))).block_mask()
    after = Stem(0.0, 3, 1.0, 0.2, 0, 0, 1, 0, 8, 8).plan(replace(small, v=large)).block_mask()
    without = Stem(0.0, 3, 1.0, 0.0, 0, 0, 1, 0, 8, 8).plan(replace(small, v=large)).block_mask()
    assert after[:, :, 9:, 8].all()
    assert torch.equal(before, without)
    assert not before[:, :, 9:, 8].all()


def test_first_layers_are_dense_and_a_call_without_values_or_layer_says_so() -> None:
    call = make_call("no padding", length=160, heads=2, groups=1, dim=8)
    method = Stem(0.05, 2, 1.0, 0.2, 0, 1, 1, 2, 8, 4)
    densities = [method.plan(replace(call, layer=layer)).density() for layer in (0, 1, 2, 30)]
    assert densities[:2] == [1.0, 1.0]
    assert max(densities[2:]) < 0.6
    assert method.lacks(replace(call, v=None)) == "values"
    records: list[CallRecord] = []
    sparse_attention(call.q, call.k, call.values, Policy(method, 0), record=records.append)
    assert records[0].reason == "stem needs layer"


def test_a_stride_that_does_not_divide_the_block_is_named() -> None:
    with pytest.raises(ValueError, match=r"stem\.stride must divide block, got 3 for blocks of 128"):
        Stem(stride=3)


def test_every_number_has_a_least_value() -> None:
    least = {
        "extra": 0,
        "full_blocks": 0,
        "sink_blocks": 0,
        "window_blocks": 1,
        "dense_layers": 0,
        "block": 8,
        "stride": 1,
    }
    assert Stem(**least | {"block": 1}).to_dict() == Stem().to_dict() | least | {"block": 1}
    for field, value in least.items():
        with pytest.raises(ValueError, match=f"stem.{field} must "):
            Stem(**{field: min(value, 1) - 1})


def test_defaults_are_the_published_ones() -> None:
    numbers = {"share": 0.1, "extra": 30, "decay": 1.0, "bonus": 0.2, "full_blocks": 56}
    blocks = {"sink_blocks": 4, "window_blocks": 4, "dense_layers": 2, "block": 128, "stride": 8}
    assert Stem().to_dict() == {"method": "stem", **numbers, **blocks}
