"""BiLLM beside a naive search in plain Python, and the order of its ablations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gossamer.compressed.billm import MOST_SALIENT, QUANTILES, binarise, rounded, sign_and_scale
from gossamer.compressed.hessian import Hessian

OUT, IN = 5, 14


def case(seed: int = 0, rows: int = OUT, features: int = IN) -> tuple[Tensor, Hessian, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, features, generator=generator) @ torch.randn(features, features, generator=generator)
    x[:, 2] *= 8.0  # a feature that matters
    hessian = Hessian(features)
    hessian.add(x)
    return torch.randn(rows, features, generator=generator), hessian, x


def one_bit(row: list[float], members: list[int]) -> dict[int, float]:
    """``mean + scale sign`` of the members of a row."""
    if not members:
        return {}
    mean = sum(row[j] for j in members) / len(members)
    scale = sum(abs(row[j] - mean) for j in members) / len(members)
    return {j: mean + (scale if row[j] >= mean else -scale) for j in members}


def two_bits(row: list[float], members: list[int]) -> dict[int, float]:
    first = one_bit(row, members)
    rest = [row[j] - first.get(j, 0.0) for j in range(len(row))]
    second = one_bit(rest, members)
    return {j: first[j] + second[j] for j in members}


def block_of(w: list[list[float]], importance: list[list[float]], quirk: bool) -> list[list[float]]:
    columns = range(len(w[0]))
    rank = sorted(columns, key=lambda j: -sum(row[j] for row in importance))
    seen = importance if quirk else w
    errors = []
    for number in range(1, min(MOST_SALIENT, len(w[0])) + 1):
        chosen, others = sorted(rank[:number]), sorted(rank[number:])
        rows = [two_bits(r, chosen) | (two_bits if quirk else one_bit)(r, others) for r in seen]
        errors.append(sum((row[j] - found[j]) ** 2 for row, found in zip(seen, rows, strict=True) for j in columns))
    number = 1 + errors.index(min(errors))
    chosen, others = sorted(rank[:number]), sorted(rank[number:])
    sizes = sorted(abs(row[j]) for row in w for j in others)
    candidates = []
    for share in QUANTILES if others else []:
        limit = sizes[min(len(sizes) - 1, int(share * (len(sizes) - 1)))]
        found = [
            one_bit(r, [j for j in others if abs(r[j]) > limit]) | one_bit(r, [j for j in others if abs(r[j]) <= limit])
            for r in w
        ]
        error = sum((r[j] - f[j]) ** 2 for r, f in zip(w, found, strict=True) for j in others)
        candidates.append((error, found))
    best = min(candidates, key=lambda c: c[0])[1] if candidates else [{} for _ in w]
    return [[(two_bits(r, chosen) | f)[j] for j in columns] for r, f in zip(w, best, strict=True)]


@pytest.mark.parametrize("block", [5, 14, 128])
@pytest.mark.parametrize("quirk", [False, True])
def test_equal_to_the_naive_search(block: int, quirk: bool) -> None:
    weight, hessian, _ = case()
    factor = hessian.factor()
    w, expected = weight.double(), torch.empty(weight.shape, dtype=torch.float64)
    inverse = factor.double().T @ factor.double()
    for start in range(0, IN, block):
        end = min(start + block, IN)
        own = factor[start:end, start:end].diagonal().double()
        values = block_of(w[:, start:end].tolist(), ((w[:, start:end] / own) ** 2).tolist(), quirk)
        expected[:, start:end] = torch.tensor(values, dtype=torch.float64)
        errors = (w[:, start:end] - expected[:, start:end]) / own
        w[:, end:] -= errors @ factor[start:end, end:].double()
    assert bool(inverse.isfinite().all())
    found = binarise(weight, factor, block=block, search="saliency" if quirk else "weights")
    torch.testing.assert_close(found.dequantised().double(), expected, rtol=1e-4, atol=1e-4)
    assert 1.0 < found.bits <= 2.0


def test_each_part_brings_outputs_nearer() -> None:
    """The paper's order: rounding, sign and scale, BiLLM; and each of its parts helps, summed over three layers."""
    totals: dict[str, float] = {}
    for seed in range(3):
        weight, hessian, x = case(seed, 32, 96)
        factor = hessian.factor()
        some = {
            "rounded": rounded(weight),
            "sign": sign_and_scale(weight),
            "whole": binarise(weight, factor, block=32).dequantised(),
            "no salient": binarise(weight, factor, block=32, salient=False).dequantised(),
            "no split": binarise(weight, factor, block=32, split=False).dequantised(),
            "no compensation": binarise(weight, factor, block=32, compensate=False).dequantised(),
        }
        for name, found in some.items():
            totals[name] = totals.get(name, 0.0) + float((x @ (weight - found).T).square().mean())
    assert totals["whole"] < totals["sign"] < totals["rounded"]
    assert all(totals["whole"] < totals[name] for name in ("no salient", "no split", "no compensation"))


def test_the_whole_is_made_of_what_it_stores() -> None:
    weight, hessian, _ = case(3, 4, 10)
    found = binarise(weight, hessian.factor(), block=4)
    values = found.dequantised()
    for row, column in itertools.product(range(4), range(10)):
        n, sign = column // 4, 1.0 if found.positive[row, column] else -1.0
        groups = [2, 3] if found.salient[column] else [1] if found.high[row, column] else [0]
        signs = [sign, 1.0 if found.second[row, column] else -1.0]
        parts = [found.mean[g, row, n] + found.scale[g, row, n] * s for g, s in zip(groups, signs, strict=False)]
        torch.testing.assert_close(values[row, column], torch.stack(parts).sum())


def test_features_that_are_never_there_are_not_salient() -> None:
    weight, _, x = case(2, 8, 40)
    x = 0.05 * x
    x[:, ::4] = 0.0
    hessian = Hessian(40)
    hessian.add(x)
    found = binarise(weight, hessian.factor(), dead=hessian.dead)
    assert not bool(found.salient[::4].any())
    assert bool(found.salient.any())


def test_one_bit_of_rows_of_two_values_is_exact() -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(6, 16)
    weight = 0.3 + torch.rand(6, 1, generator=torch.Generator().manual_seed(1)) * signs
    torch.testing.assert_close(binarise(weight, None, salient=False, split=False).dequantised(), weight)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="search must be"):
        binarise(torch.ones(2, 2), None, search="hessian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block must be"):
        binarise(torch.ones(2, 2), None, block=0)
