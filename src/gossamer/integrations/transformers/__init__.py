"""Sparse prefill inside unmodified transformers models: `enable`, `Handle`, `register`.

    handle = gossamer.enable(model, method="minference")    # also a context manager
    model.generate(...)                                     # prefill sparse, decode dense
    print(handle.stats())
    handle.disable()

Nothing is patched: an attention function and a mask function are registered under the name ``gossamer``, and the
policy belongs to the model object. ``from_pretrained(..., attn_implementation="gossamer")`` works too once this
module is imported (`register` was called); such a model uses the default policy until it is enabled.
"""

from gossamer.integrations.transformers.attention import NAME, Observation, hf_attention, register
from gossamer.integrations.transformers.handle import Handle, LayerStats, Stats, enable
from gossamer.integrations.transformers.masks import compact_mask

__all__ = [
    "NAME",
    "Handle",
    "LayerStats",
    "Observation",
    "Stats",
    "compact_mask",
    "enable",
    "hf_attention",
    "register",
]

register()
