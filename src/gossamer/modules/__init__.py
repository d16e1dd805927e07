"""Trainable attention layers of papers that change the architecture. They need torch alone.

A layer takes and gives what one of transformers does, so that it stands in a model of transformers.
"""

from gossamer.modules.dynamic_mask import DynamicMask, DynamicMaskAttention, plan_of_scores

__all__ = ["DynamicMask", "DynamicMaskAttention", "plan_of_scores"]
