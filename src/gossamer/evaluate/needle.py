"""Needle in a haystack: facts hidden in any text, asked for at its end, with any tokenizer.

A needle is one sentence with a two-word key and a number; the question repeats the sentence up to the number,
so that the words right before the answer are the same in both places:

    ... some text.
    The number for amber falcon is 483726.
    more text ...

    What is the number for amber falcon? The number for amber falcon is

    sample = make_sample(haystack, tokenizer, length=8192, needles=8, rng=random.Random(0))
    generated = ...  # continue sample.prompt(0) greedily for about eight tokens
    exact_match(generated, sample.answers[0])

Only the standard library is imported here; the tokenizer is the caller's.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NEEDLE = "The number for {key} is {value}."
QUESTION = "\n\nWhat is the number for {key}? The number for {key} is"

KEY_WORDS: tuple[str, ...] = tuple(
    """
    acorn alder almond amber anchor antler apple apricot arrow aspen atlas autumn badger bamboo banjo barley
    basil beacon beaver birch bison blossom bramble breeze bronze brook buckle butter cactus camel candle
    canyon caramel carbon castle cedar cello cherry cider cinder citrus clover cobalt cobra coconut comet
    copper coral cotton cougar coyote crane crater cricket crimson crystal cypress dagger dahlia daisy dancer
    delta desert diamond dolphin dragon drum eagle ebony echo eclipse elder ember emerald falcon feather
    fennel fern ferret fiddle fjord flame flint flute forest fossil fountain fox galaxy garden garlic garnet
    gazelle geyser ginger glacier globe goblet golden goose granite grape gravel grotto guitar hammer harbor
    harvest hazel helmet hermit heron hickory hollow honey hornet indigo iris island ivory jackal jaguar
    jasmine jasper jelly jigsaw juniper jungle kettle koala lagoon lantern larch laurel lava lavender lemon
    leopard lilac lily linen lion lizard llama lobster locust lotus lunar lynx magnet magpie mango maple
    marble marigold meadow melon mercury meteor mint mirror mitten monsoon moose mosaic moss mustard nectar
    needle nettle nickel nutmeg oak oasis ocean olive onyx opal orange orchid otter owl oyster panda panther
    papaya parrot peach peacock pearl pebble pelican penguin pepper pigeon pine planet plum pollen pony poppy
    prairie prism puffin pumpkin puzzle quail quartz rabbit radish raven reef ribbon river robin rocket rose
    ruby saddle saffron sage salmon sapphire satin scarlet shadow shark silver sparrow spider spruce squid
    starling stone storm sugar summer sunset swallow tango teapot temple thistle thunder tiger timber topaz
    torch trumpet tulip tundra turtle umber valley vanilla velvet violet violin walnut walrus whale willow
    window winter wizard wolf wombat yarrow zebra zephyr zinnia
    """.split()  # noqa: SIM905
)

_BOUNDARY = re.compile(r"\n|[.!?](?= )")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class NeedleSample:
    """One haystack with its needles.

    context: the text with all needles in it, without a question.
    questions: one per needle, in the order in which the needles lie in the text; each starts with an empty
        line and ends right before the answer.
    answers: the numbers, as digits.
    keys: the two-word keys.
    depths: fraction of the haystack's characters before each needle.
    length: tokens of the longest prompt, special tokens of the tokenizer included.
    """

    context: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    keys: tuple[str, ...]
    depths: tuple[float, ...]
    length: int

    def prompt(self, index: int = 0) -> str:
        """The text with question `index` at its end; the model should continue with " " + answers[index]."""
        return self.context + self.questions[index]


def count_tokens(tokenizer: Any, text: str) -> int:
    """Number of tokens of text, the tokenizer's special tokens included."""
    return len(tokenizer(text)["input_ids"])


def draw_keys(haystack: str, count: int, rng: random.Random, words: Sequence[str] = KEY_WORDS) -> list[str]:
    """`count` keys of two words; no word is used twice and no key occurs in the haystack.

    Raises ValueError if there are too few words.
    """
    if 2 * count > len(words):
        raise ValueError(f"{count} needles need {2 * count} different words, {len(words)} were given")
    lowered = haystack.lower()
    for _ in range(100):
        drawn = rng.sample(list(words), 2 * count)
        keys = [f"{first} {second}" for first, second in zip(drawn[::2], drawn[1::2], strict=True)]
        if not any(key in lowered for key in keys):
            return keys
    raise ValueError("the haystack contains nearly every key that the given words can form; give other words")


def draw_values(haystack: str, count: int, digits: int, rng: random.Random) -> list[str]:
    """`count` different numbers of `digits` digits that do not occur in the haystack."""
    values: list[str] = []
    for _ in range(100 * count + 1000):
        if len(values) == count:
            return values
        value = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if value not in values and value not in haystack:
            values.append(value)
    raise ValueError(f"could not draw {count} numbers of {digits} digits that are not in the haystack; use more digits")


