"""Linear layers that take less memory or time: pruned, of one bit, in int8. `gossamer.compress` puts them into a model.

`gossamer.enable` leaves linear layers alone. Importing this package lets transformers load models that were saved with
such layers, where transformers is installed.
"""

from __future__ import annotations

import importlib.util

from gossamer.compressed.billm import Binarised, binarise
from gossamer.compressed.chunks import prefill
from gossamer.compressed.hessian import Hessian
from gossamer.compressed.int8 import InputScale, Int8Linear
from gossamer.compressed.packed import OneBitLinear, SparseLinear
from gossamer.compressed.recipes import RECIPES, BiLLM, Int8, Magnitude, Recipe, SparseGPT, recipe_of
from gossamer.compressed.schedule import ChunkGraph, Schedule, Stage
from gossamer.compressed.sparsegpt import Pattern, prune

if importlib.util.find_spec("transformers") is not None:
    from gossamer.compressed import model as model
    from gossamer.compressed.cards import Card as Card
    from gossamer.compressed.cards import card as card
    from gossamer.compressed.measures import Measures as Measures

__all__ = [
    "RECIPES",
    "BiLLM",
    "Binarised",
    "ChunkGraph",
    "Hessian",
    "InputScale",
    "Int8",
    "Int8Linear",
    "Magnitude",
    "OneBitLinear",
    "Pattern",
    "Recipe",
    "Schedule",
    "SparseGPT",
    "SparseLinear",
    "Stage",
    "binarise",
    "prefill",
    "prune",
    "recipe_of",
]
