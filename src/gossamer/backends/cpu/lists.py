"""From scores to a plan in C++: rules, forced ranges and diagonals as bits, bits as lists, and the pairs in a plan.

From equal scores the sets are those of `gossamer.backends.torch.choose`, the definition, and pairs are counted exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gossamer.backends.cpu.native import kernels
from gossamer.backends.cpu.views import address, plan_view
from gossamer.backends.torch.choose import ListWriter as TorchListWriter
from gossamer.plan import SparsePlan, ceil_div
from gossamer.plan.count import count_pairs
from gossamer.plan.parts import plan_parts
from gossamer.rules import (
    Above,
    AtLeast,
    Besides,
    Candidates,
    Either,
    PerHead,
    RelativeToMax,
    Rule,
    TopK,
    TopP,
    TopPBelow,
    TopPInTiers,
    TopPOfAllRows,
    TopPReaching,
    per_head,
    shares,
)

__all__ = ["ListWriter", "count", "count_top_p", "finish", "list_bits", "listed"]

_TOP_P = {TopPReaching: "top_p_reaching", TopPBelow: "top_p_below", TopPOfAllRows: "top_p_of_all_rows"}


class ListWriter(TorchListWriter):
    """Collects the rows of a plan's lists; see `gossamer.backends.torch.ListWriter`.

    What it chose is held as bits until `build`.
    """

    def choose(
        self, part: range, candidates: Candidates, scores: Tensor | None = None, rule: Rule | None = None
    ) -> None:
        """See `gossamer.backends.torch.ListWriter.choose`. Rules of third parties run by their own `Rule.select`.

        Raises:
            ValueError: shapes disagree, a share lies outside [0, 1], or another part has written one of these rows.
        """
        batch, heads, _ = self.shape
        shape = (batch, heads, len(part), self.width)
        if scores is not None and tuple(scores.shape) != shape:
            raise ValueError(f"scores of this part must have shape {shape}, got {tuple(scores.shape)}")
        nothing: list[_Pass] = [(candidates, None, {})]
        passes = nothing if scores is None or rule is None else _passes(candidates, scores, rule)
        if passes is None:
            super().choose(part, candidates, scores, rule)
            return
        if rule is not None and rule.all_rows and len(part) * self.width >= 1 << 32:
            raise ValueError(
                f"one list of all rows takes less than 2^32 scores a head, got {len(part)} x {self.width}; "
                "widen the blocks"
            )
        bits = torch.empty(batch, heads, len(part), ceil_div(self.width, 64), dtype=torch.int64, device="cpu")
        counts = torch.empty(batch, heads, len(part), dtype=torch.int64, device="cpu")
        for taking, own, fields in passes:
            _choose(taking, own, fields, shape, bits, counts)
        self.take(part, counts, bits)

    def build(self) -> tuple[Tensor, Tensor]:
        """Row pointers int64 and ascending indices int32 of all rows."""
        counts = torch.zeros(self.shape, dtype=torch.int64, device="cpu")
        for start, (part, _) in self._parts.items():
            counts[:, :, start : start + part.shape[2]] = part
        indptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(counts.flatten(), 0, out=indptr[1:])
        indices = torch.empty(int(indptr[-1]), dtype=torch.int32, device="cpu")
        starts = indptr[:-1].view(self.shape)
        for start, (part, chosen) in self._parts.items():
            row_starts = starts[:, :, start : start + part.shape[2]].contiguous()
            if chosen.dtype == torch.int64:
                list_bits(chosen, self.width, row_starts, indices)
            else:
                part, chosen = part.contiguous(), chosen.contiguous()
                kernels().place_lists(
                    lists=chosen.data_ptr(),
                    counts=part.data_ptr(),
                    rows=part.numel(),
                    starts=row_starts.data_ptr(),
                    indices=indices.data_ptr(),
                    threads=torch.get_num_threads(),
                )
        return indptr, indices


_Pass = tuple[Candidates, Tensor | None, dict[str, Any]]


def _passes(candidates: Candidates, scores: Tensor, rule: Rule) -> list[_Pass] | None:
    """What is chosen one after the other into the same bits. None for a rule that the kernels do not know."""
    shape = scores.shape
    if isinstance(rule, Either) and type(rule) is Either:
        first, second = (_rule_fields(one, shape) for one in (rule.rule, rule.other))
        if first is None or second is None:
            return None
        of_second = replace(candidates, forced=torch.zeros_like(candidates.forced), first=0)
        return [(candidates, scores, first), (of_second, rule.others.expand(shape), second | {"unite": True})]
    fields = _rule_fields(rule, shape)
    return None if fields is None else [(candidates, scores, fields)]


def _rule_fields(rule: Rule, shape: Sequence[int]) -> dict[str, Any] | None:
    """Of a rule that the kernels know: its name and its numbers. None for others, and for what inherits from them."""
    kind, heads = type(rule), shape[1]
    if isinstance(rule, Besides) and kind is Besides:
        fields = _rule_fields(rule.rule, shape)
        return None if fields is None or "taken" in fields else fields | {"taken": _bytes(rule.taken, shape)}
    if isinstance(rule, TopPInTiers) and kind is TopPInTiers:
        numbers = shares(rule.p, heads, "cpu").contiguous()
        return {"rule": "top_p_in_tiers", "shares": numbers, "early": _bytes(rule.early, shape)}
    if isinstance(rule, Above) and kind is Above:
        # As the definition has them, in fp32.
        numbers = per_head(rule.threshold, heads, torch.float32, "cpu").double().contiguous()
        return {"rule": "above", "shares": numbers}
    if isinstance(rule, RelativeToMax) and kind is RelativeToMax and isinstance(rule.alpha, (int, float)):
        return {"rule": "relative_to_max", "alpha": float(rule.alpha)}
    if isinstance(rule, AtLeast) and kind is AtLeast:
        return {"rule": "at_least", "shares": per_head(rule.bar, heads, torch.float64, "cpu").contiguous()}
    if isinstance(rule, TopK) and kind is TopK:
        return {"rule": "top_k", "counts": per_head(rule.count, heads, torch.int64, "cpu").contiguous()}
    if isinstance(rule, TopP) and kind is TopP:
        name = "top_p_forced_first" if rule.forced_first else "top_p"
        return {"rule": name, "shares": shares(rule.p, heads, "cpu").contiguous()}
    if isinstance(rule, (TopPReaching, TopPBelow, TopPOfAllRows)) and kind in _TOP_P:
        return {"rule": _TOP_P[kind], "shares": shares(rule.p, heads, "cpu").contiguous()}
    return None


def _choose(
    candidates: Candidates,
    scores: Tensor | None,
    fields: dict[str, Any],
    shape: tuple[int, int, int, int],
    bits: Tensor,
    counts: Tensor,
) -> None:
    batch, heads, rows, width = shape
    native = kernels()
    # Held by name until the kernel is done: only their addresses are handed over.
    scores = None if scores is None else scores.float().contiguous()
    seen, forced = _int64(candidates.seen, (batch, rows, 2)), _int64(candidates.forced, (batch, rows, 2))
    forced_heads, diagonals, origin = candidates.forced_heads, candidates.diagonals, None
    if forced_heads is not None:
        forced_heads = forced_heads.expand(batch, heads).to(torch.uint8).contiguous()
    if diagonals is not None:
        diagonals = diagonals.expand(batch, heads, -1).to(torch.uint8).contiguous()
        origin = _int64(candidates.origin, (batch, rows))
    everywhere, ruled_heads = candidates.everywhere, candidates.ruled_heads
    if everywhere is not None:
        everywhere = everywhere.expand(batch, heads, width).to(torch.uint8).contiguous()
    if ruled_heads is not None:
        ruled_heads = ruled_heads.expand(batch, heads).to(torch.uint8).contiguous()
    choice = native.Choice(
        batch=batch,
        heads=heads,
        rows=rows,
        width=width,
        rule=getattr(native.Rule, fields.get("rule", "none")),
        alpha=fields.get("alpha", 0.0),
        scores=address(scores),
        counts=address(fields.get("counts")),
        shares=address(fields.get("shares")),
        seen=seen.data_ptr(),
        forced=forced.data_ptr(),
        first=candidates.first,
        forced_heads=address(forced_heads),
        diagonals=address(diagonals),
        diagonal_count=0 if diagonals is None else diagonals.shape[2],
        origin=address(origin),
        mirrored=candidates.mirrored,
        everywhere=address(everywhere),
        ruled_heads=address(ruled_heads),
        early=address(fields.get("early")),
        taken=address(fields.get("taken")),
        unite=fields.get("unite", False),
    )
    native.choose(choice, native.ChosenBits(bits=bits.data_ptr(), counts=counts.data_ptr()), torch.get_num_threads())


def _bytes(flags: Tensor, shape: Sequence[int]) -> Tensor:
    return flags.to(torch.bool).expand(*shape).contiguous()


def _int64(values: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if values is None:
        raise ValueError("diagonals need an origin: the candidate of each row on diagonal 0")
    return values.to("cpu", torch.int64).expand(shape).contiguous()


def count_top_p(scores: Tensor, p: PerHead) -> Tensor:
    """See `gossamer.rules.count_top_p`."""
    scores = scores.float().contiguous()
    counts = torch.empty(scores.shape[:-1], dtype=torch.int64, device="cpu")
    numbers = shares(p, scores.shape[1], "cpu")[:, None].expand(counts.shape).contiguous()
    kernels().count_top_p(
        scores=scores.data_ptr(),
        rows=counts.numel(),
        width=scores.shape[-1],
        shares=numbers.data_ptr(),
        counts=counts.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return counts


def list_bits(bits: Tensor, width: int, starts: Tensor, indices: Tensor) -> None:
    """Writes the numbers of the bits that are set, ascending, each row's from its start on."""
    kernels().list_bits(
        bits=bits.data_ptr(),
        rows=starts.numel(),
        width=width,
        starts=starts.data_ptr(),
        indices=indices.data_ptr(),
        threads=torch.get_num_threads(),
    )


