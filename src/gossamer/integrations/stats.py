"""What the layers of an enabled model did, and what went through them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from torch import Tensor

from gossamer.attention import CallRecord
from gossamer.call import AttentionCall

__all__ = ["LayerStats", "Observation", "Stats"]


@dataclass(frozen=True, slots=True)
class Observation:
    """What went into and came out of one call with several queries, for `Handle.observe`. Read, do not write.

    Fields:
        call: with ``layer``, the model's index of it.
        out: ``[B, H, S, Dv]``.
    """

    call: AttentionCall
    out: Tensor


@dataclass(slots=True)
class LayerStats:
    """What one layer's attention did since `enable` or `Handle.reset`.

    Fields:
        layer: the model's index of it; None collects the modules that have no ``layer_idx``.
        calls, sparse_calls, dense_calls: a batch is one call. A compiled decode step is not counted.
        density: share of the dense causal pairs that was computed, over all calls with more than one query; 1.0 if
            there were none.
        sparse_steps: sparse calls of one query, as a decode step has.
        step_density: share of the keys that calls of one query read; 1.0 if there were none.
        plan_seconds, attention_seconds: wall-clock, estimation and execution.
        fallbacks: reason of each dense call and how often; a method that is itself dense gives none.
        executors: what ran, and how often.
    """

    layer: int | None
    sparse_calls: int = 0
    dense_calls: int = 0
    plan_seconds: float = 0.0
    attention_seconds: float = 0.0
    fallbacks: dict[str, int] = field(default_factory=dict)
    executors: dict[str, int] = field(default_factory=dict)
    sparse_steps: int = 0
    _computed: float = 0.0
    _pairs: float = 0.0
    _read: float = 0.0
    _keys: float = 0.0

    @property
    def calls(self) -> int:
        return self.sparse_calls + self.dense_calls

    @property
    def density(self) -> float:
        return self._computed / self._pairs if self._pairs else 1.0

    @property
    def step_density(self) -> float:
        return self._read / self._keys if self._keys else 1.0

    def merge(self, other: LayerStats) -> None:
        """Count what another row of the same layer did, too."""
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if isinstance(mine, dict):
                for name, count in theirs.items():
                    mine[name] = mine.get(name, 0) + count
            elif part.name != "layer":
                setattr(self, part.name, mine + theirs)

    def add(self, call: CallRecord) -> None:
        if call.path == "sparse":
            self.sparse_calls += 1
        else:
            self.dense_calls += 1
        self.plan_seconds += call.plan_seconds
        self.attention_seconds += call.attention_seconds
        self.executors[call.executor] = self.executors.get(call.executor, 0) + 1
        if call.reason is not None:
            self.fallbacks[call.reason] = self.fallbacks.get(call.reason, 0) + 1
        if call.query_len > 1:
            pairs = call.query_len * (call.key_len - (call.query_len - 1) / 2)
            self._pairs += pairs
            self._computed += call.density * pairs
        else:
            self.sparse_steps += call.path == "sparse"
            self._keys += call.key_len
            self._read += call.density * call.key_len


@dataclass(frozen=True, slots=True)
class Stats:
    """The layers of a model, in order; prints as a table. Its column ``read`` is `LayerStats.step_density`."""

    layers: tuple[LayerStats, ...]

    def __iter__(self) -> Iterator[LayerStats]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def fallbacks(self) -> dict[str, int]:
        """Reasons of the dense calls of all layers, the most frequent first."""
        total: dict[str, int] = {}
        for row in self.layers:
            for reason, count in row.fallbacks.items():
                total[reason] = total.get(reason, 0) + count
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    def __str__(self) -> str:
        if not self.layers:
            return "no attention calls recorded"
        steps = any(row.sparse_steps for row in self.layers)
        read = f" {'read':>5}" if steps else ""
        lines = [
            f"{'layer':>5} {'calls':>6} {'sparse':>6} {'density':>7}{read} {'plan s':>8} {'attn s':>8}  dense because"
        ]
        for row in self.layers:
            name = "-" if row.layer is None else str(row.layer)
            why = ", ".join(f"{reason} x{count}" for reason, count in row.fallbacks.items())
            read = f" {row.step_density:>5.3f}" if steps else ""
            lines.append(
                f"{name:>5} {row.calls:>6} {row.sparse_calls:>6} {row.density:>7.3f}{read} {row.plan_seconds:>8.3f} "
                f"{row.attention_seconds:>8.3f}  {why}".rstrip()
            )
        return "\n".join(lines)
