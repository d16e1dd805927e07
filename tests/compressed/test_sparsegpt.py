"""SparseGPT beside Optimal Brain Surgeon, which solves for each column anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.compressed.hessian import Hessian
from gossamer.compressed.int8 import row_scale
from gossamer.compressed.sparsegpt import Pattern, magnitude, prune

OUT, IN, SAMPLES = 6, 24, 64


def case(seed: int = 0, features: int = IN) -> tuple[Tensor, Hessian, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features // 3, features, generator=generator)  # features that say much of each other
    x = torch.randn(SAMPLES, len(mixing), generator=generator) @ mixing
    x += 0.3 * torch.randn(SAMPLES, features, generator=generator)
    hessian = Hessian(features)
    hessian.add(x[:20])
    hessian.add(x[20:].view(4, 11, features))
    return torch.randn(OUT, features, generator=generator), hessian, x


def surgeon(weight: Tensor, h: Tensor, pattern: Pattern, block: int) -> Tensor:
    """Each column's loss handed on by the inverse of the Hessian of the columns that are still free (fp64)."""
    w, zero = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.bool)
    for i in range(w.shape[1]):
        left = torch.stack([torch.linalg.inv(h[j:, j:])[0, 0] for j in range(w.shape[1])])
        if pattern.of:
            if i % pattern.of == 0:
                for row in range(len(w)):
                    scores = w[row, i : i + pattern.of] ** 2 / left[i : i + pattern.of]
                    zero[row, i + scores.argsort()[: pattern.of - pattern.keep]] = True
        elif i % block == 0:
            scores = w[:, i : i + block] ** 2 / left[i : i + block]
            for flat in scores.flatten().argsort()[: int(pattern.share * scores.numel())].tolist():
                zero[flat // scores.shape[1], i + flat % scores.shape[1]] = True
        inverse = torch.linalg.inv(h[i:, i:])
        loss = torch.where(zero[:, i], w[:, i], 0.0)
        w[:, i:] -= loss[:, None] * inverse[0] / inverse[0, 0]
    return w.masked_fill(zero, 0.0)


@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4", "1:4"])
@pytest.mark.parametrize("block", [8, 24, 128])
def test_equal_to_optimal_brain_surgeon(pattern: str, block: int) -> None:
    weight, hessian, _ = case()
    h = hessian.matrix().double()
    h += 0.01 * h.diagonal().mean() * torch.eye(IN)
    expected = surgeon(weight, h, Pattern.parse(pattern), block)
    found = prune(weight, hessian.factor(0.01), Pattern.parse(pattern), block)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4"])
def test_outputs_stay_nearer_than_by_magnitude(pattern: str) -> None:
    for seed in range(3):
        weight, hessian, x = case(seed)
        some = Pattern.parse(pattern)
        pruned, plain = prune(weight, hessian.factor(), some), magnitude(weight, some)
        losses = [float((x @ (weight - found).T).square().sum()) for found in (pruned, plain)]
        assert losses[0] < 0.8 * losses[1]
        assert int((pruned == 0).sum()) == int((plain == 0).sum()) == int(some.share * weight.numel())


def test_n_of_m_holds_in_every_group() -> None:
    weight, hessian, _ = case(2)
    for found in (prune(weight, hessian.factor(), Pattern(keep=1, of=4), 8), magnitude(weight, Pattern(keep=1, of=4))):
        assert ((found.view(OUT, -1, 4) != 0).sum(-1) == 1).all()


def test_features_that_are_never_there_touch_no_other() -> None:
    _, _, x = case(1)
    x[:, [0, 7]] = 0.0
    hessian = Hessian(IN)
    hessian.add(x)
    factor = hessian.factor()
    assert bool(factor.isfinite().all())
    assert (factor[0, 1:] == 0).all()
    assert (factor[:7, 7] == 0).all()


def test_weights_of_features_that_are_never_there_go_first() -> None:
    weight, _, x = case(3)
    x = 0.05 * x
    x[:, ::4] = 0.0
    hessian = Hessian(IN)
    hessian.add(x)
    assert hessian.dead.tolist() == [i % 4 == 0 for i in range(IN)]
    pruned = prune(weight, hessian.factor(), Pattern(0.5), dead=hessian.dead)
    assert (pruned[:, ::4] == 0).all()
    assert float((pruned == 0).float().mean()) == 0.5
    lost = float((x @ (weight - pruned).T).norm())
    assert lost < 0.8 * float((x @ (weight - magnitude(weight, Pattern(0.5))).T).norm())


def test_nothing_is_lost_where_nothing_is_pruned() -> None:
    weight, hessian, _ = case()
    torch.testing.assert_close(prune(weight, hessian.factor(), Pattern(0.0)), weight)


@pytest.mark.parametrize("text", ["half", "1.0", "-0.1", "4:4", "0:4", "2:0", "1:2:3", "nan"])
def test_patterns_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="a pattern is the share of zeros"):
        Pattern.parse(text)


def test_patterns_are_read_as_they_are_written() -> None:
    assert str(Pattern.parse("2:8")) == "2:8"
    assert Pattern.parse("2:8").share == 0.75
    assert str(Pattern.parse("0.70")) == "0.7"


def test_bad_input() -> None:
    weight, hessian, x = case()
    with pytest.raises(ValueError, match="add\\(\\) some first"):
        Hessian(3).factor()
    with pytest.raises(ValueError, match="24 features"):
        hessian.add(x[:, :3])
    with pytest.raises(ValueError, match="not finite"):
        hessian.add(x * float("nan"))
    with pytest.raises(ValueError, match="damp"):
        hessian.factor(0.0)
    with pytest.raises(ValueError, match="multiples of 5"):
        prune(weight, hessian.factor(), Pattern(keep=2, of=5))
    with pytest.raises(ValueError, match="multiples of 5"):
        magnitude(weight, Pattern(keep=2, of=5))


def test_rounding_is_made_up_for_as_well() -> None:
    """On a coarse grid, so that rounding is most of the loss: less of it than where the pruned weight is rounded."""
    together, afterwards = 0.0, 0.0
    for seed in range(5):
        weight, hessian, x = case(seed)
        factor, scale = hessian.factor(), 16 * row_scale(weight)
        found = prune(weight, factor, Pattern(0.5), 8, scale=scale)
        multiples = found / scale[:, None]
        assert (multiples - multiples.round()).abs().max() < 1e-5
        assert multiples.abs().max() <= 127.5
        assert (found == 0).sum() >= found.numel() // 2
        rounded = (prune(weight, factor, Pattern(0.5), 8) / scale[:, None]).round() * scale[:, None]
        together += float((x @ (found - weight).T).square().mean())
        afterwards += float((x @ (rounded - weight).T).square().mean())
    assert together < 0.9 * afterwards
