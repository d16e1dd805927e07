"""What every candidate would cost each head of one layer, and what it would lose there; a few heads at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer import backends
from gossamer.calibrate.prices import Price, head_costs
from gossamer.call import AttentionCall
from gossamer.evaluate.fidelity import listed_lse, relative_l2
from gossamer.methods import Dense, Method
from gossamer.oracle import log_sum_exp
from gossamer.plan import SparsePlan

__all__ = ["FIGURES", "LAST_QUERIES", "LayerFigures", "measure_layer"]

FIGURES = ("error", "last_error", "recall", "cost")
LAST_QUERIES = 64
"""Where a prompt asks what is to be answered: as many as `vertical_slash` looks at."""


@dataclass(frozen=True)
class LayerFigures:
    """Of one layer under one prompt, fp64 ``[candidates, H]``.

    Fields:
        error: relative L2 error of the output, with values.
        last_error: likewise, of the last `LAST_QUERIES` queries.
        recall: attention mass inside the plan, mean over the queries.
        cost: over that of the head's dense attention.
    """

    error: Tensor
    last_error: Tensor
    recall: Tensor
    cost: Tensor

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).tolist() for name in FIGURES}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerFigures:
        return cls(*(torch.tensor(data[name], dtype=torch.float64, device="cpu") for name in FIGURES))


def measure_layer(
    call: AttentionCall, dense: Tensor, methods: Sequence[Method], price: Price, *, groups: int = 1
) -> LayerFigures:
    """Plan and attend by each method on what a layer was given.

    Args:
        call: of one prompt, with values.
        dense: its output under dense attention, ``[1, H, S, Dv]``.
        groups: key/value heads that are looked at together; memory grows with them, results do not change.
    """
    parts: list[list[Tensor]] = [[] for _ in FIGURES]
    for start in range(0, call.groups, groups):
        stop = min(start + groups, call.groups)
        part, out = call.of_groups(range(start, stop)), dense[:, start * call.share : stop * call.share]
        for found, figures in zip(parts, _figures(part, out, methods, price), strict=True):
            found.append(figures)
    return LayerFigures(*(torch.cat(found, dim=1) for found in parts))


def _figures(call: AttentionCall, dense: Tensor, methods: Sequence[Method], price: Price) -> tuple[Tensor, ...]:
    lse = log_sum_exp(call)
    everything = SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
    whole = price.of_heads(call, everything)
    live = call.extent.live_queries(call.query_len, call.device)[0]
    expected = dense[0, :, live]
    rows = []
    for method in methods:
        if isinstance(method, Dense):
            ones = torch.ones(call.heads, dtype=torch.float64, device="cpu")
            rows.append((torch.zeros_like(ones), torch.zeros_like(ones), ones, ones))
            continue
        plan = method.plan(call)
        out, kept = backends.attend(call, plan)
        kept = listed_lse(call, plan, kept)
        recall = (kept - lse)[0, :, live].exp().clamp(max=1.0).mean(dim=-1)
        got = out[0, :, live]
        error, last = relative_l2(got, expected), relative_l2(got[:, -LAST_QUERIES:], expected[:, -LAST_QUERIES:])
        lost = [figure.double().cpu() for figure in (error, last, recall)]
        rows.append((*lost, head_costs(price, call, method, plan, whole)))
        del out, kept, got
    return tuple(torch.stack(figure) for figure in zip(*rows, strict=True))
