"""Multi-query associative recall (Zoology, 2312.04927): small models of two layers, trained to look pairs up.

The generator (`data`), what mixes tokens (`mixers`), the model and its training (`network`, `training`), and the sweep
over mixers, widths, rates and seeds that goes on where it was stopped (`settings`, `sweep`).
"""

from gossamer.evaluate.mqar.data import (
    VARIANTS,
    Compositional,
    Examples,
    Forgetting,
    Plain,
    Scattered,
    Stacked,
    Variant,
)

__all__ = ["VARIANTS", "Compositional", "Examples", "Forgetting", "Plain", "Scattered", "Stacked", "Variant"]
