"""Training samples: facts in text (or nothing but facts) with questions, copies of random tokens, and plain text.

The facts and questions are those of gossamer.evaluate.tasks, token by token: because the tokenizer never merges
across a line end or a sentence end, inserting the tokens of a fact equals inserting its text.
`tests/evaluate/test_tasks.py` holds both to that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from string import Formatter
from typing import Any

import numpy as np
from tokenizer import BOS, EOS, boundary_tables, whole_words

from gossamer.evaluate.tasks.needle import LIST_QUESTION, NEEDLE, QUESTION, VALUES_QUESTION
from gossamer.evaluate.tasks.variable_tracking import CHAIN_QUESTION, CHAIN_START, CHAIN_STEP
from gossamer.evaluate.words import KEY_WORDS

# Names are mostly made of key words and sometimes of other words: then copying is learned, not a list of words.
OTHER_WORDS = 0.35
# Of lists of 2, 3 and 4: mostly 4, so that stopping early does not pay.
LIST_SIZES = [0.15, 0.15, 0.7]
CHOICE, ANSWER, TEXT, TEMPLATE, IGNORE = 12.0, 4.0, 1.0, 0.3, 0.0
Weighted = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Batch:
    """tokens, positions: int64 [B, S]; weights: float32 [B, S], the loss weight of each token as a target."""

    tokens: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Item:
    """Something to ask for.

    kind: "single" (one value), "values" (several values of one key) or "chain" (a value handed on).
    key, values: what is asked with, and what is to be answered.
    facts: tokens and weights of the sentences that say it.
    """

    kind: str
    key: str
    values: list[str]
    facts: list[Weighted]


class SampleMaker:
    """Draws training samples of a given length; all randomness comes from the generator that is passed in."""

    def __init__(self, tokenizer: Any, corpus: np.ndarray, words: tuple[str, ...] = KEY_WORDS):
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.words = words
        self.other_words = whole_words(tokenizer)
        self.line, self.sentence, self.space = boundary_tables(tokenizer)
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Tokens of a short text, without <bos>."""
        found = self.cache.get(text)
        if found is None:
            found = self.tokenizer.encode(text, add_special_tokens=False)
            if len(self.cache) < 200_000:
                self.cache[text] = found
        return found

    def pieces(self, *parts: tuple[str, float]) -> Weighted:
        """Tokens of pieces of text that each start at a token's start, and the weight given with each."""
        tokens: list[int] = []
        weights: list[float] = []
        for text, weight in parts:
            new = [t for word in text.split(" ") if word for t in self.encode(" " + word)] if text[0] == " " else None
            new = self.encode(text) if new is None else new
            tokens += new
            weights += [weight] * len(new)
        return tokens, weights

    def fill(self, template: str, unknown: float, **fields: str) -> Weighted:
        """A template with its fields filled in; `unknown` is the weight of the fields."""
        parts = []
        for text, name, _, _ in Formatter().parse(template):
            if text.rstrip(" "):
                parts.append((text.rstrip(" "), TEMPLATE))
            if name:
                parts.append((" " + fields[name], unknown))
        return self.pieces(*parts)

    def text(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """A random passage of the corpus."""
        start = int(rng.integers(0, len(self.corpus) - length))
        return self.corpus[start : start + length].astype(np.int64)

    def boundaries(self, passage: np.ndarray) -> np.ndarray:
        """Where a needle may stand: indices of tokens that follow a line end or a sentence end."""
        after_line = self.line[passage[:-1]]
        after_sentence = self.sentence[passage[:-1]] & self.space[passage[1:]]
        return np.concatenate(([0], np.flatnonzero(after_line | after_sentence) + 1))

    def _number(self, rng: np.random.Generator) -> str:
        digits = int(rng.choice([5, 6, 6, 6, 7]))
        return str(rng.integers(10 ** (digits - 1), 10**digits))

    def items(self, count: int, rng: np.random.Generator) -> list[Item]:
        """Things to ask for that together have `count` facts."""
        words = self.other_words if rng.random() < OTHER_WORDS else self.words
        drawn = iter([words[i] for i in rng.permutation(len(words))])
        made: list[Item] = []
        left = count
        while left > 0:
            kind = rng.choice(["single", "values", "chain"], p=[0.25, 0.6, 0.15]) if left > 1 else "single"
            if kind == "chain":
                size = int(rng.integers(2, min(left, 5) + 1))
                names = [self._name(drawn) for _ in range(size)]
                value = self._number(rng)
                facts = [self.fill(CHAIN_START, IGNORE, value=value, name=names[0])]
                for source, target in pairwise(names):
                    facts.append(self.fill(CHAIN_STEP, IGNORE, source=source, name=target))
                made.append(Item("chain", value, names, facts))
            else:
                size = min(left, int(rng.choice([2, 3, 4], p=LIST_SIZES))) if kind == "values" else 1
                key = self._name(drawn)
                values = [self._number(rng) for _ in range(size)]
                facts = [self.fill(NEEDLE, IGNORE, key=key, value=value) for value in values]
                made.append(Item(str(kind), key, values, facts))
            left -= size
        return made

    def _name(self, drawn: Iterator[str]) -> str:
        return f"{next(drawn)} {next(drawn)}"

    def _answer(self, steps: list[tuple[str, str]], joint: str, verb: str) -> Weighted:
        """ "value, key is value, key is value." for (key, value) pairs, or "name goes to name goes to name."

        Which value or key comes next is what is hard to learn, and its first token says it: it weighs more.
        """
        tokens: list[int] = []
        weights: list[float] = []
        for i, (key, value) in enumerate(steps):
            parts = [joint, f" {key}" if key else "", f" {verb}"] if i else []
            for part in [*parts, f" {value}"]:
                if part:
                    new, _ = self.pieces((part, ANSWER))
                    tokens += new
                    weights += [CHOICE if part[0] == " " and part != f" {verb}" else ANSWER, *[ANSWER] * (len(new) - 1)]
        return [*tokens, *self.encode(".")], [*weights, ANSWER]

    def _ask(self, item: Item, others: list[Item], rng: np.random.Generator) -> Weighted:
        """A question for an item, with its answer; sometimes one list question for it and others."""
        if item.kind == "chain":
            question = self.fill(CHAIN_QUESTION, IGNORE, value=item.key)
            answer = self._answer([("", name) for name in item.values], "", "goes to")
        elif item.kind == "values":
            question = self.fill(VALUES_QUESTION, IGNORE, key=item.key)
            values = [item.values[i] for i in rng.permutation(len(item.values))]
            answer = self._answer([(item.key, value) for value in values], ",", "is")
        elif others:
            asked = [item, *others]
            keys = [part for other in asked for part in ((f" {other.key}", IGNORE), (",", TEMPLATE))][:-1]
            head, tail = LIST_QUESTION.split(" {keys}")
            question = joined(self.pieces((head, TEMPLATE), *keys), self.fill(tail, IGNORE, key=item.key))
            answer = self._answer([(other.key, other.values[0]) for other in asked], ",", "is")
        else:
            question = self.fill(QUESTION, IGNORE, key=item.key)
            answer = self._answer([(item.key, item.values[0])], ",", "is")
        return joined(question, answer)

    def _questions(self, items: list[Item], room: int, most: int, rng: np.random.Generator) -> Weighted:
        """Questions with answers, up to `room` tokens and `most` of them."""
        order = [items[i] for i in rng.permutation(len(items))]
        order.sort(key=lambda item: rng.random() - (0.35 if item.kind != "single" else 0))
        tokens: list[int] = []
        weights: list[float] = []
        while order and most > 0:
            item = order.pop(0)
            others: list[Item] = []
            if item.kind == "single" and rng.random() < 0.8:
                singles = [other for other in order if other.kind == "single"]
                others = singles[: int(rng.choice([1, 2, 3], p=LIST_SIZES))]
                order = [other for other in order if other not in others]
            new_tokens, new_weights = self._ask(item, others, rng)
            if tokens and len(tokens) + len(new_tokens) > room:
                break
            tokens += new_tokens
            weights += new_weights
            most -= 1
        return tokens, weights

    def retrieval(self, length: int, count: int, asked: int, dense: bool, rng: np.random.Generator) -> Weighted:
        """`count` facts in text (or nothing but facts, if dense), and up to `asked` questions at the end."""
        items = self.items(count, rng)
        taken = 1 + sum(len(tokens) + 1 for item in items for tokens, _ in item.facts)
        tail = self._questions(items, length - taken - 1, asked, rng)
        facts = [fact for item in items for fact in item.facts]
        if rng.random() < 0.5:
            facts = [facts[i] for i in rng.permutation(len(facts))]
        return self.place(facts, tail, length, dense, rng)

    def place(
        self, facts: list[Weighted], tail: Weighted, length: int, dense: bool, rng: np.random.Generator
    ) -> Weighted:
        """Facts, in their order, at line and sentence ends of a passage (or without one, if dense), and the tail."""
        taken = 1 + sum(len(tokens) + 1 for tokens, _ in facts)
        end, end_weights = [*tail[0], EOS], [*tail[1], TEMPLATE]
        room = length - taken - len(end)
        if room < 0:
            raise ValueError(f"{len(facts)} facts do not fit into {length} tokens")
        if dense:
            room = 0
        tokens: list[int] = [BOS]
        weights: list[float] = [IGNORE]
        newline = self.encode("\n")
        passage = self.text(max(room, 2), rng)[:room]
        passage = np.where(passage == EOS, newline[0], passage)
        places = self.boundaries(passage) if room > 2 else np.zeros(1, dtype=np.int64)
        targets = np.sort(rng.random(len(facts))) * room
        positions = places[np.searchsorted(places, targets, side="right") - 1]
        previous = 0
        for (fact, fact_weights), position in zip(facts, positions, strict=True):
            tokens += passage[previous:position].tolist()
            weights += [TEXT] * int(position - previous)
            at_line = position == 0 or self.line[passage[position - 1]]
            if at_line:
                tokens += [*fact, newline[0]]
                weights += [*fact_weights, TEMPLATE]
            else:
                tokens += [*self.encode(" The"), *fact[1:]]
                weights += fact_weights
            previous = int(position)
        tokens += passage[previous:].tolist()
        weights += [TEXT] * (room - previous)
        return tokens + end, weights + end_weights

    def copy(self, length: int, rng: np.random.Generator) -> Any:
        """Random tokens of the whole vocabulary, and again."""
        half = (length - 1) // 2
        unit = int(rng.integers(min(16, half), half + 1))
        pattern = rng.integers(3, len(self.tokenizer), size=unit)
        body = np.concatenate([pattern, pattern])[: length - 1]
        return [BOS, *body.tolist()], [IGNORE] * (unit + 3) + [TEXT] * (len(body) - unit - 2)

    def sample(self, length: int, rng: np.random.Generator, retrieval: float = 0.75) -> Any:
        """One training sample: tokens and weights, padded or cut to `length` with plain text."""
        draw = rng.random()
        largest = max(1, min(length // 32 - 1, 64, len(self.words) // 2))
        if draw < retrieval:
            dense = rng.random() < (0.5 if length <= 512 else 0.1)
            if dense:
                count = int(rng.integers(max(1, largest // 2), largest + 1))
            else:
                count = int(np.exp(rng.uniform(0, np.log(max(2, min(largest, length // 48))))))
            tokens, weights = self.retrieval(length, max(count, 1), 1 + int(rng.integers(0, 16)), dense, rng)
        elif draw < retrieval + 0.1:
            tokens, weights = self.copy(min(length, 1024), rng)
        else:
            tokens, weights = [BOS], [IGNORE]
        missing = length - len(tokens)
        if missing > 0:
            # Text goes between <bos> and the task, so that questions stay at the end.
            passage = self.text(missing + 1, rng)[:missing]
            tokens = [BOS, *passage.tolist(), *tokens[1:]]
            weights = [IGNORE, *([TEXT] * missing), *weights[1:]]
        return tokens[:length], weights[:length]

    def batch(self, rows: int, length: int, skip: float, rng: np.random.Generator) -> Batch:
        """`rows` samples; with probability `skip` each, its positions jump (PoSE) up to 131,071."""
        made = [self.sample(length, rng) for _ in range(rows)]
        tokens = np.array([tokens for tokens, _ in made], dtype=np.int64)
        weights = np.array([weights for _, weights in made], dtype=np.float32)
        positions = np.stack([skipped_positions(length, skip, rng) for _ in range(rows)])
        return Batch(tokens, positions, weights)


def joined(first: Weighted, second: Weighted) -> Weighted:
    """One after the other."""
    return first[0] + second[0], first[1] + second[1]


def skipped_positions(length: int, probability: float, rng: np.random.Generator, limit: int = 131072) -> np.ndarray:
    """Positions 0 ... length - 1 with, sometimes, one to three jumps that together stay below `limit`."""
    positions = np.arange(length)
    if rng.random() < probability:
        jumps = int(rng.integers(1, 4))
        reach = length * (limit / length) ** rng.random()
        cuts = np.sort(rng.integers(1, length, size=jumps))
        sizes = rng.dirichlet(np.ones(jumps)) * max(0.0, reach - length)
        for cut, size in zip(cuts, sizes, strict=True):
            positions[cut:] += int(size)
    return positions
