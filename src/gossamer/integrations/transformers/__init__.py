"""Sparse prefill inside unmodified transformers models: `enable`, `Handle`, `verify`, `filter_prompt`, `register`.

    handle = gossamer.enable(model, method="minference")    # also a context manager
    model.generate(...)                                     # prefill sparse, decode dense
    print(handle.stats())
    handle.disable()

Nothing is patched: an attention function and a mask function are registered under the name ``gossamer``, and the
policy belongs to the model object. ``from_pretrained(..., attn_implementation="gossamer")`` works too once this
module is imported (`register` was called); such a model uses the default policy until it is enabled.
"""

from gossamer.integrations.stats import LayerStats, Stats
from gossamer.integrations.transformers.attention import hf_attention, register
from gossamer.integrations.transformers.filter import filter_prompt
from gossamer.integrations.transformers.handle import Handle, enable
from gossamer.integrations.transformers.masks import compact_mask
from gossamer.integrations.transformers.owners import NAME, Observation
from gossamer.integrations.transformers.verify import Verification, verify

__all__ = [
    "NAME",
    "Handle",
    "LayerStats",
    "Observation",
    "Stats",
    "Verification",
    "compact_mask",
    "enable",
    "filter_prompt",
    "hf_attention",
    "register",
    "verify",
]

register()
