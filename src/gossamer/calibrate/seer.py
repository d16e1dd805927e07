"""Training of SeerAttention's gates on a frozen model (2410.13276, section 3.2): distilled from its exact attention.

The teacher of a query block is the largest attention mass of a pair in each key block, brought to a sum of 1; the loss
is the divergence of the gate's softmax from it, ``KL(teacher || gate)``. Layers are trained side by side in one forward
pass: each sees its own q and k, and its loss is dropped before the next one's is made.

Deviations from the authors' recipe: a gate begins as mean-pooled attention (there as noise), and their factor of 10 on
the loss is left out, which changes nothing under Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.calibrate.training import Schedule, Training
from gossamer.call import AttentionCall
from gossamer.integrations.transformers import Observation, enable
from gossamer.methods.seer_gates import BLOCK, LayerGate, SeerGates, gate_inputs, gate_scores
from gossamer.oracle import block_peaks, log_sum_exp
from gossamer.plan import Grid

__all__ = ["gate_loss", "teacher", "train_seer"]

# The first rows see few blocks, and say little: a quarter of them does not count.
_DROPPED = 4
_LEAST = 1e-30


def teacher(call: AttentionCall, grid: Grid) -> Tensor:
    """Largest mass of each block, as a share of its row: fp32 ``[B, H, M, N]``; 0 in rows that see nothing."""
    peaks = block_peaks(call, log_sum_exp(call), grid)
    return peaks / peaks.sum(-1, keepdim=True).clamp(min=_LEAST)


def gate_loss(call: AttentionCall, gate: LayerGate, block: int = BLOCK) -> Tensor:
    """Mean over heads and query blocks of ``KL(teacher || gate)``, without the first quarter of the query blocks."""
    grid = Grid(call.extent, block, block)
    with torch.no_grad():
        wanted, inputs = teacher(call, grid), gate_inputs(call, grid)
    total, rows = torch.zeros((), device=call.device), 0
    for part, shares in gate_scores(call, grid, gate, *inputs):
        first = max(grid.query_blocks // _DROPPED - part.start, 0)
        share, given = wanted[:, :, part.start + first : part.stop], shares[:, :, first:]
        difference = share.clamp(min=_LEAST).log() - given.clamp(min=_LEAST).log()
        total, rows = total + (share * difference).sum(), rows + max(0, len(part) - first)
    return total / max(1, rows * call.batch * call.heads)


def train_seer(
    model: Any,
    sample: Callable[[int], Tensor],
    schedule: Schedule,
    *,
    block: int = BLOCK,
    about: Mapping[str, Any] | None = None,
    path: Path | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    save_every: int = 50,
) -> tuple[SeerGates, Training]:
    """Gates for every layer of a model.

    Args:
        model: as for `gossamer.enable`; it is given back as it was.
        sample: token ids ``[1, S]`` for each step.
        about, path: see `Training`.

    Returns:
        the gates, and the training with its losses.

    Raises:
        ValueError: the model's rotary embedding cannot be undone; or see `Training`.
    """
    text = model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    weights = {
        f"layers.{layer}": nn.Parameter(LayerGate.untrained(heads, dim).keys.to(model.device))
        for layer in range(text.num_hidden_layers)
    }
    losses: list[float] = []

    def visit(observed: Observation) -> None:
        weight = weights.get(f"layers.{observed.call.layer}")
        if weight is None or observed.call.rotary is None:
            return
        with torch.enable_grad():
            loss = gate_loss(observed.call, LayerGate(weight), block)
            loss.backward()
        losses.append(float(loss.detach()))

    def backward(step: int) -> float:
        losses.clear()
        with torch.no_grad():
            model.base_model(input_ids=sample(step).to(model.device), use_cache=False)
        if not losses:
            raise ValueError(
                f"no attention of {type(model).__name__} can be learned from: none has a plain causal mask"
            )
        return sum(losses) / len(losses)

    settings = dict(about or {}) | {"kind": "seer", "block": block}
    training = Training(weights, backward, schedule, about=settings, path=path)
    with enable(model, "dense", min_tokens=0) as handle:
        handle.observe(visit, rotary=True)
        training.run(progress, save_every=save_every)
    gates = [LayerGate(weights[f"layers.{layer}"].detach().cpu()) for layer in range(len(weights))]
    return SeerGates(gates, block), training
