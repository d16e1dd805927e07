"""The methods that are tested, each in one line: a new one joins here, and meets every dtype, shape and situation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gossamer import methods
from gossamer.methods import AShape, BlockSparse, Dense, MaxRelative, Method, VerticalSlash


@dataclass(frozen=True)
class Listed:
    """A method as it is tested.

    Fields:
        name, small: with budgets small enough that plans are sparse from a few hundred tokens on. A field that differs
            between heads is a function of their number.
        full: the same method with a budget for everything.
        by_block: each query block is planned by itself, but for a tail that belongs to the call.
        tail: rows of that tail, for a share of query heads.
    """

    name: str
    small: dict[str, Any]
    full: dict[str, Any]
    by_block: bool
    tail: Callable[[int], int] = lambda share: 0

    @property
    def id(self) -> str:
        exact = self.small.get("exact")
        return (
            self.name
            + ("-share" if "share" in self.small else "")
            + ("" if exact is None else "-exact" if exact else "-blocks")
            + ("-plus" if self.small.get("plus") else "")
            + ("-stride" if self.small.get("stride") and self.name == "longgen" else "")
        )

    def create(self, heads: int, *, full: bool = False) -> Method:
        fields = self.full if full else self.small
        return methods.create(self.name, **{k: v(heads) if callable(v) else v for k, v in fields.items()})


_SLASH, _OTHER_SLASH = VerticalSlash(60, 300), VerticalSlash(40, 64)
_MIXED: list[Any] = [_SLASH, AShape(9, 150), BlockSparse(4, 32), _OTHER_SLASH, MaxRelative(0.97, 1, 2, 64)]
_ALL: list[Any] = [VerticalSlash(10_000, 64), AShape(1, 10_000), BlockSparse(1000, 32), Dense(), MaxRelative(0.0)]


def by_head(values: list[Any]) -> Callable[[int], Any]:
    """A field ``[layer][head]`` of one layer, the values in turn."""
    return lambda heads: [[values[head % len(values)] for head in range(heads)]]


_GATES = {"gates": by_head([0.2, 0.9, 0.4]), "sparsity": 0.7}
_BLOCKWISE = {"sink": 9, "local": 150, "block": 64, "exact": False}
_SPANS = {"alphas": by_head([0, 60.5, -20]), "betas": by_head([0.1, 0, 0.2]), "least": 64, "new_tokens": 20}
_NONE: dict[str, Any] = {}
_SHARES = {"error": 0.8, "sink": 4, "window": 40, "group": 2, "block": 32, "threshold": 0.5}
_SLASHES = {"vertical_size": 60, "slash_size": 300}
_RELATIVE = {"alpha": 0.99, "sink_blocks": 1, "window_blocks": 2, "last_rows": 256, "block_q": 32, "block_k": 64}
_ANCHOR = {"theta": 1.0, "step": 2, "first_blocks": 1, "block": 32}
_PBS = {"threshold": 0.4, "segment": 64, "block": 32}
_FLASH = {"alpha": 0.99, "sink_blocks": 1, "window_blocks": 2, "last_tiles": 2, "block_k": 64}
_SIMILAR = {"similarity": 0.02, "p": 0.3, "block_q": 32, "block_k": 32}
_STRIDED = {"sink": 0, "recent": 1, "stride": 5, "offset": 2, "block": 32}
_STEM = {"share": 0.05, "extra": 1, "decay": 0.5, "full_blocks": 0, "dense_layers": 0, "block": 32, "stride": 4}


def _tail(share: int) -> int:
    return -(-256 // share)


LISTED = [
    Listed("dense", _NONE, _NONE, by_block=True),
    Listed("auto", _SHARES, _SHARES | {"error": 0.0}, by_block=False),
    Listed("a_shape", {"sink": 9, "window": 150}, {"window": 10_000}, by_block=True),
    Listed("tri_shape", {"sink": 9, "window": 150, "last": 100}, {"window": 10_000}, True, lambda share: 100),
    Listed("triangle_mix", {"sink": 9, "window": 150, "last": 100, "first_layer": 0}, {}, True, lambda share: 100),
    Listed("vertical_slash", _SLASHES, {"slash_size": 10_000}, by_block=False),
    Listed("vertical_slash", _SLASHES | {"exact": True}, {"slash_size": 10_000, "exact": True}, by_block=False),
    Listed("mtraining", {"p": 0.6}, {"p": 1.0}, by_block=False),
    Listed("block_sparse", {"blocks": 4}, {"blocks": 1000}, by_block=True),
    Listed("minference", _SLASHES, {"vertical_size": 10_000}, by_block=False),
    Listed("grid", {"stride": 29, "hline": False}, {"stride": 1}, by_block=False),
    Listed("mminference", {"patterns": [_SLASH]}, {"patterns": [VerticalSlash(10_000, 64)]}, by_block=False),
    Listed("flexprefill", {"gamma": 0.4, "tau": 0.3, "min_budget": 32, "block": 32}, {"gamma": 1.0}, by_block=False),
    Listed("xattention", {"threshold": 0.5, "stride": 8, "block": 32}, {"threshold": 1.0}, by_block=True),
    Listed("anchor_attention", _ANCHOR, {"theta": math.inf}, by_block=True),
    Listed("vec_attention", {"threshold": 0.5, "block": 32}, {"threshold": 0.0}, by_block=True),
    Listed("max_relative", _RELATIVE, {"alpha": 0.0}, True, _tail),
    Listed("flash_prefill", _FLASH, _FLASH | {"alpha": 0.0}, True, _tail),
    Listed("sparge", _SIMILAR, {"similarity": 0.0, "p": 1.0}, by_block=False),
    Listed("prism", {"p_high": 0.3, "p_low": 0.3, "block": 32}, {"p_high": 1.0, "p_low": 1.0}, by_block=False),
    Listed("stem", _STEM, _STEM | {"share": 1.0}, by_block=False),
    Listed("cosa", {"p": 0.3, "block": 32, "stride": 8}, {"p": 1.0}, by_block=True),
    Listed("pbs", _PBS, {"threshold": 1.0}, by_block=False),
    Listed("pbs", _PBS | {"plus": True, "shared": False}, {"threshold": 1.0, "plus": True}, by_block=False),
    Listed("duo_attention", _GATES | {"sink": 9, "recent": 150}, _GATES | {"recent": 10_000}, by_block=True),
    Listed("lserve", _GATES | {"sink": 9, "local": 150}, _GATES | {"local": 10_000}, by_block=True),
    Listed("lserve", _GATES | _BLOCKWISE, _GATES | {"local": 10_000, "exact": False}, by_block=True),
    Listed("moa", _SPANS, _SPANS | {"betas": by_head([1.0])}, by_block=False),
    Listed("longgen", {"recent": 2, "block": 32}, {"recent": 1000}, by_block=True),
    Listed("longgen", _STRIDED, _STRIDED | {"stride": 1, "offset": 0}, by_block=True),
    Listed("seer_attention", {"threshold": 0.08}, {"threshold": 0.0}, True, lambda share: 65),
    Listed("seer_attention", {"share": 0.3}, {"share": 1.0}, by_block=False),
    Listed("corrected", {"base": MaxRelative(**_RELATIVE), "skip": 1.0}, {"base": MaxRelative(0.0)}, True, _tail),
    Listed("per_head", {"layers": by_head(_MIXED)}, {"layers": by_head(_ALL)}, by_block=False),
]
