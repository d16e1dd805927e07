"""The ground: where tokens sit (`Extent`), how blocks lie on them (`Grid`), which pairs are computed (`SparsePlan`)."""

from gossamer.plan.plan import Extent, SparsePlan, ceil_div, on_device

__all__ = ["Extent", "SparsePlan", "ceil_div", "on_device"]
