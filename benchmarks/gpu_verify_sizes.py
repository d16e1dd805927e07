"""What is timed, at the lengths at which it is timed: plans by structure and choices, outputs by a sample.

Offsets beyond 32 bits, bitmaps that are made in several parts and energies in several chunks exist only there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from gpu_setting import Attempt, Setting, full_plan, planned_by
from gpu_timing import Budget, Timer
from torch import Tensor
from workloads import random_blocks_of

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import triton
from gossamer.cli.specs import parse_method

SAMPLED_ROWS = 64
_KEYS_AT_ONCE = 131072
_ROWS_AT_ONCE = 16
# A row's error over its norm, and an LSE's: bf16 rounds weights and outputs by 2^-9 each; the LSE is in fp32.
_MOST_ERROR = 1e-2
_MOST_LSE_ERROR = 2e-3
# Of the pairs of a few blocks, where two planners round scores near a threshold differently.
_MOST_CHANGED = 0.05
_SPARE_BYTES = 8 << 30


class NotRun(Exception):
    """This check does not fit here, which is no fault."""


def size_checks(device: torch.device, small: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """By name, the shorter length first."""
    setting = Setting(device, small, Timer(torch.device("cpu")), Budget(0))
    for length in setting.lengths(131072, 1048576):
        blocks = ["10% in 128x128"] if length < 200_000 else []
        for name in ("dense", *blocks, *setting.methods):
            yield f"{name} at {length} tokens", functools.partial(check_size, setting, name, length)


def check_size(setting: Setting, name: str, length: int) -> None:
    """Raises AssertionError if the plan or the output is wrong, NotRun where memory does not suffice."""
    heads, groups, dim = setting.shape
    if setting.device.type == "cuda":
        need = 2 * dim * length * (2 * heads + 2 * groups) * 2 + _SPARE_BYTES
        free = torch.cuda.mem_get_info()[0]
        if free < need:
            raise NotRun(f"needs {need / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")
    call = _inputs(setting, length)
    plan = _plan(setting, name, length, call)
    validate(plan)
    out, lse = triton.attend(call, plan)
    for head in sorted({0, heads - 1}):
        rows = sampled_rows(length, plan.block_q, seed=head)
        compare_rows(call, plan, out, lse, head, rows)
    if name in setting.methods:
        compare_choice(name, call, plan)


def validate(plan: SparsePlan) -> None:
    """Raises ValueError or TypeError where lists do not rise or indices lie outside. Planners on a device skip that."""
    given: dict[str, Any] = {part.name: getattr(plan, part.name) for part in fields(plan) if part.init}
    SparsePlan(**given)


@functools.lru_cache(maxsize=1)
def _inputs(setting: Setting, length: int) -> AttentionCall:
    return setting.draw_like_prompts(length)(0)


def forget_inputs() -> None:
    """Give their memory back."""
    _inputs.cache_clear()


def _plan(setting: Setting, name: str, length: int, call: AttentionCall) -> SparsePlan:
    if name == "dense":
        return full_plan(setting, length)
    if name in setting.methods:
        return Attempt(name).plan(call)
    return random_blocks_of(setting.shape[1], length, 0.1, block_q=128, block_k=128).to(setting.device)


def sampled_rows(length: int, block: int, seed: int = 0) -> Tensor:
    """The first and the last row, those at edges of blocks, and others by chance: int64, ascending."""
    last = (length - 1) // block * block
    middle = length // 2 // block * block
    edges = [0, 1, block - 1, block, middle - 1, middle, last - 1, last, length - 1]
    chance = torch.randint(length, (SAMPLED_ROWS,), generator=torch.Generator().manual_seed(seed))
    edges = torch.tensor(edges).clamp(0, length - 1).unique()
    return torch.cat([edges, chance[: SAMPLED_ROWS - len(edges)]]).unique()


def plan_of_head(plan: SparsePlan, head: int) -> SparsePlan:
    """One head of a plan of one batch row: its masks are small enough to hold."""
    lists = {}
    for name, count in (("block", plan.num_query_blocks), ("column", plan.num_column_groups)):
        indptr = getattr(plan, f"{name}_indptr")[head * count : (head + 1) * count + 1]
        begin, end = int(indptr[0]), int(indptr[-1])
        lists |= {f"{name}_indptr": indptr - begin, f"{name}_indices": getattr(plan, f"{name}_indices")[begin:end]}
    sizes = {name: getattr(plan, name) for name in ("block_q", "block_k", "column_group")}
    where = {"query_len": plan.query_len, "key_len": plan.key_len, "extent": plan.extent}
    bands = {name: torch.as_tensor(getattr(plan, name))[head : head + 1] for name in ("sink", "window")}
    return SparsePlan.unchecked(heads=1, **where, **sizes, **bands, **lists)


def compare_rows(call: AttentionCall, plan: SparsePlan, out: Tensor, lse: Tensor, head: int, rows: Tensor) -> None:
    """Rows of a query head against the definition in fp64, in chunks of keys on the inputs' device."""
    q, k, v, group = call.q, call.k, call.values, head // call.share
    own = plan_of_head(plan, head // (call.heads // plan.heads))
    for some in rows.split(_ROWS_AT_ONCE):
        at = some.to(q.device)
        mask = own.rows_mask(some)[0, 0]
        wide = q[0, head, at].double()
        chunks = range(0, k.shape[2], _KEYS_AT_ONCE)
        logits = torch.cat([wide @ k[0, group, n : n + _KEYS_AT_ONCE].double().T for n in chunks], dim=1)
        logits = logits.mul_(call.scale).masked_fill_(~mask, float("-inf"))
        expected_lse = logits.logsumexp(-1)
        weights = (logits - expected_lse[:, None]).exp_()
        expected = torch.zeros(len(some), v.shape[-1], dtype=torch.float64, device=q.device)
        for n in chunks:
            expected += weights[:, n : n + _KEYS_AT_ONCE] @ v[0, group, n : n + _KEYS_AT_ONCE].double()
        error = (out[0, head, at].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        _below(error, _MOST_ERROR, "relative error", head, some)
        _below((lse[0, head, at] - expected_lse).abs(), _MOST_LSE_ERROR, "error of the lse", head, some)


def _below(error: Tensor, most: float, what: str, head: int, rows: Tensor) -> None:
    wrong = ~(error <= most)  # NaN too
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise AssertionError(f"head {head}, row {int(rows[at])}: {what} {float(error[at]):.1e} exceeds {most:.0e}")


def compare_choice(name: str, call: AttentionCall, plan: SparsePlan) -> None:
    """The choice for some query blocks against that of the torch planner, which is given only their queries.

    Max-relative chooses by a block's own queries, so a slice from the middle is planned, with a tail behind it that
    stays out of the comparison; the others choose by the call's last queries, so the slice is the end.
    """
    length, block = call.key_len, plan.block_q
    begin, compared = length - 2 * block, 2 * block
    if name.startswith("max_relative"):
        begin, compared = length * 5 // 8 // block * block, min(8 * block, length // 4)
    stop = min(length, begin + compared + (0 if begin + compared == length else 2048))
    some = replace(call, q=call.q[:, :, begin:stop], extent=call.extent.of_queries(begin, stop))
    with planned_by("torch"):
        again = parse_method(name).plan(some)
    rows = torch.arange(0, compared, block) + block // 2
    changed = kept = 0
    for head in range(plan.heads):
        one = plan_of_head(plan, head).rows_mask(rows + begin)
        other = plan_of_head(again, head).rows_mask(rows)
        changed, kept = changed + int((one ^ other).sum()), kept + int(other.sum())
    assert changed <= _MOST_CHANGED * kept, f"{changed} pairs of {kept} are not those that torch chooses"
