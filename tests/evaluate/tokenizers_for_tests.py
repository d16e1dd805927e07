"""A tokenizer that needs no files, and a text to hide things in."""

from __future__ import annotations

import random
import re

from gossamer.evaluate.haystack import Haystack


class WordTokenizer:
    """One token for each word, mark or line end, and one in front; text comes back as it was."""

    pad_token_id = 0
    eos_token_id = 1

    def __init__(self) -> None:
        self.pieces: list[str] = ["<pad>", "<eos>", "<bos>"]
        self.ids: dict[str, int] = {}

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids = [2]
        for piece in re.findall(r"\s?\w+|\s?[^\w\s]|\s", text):
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
            ids.append(self.ids[piece])
        return {"input_ids": ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.pieces[i] for i in ids if i > 2 and i < len(self.pieces))


def make_text(lines: int = 3000, seed: int = 0) -> str:
    rng = random.Random(seed)
    names = ["plan", "mask", "tile", "block", "query", "column"]
    return "\n".join(" ".join(rng.choices(names, k=9)) + ". And so on. Then more" for _ in range(lines))


HAYSTACK = Haystack("test", make_text())
