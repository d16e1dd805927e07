"""Trainable attention layers of papers that change the architecture. They need torch alone.

`DynamicMaskAttention` takes and gives what a layer of transformers does, so that it stands in a model of transformers.
`OrionMSP` is a whole model of tables. All others take ``x [B, T, E]`` and a mask of live tokens or lengths, and give
``[B, T, E]``.
"""

from gossamer.modules.combiner import Axial, CombinerAttention, CombinerCache, Fixed, Learnable, LogSparse, Mixture
from gossamer.modules.dynamic_mask import DynamicMask, DynamicMaskAttention, plan_of_scores
from gossamer.modules.moving_average import MovingAverage
from gossamer.modules.orion_msp import OrionMSP, RowInteraction, links, plan_of_links
from gossamer.modules.routing import KeysAndValues, RoutingAttention
from gossamer.modules.seqboat import SeqBoatCache, SeqBoatLayer
from gossamer.modules.sparsifiner import (
    Connections,
    ConnectivityPredictor,
    SparsifinerAttention,
    distillation_loss,
    plan_of_connections,
    prune_tokens,
    reconstruction_loss,
    set_stage,
)
from gossamer.modules.vit import sparsify_vit

__all__ = [
    "Axial",
    "CombinerAttention",
    "CombinerCache",
    "Connections",
    "ConnectivityPredictor",
    "DynamicMask",
    "DynamicMaskAttention",
    "Fixed",
    "KeysAndValues",
    "Learnable",
    "LogSparse",
    "Mixture",
    "MovingAverage",
    "OrionMSP",
    "RoutingAttention",
    "RowInteraction",
    "SeqBoatCache",
    "SeqBoatLayer",
    "SparsifinerAttention",
    "distillation_loss",
    "links",
    "plan_of_connections",
    "plan_of_links",
    "plan_of_scores",
    "prune_tokens",
    "reconstruction_loss",
    "set_stage",
    "sparsify_vit",
]
