"""How far a method is from dense attention, without generating: inside the attention, and in the model's logits.

Inside, every layer sees the inputs of the dense run, so that errors do not add up and layers can be compared: the
attention mass that the plan keeps, next to what the best plan of whole blocks with as many blocks keeps, and the
output. A layer that the policy's thresholds let run dense counts as dense. The logits are those of a whole sparse run.
Memory: one layer's tensors, two times the hidden states, and the logits of 512 positions.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
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
_ROWS_PER_TILE = 4


def compare(subject: Subject, tokens: Tensor, policies: Sequence[Policy]) -> list[dict[str, Any]]:
    """The fields of a ``fidelity`` record for each policy.

    Args:
        tokens: ``[1, S]``.

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
                rows[name].append([round(value, 6) for value in values])
            if call.layer in drawn:
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
    results = []
    for policy, rows in zip(policies, measured, strict=True):
        sparse, cost = subject.hidden_states(tokens, policy)
        means = {name: _mean(rows[name]) for name in FIGURES}
        logits = compare_logits(subject, dense, sparse)
        more = {"mean": means, "logits": logits, "dense_because": cost.dense_because}
        results.append({"density": means["head_density"]} | rows | more)
    return results


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
    """Log-sum-exp of the plan's own pairs: ``lse``, which attending gave, unless others are in it or some are not."""
    if not plan.pruned_mean and plan.skip is None:
        return lse
    return backends.attend(call, plan.with_attributes())[1]


def relative_l2(sparse: Tensor, dense: Tensor) -> Tensor:
    """``|sparse - dense| / |dense|`` over rows and channels, fp32 ``[H]`` of outputs ``[H, rows, Dv]``."""
    difference = (sparse.float() - dense.float()).norm(dim=(1, 2))
    return difference / dense.float().norm(dim=(1, 2)).clamp(min=1e-20)


@torch.inference_mode()
def compare_logits(subject: Subject, dense: Tensor, sparse: Tensor) -> dict[str, Any]:
    """KL divergence (nats, of the sparse from the dense prediction) and share of equal choices, by position.

    Args:
        dense, sparse: hidden states ``[S, width]``.
    """
    length = dense.shape[0]
    edges = [0, *(edge for edge in (64 * 4**i for i in range(12)) if edge < length), length]
    divergence, agreement = torch.empty(length), torch.empty(length)
    for (start, p), (_, q) in zip(subject.logits(dense), subject.logits(sparse), strict=True):
        rows = slice(start, start + p.shape[0])
        expected = p.log_softmax(-1)
        divergence[rows] = (expected.exp() * (expected - q.log_softmax(-1))).sum(-1).clamp(min=0).cpu()
        agreement[rows] = (p.argmax(-1) == q.argmax(-1)).float().cpu()
    pieces = [slice(a, b) for a, b in pairwise(edges)]
    return {
        "edges": edges,
        "kl": [float(divergence[piece].mean()) for piece in pieces],
        "top1": [float(agreement[piece].mean()) for piece in pieces],
        "mean_kl": float(divergence.mean()),
        "mean_top1": float(agreement.mean()),
    }


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
