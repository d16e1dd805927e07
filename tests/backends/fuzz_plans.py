"""Writes to random plans after they were made, and runs them: an error or a result is fine, a crash is not.

Run by test_cpu_fuzz.py in a process of its own, as ``python fuzz_plans.py COUNT``. Before each plan is run, what it is
made of and what is written to it stand in the last line of the output, from which a crash can be repeated.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from cpu_checks import check, draw
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu
from gossamer.plan.checks import CHECK
from gossamer.testing import random_plan

LISTS = ("block_indptr", "block_indices", "column_indptr", "column_indices")
OF_PLAN = (*LISTS, "sink", "window", "q_order", "k_order")
OF_EXTENT = ("query_start", "query_count", "key_start", "key_count")
HUGE = (1 << 31) - 1
seen = {"plans": 0, "errors": 0, "results": 0, "invalid": 0}

# No tile is so far below another that rounding decides whether it is left out.
ATTRIBUTES: list[dict[str, Any]] = [{}, {}, {"pruned_mean": True}, {"skip": 50.0}, {"pruned_mean": True, "skip": 50.0}]

fields = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1 << 20),
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 2),
        "query_len": st.sampled_from([1, 7, 40, 130]),
        "key_len": st.sampled_from([130, 150, 200]),
        "block_q": st.sampled_from([16, 64]),
        "block_k": st.sampled_from([16, 64]),
        "permuted": st.sampled_from([False, False, True]),
        "causal": st.booleans(),
        "limit": st.sampled_from([None, 30]),
        "padded": st.booleans(),
        "attributes": st.sampled_from(ATTRIBUTES),
    }
)
values = st.one_of(st.sampled_from([-1, 0, HUGE, -HUGE - 1]), st.integers(-300, 300), st.integers(-HUGE, HUGE))
writes = st.lists(
    st.tuples(st.sampled_from([*OF_PLAN, *OF_EXTENT]), st.integers(0, 1 << 20), values, st.booleans()),
    min_size=1,
    max_size=3,
)


def write(plan: SparsePlan, name: str, at: int, value: int, by_numpy: bool) -> None:
    """One entry of one tensor, or all of them where the place is a multiple of 7; by numpy's alias, or in place."""
    tensor = getattr(plan.extent if name in OF_EXTENT else plan, name)
    if tensor is None or not tensor.numel():
        return
    if tensor.dtype == torch.int64 and at % 5 == 0:
        value <<= 31
    flat: Any = tensor.numpy().reshape(-1) if by_numpy else tensor.view(-1)
    flat[slice(None) if at % 7 == 0 else at % tensor.numel()] = value


def is_valid(plan: SparsePlan) -> bool:
    """Whether a plan's tensors but the extent's are as the docstring of `SparsePlan` has them, entry by entry."""
    rows = plan.batch * plan.heads
    for name, many, limit in (
        ("block", plan.num_query_blocks, plan.num_key_blocks),
        ("column", plan.num_column_groups, plan.extent.longest),
    ):
        ends = getattr(plan, f"{name}_indptr").tolist()
        entries = getattr(plan, f"{name}_indices").tolist()
        if len(ends) != rows * many + 1 or (ends[0], ends[-1]) != (0, len(entries)) or sorted(ends) != ends:
            return False
        for begin, end in pairwise(ends):
            row = entries[begin:end]
            if sorted(set(row)) != row or any(not 0 <= entry < limit for entry in row):
                return False
    bands = torch.cat([torch.as_tensor(plan.sink), torch.as_tensor(plan.window)]).tolist()
    orders = [order.flatten(0, 1).tolist() for order in (plan.q_order, plan.k_order) if order is not None]
    if (plan.pruned_mean or plan.skip is not None) and max(bands) > 0:
        return False
    return min(bands) >= 0 and all(sorted(row) == list(range(len(row))) for order in orders for row in order)


def runs(call: AttentionCall, plan: SparsePlan) -> tuple[Tensor, Tensor] | None:
    """What attending gives, or None for an error that a user can read."""
    try:
        result = cpu.attend(call, plan)
    except ValueError:
        seen["errors"] += 1
        return None
    seen["results"] += 1
    return result


@given(fields, writes, st.sampled_from([torch.float32, torch.bfloat16]))
def fuzz(made_of: dict[str, Any], written: list[tuple[str, int, int, bool]], dtype: torch.dtype) -> None:
    seen["plans"] += 1
    print(seen["plans"], made_of, written, dtype, flush=True)
    attributes = made_of.pop("attributes")
    if attributes:
        made_of |= {"permuted": False, "block_k": 64 if "skip" in attributes else made_of["block_k"]}
    plan = random_plan(**made_of, **attributes)
    call = draw(plan, heads=2 * plan.heads, groups=plan.heads, dim=16, dtype=dtype)
    check(call, plan)
    of_plan = [one for one in written if one[0] in OF_PLAN]
    for one in of_plan:
        write(plan, *one)
    os.environ[CHECK] = "1"
    valid, result = is_valid(plan), runs(call, plan)
    seen["invalid"] += not valid
    assert (result is not None) == valid, f"{CHECK}=1 took a wrong plan for right, or the other way round"
    if valid:
        check(call, plan)
    del os.environ[CHECK]
    runs(call, plan)
    for one in written:
        write(plan, *one)
    runs(call, plan)
    for verb in (cpu.count, lambda plan: cpu.last_query_probe(call, 3), lambda plan: cpu.pool_keys(call, plan.grid)):
        with suppress(ValueError):
            verb(plan)


if __name__ == "__main__":
    faulthandler.enable()
    run = settings(
        max_examples=int(sys.argv[1]),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
    )(fuzz)
    run()
    print(seen)
