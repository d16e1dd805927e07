"""Passages that are held out share nothing with those that choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("transformers")

from tiny import tiny_llama

from gossamer.calibrate.samples import Samples
from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.subject import Subject

COUNTED = Haystack("counted.txt", " ".join(map(str, range(4000))))


class Places:
    """A tokenizer whose tokens are the numbers themselves."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize("others", [[], [COUNTED], [replace(COUNTED, name="a copy.txt")]], ids=["none", "same", "copy"])
def test_what_is_held_out_of_a_text_shares_no_token_with_what_chooses(others: list[Haystack]) -> None:
    of = Subject(tiny_llama(), Places(), "tiny")
    for seed in range(5):
        samples = Samples(of, [COUNTED], [200, 400], count=2, held_out=2, others=others, haystack=COUNTED, seed=seed)
        chosen, held = ([set(samples.tokens(s)[0].tolist()) for s in samples.listed if s.held_out == o] for o in (0, 1))
        assert not set.union(*chosen) & set.union(*held)
        assert [len(one) for one in held] == [200, 200, 400, 400]
        assert len(set(map(frozenset, held))) == 4


def test_of_a_short_text_other_passages_are_held_out_until_there_are_no_more() -> None:
    of = Subject(tiny_llama(), Places(), "tiny")
    short = Haystack("short.txt", " ".join(map(str, range(104))))
    given: dict[str, Any] = {"count": 2, "haystack": short}
    for others in ([], [short]):
        samples = Samples(of, [short], [101], held_out=2, others=others, **given)
        assert sorted(int(samples.tokens(one)[0, 0]) for one in samples.listed) == [0, 1, 2, 3]
        more = Samples(of, [short], [101], held_out=3, others=others, **given)
        with pytest.raises(ValueError, match="has only 4 different windows of 101 tokens"):
            more.to_dict()
