"""Training that computes less: with the zeros of a pruned model, or with N of M weights of each product."""

from gossamer.training.bdwp import BDWPLinear, Macs, bdwp, count_macs, largest
from gossamer.training.masked import MaskedLinear, distillation_loss, pack, recover, unpack

__all__ = [
    "BDWPLinear",
    "Macs",
    "MaskedLinear",
    "bdwp",
    "count_macs",
    "distillation_loss",
    "largest",
    "pack",
    "recover",
    "unpack",
]
