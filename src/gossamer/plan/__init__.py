"""The ground: what a model allows (`Extent`), how blocks lie on it (`Grid`), what is computed of it (`SparsePlan`)."""

from gossamer.plan.extent import Extent
from gossamer.plan.grid import Grid
from gossamer.plan.integers import ceil_div, starts_of
from gossamer.plan.plan import SparsePlan, on_device

__all__ = ["Extent", "Grid", "SparsePlan", "ceil_div", "on_device", "starts_of"]
