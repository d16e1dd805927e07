"""Filling in masks: LLaDA's order, stretches, and what never happens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.evaluate.masked.passages import draw
from gossamer.evaluate.masked.sampler import fill, per_step

MASK, WORDS = 9, 10


class Certain:
    """Predicts a word at each position, with a certainty that is given; remembers what it was shown."""

    def __init__(self, words: list[int], certainty: list[float]) -> None:
        self.logits = torch.zeros(1, len(words), WORDS)
        self.logits[0, range(len(words)), words] = torch.tensor(certainty)
        self.shown: list[list[int]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.shown.append(tokens[0].tolist())
        return self.logits.clone()


def masks(*positions: int, length: int = 6) -> Tensor:
    masked = torch.zeros(1, length, dtype=torch.bool)
    masked[0, list(positions)] = True
    return masked


def test_steps_share_tokens_as_evenly_as_can_be() -> None:
    assert per_step(10, 4) == [3, 3, 2, 2]
    assert per_step(2, 4) == [1, 1, 0, 0]


def test_the_most_certain_tokens_are_kept_first() -> None:
    model = Certain([1, 2, 3, 4, 5, 6], [1.0, 5.0, 2.0, 4.0, 3.0, 9.0])
    given = torch.tensor([[7, 0, 0, 0, 0, 8]])
    filled = fill(model, given, masks(1, 2, 3, 4), MASK, 2)
    assert model.shown == [[7, MASK, MASK, MASK, MASK, 8], [7, 2, MASK, 4, MASK, 8]]
    assert filled.tolist() == [[7, 2, 3, 4, 5, 8]]


def test_of_equally_certain_tokens_the_first_are_kept() -> None:
    model = Certain([1, 1, 1, 1, 1, 1], [2.0] * 6)
    fill(model, torch.zeros(1, 6, dtype=torch.int64), masks(1, 3, 4), MASK, 3)
    assert [row.count(MASK) for row in model.shown] == [3, 2, 1]
    assert model.shown[1][1] == 1
    assert model.shown[2][4] == MASK


def test_stretches_are_filled_one_after_the_other() -> None:
    model = Certain([1] * 6, [1.0, 1.0, 1.0, 1.0, 9.0, 9.0])
    steps: list[int] = []
    fill(
        model,
        torch.zeros(1, 6, dtype=torch.int64),
        masks(2, 3, 4, 5),
        MASK,
        4,
        block=2,
        begin=lambda step, tokens: steps.append(step),
    )
    assert steps == [0, 1, 2, 3]
    assert [row[2:] for row in model.shown] == [[9, 9, 9, 9], [1, 9, 9, 9], [1, 1, 9, 9], [1, 1, 1, 9]]


def test_rows_of_a_batch_are_filled_as_by_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 8, WORDS, generator=generator)
    given = torch.randint(0, 9, (2, 8), generator=generator)
    masked = torch.tensor([[False] * 3 + [True] * 5, [False, True] * 4])
    both = fill(lambda tokens: logits.clone(), given, masked, MASK, 3)
    for row in range(2):
        one = slice(row, row + 1)
        alone = fill(lambda tokens, one=one: logits[one].clone(), given[one], masked[one], MASK, 3)
        assert torch.equal(both[one], alone)
    assert torch.equal(both[~masked], given[~masked])


def test_the_mask_itself_is_never_filled_in() -> None:
    model = Certain([MASK] * 6, [50.0] * 6)
    assert MASK not in fill(model, torch.zeros(1, 6, dtype=torch.int64), masks(0, 5), MASK, 2)[0].tolist()


def test_what_cannot_be_filled_is_refused() -> None:
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    model = Certain([1] * 6, [1.0] * 6)
    with pytest.raises(ValueError, match="3 steps cannot be shared evenly by 2 stretches of 2 tokens"):
        fill(model, tokens, masks(2, 3, 4, 5), MASK, 3, block=2)
    with pytest.raises(ValueError, match=r"a bool mask of the same shape, got \(1, 6\) and \(1, 5\)"):
        fill(model, tokens, masks(2, length=5), MASK, 3)
    with pytest.raises(ValueError, match="at least 1 step"):
        fill(model, tokens, masks(2), MASK, 0)


def test_stretches_from_a_start_do_not_depend_on_the_masks() -> None:
    """Of tokens 2 to 6 there are two stretches, though the masks of the last text would fit into one."""
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    for where in ((2, 5), (3, 4), (2, 3)):
        model = Certain([1] * 6, [1.0] * 6)
        filled = fill(model, tokens, masks(*where), MASK, 4, block=2, start=2)
        assert len(model.shown) == 4
        assert filled[0].nonzero().flatten().tolist() == list(where)
    model = Certain([1] * 6, [1.0] * 6)
    with pytest.raises(ValueError, match="4 steps cannot be shared evenly by 3 stretches"):
        fill(model, tokens, masks(2), MASK, 4, block=2, start=0)
    with pytest.raises(ValueError, match="start must be a position below 6 with no masked token before it, got 3"):
        fill(model, tokens, masks(2), MASK, 4, block=2, start=3)


def test_a_passage_says_again_what_its_prompt_has_said() -> None:
    text = torch.arange(1000)
    for index in range(20):
        passage = draw(text, 128, index, 0, 0.5)
        assert passage.prompt == 96
        assert int(passage.masked.sum()) == 16
        assert not passage.masked[:96].any()
        # Where the text goes on counting it is as it was; the copy comes from before.
        copy = passage.tokens < passage.tokens[0] + torch.arange(128)
        assert int(copy.sum()) == 16
        assert torch.equal(passage.copied, passage.masked & copy)
        assert torch.isin(passage.tokens[copy], passage.tokens[:96]).all()


def test_a_seed_draws_masks_alone() -> None:
    text = torch.arange(1000)
    one, other = draw(text, 128, 3, 0, 0.5), draw(text, 128, 3, 1, 0.5)
    assert torch.equal(one.tokens, other.tokens)
    assert not torch.equal(one.masked, other.masked)
    assert torch.equal(draw(text, 128, 3, 1, 0.5).masked, other.masked)
    assert not torch.equal(draw(text, 128, 4, 0, 0.5).tokens, one.tokens)
    with pytest.raises(ValueError, match="the text has 1,000 tokens, 2,048 are needed"):
        draw(text, 2048, 0, 0, 0.5)
