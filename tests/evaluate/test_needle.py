"""Needles: they are found where the sample says, fit the length, and equal what the reference model is trained on."""

import random
import re
import sys
from pathlib import Path

import pytest

from gossamer.evaluate.needle import KEY_WORDS, NEEDLE, count_tokens, exact_match, make_sample

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "models" / "reference"


class WordTokenizer:
    """One token for each word, mark or line end, and one in front."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0, *(hash(piece) % 1000 for piece in re.findall(r"\n| ?\w+| ?[^\w\s]", text))]}


def make_haystack(lines: int = 2000, seed: int = 0) -> str:
    rng = random.Random(seed)
    names = ["plan", "mask", "tile", "block", "query", "column"]
    return "\n".join(" ".join(rng.choices(names, k=9)) + ". And so on. Then more" for _ in range(lines))


HAYSTACK = make_haystack()


@pytest.mark.parametrize("length", [64, 200, 1000, 8192])
@pytest.mark.parametrize("needles", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_length_is_met_but_not_exceeded(length, needles, seed):
    sample = make_sample(HAYSTACK, WordTokenizer(), length, needles, random.Random(seed))
    counts = [count_tokens(WordTokenizer(), sample.prompt(i)) for i in range(needles)]
    assert max(counts) == sample.length
    assert length - 8 <= sample.length <= length


def test_every_needle_is_in_the_context_once():
    sample = make_sample(HAYSTACK, WordTokenizer(), 4000, 8, random.Random(3))
    for key, value in zip(sample.keys, sample.answers, strict=True):
        assert sample.context.count(NEEDLE.format(key=key, value=value)) == 1
        assert sample.context.count(key) == 1
        assert sample.context.count(value) == 1


def test_questions_end_as_the_needle_does_before_its_value():
    sample = make_sample(HAYSTACK, WordTokenizer(), 500, 2, random.Random(3))
    for key, value, question in zip(sample.keys, sample.answers, sample.questions, strict=True):
        assert question.endswith(NEEDLE.format(key=key, value=value).removesuffix(f" {value}."))
        assert value not in question


def test_taking_the_needles_out_gives_back_the_haystack():
    sample = make_sample(HAYSTACK, WordTokenizer(), 900, 6, random.Random(5))
    text = sample.context
    for key, value in zip(sample.keys, sample.answers, strict=True):
        fact = NEEDLE.format(key=key, value=value)
        text = text.replace(fact + "\n", "") if fact + "\n" in text else text.replace(" " + fact, "")
    assert text in HAYSTACK


def test_needles_stand_at_given_depths_in_order():
    sample = make_sample(HAYSTACK, WordTokenizer(), 4000, 3, random.Random(5), depths=[0.9, 0.1, 0.5])
    assert sample.depths == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
    assert [sample.context.index(key) for key in sample.keys] == sorted(sample.context.index(k) for k in sample.keys)


def test_drawn_depths_cover_the_haystack_evenly():
    depths = [make_sample(HAYSTACK, WordTokenizer(), 500, 1, random.Random(i)).depths[0] for i in range(200)]
    fifths = [sum(int(depth * 5) == i for depth in depths) for i in range(5)]
    assert min(fifths) >= 20


def test_same_seed_gives_same_sample():
    first, second = (make_sample(HAYSTACK, WordTokenizer(), 700, 2, random.Random(9)) for _ in range(2))
    assert first == second


def test_key_words_are_distinct():
    assert len(set(KEY_WORDS)) == len(KEY_WORDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 30, "needles": 2}, "too short"),
        ({"length": 10**6, "needles": 1}, "the haystack has"),
        ({"length": 500, "needles": 0}, "at least 1"),
        ({"length": 500, "needles": 2, "depths": [0.5]}, "2 fractions"),
        ({"length": 500, "needles": 1, "depths": [1.5]}, "fractions"),
        ({"length": 500, "needles": 2, "words": ["one", "two", "three"]}, "need 4 different words"),
        ({"length": 500, "needles": 1, "digits": 1}, "digits"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sample(HAYSTACK, WordTokenizer(), rng=random.Random(0), **arguments)


@pytest.mark.parametrize(
    ("generated", "right"),
    [(" 483726.", True), ("483726", True), (" 4837261.", False), (" 48372", False), (" none", False), ("", False)],
)
def test_exact_match_wants_exactly_the_number(generated, right):
    assert exact_match(generated, "483726") is right


@pytest.fixture(scope="module")
def reference_tokenizer():
    transformers = pytest.importorskip("transformers")
    if not (REFERENCE / "tokenizer.json").exists():
        pytest.skip("the reference model is not in this checkout")
    return transformers.AutoTokenizer.from_pretrained(REFERENCE)


def test_reference_tokenizer_meets_the_length(reference_tokenizer):
    sample = make_sample(HAYSTACK, reference_tokenizer, 2048, 4, random.Random(0))
    assert 2040 <= sample.length <= 2048


def test_training_samples_are_the_tokens_of_this_format(reference_tokenizer, monkeypatch):
    np = pytest.importorskip("numpy")
    monkeypatch.syspath_prepend(str(ROOT / "models"))
    for name in ("tasks", "tokenizer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    tasks = __import__("tasks")

    tokens = np.array(reference_tokenizer.encode(HAYSTACK, add_special_tokens=False), dtype=np.uint16)
    maker = tasks.SampleMaker(reference_tokenizer, tokens)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        made, weights = maker.retrieval(600, 3, 2, False, rng)
        assert len(made) == len(weights) <= 600
        text = reference_tokenizer.decode(made[1:-1])
        assert reference_tokenizer.encode(text) == made[:-1]
        facts = re.findall(r"The number for ([a-z]+ [a-z]+) is (\d+)\.", text)
        for key, value in facts[-2:]:
            fact = NEEDLE.format(key=key, value=value)
            assert text.count(fact) == 2
            assert f"\n\nWhat is the number for {key}? {fact}" in text
