"""Labels: which channels they have, and what their bits lose."""

from __future__ import annotations

import pytest
import torch
from kept import held, keys_of
from torch import Tensor

from gossamer.summaries import Labels, LabelSet


def labels_of(keys: Tensor, kind: Labels, starts: list[int]) -> LabelSet:
    return kind.begin().of(held(keys, starts))


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("heads", [2, 4])
def test_values_are_those_of_the_channels(bits: int, count: int, heads: int) -> None:
    keys, generator = 10 * keys_of(33, dim=7), torch.Generator().manual_seed(1)
    channels = tuple(tuple(torch.randperm(7, generator=generator).tolist()) for _ in range(heads))
    found = labels_of(keys, Labels(count, bits, channels), [0, 4])
    assert found.channels.tolist() == [[list(row[:count]) for row in channels]] * 2
    for row, start in enumerate((0, 4)):
        for head in range(heads):
            wanted = keys[row, head // (heads // 2), start:, list(channels[head][:count])].T
            got = found.values()[row, head][:, : wanted.shape[1]]
            if bits == 32:
                assert torch.equal(got, wanted)
            elif bits == 16:
                assert torch.equal(got, wanted.bfloat16().float())
            else:
                assert found.step is not None
                half = found.step[row, head, : wanted.shape[1]].float() / 2
                assert bool(((got - wanted).abs() <= half * (1 + 1e-5) + 1e-6).all())
                # Rounding outward widens a range of some ten by no more than bf16 loses.
                range_ = wanted.amax(0) - wanted.amin(0) + 0.02 * wanted.abs().amax(0)
                assert bool((half * 2 * (2**bits - 1) <= 1.02 * range_ + 1e-6).all())


@pytest.mark.parametrize(("bits", "rows"), [(4, 3), (8, 5), (16, 5)])
def test_bytes(bits: int, rows: int) -> None:
    found = labels_of(keys_of(40), Labels(5, bits), [0, 0])
    assert found.codes.shape == (2, 2, rows, 40)
    assert found.codes.element_size() == (1 if bits < 16 else 2)
    assert found.packed is (bits == 4)


def test_labels_of_fp16_stay_so() -> None:
    assert labels_of(keys_of(40).half(), Labels(5, 16), [0, 0]).codes.dtype == torch.float16


@pytest.mark.parametrize("slots", [40, 512, 700])
def test_without_a_table_channels_are_those_of_the_first_keys(slots: int) -> None:
    keys = keys_of(slots)
    keys[:, :, :7] = torch.nan
    keys[0, 0, :, 3] *= 9
    keys[0, 1, :, 1] *= 9
    keys[1, :, 519:, 2] *= 100  # too late to be seen
    found = labels_of(keys, Labels(2, 16), [7, 7]).channels
    for row in range(2):
        for head in range(2):
            mean = keys[row, head, 7:519].abs().mean(0)
            assert found[row, head].tolist() == mean.argsort(descending=True)[:2].tolist()
    assert found[0, :, 0].tolist() == [3, 1]


def test_constant_labels_have_no_step() -> None:
    found = labels_of(torch.full((1, 1, 9, 4), 0.5), Labels(4, 4), [0])
    assert torch.equal(found.values(), torch.full((1, 1, 4, 9), 0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Labels(3, 5), "4, 8, 16 or 32 bits, got 5"),
        (lambda: Labels(0), "at least 1 and as many as each head has, got 0"),
        (lambda: Labels(3, 8, ((0, 1),)), "as many as each head has, got 3"),
        (
            lambda: labels_of(keys_of(9), Labels(1, 8, ((0,), (5,))), [0, 0]),
            "the last channel 5, but keys have 2 heads",
        ),
        (lambda: labels_of(keys_of(9), Labels(1, 8, ((0,),)), [0, 0]), "are of 1 heads"),
    ],
)
def test_labels_that_cannot_be(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
