"""Windows of a text: they differ, they hold the tokenizer's own tokens in front, short texts are refused."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from test_runner import DENSE, job, run, subject
from tokenizers_for_tests import HAYSTACK, WordTokenizer

from gossamer.evaluate import runner
from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.perplexity import Windows
from gossamer.evaluate.runner import ResultsFile, make_header


def short_text(tokens: int) -> Haystack:
    text = " ".join(f"word{i}" for i in range(tokens))
    assert len(WordTokenizer()(text)["input_ids"]) == 1 + tokens
    return Haystack("short", text)


def test_windows_of_a_short_text_differ():
    windows = Windows(subject(), short_text(320), seed=0)
    made = [windows.tokens(300, i) for i in range(15)]
    assert all(tokens.shape == (1, 300) for tokens in made)
    assert len({tuple(tokens[0].tolist()) for tokens in made}) == 15
    own = WordTokenizer()(short_text(320).text)["input_ids"]
    for i, tokens in enumerate(made):
        start = windows.start(300, i)
        assert tokens[0].tolist() == [own[0], *own[1 + start : 300 + start]]


def test_a_window_does_not_depend_on_how_many_there_are():
    one, all_of_them = (Windows(subject(), HAYSTACK, seed=3) for _ in range(2))
    starts = [all_of_them.start(300, i) for i in range(5)]
    assert one.start(300, 4) == starts[4]
    assert Windows(subject(), HAYSTACK, seed=4).start(300, 4) != starts[4]


def test_special_tokens_at_the_end_of_a_text_are_not_in_the_middle_of_a_window():
    class Ends(WordTokenizer):
        def __call__(self, text):
            return {"input_ids": [*super().__call__(text)["input_ids"], 1]}

    of = subject()
    of.tokenizer = Ends()
    windows = Windows(of, short_text(320), seed=0)
    assert windows.text_tokens == 320
    assert all(1 not in windows.tokens(300, i) for i in range(15))


def test_more_windows_than_there_are_and_short_texts_are_refused():
    windows = Windows(subject(), short_text(305), seed=0)
    assert len({windows.start(300, i) for i in range(7)}) == 7
    with pytest.raises(ValueError, match="only 7 different windows of 300 tokens; ask for fewer"):
        windows.start(300, 7)
    with pytest.raises(ValueError, match="has 305 tokens, perplexity at 400 needs as many; give a longer text"):
        windows.start(400, 0)


def test_overlap_is_noted(tmp_path):
    of = subject()
    for tokens, notes in ((320, 1), (2000, 0)):
        work = job(tasks=(), lengths=(300,), samples=3, perplexity=short_text(tokens), fidelity=0)
        with ResultsFile(tmp_path / "r.jsonl", make_header(of, work)) as results:
            windows = work.windows(of)
            found = runner.check(of, work, runner.pending(work, results, windows), windows)
        assert len(found) == notes
        assert all("3 windows of 300 tokens from a text of 320 overlap" in note for note in found)


def test_records_say_which_window_it_was(tmp_path):
    work = job(methods=(DENSE,), tasks=(), lengths=(300,), samples=3, fidelity=0)
    new = run(tmp_path / "r.jsonl", work)
    windows = Windows(subject(), HAYSTACK, seed=0)
    assert [record["start"] for record in new] == [windows.start(300, i) for i in range(3)]
    assert len({record["nats"] for record in new}) == 3


def test_windows_that_are_spread_share_no_token_and_reach_both_ends():
    own = WordTokenizer()(short_text(320).text)["input_ids"]
    windows = Windows(subject(), short_text(320), seed=0)
    made = windows.spread(65, 5)  # a token in front of each, so all of the text
    assert [tokens[0].tolist() for tokens in made] == [[own[0], *own[1 + n : 65 + n]] for n in range(0, 320, 64)]
    first, last = windows.spread(41, 2)
    assert first[0, 1:].tolist() == own[1:41]
    assert last[0, 1:].tolist() == own[-40:]
    assert [tokens.tolist() for tokens in windows.spread(41, 1)] == [first.tolist()]
    with pytest.raises(ValueError, match="has 320 tokens, 5 windows of 66 take more; give a longer text"):
        windows.spread(66, 5)
    with pytest.raises(ValueError, match="1 windows of 1 take more"):
        windows.spread(1, 1)