def listed(bits: Tensor, counts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Of rows of bits: how many are set, as given, and their numbers int32, for `ListWriter.take`."""
    ends = counts.flatten().cumsum(0)
    indices = torch.empty(int(counts.sum()), dtype=torch.int32, device="cpu")
    list_bits(bits, width, ends - counts.flatten(), indices)
    return counts, indices


def finish(blocks: ListWriter | None, columns: ListWriter | None, **fields: Any) -> SparsePlan:
    """See `gossamer.backends.torch.finish`."""
    lists: dict[str, Tensor] = {}
    for name, writer in (("block", blocks), ("column", columns)):
        if writer is not None:
            lists[f"{name}_indptr"], lists[f"{name}_indices"] = writer.build()
    plan = SparsePlan.unchecked(**lists, **fields)
    object.__setattr__(plan, "_pairs", count(plan))  # nobody else holds it yet; a second one would be checked again
    return plan


def count(plan: SparsePlan) -> Tensor:
    """See `gossamer.plan.SparsePlan.count_pairs`. Plans with an order are counted in torch."""
    if plan.permuted:
        return count_pairs(plan)
    if plan.device.type != "cpu":
        raise ValueError(f"the C++ kernels count plans on the CPU, got one on {plan.device}; move it")
    counts = torch.zeros(plan.batch, plan.heads, dtype=torch.int64, device="cpu")
    tensors, sizes = plan_parts(plan)
    tensors = [x.contiguous() for x in tensors]  # held by name until the kernel is done
    kernels().count_pairs(plan_view(tensors, sizes), counts=counts.data_ptr(), threads=torch.get_num_threads())
    return counts
