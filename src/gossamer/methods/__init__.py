"""Methods: from a call to a plan. One file a paper; a new one joins by one line in ``registry``."""

from gossamer.methods.a_shape import AShape
from gossamer.methods.adaspa import AdaSpa
from gossamer.methods.anchor_attention import AnchorAttention
from gossamer.methods.attention_tile import AttentionTile
from gossamer.methods.auto import Auto
from gossamer.methods.base import Method
from gossamer.methods.block_bounds import OracleBlocks, RandomBlocks, WindowBlocks
from gossamer.methods.block_sparse import BlockSparse
from gossamer.methods.corrected import Corrected
from gossamer.methods.cosa import CoSA
from gossamer.methods.dense import Dense
from gossamer.methods.double_sparsity import DoubleSparsity
from gossamer.methods.duo_attention import DuoAttention
from gossamer.methods.flash_prefill import FlashPrefill
from gossamer.methods.flexprefill import FlexPrefill
from gossamer.methods.grid_lines import GridLines
from gossamer.methods.infllm import InfLLM
from gossamer.methods.infllm_long import InfLLMLong
from gossamer.methods.longgen import LongGen
from gossamer.methods.lserve import LServe
from gossamer.methods.magicpig import MagicPIG
from gossamer.methods.max_relative import MaxRelative
from gossamer.methods.minference import MInference
from gossamer.methods.mminference import MMInference
from gossamer.methods.moa import MoA
from gossamer.methods.mtraining import MTraining
from gossamer.methods.oracle_topk import OracleTopK
from gossamer.methods.paro import PARO
from gossamer.methods.pbs import PBS
from gossamer.methods.per_head import PerHead
from gossamer.methods.prism import Prism
from gossamer.methods.quest import Quest
from gossamer.methods.reduced import Reduced, Reducing
from gossamer.methods.registry import available, create, decoding, denoising, from_dict
from gossamer.methods.retro_infer import RetroInfer
from gossamer.methods.seer_attention import SeerAttention
from gossamer.methods.sparge import Sparge
from gossamer.methods.sparse_vdit import SparseVDiT
from gossamer.methods.sparsed import SparseD
from gossamer.methods.stem import Stem
from gossamer.methods.tri_shape import TriShape
from gossamer.methods.triangle_mix import TriangleMix
from gossamer.methods.vec_attention import VecAttention
from gossamer.methods.vertical_slash import VerticalSlash
from gossamer.methods.xattention import XAttention

__all__ = [
    "PARO",
    "PBS",
    "AShape",
    "AdaSpa",
    "AnchorAttention",
    "AttentionTile",
    "Auto",
    "BlockSparse",
    "CoSA",
    "Corrected",
    "Dense",
    "DoubleSparsity",
    "DuoAttention",
    "FlashPrefill",
    "FlexPrefill",
    "GridLines",
    "InfLLM",
    "InfLLMLong",
    "LServe",
    "LongGen",
    "MInference",
    "MMInference",
    "MTraining",
    "MagicPIG",
    "MaxRelative",
    "Method",
    "MoA",
    "OracleBlocks",
    "OracleTopK",
    "PerHead",
    "Prism",
    "Quest",
    "RandomBlocks",
    "Reduced",
    "Reducing",
    "RetroInfer",
    "SeerAttention",
    "Sparge",
    "SparseD",
    "SparseVDiT",
    "Stem",
    "TriShape",
    "TriangleMix",
    "VecAttention",
    "VerticalSlash",
    "WindowBlocks",
    "XAttention",
    "available",
    "create",
    "decoding",
    "denoising",
    "from_dict",
]
