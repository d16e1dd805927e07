"""How many pairs of a plan this machine's kernel computes in a second, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from gossamer import backends
from gossamer.backends import Needs
from gossamer.call import AttentionCall
from gossamer.distributed.layout import Layout
from gossamer.distributed.selection import Selection
from gossamer.distributed.simulate import work_of_units
from gossamer.distributed.steps import pieces_of
from gossamer.plan import ceil_div

__all__ = ["pairs_per_second"]


def pairs_per_second(
    selection: Selection, call: AttentionCall, *, rounds: int = 3, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Pairs, as `gossamer.distributed.simulate` counts them, over seconds: forward, and backward.

    Medians of the rounds after one that does not count.

    Args:
        call: all tokens of the selection.
    """
    unit = max(1, ceil_div(call.key_len, selection.block)) * selection.block
    layout = Layout("contiguous", call.key_len, 1, unit)
    pieces = pieces_of(selection, layout, 0, 0)
    needs = Needs(sinks=False, bias=False)
    forward, backward = [], []
    for once in range(rounds + 1):
        taken = [0.0, 0.0]
        for piece in pieces:
            plan, started = piece.plan.to(call.device), _now(call, clock)
            out, lse = backends.attend(call, plan)
            attended = _now(call, clock)
            backends.attend_backward(call, plan, out, lse, out, None, needs)
            taken[0] += attended - started
            taken[1] += _now(call, clock) - attended
        if once:
            forward.append(taken[0])
            backward.append(taken[1])
    share = call.heads // selection.heads
    pairs = share * float(work_of_units(selection, unit).sum())
    return pairs / max(median(forward), 1e-12), pairs / max(median(backward), 1e-12)


def _now(call: AttentionCall, clock: Callable[[], float]) -> float:
    if call.device.type == "cuda":
        torch.cuda.synchronize(call.device)
    return clock()
