"""How far a method is from dense attention, without generating: inside the attention, and in the model's logits.

Inside, every layer sees the inputs of the dense run, so that errors do not add up and layers can be compared: the
attention mass that the plan keeps, next to what the best plan of whole blocks with as many blocks keeps, and the
output. A layer that the policy's thresholds let run dense counts as dense. The logits are those of a whole sparse run.
Memory: one layer's tensors, five times the hidden states, and the logits of 512 positions of as many runs.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import backends
from gossamer.call import AttentionCall
from gossamer.evaluate.subject import Subject
from gossamer.integrations.transformers import Observation
from gossamer.methods.per_head import needs_of
from gossamer.oracle import block_counts, block_mass, log_sum_exp, oracle_blocks, oracle_recall
from gossamer.plan import SparsePlan
from gossamer.policy import Policy

__all__ = ["FIGURES", "compare", "compare_layer", "compare_logits", "listed_lse", "plan_map", "relative_l2"]

FIGURES = ("head_density", "recall", "oracle_recall", "relative_l2", "cosine")
_MAP_SIZE = 64
_MAPS = 6
_DIGITS = 4
_ROWS_PER_TILE = 4
# Whole runs whose logits are compared with those of the dense run at a time, which are made once for all of them.
_TOGETHER = 4


def compare(
    subject: Subject, tokens: Tensor, policies: Sequence[Policy], *, maps: bool = True
) -> Iterator[dict[str, Any]]:
    """The fields of a ``fidelity`` record for each policy, some policies at a time; the dense run is shared by all.

    Args:
        tokens: ``[1, S]``.
        maps: also draw the plans of a few heads.

    Raises:
        ValueError: the model's attention cannot be observed, or its logits not be formed in chunks.
    """
    measured: list[dict[str, list[Any]]] = [{name: [] for name in (*FIGURES, "maps")} for _ in policies]
    layers = subject.config.num_hidden_layers
    drawn = {round(i * (layers - 1) / (_MAPS - 1)) if layers > 1 else 0: i for i in range(_MAPS)}

    def visit(observed: Observation) -> None:
        call, heads = observed.call, observed.call.heads
        masses: dict[tuple[int, int], Tensor] = {}
        lse = log_sum_exp(call)
        for policy, rows in zip(policies, measured, strict=True):
            plan = policy.decide(call).plan
            figures = _dense_figures(heads) if plan is None else compare_layer(observed, plan, lse, masses)
            for name, values in figures.items():
                rows[name].append([round(value, _DIGITS) for value in values])
            if maps and call.layer in drawn:
                head = drawn[call.layer] % heads
                if plan is None:
                    plan = SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
                rows["maps"].append({"layer": call.layer, "head": head} | plan_map(plan, head, heads))

    rotary = any("rotary" in needs_of(policy.method) for policy in policies)
    dense, _ = subject.hidden_states(tokens, Policy.of("dense"), visit, rotary=rotary)
    if any(len(rows["recall"]) == 0 for rows in measured):
        raise ValueError(
            f"{type(subject.model).__name__} made no attention call with a plain mask; fidelity cannot be measured"
        )
    pairs = list(zip(policies, measured, strict=True))
    for first in range(0, len(pairs), _TOGETHER):
        some = pairs[first : first + _TOGETHER]
        runs = [subject.hidden_states(tokens, policy) for policy, _ in some]
        logits = compare_logits(subject, dense, [hidden for hidden, _ in runs], tokens)
        for (_, rows), (_, cost), compared in zip(some, runs, logits, strict=True):
            means = {name: _mean(rows[name]) for name in FIGURES}
            spent = cost.to_dict() | {"density": means["head_density"]}
            tables = {name: values for name, values in rows.items() if values}
            yield spent | tables | {"mean": means, "logits": compared}


def _mean(rows: list[list[float]]) -> float:
    return sum(map(sum, rows)) / sum(map(len, rows))


def _dense_figures(heads: int) -> dict[str, list[float]]:
    return {name: [0.0 if name == "relative_l2" else 1.0] * heads for name in FIGURES}


def compare_layer(
    observed: Observation, plan: SparsePlan, lse: Tensor, masses: dict[tuple[int, int], Tensor] | None = None
) -> dict[str, list[float]]:
    """Each of `FIGURES` for each query head of a layer, of a batch of one.

    Args:
        observed: the layer's call, with its output under dense attention.
        lse: of dense attention, ``[1, H, S]``.
        masses: keeps the mass of all blocks by their size between calls for the same layer.
    """
    call = observed.call
    out, kept = backends.attend(call, plan)
    kept = listed_lse(call, plan, kept)
    live = call.extent.live_queries(call.query_len, call.device)[0]
    sparse, dense = out[0, :, live].float(), observed.out[0, :, live].float()
    recall = (kept - lse)[0, :, live].exp().clamp(max=1.0).mean(dim=-1)

    masses = {} if masses is None else masses
    size = (plan.block_q, plan.block_k)
    if size not in masses:
        masses[size] = block_mass(call, lse, plan.grid)
    best = oracle_blocks(masses[size], block_counts(plan), plan.grid)
    oracle = oracle_recall(masses[size], best, call.extent.query_count)[0]
    density = (plan.count_pairs() / call.extent.count_allowed()[:, None])[0]
    return {
        "head_density": density.repeat_interleave(call.heads // plan.heads).tolist(),
        "recall": recall.tolist(),
        "oracle_recall": oracle.tolist(),
        "relative_l2": relative_l2(sparse, dense).tolist(),
        "cosine": F.cosine_similarity(sparse, dense, dim=-1).mean(dim=-1).tolist(),
    }


def listed_lse(call: AttentionCall, plan: SparsePlan, lse: Tensor) -> Tensor:
    """Log-sum-exp of the plan's own pairs: ``lse``, which attending gave, unless others are in it, some are not, or
    their logits may be rounded."""
    if not plan.pruned_mean and plan.skip is None and not plan.quantised:
        return lse
    return backends.attend(call, plan.with_attributes())[1]


def relative_l2(sparse: Tensor, dense: Tensor) -> Tensor:
    """``|sparse - dense| / |dense|`` over rows and channels, fp32 ``[H]`` of outputs ``[H, rows, Dv]``."""
    difference = (sparse.float() - dense.float()).norm(dim=(1, 2))
    return difference / dense.float().norm(dim=(1, 2)).clamp(min=1e-20)


@torch.inference_mode()
def compare_logits(
    subject: Subject,
    dense: Tensor,
    sparse: Sequence[Tensor],
    tokens: Tensor | None = None,
    *,
    readers: Sequence[Subject] | None = None,
) -> list[dict[str, Any]]:
    """What each sparse run predicts, beside the dense one: the ``logits`` of a ``fidelity`` record.

    KL divergence (nats, of the sparse from the dense prediction) and share of equal choices, by position; with
    ``tokens`` also the loss of both.

    Args:
        dense, sparse: hidden states ``[S, width]``.
        tokens: the prompt, ``[1, S]``.
        readers: the models whose heads read the sparse runs; `subject` unless given.
    """
    length, runs = dense.shape[0], len(sparse)
    edges = [0, *(edge for edge in (64 * 4**i for i in range(12)) if edge < length), length]
    divergence, agreement = torch.empty(runs, length), torch.empty(runs, length)
    # Of the token that follows each position, the last one left out: the dense run's first.
    losses = torch.zeros(1 + runs, length)
    following = None if tokens is None else F.pad(tokens[0, 1:], (0, 1))[:, None]
    own_heads = [reader.logits(hidden) for reader, hidden in zip(readers or [subject] * runs, sparse, strict=True)]
    for parts in zip(subject.logits(dense), *own_heads, strict=True):
        (start, expected), others = parts[0], parts[1:]
        rows = slice(start, start + expected.shape[0])
        share, total, choice = expected.softmax(-1), expected.logsumexp(-1), expected.argmax(-1)
        if following is not None:
            losses[0, rows] = (total - expected.gather(-1, following[rows])[:, 0]).cpu()
        for run, (_, logits) in enumerate(others):
            own = logits.logsumexp(-1)
            moved = torch.linalg.vecdot(share, expected - logits)
            divergence[run, rows] = (moved + own - total).clamp(min=0).cpu()
            agreement[run, rows] = (logits.argmax(-1) == choice).float().cpu()
            if following is not None:
                losses[1 + run, rows] = (own - logits.gather(-1, following[rows])[:, 0]).cpu()
    pieces = [slice(a, b) for a, b in pairwise(edges)]
    nats = losses[:, :-1].mean(-1).tolist()
    return [
        {
            "edges": edges,
            "kl": [float(divergence[run, piece].mean()) for piece in pieces],
            "top1": [float(agreement[run, piece].mean()) for piece in pieces],
            "mean_kl": float(divergence[run].mean()),
            "mean_top1": float(agreement[run].mean()),
        }
        | ({} if tokens is None else {"nats": nats[1 + run], "dense_nats": nats[0]})
        for run in range(runs)
    ]


def plan_map(plan: SparsePlan, head: int, heads: int, size: int = _MAP_SIZE) -> dict[str, Any]:
    """A picture of a plan for a query head of a batch of one: see ``maps`` in the format of results.

    A tile is judged by up to 4 of its rows.
    """
    rows = torch.linspace(0, plan.query_len - 1, size * _ROWS_PER_TILE).round().long()
    mask = plan.rows_mask(rows)[0, head * plan.heads // heads].float()
    visible = plan.extent.allowed(rows, plan.key_len)[0].float()
    kept, seen = (F.adaptive_avg_pool2d(x.cpu()[None], (size, size))[0] for x in (mask, visible))
    image = (255 * kept / seen.clamp(min=1e-9)).round().clamp(max=255).to(torch.uint8)
    return {"size": size, "data": base64.b64encode(bytes(image.flatten().tolist())).decode()}