def make_sample(
    haystack: str,
    tokenizer: Any,
    length: int,
    needles: int,
    rng: random.Random,
    *,
    digits: int = 6,
    words: Sequence[str] = KEY_WORDS,
    depths: Sequence[float] | None = None,
) -> NeedleSample:
    """Hide `needles` numbers in a passage of `haystack` so that each prompt has at most, and nearly, `length` tokens.

    haystack: any text; a passage of it that starts at a random line is used, and never repeated to fill the length.
    tokenizer: called as tokenizer(text)["input_ids"]; any Hugging Face tokenizer will do.
    length: tokens of the longest prompt (context and one question), special tokens included.
    rng: the only source of randomness.
    digits: digits of each number.
    words: what keys are made of; two words for each key.
    depths: where the needles go, as fractions of the passage in [0, 1]; drawn uniformly where not given.

    Needles stand at ends of lines or sentences. Raises ValueError if the arguments cannot be met: a length
    too short for the needles, a haystack too short for the length, or too few words.
    """
    if needles < 1:
        raise ValueError(f"needles must be at least 1, got {needles}")
    if digits < 2:
        raise ValueError(f"digits must be at least 2, got {digits}")
    if depths is not None and (len(depths) != needles or not all(0 <= d <= 1 for d in depths)):
        raise ValueError(f"depths must be {needles} fractions in [0, 1], got {list(depths)}")
    keys = draw_keys(haystack, needles, rng, words)
    values = draw_values(haystack, needles, digits, rng)
    chosen = sorted(rng.random() for _ in keys) if depths is None else list(depths)
    facts = [NEEDLE.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    questions = [QUESTION.format(key=key) for key in keys]

    overhead = count_tokens(tokenizer, "\n".join(facts) + max(questions, key=lambda q: count_tokens(tokenizer, q)))
    if length < overhead + 16:
        raise ValueError(
            f"length {length} is too short: {needles} needle(s) and the question take {overhead} tokens, "
            f"ask for at least {overhead + 16}"
        )
    start = _draw_start(haystack, tokenizer, length - overhead, rng)
    available = haystack[start:]

    def tokens_with(size: int) -> int:
        context, _ = _insert(available[:size], facts, chosen)
        return max(count_tokens(tokenizer, context + question) for question in questions[:1] + questions[-1:])

    size = _largest_size(tokens_with, len(available), length)
    context, placed = _insert(available[:size], facts, chosen)
    total = max(count_tokens(tokenizer, context + question) for question in questions)
    while total > length:
        size -= max(1, 2 * (total - length))
        context, placed = _insert(available[:size], facts, chosen)
        total = max(count_tokens(tokenizer, context + question) for question in questions)
    order = sorted(range(needles), key=lambda i: placed[i])
    return NeedleSample(
        context=context,
        questions=tuple(questions[i] for i in order),
        answers=tuple(values[i] for i in order),
        keys=tuple(keys[i] for i in order),
        depths=tuple(placed[i] for i in order),
        length=total,
    )


def exact_match(generated: str, answer: str) -> bool:
    """Whether the first number in the generated text is exactly the answer."""
    found = _NUMBER.search(generated)
    return found is not None and found.group() == answer


def _draw_start(haystack: str, tokenizer: Any, tokens: int, rng: random.Random) -> int:
    """Start of a line such that at least `tokens` tokens follow."""
    # The last position from which the text is long enough is found backwards, with a fifth to spare.
    size = 4 * tokens
    while size < len(haystack) and count_tokens(tokenizer, haystack[-size:]) < tokens:
        size *= 2
    if size >= len(haystack):
        total = count_tokens(tokenizer, haystack)
        if total < tokens:
            raise ValueError(
                f"the haystack has {total} tokens, {tokens} are needed beside the needles; give a longer text or a "
                f"smaller length"
            )
        return 0
    limit = len(haystack) - size
    start = rng.randrange(limit + 1)
    newline = haystack.rfind("\n", 0, start)
    return newline + 1


def _largest_size(tokens_with: Any, available: int, length: int) -> int:
    """The largest number of characters whose prompt fits, by bisection from an estimate."""
    low, high = 0, min(available, length)
    while high < available and tokens_with(high) <= length:
        low, high = high, min(available, 2 * high)
    if high == available and tokens_with(high) <= length:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if tokens_with(middle) <= length:
            low = middle
        else:
            high = middle
    return low


def _insert(passage: str, facts: Sequence[str], depths: Sequence[float]) -> tuple[str, list[float]]:
    """The passage with each fact at the line or sentence end nearest before its depth, and the depths that resulted."""
    ends = [0, *(match.end() for match in _BOUNDARY.finditer(passage))]
    taken: dict[int, list[int]] = {}
    placed = []
    low = 0
    for i, depth in enumerate(depths):
        target = depth * len(passage)
        low, high = 0, len(ends) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if ends[middle] <= target:
                low = middle
            else:
                high = middle - 1
        position = ends[low]
        taken.setdefault(position, []).append(i)
        placed.append(position / max(1, len(passage)))
    pieces = []
    previous = 0
    for position in sorted(taken):
        pieces.append(passage[previous:position])
        at_line = position == 0 or passage[position - 1] == "\n"
        pieces.extend(f"{facts[i]}\n" if at_line else f" {facts[i]}" for i in taken[position])
        previous = position
    pieces.append(passage[previous:])
    return "".join(pieces), placed
