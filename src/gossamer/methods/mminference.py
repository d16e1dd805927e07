"""MMInference: patterns for the queries of each modality, or for each pair of modalities, in prompts with images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.layout import TEXT, ModalityLayout
from gossamer.methods.a_shape import AShape
from gossamer.methods.base import Method, Settings
from gossamer.methods.grid_lines import GridLines
from gossamer.methods.grouped_rows import GroupedRow, joined
from gossamer.methods.segment_patterns import Chosen, choose
from gossamer.methods.vertical_slash import VerticalSlash
from gossamer.plan import SparsePlan

__all__ = ["BOUNDARIES", "MMInference", "groups_of"]

BOUNDARIES = ("none", "q", "2d")
COLUMN_GROUP = 4
_PATTERNS = (AShape, VerticalSlash, GridLines)


@dataclass(frozen=True)
class MMInference(Method):
    """MMInference (2504.16083) for heads of models that read images and videos: where modalities meet.

    Attention between modalities breaks what is regular inside of one. Of each head:

    * ``none``: no boundary, or a K-boundary, along which rows stay as they are: one pattern for the whole prompt.
    * ``q`` (Q-boundary, Algorithm 2): queries are grouped by modality, and each group has a pattern over all keys,
      found from its own last queries.
    * ``2d`` (2D-boundary, Algorithm 3): keys are grouped, too, and each pair of a query's and a key's modality has a
      pattern; one softmax runs over all of them.

    Patterns are `AShape`, `VerticalSlash` or `GridLines`; distances, lines and causality go by the original positions.
    Which head has which, a search finds (`gossamer.calibrate.modalities`) and a profile holds
    (`gossamer.methods.PerHead`).

    Fields:
        boundary: one of `BOUNDARIES`.
        patterns: one for everything; or of ``q`` two, for the queries of text and for those of other modalities; or of
            ``2d`` four: text to text, text to others, others to text, others to others.

    A call whose layout does not say which token is of which modality (`gossamer.layout.ModalityLayout`) is all text:
    its pattern is the first one. Images and videos are one modality to it, as in the paper's figures.

    Points left open by the paper, as decided here: the default is ``q`` with the budget that MInference's code has for
    a head without a pattern. What a group's last queries see is a softmax over all keys, in ``2d`` too, of which a pair
    takes its part. The 30 first columns and the two nearest bands of a `VerticalSlash` are kept in each pair, the first
    keys being those of its modality. In groups an `AShape` has its window by whole key blocks, and a `GridLines` its
    columns and slashes as single keys and its horizontal lines as blocks of queries; every query keeps its own key. A
    block of 64 queries that holds the end of one group and the beginning of the next has what either keeps; single keys
    are listed for 4 such blocks together, but for each where a pattern is a grid.
    """

    name: ClassVar[str] = "mminference"
    alone: ClassVar[bool] = True
    modal: ClassVar[bool] = True
    candidates: ClassVar[Settings] = tuple(
        {"boundary": boundary, "patterns": (VerticalSlash(columns, slashes),)}
        for boundary in BOUNDARIES
        for columns, slashes in ((128, 512), (1000, 1024), (1000, 4096))
    )
    boundary: str = "q"
    patterns: Sequence[Method] = (VerticalSlash(),)

    def __post_init__(self) -> None:
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"{self.name}.boundary must be one of {', '.join(BOUNDARIES)}, got {self.boundary!r}")
        patterns = tuple(self.patterns)
        object.__setattr__(self, "patterns", patterns)
        for pattern in patterns:
            if not isinstance(pattern, _PATTERNS) or (isinstance(pattern, VerticalSlash) and pattern.exact):
                given = pattern.name if isinstance(pattern, Method) else type(pattern).__name__
                raise TypeError(
                    f"{self.name}.patterns must be a_shape, vertical_slash (with exact=False) or grid, got {given}"
                )
        many = {"none": 1, "q": 2, "2d": 4}[self.boundary]
        if len(patterns) not in (1, many):
            raise ValueError(
                f"{self.name}.patterns must be 1 or {many} for boundary={self.boundary!r}, got {len(patterns)}"
            )

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset[str]().union(*(pattern.needs for pattern in self.patterns))

    def lacks(self, call: AttentionCall) -> str | None:
        if self._plain(call):
            return self.patterns[0].lacks(call)
        return call.lacks({"causal", "whole prompt"})

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"patterns": [pattern.to_dict() for pattern in self.patterns]}

    def least_density(self, call: AttentionCall) -> float:
        taking_part = self.patterns[:1] if self._plain(call) else self.patterns
        return min(pattern.least_density(call) for pattern in taking_part)

    def plan(self, call: AttentionCall) -> SparsePlan:
        layout = call.layout
        if self._plain(call) or not isinstance(layout, ModalityLayout):
            return self.patterns[0].plan(call)
        rows = [self._row(call, row, groups_of(layout, row, call)) for row in range(call.batch)]
        group = 1 if any(isinstance(pattern, GridLines) for pattern in self.patterns) else COLUMN_GROUP
        return joined(call, rows, group, ordered_keys=self.boundary == "2d")

    def _plain(self, call: AttentionCall) -> bool:
        return self.boundary == "none" or not isinstance(call.layout, ModalityLayout)

    def pattern(self, of_query: int, of_key: int) -> Method:
        """Of queries and keys of two groups, 0 for text and 1 for other modalities."""
        if len(self.patterns) == 1:
            return self.patterns[0]
        return self.patterns[of_query if self.boundary == "q" else 2 * of_query + of_key]

    def _row(self, call: AttentionCall, row: int, groups: Tensor) -> GroupedRow:
        pairs: dict[tuple[int, int], Chosen] = {}
        grouped = self.boundary == "2d"
        keys = groups[: int(call.extent.key_count[row])]
        for of_query in sorted(set(groups[: int(call.extent.query_count[row])].tolist())):
            for of_key in sorted(set(keys.tolist())) if grouped else (0,):
                theirs = keys == of_key if grouped else torch.ones_like(keys, dtype=torch.bool)
                pattern = self.pattern(of_query, of_key)
                pairs[of_query, of_key] = choose(call, row, pattern, groups == of_query, theirs)
        return GroupedRow(call, row, groups, pairs, grouped_keys=grouped)


def groups_of(layout: ModalityLayout, row: int, call: AttentionCall) -> Tensor:
    """The group of each position of a batch row, int64 on the CPU: 0 for text, 1 for other modalities."""
    count = max(int(call.extent.query_count[row]), int(call.extent.key_count[row]))
    return (layout.of_row(row, count) != TEXT).long()
