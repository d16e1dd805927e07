"""Training that computes less."""

from __future__ import annotations

from gossamer.training.prge import PRGE, estimate_gradient, target_loss
from gossamer.training.rsc import RSC, allocate
from gossamer.training.sampled import topk_mm

__all__ = [
    "PRGE",
    "RSC",
    "allocate",
    "estimate_gradient",
    "target_loss",
    "topk_mm",
]
