"""Training samples: needles in text, dense lists of needles, copies of random tokens, and plain text.

This is the token-level twin of gossamer.evaluate.needle: because the tokenizer never merges across a line end
or a sentence end, inserting the tokens of a needle equals inserting its text. `tests/evaluate/test_needle.py`
holds both to that.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizer import BOS, EOS, boundary_tables

from gossamer.evaluate.needle import KEY_WORDS, NEEDLE, QUESTION

HELD_OUT_WORDS = KEY_WORDS[::5]
TRAIN_WORDS = tuple(word for word in KEY_WORDS if word not in HELD_OUT_WORDS)
ANSWER, TEXT, TEMPLATE, IGNORE = 4.0, 1.0, 0.3, 0.0


@dataclass(frozen=True)
class Batch:
    """tokens, positions: int64 [B, S]; weights: float32 [B, S], the loss weight of each token as a target."""

    tokens: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


class SampleMaker:
    """Draws training samples of a given length; all randomness comes from the generator that is passed in."""

    def __init__(self, tokenizer: Any, corpus: np.ndarray, words: tuple[str, ...] = TRAIN_WORDS):
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.words = words
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

    def key_tokens(self, template: str, key: str) -> list[int]:
        """Tokens of a template up to its value, for a key of two words."""
        before, after = template.split("{key}", 1)[0], template.split("{key}")[1:]
        words = key.split(" ")
        out = self.encode(before.removesuffix(" "))
        for part in after:
            out = out + [t for word in words for t in self.encode(" " + word)]
            out = out + self.encode(part.removesuffix(" "))
        return out

    def needle(self, key: str, value: str) -> list[int]:
        """Tokens of one needle sentence."""
        head = NEEDLE.split(" {value}")[0]
        return self.key_tokens(head, key) + self.encode(f" {value}") + self.encode(".")

    def question(self, key: str) -> list[int]:
        """Tokens of a question up to the answer."""
        return self.key_tokens(QUESTION, key)

    def text(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """A random passage of the corpus."""
        start = int(rng.integers(0, len(self.corpus) - length))
        return self.corpus[start : start + length].astype(np.int64)

    def boundaries(self, passage: np.ndarray) -> np.ndarray:
        """Where a needle may stand: indices of tokens that follow a line end or a sentence end."""
        after_line = self.line[passage[:-1]]
        after_sentence = self.sentence[passage[:-1]] & self.space[passage[1:]]
        return np.concatenate(([0], np.flatnonzero(after_line | after_sentence) + 1))

    def _pairs(self, count: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
        drawn = rng.permutation(len(self.words))[: 2 * count]
        names = [f"{self.words[a]} {self.words[b]}" for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
        digits = rng.choice([5, 6, 6, 6, 7], size=count)
        values = [str(rng.integers(10 ** (d - 1), 10**d)) for d in digits]
        return names, values

    def _weigh_needle(self, key: str, value: str) -> tuple[list[int], list[float]]:
        tokens = self.needle(key, value)
        digits = len(self.encode(f" {value}"))
        weights = [TEMPLATE] * (len(tokens) - digits - 1) + [IGNORE] * digits + [TEMPLATE]
        # Which key comes next cannot be known.
        weights[3:5] = [IGNORE, IGNORE]
        return tokens, weights

    def _ask(self, key: str, value: str) -> tuple[list[int], list[float]]:
        question = self.question(key)
        answer = self.encode(f" {value}") + self.encode(".")
        weights = [TEMPLATE] * len(question)
        words = [i for i, t in enumerate(question) if t in self.encode(" " + key.split(" ")[0])]
        weights[words[0]] = weights[words[0] + 1] = IGNORE
        return question + answer, weights + [ANSWER] * len(answer)

    def retrieval(self, length: int, count: int, asked: int, dense: bool, rng: np.random.Generator) -> Any:
        """`count` needles in text (or nothing but needles, if dense), `asked` of them asked for at the end."""
        keys, values = self._pairs(count, rng)
        facts = [self._weigh_needle(k, v) for k, v in zip(keys, values, strict=True)]
        chosen = rng.permutation(count)[:asked]
        asks = [self._ask(keys[i], values[i]) for i in chosen]
        tail = [t for tokens, _ in asks for t in tokens] + [EOS]
        tail_weights = [w for _, weights in asks for w in weights] + [TEMPLATE]
        taken = 1 + len(tail) + sum(len(tokens) + 1 for tokens, _ in facts)
        room = length - taken
        tokens: list[int] = [BOS]
        weights: list[float] = [IGNORE]
        newline = self.encode("\n")
        if dense:
            room = 0
        if room < 0:
            raise ValueError(f"{count} needles do not fit into {length} tokens")
        passage = self.text(max(room, 2), rng)[:room]
        passage = np.where(passage == EOS, newline[0], passage)
        places = self.boundaries(passage) if room > 2 else np.zeros(1, dtype=np.int64)
        targets = np.sort(rng.random(count)) * room
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
        return tokens + tail, weights + tail_weights

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
            asked = min(count, 1 + int(rng.integers(0, max(1, min(16, (length - 16 * count) // 32)))))
            tokens, weights = self.retrieval(length, max(count, 1), asked, dense, rng)
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
