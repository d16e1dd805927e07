"""Words that keys, names and lists are made of: lower-case English nouns and adjectives."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["KEY_WORDS", "draw_compounds", "draw_names", "draw_numbers"]

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


def draw_names(text: str, count: int, rng: random.Random, words: Sequence[str] = KEY_WORDS) -> list[str]:
    """`count` names of two words; no word is used twice and no name occurs in the (lower-case) text.

    Raises:
        ValueError: too few words.
    """
    if 2 * count > len(words):
        raise ValueError(
            f"{count} names need {2 * count} different words, {len(words)} are known; ask for at most {len(words) // 2}"
        )
    for _ in range(100):
        drawn = rng.sample(list(words), 2 * count)
        names = [f"{first} {second}" for first, second in zip(drawn[::2], drawn[1::2], strict=True)]
        if not any(name in text for name in names):
            return names
    raise ValueError("the haystack contains nearly every name that two words can form; give another text")


def draw_compounds(count: int, rng: random.Random, words: Sequence[str] = KEY_WORDS) -> list[str]:
    """`count` different compounds such as ``amber-falcon``.

    Raises:
        ValueError: more than can be formed.
    """
    possible = len(words) * (len(words) - 1)
    if count > possible:
        raise ValueError(f"{count:,} different compounds were asked for, {possible:,} can be formed; use fewer")
    chosen: list[str] = []
    for number in rng.sample(range(possible), count):
        first, second = divmod(number, len(words) - 1)
        chosen.append(f"{words[first]}-{words[second + (second >= first)]}")
    return chosen


def draw_numbers(text: str, count: int, digits: int, rng: random.Random) -> list[str]:
    """`count` different numbers of `digits` digits that do not occur in the text.

    Raises:
        ValueError: too few such numbers.
    """
    numbers: list[str] = []
    for _ in range(100 * count + 1000):
        if len(numbers) == count:
            return numbers
        number = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if number not in numbers and number not in text:
            numbers.append(number)
    raise ValueError(f"could not draw {count} numbers of {digits} digits that are not in the haystack; use more digits")
