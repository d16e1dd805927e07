"""Methods: from a call to a plan. One file a paper; a new one joins by one line in ``registry``."""

from gossamer.methods.a_shape import AShape
from gossamer.methods.base import Method
from gossamer.methods.block_sparse import BlockSparse
from gossamer.methods.dense import Dense
from gossamer.methods.duo_attention import DuoAttention
from gossamer.methods.lserve import LServe
from gossamer.methods.max_relative import MaxRelative
from gossamer.methods.minference import MInference
from gossamer.methods.moa import MoA
from gossamer.methods.per_head import PerHead
from gossamer.methods.registry import available, create, from_dict
from gossamer.methods.seer_attention import SeerAttention
from gossamer.methods.tri_shape import TriShape
from gossamer.methods.vertical_slash import VerticalSlash

__all__ = [
    "AShape",
    "BlockSparse",
    "Dense",
    "DuoAttention",
    "LServe",
    "MInference",
    "MaxRelative",
    "Method",
    "MoA",
    "PerHead",
    "SeerAttention",
    "TriShape",
    "VerticalSlash",
    "available",
    "create",
    "from_dict",
]
