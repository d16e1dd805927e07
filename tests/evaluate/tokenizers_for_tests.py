"""A tokenizer that needs no files, and a text to hide things in."""

from __future__ import annotations

import random
import re
import zlib

from gossamer.evaluate.haystack import Haystack


class WordTokenizer:
    """One token for each word, mark or line end, and one in front. A token's text is its number: ``w17``."""

    pad_token_id = 0
    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        pieces = re.findall(r"\s?\w+|\s?[^\w\s]|\s", text)
        return {
            "input_ids": [
                *([2] if add_special_tokens else []),
                *(3 + zlib.crc32(piece.encode()) % 2900 for piece in pieces),
            ]
        }

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(f" w{i}" for i in ids if i > 2)


def make_text(lines: int = 3000, seed: int = 0) -> str:
    rng = random.Random(seed)
    names = ["plan", "mask", "tile", "block", "query", "column"]
    return "\n".join(" ".join(rng.choices(names, k=9)) + ". And so on. Then more" for _ in range(lines))


def make_code(functions: int = 500, seed: int = 0) -> str:
    """Python source: functions with docstrings."""
    rng = random.Random(seed)
    names = ["plan", "mask", "tile", "block", "query", "column"]
    return "\n\n".join(
        f'def {"_".join(rng.choices(names, k=2))}_{i}(a: int, b: str = "(") -> None:\n'
        f'    """Makes number {rng.randrange(10**6)} of the {rng.choice(names)}s.\n\n    More."""\n    return a'
        for i in range(functions)
    )


HAYSTACK = Haystack("test", make_text())
CODE = Haystack("code", make_code())
