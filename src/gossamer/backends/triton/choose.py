"""Chosen candidates as lists: see `gossamer.backends.torch.choose`, the definition.

A choice stays on the device as bits until `finish` or `ListWriter.build` fetches how large the lists are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.backends.triton.config import power_of_two
from gossamer.backends.triton.device import check_device, fetch, flags_on, integers_on, kernels, run
from gossamer.backends.triton.pairs import count, count_on_cpu, countable, pairs_of_bits
from gossamer.plan import SparsePlan, ceil_div, on_device
from gossamer.rules import Candidates, RelativeToMax, Rule, TopK, per_head

__all__ = ["ListWriter", "finish"]

_ROW_TILE = 4096  # candidates that a program holds at once
_WIDEST_ROW = 1 << 15  # that one program chooses from: a whole device sorts longer rows sooner


class ListWriter:
    """Collects the rows of a plan's lists, in parts that come in any order, as bits on the device.

    One list for each of ``[B, heads, rows]``, of candidates below ``width``. Rows that no part names stay empty.
    """

    def __init__(self, batch: int, heads: int, rows: int, width: int, device: torch.device) -> None:
        check_device(torch.device(device))
        self.shape = (batch, heads, rows)
        self.width = width
        self.bits = torch.zeros(batch, heads, rows, ceil_div(width, 32), dtype=torch.int32, device=device)
        self.counts = torch.zeros(batch, heads, rows, dtype=torch.int32, device=device)
        self._parts: list[range] = []

    @property
    def device(self) -> torch.device:
        return self.bits.device

    def choose(
        self, part: range, candidates: Candidates, scores: Tensor | None = None, rule: Rule | None = None
    ) -> None:
        """Lists of the rows ``part``: by a rule on scores, forced, on diagonals, everywhere; their union, of the seen.

        Args:
            candidates: for B batch rows and the rows of the part.
            scores: fp32 ``[B, heads, len(part), width]``, with a rule; without, all but what a rule chooses.

        Raises:
            ValueError: another part has written one of these rows, there are no such rows, or the scores have another
                shape.
        """
        batch, heads, rows = self.shape
        self._take(part)
        if scores is not None and tuple(scores.shape) != (batch, heads, len(part), self.width):
            raise ValueError(
                f"scores must be [{batch}, {heads}, {len(part)}, {self.width}] for these rows, "
                f"got {tuple(scores.shape)}"
            )
        if not part or self.width == 0:
            return
        every, nothing = kernels(), self.counts
        name, given = self._rule(candidates, scores, rule)
        diagonals, origin, everywhere = candidates.diagonals, candidates.origin, candidates.everywhere
        ranges = [candidates.seen, candidates.forced]
        ranges.append(torch.zeros_like(candidates.seen[..., :1]) if origin is None else origin[..., None])
        forced_heads = candidates.forced_heads
        if forced_heads is None:
            forced_heads = torch.ones(batch, heads, dtype=torch.bool, device=self.device)
        tile = min(_ROW_TILE, max(32, power_of_two(self.width)))
        run(
            every.choose_rows, batch * heads * len(part), given.get("scores", nothing), given.get("flags", nothing),
            integers_on(torch.cat(ranges, dim=-1), self.device), flags_on(forced_heads, self.device),
            given.get("budgets", nothing), nothing if diagonals is None else flags_on(diagonals, self.device),
            nothing if everywhere is None else flags_on(everywhere, self.device), self.bits, self.counts, heads,
            len(part), self.width, part.start, rows, candidates.first,
            0 if diagonals is None else diagonals.shape[-1], self.bits.shape[3], given.get("alpha", 0.0),
            RULE=getattr(every.choices, name).value, DIAGONALS=diagonals is not None, MIRRORED=candidates.mirrored,
            EVERYWHERE=everywhere is not None, ONE=self.width <= tile, TILE=tile, num_warps=4 if tile > 512 else 1,
        )  # fmt: skip

    def _take(self, part: range) -> None:
        if part.step != 1 or not 0 <= part.start <= part.stop <= self.shape[2]:
            raise ValueError(f"a part must be consecutive rows of the {self.shape[2]} of the lists, got {part}")
        for other in self._parts:
            if part and part.start < other.stop and other.start < part.stop:
                raise ValueError(
                    f"rows {part.start} to {part.stop - 1} overlap rows {other.start} to {other.stop - 1}, which are "
                    "chosen already; choose each query block once"
                )
        self._parts.append(part)

    def _rule(self, candidates: Candidates, scores: Tensor | None, rule: Rule | None) -> tuple[str, dict[str, Any]]:
        """What the kernel calls the rule, and what it needs for it. Rules that it does not know come as flags."""
        if scores is None or rule is None:
            return "FORCED", {}
        scores = scores.float().contiguous()
        every = candidates.ruled_heads is None
        if every and type(rule) is RelativeToMax and isinstance(rule.alpha, (int, float)):
            return ("ALL", {}) if rule.alpha == 0 else ("RELATIVE", {"scores": scores, "alpha": float(rule.alpha)})
        if every and type(rule) is TopK and self.width <= _WIDEST_ROW:
            budgets = per_head(rule.count, self.shape[1], torch.int64, "cpu")
            return "BEST", {"scores": scores, "budgets": integers_on(budgets, self.device)}
        seen, forced = self._members(candidates)
        picked = rule.select(scores.masked_fill(~seen, rule.unseen), forced)
        if candidates.ruled_heads is not None:
            picked = picked & on_device(candidates.ruled_heads, self.device)[:, :, None, None]
        return "FLAGGED", {"flags": flags_on(picked, self.device)}

    def _members(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """What rows see, bool ``[B, 1, rows, width]``, and what is forced, ``[B, heads or 1, rows, width]``."""
        index = torch.arange(self.width, device=self.device)

        def inside(ranges: Tensor) -> Tensor:
            low, high = on_device(ranges, self.device)[:, None, :, None].unbind(-1)
            return (index >= low) & (index < high)

        seen = inside(candidates.seen)
        forced = inside(candidates.forced) | (index < candidates.first)
        if candidates.forced_heads is not None:
            forced = forced & on_device(candidates.forced_heads, self.device)[:, :, None, None]
        return seen, forced & seen

    def indptr(self) -> Tensor:
        """Row pointers int64, on the device."""
        indptr = torch.zeros(self.counts.numel() + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(self.counts.flatten(), 0, out=indptr[1:])
        return indptr

    def members(self, indptr: Tensor, size: int) -> Tensor:
        """Ascending indices int32 of all rows, ``size`` of them."""
        indices = torch.empty(size, dtype=torch.int32, device=self.device)
        words = self.bits.shape[3]
        if size:
            tile = min(32, power_of_two(words))
            run(kernels().list_bits, self.counts.numel(), self.bits, indptr, indices, words, TILE=tile, num_warps=4)
        return indices

    def build(self) -> tuple[Tensor, Tensor]:
        """Row pointers int64 and ascending indices int32 of all rows. Waits for the device."""
        indptr = self.indptr()
        return indptr, self.members(indptr, *fetch(indptr[-1:]))


def finish(blocks: ListWriter | None, columns: ListWriter | None, **fields: Any) -> SparsePlan:
    """The plan of what two writers collected, with its pairs counted. ``fields`` are the plan's others.

    It waits for the device once, for the numbers of blocks, columns and pairs. A plan of bands alone is made and
    counted on the CPU, and moves without waiting.
    """
    writers = {name: writer for name, writer in (("block", blocks), ("column", columns)) if writer is not None}
    if not writers:
        return SparsePlan.unchecked(**fields, pairs=count_on_cpu(SparsePlan.unchecked(**fields)))
    device = next(iter(writers.values())).device
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    plan = SparsePlan.unchecked(**fields, block_indices=nothing)
    pointers = {name: writer.indptr() for name, writer in writers.items()}
    numbers = [indptr[-1:] for indptr in pointers.values()]
    if countable(plan):
        bits = {f"{name}s": writer.bits for name, writer in writers.items()}
        numbers.append(pairs_of_bits(plan, device, **bits).flatten())
    found = fetch(torch.cat(numbers))
    lists = {f"{name}_indptr": indptr for name, indptr in pointers.items()}
    for (name, writer), size in zip(writers.items(), found, strict=False):
        lists[f"{name}_indices"] = writer.members(pointers[name], size)
    lists.setdefault("block_indices", nothing)  # a plan lies where its blocks lie
    plan = SparsePlan.unchecked(**fields, **lists)
    counted = found[len(writers) :]
    pairs = (
        torch.tensor(counted, dtype=torch.int64, device="cpu").view(plan.batch, plan.heads) if counted else count(plan)
    )
    return SparsePlan.unchecked(**fields, **lists, pairs=pairs)
