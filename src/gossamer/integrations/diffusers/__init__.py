"""Sparse attention inside unmodified diffusers pipelines and transformers: `enable` and its `Handle`.

    handle = gossamer.enable(pipeline, method="adaspa")    # also a context manager
    pipeline(prompt)                                       # early steps dense, later ones sparse
    print(handle.stats())                                  # by layer; handle.stats(step=20) of one step
    handle.disable()

Each attention module keeps its own processor, with the model's projections, norms and rotary embedding; what the
processor asks diffusers or torch to attend comes here.
"""

from gossamer.integrations.diffusers.handle import Handle, enable
from gossamer.integrations.stats import LayerStats, Observation, Stats

__all__ = ["Handle", "LayerStats", "Observation", "Stats", "enable"]
