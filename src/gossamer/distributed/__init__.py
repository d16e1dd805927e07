"""Attention over a sequence that several processes share, on ``torch.distributed``."""

from gossamer.distributed.layout import KINDS, Layout, Run
from gossamer.distributed.selection import Selection, VerticalSlashes, selection_of
from gossamer.distributed.steps import Piece, pieces_of

__all__ = ["KINDS", "Layout", "Piece", "Run", "Selection", "VerticalSlashes", "pieces_of", "selection_of"]
