"""Text to hide things in, and to measure perplexity on: the package's own, noise, or any file."""

from __future__ import annotations

import gzip
import hashlib
import random
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

from gossamer.profiles.files import read_text

__all__ = ["Haystack", "load_haystack", "noise"]

_NOISE = (
    "The road is dry and the air is still. A cart stands by the wall. The clock shows a quarter past. "
    "Nobody is in the yard. It is a day like the others.\n"
)


@dataclass(frozen=True)
class Haystack:
    """A text and where it comes from.

    Fields:
        name: ``package``, ``noise`` or a path.
        text: plain text; never repeated to fill a length, except ``noise``, which is made of repetition.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        if len(self.text.strip()) < 100:
            raise ValueError(
                f"the haystack {self.name!r} has {len(self.text.strip())} characters of text, at least 100 are needed; "
                "give a longer file"
            )

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def short_name(self) -> str:
        """The last part of the name."""
        return self.name.replace("\\", "/").rpartition("/")[2]

    @cached_property
    def lowered(self) -> str:
        return self.text.lower()

    def to_dict(self) -> dict[str, str | int]:
        return {"name": self.name, "sha256": self.sha256, "characters": len(self.text)}

    def passage(self, characters: int, rng: random.Random) -> str:
        """Text from a random line's start on, of at least `characters` characters.

        Raises:
            ValueError: the text is shorter.
        """
        if characters > len(self.text):
            raise ValueError(
                f"the haystack {self.name!r} has {len(self.text):,} characters, {characters:,} are needed; "
                "give a longer text or ask for a smaller length"
            )
        start = rng.randrange(len(self.text) - characters + 1)
        return self.text[self.text.rfind("\n", 0, start) + 1 :]


def noise(characters: int) -> Haystack:
    """One line of five short sentences, repeated (RULER's easiest haystack, 2404.06654, in words of our own)."""
    return Haystack("noise", _NOISE * (characters // len(_NOISE) + 2))


def load_haystack(name: str = "package") -> Haystack:
    """``package``: source and documentation of gossamer; or a UTF-8 text file.

    The package's text is a snapshot that came with version 0.1 and stays as it is, so that results can be compared
    between versions. No fact or question of a task occurs in it. It has some 570,000 characters.

    Raises:
        ValueError: no such file, or not UTF-8 text.
    """
    if name == "package":
        data = (resources.files("gossamer.evaluate") / "haystack.txt.gz").read_bytes()
        return Haystack(name, gzip.decompress(data).decode())
    try:
        return Haystack(name.encode("utf-8", "replace").decode(), read_text(name))
    except UnicodeDecodeError as error:
        raise ValueError(f"the haystack {name} is not UTF-8 text; convert it, or give another file") from error
    except OSError as error:
        raise ValueError(f"cannot read the haystack {name}: {error.strerror}; give a text file or 'package'") from error
