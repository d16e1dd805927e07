"""Attention over a sequence that several processes share, on ``torch.distributed``."""

from gossamer.distributed.index import TopP, plan_vertical_slash
from gossamer.distributed.layout import KINDS, Layout, Run
from gossamer.distributed.ring import RingPlan, merge, ring_attention
from gossamer.distributed.selection import Selection, VerticalSlashes, selection_of
from gossamer.distributed.simulate import Layer, Machine, Simulation, planted, simulate
from gossamer.distributed.steps import Piece, pieces_of

__all__ = [
    "KINDS",
    "Layer",
    "Layout",
    "Machine",
    "Piece",
    "RingPlan",
    "Run",
    "Selection",
    "Simulation",
    "TopP",
    "VerticalSlashes",
    "merge",
    "pieces_of",
    "plan_vertical_slash",
    "planted",
    "ring_attention",
    "selection_of",
    "simulate",
]
