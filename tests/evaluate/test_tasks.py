"""Tasks: the length is met to the token, counts and depths follow the definitions, answers are in the text alone."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers_for_tests import CODE, HAYSTACK, WordTokenizer

from gossamer.evaluate import tasks
from gossamer.evaluate.haystack import load_haystack
from gossamer.evaluate.tasks.base import count_tokens, largest
from gossamer.evaluate.tasks.frequent_words import zipf_counts
from gossamer.evaluate.tasks.mqar import power_law_gaps
from gossamer.evaluate.tasks.needle import NEEDLE
from gossamer.evaluate.tasks.placement import draw_depths, place

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "models" / "reference"
WORDS = WordTokenizer()


def make(name: str, length: int = 2048, seed: int = 0, **fields: object) -> tuple[tasks.Task, tasks.Sample]:
    task = tasks.create(name, **fields)
    return task, task.make(CODE if name == "code_function" else HAYSTACK, WORDS, length, random.Random(seed))


def search(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def reference_tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(REFERENCE)


@pytest.mark.parametrize("name", tasks.available())
@pytest.mark.parametrize("turns", [1, 3])
class TestEveryTask:
    def test_prompt_and_answer_have_the_length_to_the_token(self, name, turns):
        for seed in range(3):
            task, sample = make(name, 5000, seed, turns=turns)
            longest = max(count_tokens(WORDS, sample.prompt(i)) for i in range(turns))
            assert longest == sample.prompt_tokens == 5000 - task.max_new_tokens

    def test_turns_are_different_questions_with_answers_that_the_context_holds(self, name, turns):
        _, sample = make(name, 5000, turns=turns)
        assert len({turn.question for turn in sample.turns}) == turns
        for turn in sample.turns:
            assert turn.references
            for reference in turn.references:
                assert reference in sample.context
                assert reference not in turn.question
            assert turn.depth is None or 0 <= turn.depth <= 1

    def test_a_perfect_answer_scores_one_and_an_empty_one_none(self, name, turns):
        task, sample = make(name, 5000, turns=turns)
        for turn in sample.turns:
            assert task.score(" " + ", ".join(turn.references) + ".", turn.references) == 1.0
            assert task.score("", turn.references) == 0.0
            assert task.score(" I do not know.", turn.references) == 0.0

    def test_same_seed_same_sample_other_seed_other_sample(self, name, turns):
        samples = [make(name, 5000, seed, turns=turns)[1] for seed in (4, 4, 5)]
        assert samples[0] == samples[1]
        assert samples[0] != samples[2]

    def test_fields_come_back_from_json(self, name, turns):
        task = tasks.create(name, turns=turns)
        data = json.loads(json.dumps(task.to_dict()))
        assert tasks.create(data.pop("task"), **data) == task

    def test_too_short_a_length_is_refused(self, name, turns):
        with pytest.raises(ValueError, match=r"ask for|fit"):
            make(name, 30, turns=turns)


@pytest.mark.parametrize("name", tasks.available())
def test_the_length_is_met_with_a_real_tokenizer_and_the_default_text(name, reference_tokenizer):
    task = tasks.create(name)
    sample = task.make(load_haystack(), reference_tokenizer, 4096, random.Random(2))
    assert sample.prompt_tokens == 4096 - task.max_new_tokens
    longest = max(count_tokens(reference_tokenizer, sample.prompt(i)) for i in range(task.turns))
    assert longest == sample.prompt_tokens


def test_answers_that_are_lists_may_have_several_lines():
    lists = {
        "repeat_passage",
        "needle_multivalue",
        "needle_multiquery",
        "variable_tracking",
        "common_words",
        "frequent_words",
    }
    assert {name for name in tasks.available() if not tasks.create(name).one_line} == lists
    assert not tasks.create("needle_single", values=2).one_line


def test_labels_name_what_differs_from_the_defaults():
    assert tasks.create("needle_multikey").label() == "needle_multikey"
    assert tasks.create("needle_multikey", turns=4, keys=8).label() == "needle_multikey(turns=4,keys=8)"
    assert tasks.create("mqar").label() == "mqar"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("needle", {}, "unknown task 'needle'; known: needle_single"),
        ("mqar", {"turn": 2}, "no field 'turn'; its fields are: turns"),
        ("mqar", {"turns": 0}, "integer of at least 1, got 0"),
        ("needle_single", {"haystack": "essay"}, "one of text, noise, needles"),
        ("needle_single", {"digits": 2}, "at least 4"),
        ("needle_single", {"values": 2, "queries": 2}, "either values or queries"),
        ("math_find", {"turns": 9}, "at most 5"),
    ],
)
def test_bad_fields_are_named(name, fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.create(name, **fields)


class TestNeedles:
    def test_taking_the_needles_out_gives_back_the_haystack(self):
        _, sample = make("needle_multikey", keys=8)
        text = re.sub(
            r"The number for [a-z]+ [a-z]+ is \d+\.\n| The number for [a-z]+ [a-z]+ is \d+\.", "", sample.context
        )
        assert text in HAYSTACK.text
        assert len(text) > 1000

    def test_counts_of_keys_values_and_queries(self):
        found = re.compile(r"The number for ([a-z]+ [a-z]+) is (\d{7})\.")
        for name, keys, values, asked in (
            ("needle_single", 1, 1, 1),
            ("needle_multikey", 4, 1, 1),
            ("needle_multivalue", 1, 4, 4),
            ("needle_multiquery", 4, 1, 4),
        ):
            _, sample = make(name)
            facts = found.findall(sample.context)
            assert len(facts) == keys * values
            assert len({key for key, _ in facts}) == keys
            assert len({value for _, value in facts}) == keys * values
            assert len(sample.turns[0].references) == asked
            assert set(sample.turns[0].references) <= {value for _, value in facts}

    def test_the_question_ends_as_the_needle_does_before_its_value(self):
        _, sample = make("needle_single")
        key, value = search(r"The number for ([a-z]+ [a-z]+) is (\d+)\.", sample.context).groups()
        assert sample.turns[0].question.endswith(NEEDLE.format(key=key, value=value).removesuffix(f" {value}."))

    def test_the_depth_is_where_the_needle_stands(self):
        for seed in range(10):
            _, sample = make("needle_multikey", seed=seed, turns=3)
            for turn in sample.turns:
                value = sample.context.index(turn.references[0])
                assert turn.depth is not None
                assert 0 < value - turn.depth * len(sample.context) < 60

    @pytest.mark.parametrize("name", ["needle_single", "needle_multikey", "passkey", "number_string", "json_kv"])
    def test_depths_are_uniform(self, name):
        """Chi-square of 400 depths in ten bins: below 27.88, which it passes once in a thousand series (9 degrees)."""
        depths = [make(name, 2000, seed)[1].turns[0].depth or 0.0 for seed in range(400)]
        bins = Counter(min(9, int(depth * 10)) for depth in depths)
        assert sum((bins[i] - 40) ** 2 / 40 for i in range(10)) < 27.88

    def test_nothing_but_needles(self):
        task, sample = make("needle_multikey", 3000, haystack="needles")
        lines = [line for line in sample.context.split("\n") if line.startswith("The number for")]
        assert len("\n".join(lines)) > 0.9 * len(sample.context)
        assert len(lines) > 100
        assert sum(sample.turns[0].references[0] in line for line in lines) == 1
        key = search(r"for ([a-z]+ [a-z]+)\?", sample.turns[0].question).group(1)
        assert sum(f"for {key} is" in line for line in lines) == 1
        assert sample.prompt_tokens == 3000 - task.max_new_tokens

    def test_noise_is_noise(self):
        _, sample = make("needle_single", haystack="noise")
        assert len(set(sample.context.split("\n"))) <= 6

    def test_draw_depths_uses_each_level_once_while_they_last(self):
        depths = draw_depths(40, random.Random(0))
        assert depths == [i / 39 for i in range(40)]
        assert len(draw_depths(90, random.Random(0))) == 90

    def test_place_keeps_the_order_of_facts_at_the_same_place(self):
        text, starts = place("one line\nand another", ["A.", "B."], [0.0, 0.0])
        assert text == "A.\nB.\none line\nand another"
        assert [text[round(start * len(text))] for start in starts] == ["A", "B"]


class TestVariableTracking:
    def test_a_chain_is_in_order_and_complete(self):
        _, sample = make("variable_tracking", example=False)
        names = sample.turns[0].references
        assert len(names) == 5
        positions = [sample.context.index(f"of {a} goes to {b}.") for a, b in pairwise(names)]
        assert positions == sorted(positions)
        value = search(r"value (\d{5}) go\?", sample.turns[0].question).group(1)
        assert sample.context.index(f"The value {value} goes to {names[0]}.") < positions[0]

    def test_the_example_comes_first_and_shares_no_name(self):
        _, sample = make("variable_tracking")
        head = sample.context.split("\n\n")[0]
        assert head.startswith("The value ")
        assert head.count("goes to") == 6
        assert not any(name in head for name in sample.turns[0].references)

    def test_several_chains(self):
        _, sample = make("variable_tracking", chains=3, turns=2, hops=2)
        assert sample.context.count("The value of ") == 3 * 2 + 2
        assert not set(sample.turns[0].references) & set(sample.turns[1].references)


class TestCountingTasks:
    @pytest.mark.parametrize(("length", "often", "rarely"), [(6000, 30, 3), (2000, 6, 1)])
    def test_common_words_have_rulers_counts(self, length, often, rarely):
        _, sample = make("common_words", length)
        words = Counter(re.findall(r"\d+\. ([a-z]+-[a-z]+)", sample.context.split("List 1:")[1]))
        common = sample.turns[0].references
        assert len(common) == 10
        assert {words.pop(word) for word in common} == {often}
        assert len(words) > 20
        assert set(words.values()) == {rarely}

    def test_the_numbered_list_has_no_gap(self):
        _, sample = make("common_words", 6000)
        numbers = [int(n) for n in re.findall(r"(\d+)\. [a-z]+-", sample.context.split("List 1:")[1])]
        assert numbers == list(range(1, len(numbers) + 1))

    def test_frequent_words_are_ranks_two_to_four(self):
        _, sample = make("frequent_words", 6000)
        counts = Counter(sample.context.split("Text 1: ")[1].split(" "))
        ranked = [word for word, _ in counts.most_common(5)]
        assert ranked[0] == "..."
        assert tuple(ranked[1:4]) == sample.turns[0].references
        assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])

    def test_zipf_counts_follow_the_formula_and_keep_the_ranks_apart(self):
        counts = zipf_counts(10_000, 100)
        assert counts[0] == int(10_000 * 6 / 3.14159265**2)
        assert counts[3] == int(10_000 / 16 * 6 / 3.14159265**2)
        short = zipf_counts(30, 20)
        assert short[0] > short[1] > short[2] > short[3] > short[4]

    def test_math_find(self):
        for seed in range(6):
            _, sample = make("math_find", 2000, seed, turns=5)
            numbers = sorted(int(n) for n in re.findall(r"\d+", sample.context.split("A list of numbers: ")[1]))
            assert len(numbers) % 2 == 1
            assert len(set(numbers)) == len(numbers)
            expected = {
                "largest": numbers[-1],
                "smallest": numbers[0],
                "second largest": numbers[-2],
                "second smallest": numbers[1],
                "median": numbers[len(numbers) // 2],
            }
            for turn in sample.turns:
                which = search(r"the ([a-z ]+) number", turn.question).group(1)
                assert turn.references == (str(expected[which]),)

    def test_math_find_knows_where_its_answer_stands(self):
        """Also where it is the start of another number, which searching for it would find."""
        starts = 0
        for seed in range(40):
            _, sample = make("math_find", 600, seed, turns=5)
            for turn in sample.turns:
                assert turn.depth is not None
                at = round(turn.depth * len(sample.context))
                assert re.match(rf"{turn.references[0]}\b", sample.context[at:])
                assert sample.context[at - 1] == " "
                assert turn.depth * len(sample.context) == pytest.approx(at, abs=1e-6)
                starts += sample.context.count(f" {turn.references[0]}") > 1
        assert starts > 0


class TestKeyValueTasks:
    def test_json_is_json_with_unique_uuids(self):
        _, sample = make("json_kv", 4000, turns=4)
        body = json.loads(sample.context[sample.context.index("{\n") :])
        assert len(body) > 30
        for turn in sample.turns:
            key = turn.question.split('"')[1]
            assert body[key] == turn.references[0]

    def test_mqar_pairs_and_gaps(self):
        _, sample = make("mqar", 4000, turns=8)
        pairs = dict(re.findall(r"The pair of (\S+) is (\S+)\.", sample.context))
        assert len(pairs) > 100
        for turn in sample.turns:
            assert pairs[search(r"of (\S+) is$", turn.question).group(1)] == turn.references[0]

    def test_power_law_gaps_have_the_distribution(self):
        rng = random.Random(0)
        drawn = Counter(power_law_gaps(1, 100, rng)[0] for _ in range(4000))
        total = sum(k**-0.99 for k in range(1, 101))
        for gap in (0, 1, 3):
            expected = 4000 * (gap + 1) ** -0.99 / total
            assert abs(drawn[gap] - expected) < 5 * expected**0.5
        assert sorted(power_law_gaps(10, 10, rng)) == list(range(10))

    def test_number_strings_repeat_each_digit(self):
        _, sample = make("number_string")
        assert re.fullmatch(r"((\d)\2){5}", sample.turns[0].references[0])
        _, sample = make("passkey")
        assert re.fullmatch(r"\d{5}", sample.turns[0].references[0])
        assert sample.context.count(sample.turns[0].references[0]) == 2


@pytest.mark.parametrize("budget", [7, 100, 101, 977, 10_000])
def test_largest_finds_the_largest(budget):
    calls = []

    def measure(n: int) -> int:
        calls.append(n)
        return 5 + 3 * (n // 2)

    limit = 500
    expected = max(n for n in range(limit + 1) if 5 + 3 * (n // 2) <= budget)
    found = largest(measure, budget, limit)
    assert measure(found) == measure(expected)
    assert len(calls) < 40


def test_training_samples_are_the_tokens_of_these_tasks(reference_tokenizer, monkeypatch):
    np = pytest.importorskip("numpy")
    monkeypatch.syspath_prepend(str(ROOT / "models"))
    for name in ("tasks", "tokenizer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    training = __import__("tasks")

    tokens = np.array(reference_tokenizer.encode(HAYSTACK.text, add_special_tokens=False), dtype=np.uint16)
    maker = training.SampleMaker(reference_tokenizer, tokens)
    seen: Counter[str] = Counter()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        made, weights = maker.retrieval(900, 12, 6, False, rng)
        assert len(made) == len(weights) <= 900
        text = reference_tokenizer.decode(made[1:-1])
        assert reference_tokenizer.encode(text) == made[:-1]
        for question in text.split("\n\nW")[1:]:
            kind = next(k for k in ("hat is the", "hat are all", "hat are the", "here does") if question.startswith(k))
            seen[kind] += 1
        for value in re.findall(r"In a list, .* is (\d+)\.$", text):
            assert text.count(value) >= 2
    assert min(seen[kind] for kind in ("hat is the", "hat are all", "hat are the", "here does")) > 5


class TestExcerpts:
    def test_a_passage_is_what_follows_words_that_occur_once(self):
        for seed in range(5):
            _, sample = make("repeat_passage", seed=seed, words=12, given=6)
            (turn,) = sample.turns
            assert sample.context.count(turn.cue) == 1
            assert sample.context.split(turn.cue)[1].startswith(turn.references[0])
            assert len(re.findall(r"\w+", turn.cue)) == 6
            assert len(re.findall(r"\w+", turn.references[0])) == 12
            # A model of texts goes on from the words' last place: they stand in the text and at the end alone.
            assert sample.prompt().endswith(turn.cue)
            assert sample.prompt().count(turn.cue) == 2

    def test_the_score_is_the_share_before_the_first_wrong_word(self):
        task = tasks.create("repeat_passage")
        reference = ["one (two) three\n    four"]
        assert task.score("one two, three four five", reference) == 1.0
        assert task.score("one two four", reference) == 0.5
        assert task.score("three four", reference) == 0.0

    def test_a_function_is_the_one_with_the_docstring(self):
        for seed in range(5):
            _, sample = make("code_function", seed=seed, turns=3)
            for turn in sample.turns:
                says = search(r'docstring "(.*)"\?', turn.question)[1]
                (name,) = turn.references
                written = search(rf"def {name}\(.*?\n\s+\"\"\"(.*)", sample.context)[1]
                assert written.startswith(says)
                assert sample.context[round((turn.depth or 0) * len(sample.context)) :].startswith(name)

    def test_text_without_functions_is_refused(self):
        with pytest.raises(ValueError, match="2048 tokens of the haystack 'test' give fewer than 1 questions"):
            tasks.create("code_function").make(HAYSTACK, WORDS, 2048, random.Random(0))
