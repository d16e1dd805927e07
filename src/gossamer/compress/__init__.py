"""Linear layers that take less time or memory: pruned, binarised, in int8. `gossamer.enable` leaves them alone."""

from __future__ import annotations

from gossamer.compress.billm import Binarised, binarise
from gossamer.compress.hessian import Hessian
from gossamer.compress.sparsegpt import Pattern, prune

__all__ = ["Binarised", "Hessian", "Pattern", "binarise", "prune"]
