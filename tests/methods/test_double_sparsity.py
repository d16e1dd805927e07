"""Double Sparsity from its formula: labels of the heaviest channels, their products, the best tokens."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from decode_steps import LAYER, best, softmax, step
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods import DoubleSparsity, OracleTopK, Quest


def naive_labels(keys: Tensor, channels: list[int], bits: int) -> Tensor:
    """Of one head's keys ``[n, D]``, token by token: the channels after rounding to so many bits."""
    labels = keys[:, channels].double()
    if bits == 16:
        return labels.bfloat16().double()
    if bits == 32:
        return labels
    low, high = labels.amin(1, keepdim=True), labels.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return low + step * ((labels - low) / step.clamp(min=1e-30)).round()


def naive_scores(call: AttentionCall, row: int, head: int, channels: list[int], bits: int) -> list[float]:
    start, count = int(call.extent.key_start[row]), int(call.extent.key_count[row])
    labels = naive_labels(call.k[row, head // call.share, start : start + count], channels, bits)
    return (call.scale * (labels @ call.q[row, head, 0, channels].double())).tolist()


def naive_channels(call: AttentionCall, row: int, group: int, count: int) -> list[int]:
    start = int(call.extent.key_start[row])
    mean = call.k[row, group, start : start + 512].abs().mean(dim=0).tolist()
    return sorted(range(len(mean)), key=lambda c: (-mean[c], c))[:count]


def naive(call: AttentionCall, method: DoubleSparsity) -> list[list[set[int]]]:
    """For each row and head the tokens, by position."""
    heads, dim = call.heads if method.per_query_head else call.groups, call.q.shape[-1]
    count, rows = max(1, dim // method.group_factor), []
    for row in range(call.batch):
        chosen = []
        for head in range(heads):
            members = [head] if method.per_query_head else range(head * call.share, (head + 1) * call.share)
            scores: list[list[float]] = []
            for one in members:
                if method.channels:
                    table = method.channels[LAYER]
                    channels = list(table[one * len(table) // call.heads][:count])
                else:
                    channels = naive_channels(call, row, one // call.share, count)
                scores.append(naive_scores(call, row, one, channels, method.bits))
            one = scores[0] if len(scores) == 1 else [float(sum(x)) for x in zip(*map(softmax, scores), strict=True)]
            chosen.append(best(one, method.budget, {len(one) - 1}))
        rows.append(chosen)
    return rows


def table(heads: int, dim: int) -> Any:
    draw = torch.Generator().manual_seed(5)
    return tuple(
        tuple(tuple(torch.randperm(dim, generator=draw).tolist()) for _ in range(heads)) for _ in range(LAYER + 1)
    )


@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("of", ["none", "key heads", "query heads"])
@pytest.mark.parametrize(("groups", "share", "dim"), [(2, 1, 8), (2, 2, 16), (1, 4, 5), (1, 8, 64)])
def test_it_reads_the_tokens_with_the_best_labels(
    per_query_head: bool, bits: int, of: str, groups: int, share: int, dim: int
) -> None:
    call = step(91, groups=groups, share=share, dim=dim)
    heads = {"none": 0, "key heads": groups, "query heads": groups * share}[of]
    method = DoubleSparsity(
        budget=20, group_factor=2, bits=bits, channels=table(heads, dim) if heads else (), per_query_head=per_query_head
    )
    plan = method.plan(call)
    plan.check()
    mask = plan.to_mask()[:, :, 0]
    assert mask.shape[1] == (groups * share if per_query_head else groups)
    for row, chosen in enumerate(naive(call, method)):
        for head, tokens in enumerate(chosen):
            assert set((mask[row, head].nonzero()[:, 0] - call.extent.key_start[row]).tolist()) == tokens


@pytest.mark.parametrize(("bits", "most"), [(4, 6), (8, 1)])
def test_in_few_bits_it_reads_nearly_the_same(bits: int, most: int) -> None:
    """Zeros and steps in bf16 are not those of the naive one, so tokens near the last one taken may change places."""
    call = step(300, dim=64, share=1)
    method = DoubleSparsity(budget=60, group_factor=4, bits=bits)
    mask = method.plan(call).to_mask()[:, :, 0]
    for row, chosen in enumerate(naive(call, method)):
        for head, tokens in enumerate(chosen):
            found = set((mask[row, head].nonzero()[:, 0] - call.extent.key_start[row]).tolist())
            assert len(found) == len(tokens) == 60
            assert len(found - tokens) <= most


def test_all_channels_are_the_bound() -> None:
    call = step(200, share=2)
    for per_query_head in (False, True):
        fields: dict[str, Any] = {"budget": 30, "per_query_head": per_query_head}
        own = DoubleSparsity(group_factor=1, bits=32, **fields).plan(call)
        assert torch.equal(own.to_mask(), OracleTopK(**fields).plan(call).to_mask())


def heavy_step() -> AttentionCall:
    """Keys whose logits are of a few channels, as those of models are."""
    call = step(400, padding=(0,), share=4, dim=64)
    call.k[..., 5::16] *= 6
    call.q[..., 5::16] *= 3
    return call


def test_heavy_channels_hold_more_of_the_weights_than_pages() -> None:
    call = heavy_step()
    k = call.k.repeat_interleave(call.share, dim=1)
    weights = (call.scale * (call.q @ k.transpose(-1, -2))).softmax(dim=-1)[:, :, 0]

    def held(method: Any) -> float:
        mask = method.plan(call).to_mask()[:, :, 0].repeat_interleave(call.share, dim=1)
        return float((weights * mask).sum(dim=-1).mean())

    labels, bound, pages = held(DoubleSparsity(budget=32)), held(OracleTopK(budget=32)), held(Quest(budget=32))
    assert bound >= labels > pages
    assert labels > 0.9 * bound


def test_a_rank_has_its_heads_channels() -> None:
    method = DoubleSparsity(channels=table(4, 8))
    parts = [method.of_rank(rank, 2, 8, 4) for rank in range(2)]
    for layer, heads in enumerate(method.channels):
        assert [*parts[0].channels[layer], *parts[1].channels[layer]] == list(heads)  # type: ignore[attr-defined]


def test_another_models_channels_are_refused() -> None:
    call = step(100)
    with pytest.raises(ValueError, match="channels are for 6 layers of 3 heads, but layer 5 with 2 or 4"):
        DoubleSparsity(budget=8, channels=table(3, 8)).plan(call)
    with pytest.raises(ValueError, match="but keys have 2 heads of 8 channels"):
        DoubleSparsity(budget=8, group_factor=1, channels=table(2, 20)).plan(call)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"budget": 0}, ValueError, "double_sparsity.budget must be at least 1, got 0"),
        ({"group_factor": 0}, ValueError, "double_sparsity.group_factor must be at least 1, got 0"),
        ({"bits": 2}, ValueError, "double_sparsity.bits must be 4, 8, 16 or 32, got 2"),
        ({"channels": "k"}, TypeError, "must be a list (layers) of lists (heads) of channels, got str"),
        ({"channels": [3]}, TypeError, "a list of heads for layer 0, got int"),
        ({"channels": [[3]]}, TypeError, "a list of channels for layer 0, head 0, got int"),
        ({"channels": [[[0.5]]]}, TypeError, "layer 0, head 0: channels are integers, got [0.5]"),
        ({"channels": [[[1, 1]]]}, ValueError, "each once, got [1, 1]"),
        ({"channels": [[[-1]]]}, ValueError, "each once, got [-1]"),
        ({"channels": [[]]}, ValueError, "the same number of heads in each layer"),
        ({"channels": [[[1], [1, 2]]]}, ValueError, "the same number of heads in each layer"),
        ({"channels": [[[1]], [[1], [2]]]}, ValueError, "the same number of heads in each layer"),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        DoubleSparsity(**fields)
