"""Methods: from a call to a plan. One file a paper; a new one joins by one line in ``registry``."""

from gossamer.methods.a_shape import AShape
from gossamer.methods.base import Method
from gossamer.methods.block_sparse import BlockSparse
from gossamer.methods.cosa import CoSA
from gossamer.methods.dense import Dense
from gossamer.methods.max_relative import MaxRelative
from gossamer.methods.minference import MInference
from gossamer.methods.per_head import PerHead
from gossamer.methods.prism import Prism
from gossamer.methods.registry import available, create, from_dict
from gossamer.methods.sparge import Sparge
from gossamer.methods.stem import Stem
from gossamer.methods.tri_shape import TriShape
from gossamer.methods.triangle_mix import TriangleMix
from gossamer.methods.vertical_slash import VerticalSlash

__all__ = [
    "AShape",
    "BlockSparse",
    "CoSA",
    "Dense",
    "MInference",
    "MaxRelative",
    "Method",
    "PerHead",
    "Prism",
    "Sparge",
    "Stem",
    "TriShape",
    "TriangleMix",
    "VerticalSlash",
    "available",
    "create",
    "from_dict",
]
