"""Methods: from a call to a plan. One file a paper; a new one joins by one line in ``registry``."""

from gossamer.methods.a_shape import AShape
from gossamer.methods.anchor_attention import AnchorAttention
from gossamer.methods.base import Method
from gossamer.methods.block_sparse import BlockSparse
from gossamer.methods.dense import Dense
from gossamer.methods.flexprefill import FlexPrefill
from gossamer.methods.max_relative import MaxRelative
from gossamer.methods.minference import MInference
from gossamer.methods.pbs import PBS
from gossamer.methods.per_head import PerHead
from gossamer.methods.registry import available, create, from_dict
from gossamer.methods.tri_shape import TriShape
from gossamer.methods.vertical_slash import VerticalSlash
from gossamer.methods.xattention import XAttention

__all__ = [
    "PBS",
    "AShape",
    "AnchorAttention",
    "BlockSparse",
    "Dense",
    "FlexPrefill",
    "MInference",
    "MaxRelative",
    "Method",
    "PerHead",
    "TriShape",
    "VerticalSlash",
    "XAttention",
    "available",
    "create",
    "from_dict",
]
