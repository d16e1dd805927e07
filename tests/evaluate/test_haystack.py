"""What tasks are made of: words that nobody uses, and the text around them."""

from __future__ import annotations

import random

import pytest
from tokenizers_for_tests import HAYSTACK, WordTokenizer

from gossamer.evaluate import tasks
from gossamer.evaluate.haystack import Haystack, load_haystack, noise
from gossamer.evaluate.words import KEY_WORDS, draw_compounds, draw_names, draw_numbers

WORDS = WordTokenizer()


class TestWords:
    def test_key_words_are_distinct(self):
        assert len(set(KEY_WORDS)) == len(KEY_WORDS)

    def test_names_avoid_the_text_and_each_other(self):
        names = draw_names("amber falcon", 30, random.Random(0))
        words = [word for name in names for word in name.split(" ")]
        assert len(set(words)) == 60
        assert "amber falcon" not in names
        with pytest.raises(ValueError, match="at most 135"):
            draw_names("", 136, random.Random(0))

    def test_compounds_are_distinct(self):
        compounds = draw_compounds(5000, random.Random(0))
        assert len(set(compounds)) == 5000
        assert all(len(set(word.split("-"))) == 2 for word in compounds)
        with pytest.raises(ValueError, match="can be formed"):
            draw_compounds(10**6, random.Random(0))

    def test_numbers_are_not_in_the_text(self):
        text = " ".join(map(str, range(10, 90)))
        numbers = draw_numbers(text, 3, 2, random.Random(0))
        assert all(number not in text for number in numbers)
        with pytest.raises(ValueError, match="use more digits"):
            draw_numbers(text, 50, 2, random.Random(0))


class TestHaystacks:
    def test_the_default_is_long_and_free_of_the_tasks_own_wording(self):
        haystack = load_haystack()
        text = haystack.text
        assert (
            haystack.sha256 == "9115597854f8a4f0d3ce06c41a98f9a2d9738dd37cb96a352000d56b90bf9069"
        )  # frozen: results of different versions compare
        assert len(text) > 400_000
        assert "The number for" not in text
        assert "goes to amber" not in text

    def test_a_file(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("word " * 100)
        assert load_haystack(str(path)).text == "word " * 100
        path.write_bytes(b"\xff\xfe" * 100)
        with pytest.raises(ValueError, match="UTF-8"):
            load_haystack(str(path))
        with pytest.raises(ValueError, match="cannot read"):
            load_haystack(str(tmp_path / "none"))

    def test_short_texts_are_refused(self):
        with pytest.raises(ValueError, match="at least 100"):
            Haystack("x", "short")
        with pytest.raises(ValueError, match="longer text"):
            HAYSTACK.passage(10**9, random.Random(0))
        with pytest.raises(ValueError, match="longer text"):
            tasks.create("needle_single").make(Haystack("x", HAYSTACK.text[:5000]), WORDS, 9000, random.Random(0))

    def test_passages_begin_at_lines(self):
        for seed in range(20):
            passage = HAYSTACK.passage(1000, random.Random(seed))
            start = len(HAYSTACK.text) - len(passage)
            assert start == 0 or HAYSTACK.text[start - 1] == "\n"
            assert len(passage) >= 1000

    def test_noise_has_the_length(self):
        assert len(noise(10_000).text) >= 10_000
