"""Training that computes less: zeros in weights, sampled gradients, forward passes only."""

from gossamer.training.bdwp import BDWPLinear, Macs, bdwp, count_macs, largest
from gossamer.training.masked import MaskedLinear, distillation_loss, pack, recover, unpack
from gossamer.training.prge import PRGE, estimate_gradient, target_loss
from gossamer.training.rsc import RSC, allocate
from gossamer.training.sampled import topk_mm

__all__ = [
    "PRGE",
    "RSC",
    "BDWPLinear",
    "Macs",
    "MaskedLinear",
    "allocate",
    "bdwp",
    "count_macs",
    "distillation_loss",
    "estimate_gradient",
    "largest",
    "pack",
    "recover",
    "target_loss",
    "topk_mm",
    "unpack",
]
