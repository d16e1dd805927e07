"""Methods by name: ours, and those of packages that offer the entry point group ``gossamer.methods``."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any

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

__all__ = ["GROUP", "available", "class_of", "create", "decoding", "denoising", "from_dict"]

GROUP = "gossamer.methods"

_METHODS: tuple[type[Method], ...] = (
    Dense,
    Auto,
    AShape,
    TriShape,
    TriangleMix,
    VerticalSlash,
    MTraining,
    BlockSparse,
    MInference,
    GridLines,
    MMInference,
    MaxRelative,
    FlexPrefill,
    XAttention,
    AnchorAttention,
    VecAttention,
    FlashPrefill,
    Sparge,
    Prism,
    Stem,
    CoSA,
    PBS,
    DuoAttention,
    LServe,
    MoA,
    LongGen,
    SeerAttention,
    Corrected,
    PerHead,
)
# Those that choose what a decode step reads, and have no plan for a prompt; InfLLMLong reads it by calls of its own.
_STEPS: tuple[type[Method], ...] = (Quest, DoubleSparsity, InfLLM, InfLLMLong, MagicPIG, RetroInfer, OracleTopK)
# Those that plan the calls of models that denoise, which attend in both directions; the last three are bounds.
_DENOISING: tuple[type[Method], ...] = (
    AdaSpa,
    SparseVDiT,
    AttentionTile,
    PARO,
    SparseD,
    OracleBlocks,
    WindowBlocks,
    RandomBlocks,
)
_OTHERS = (*_STEPS, *_DENOISING)


def available() -> list[str]:
    """Names of methods that plan prompts, which ``gossamer.enable`` accepts: ours, then those of installed packages.

    ``infllm_long`` reads prompts without a plan; it is among `decoding`.
    """
    ours = [method.name for method in _METHODS]
    return ours + sorted(name for name in _installed() if name not in (*ours, *(other.name for other in _OTHERS)))


def decoding() -> list[str]:
    """Names of ours that choose what a decode step reads: ``gossamer.enable(decode=...)`` accepts them."""
    return [method.name for method in (*_STEPS, *_METHODS) if method.decodes]


def denoising() -> list[str]:
    """Names of ours that plan the calls of image, video and text diffusion models, which attend in both directions."""
    return [method.name for method in _DENOISING]


def class_of(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: no method has this name, or a package's entry point names no method.
    """
    for method in (*_METHODS, *_OTHERS):
        if method.name == name:
            return method
    entry = _installed().get(name)
    if entry is None:
        known = ", ".join(dict.fromkeys([*available(), *decoding(), *denoising()]))
        raise ValueError(f"unknown method {name!r}; known: {known}")
    try:
        method = entry.load()
    except Exception as error:
        raise ValueError(f"the entry point {entry.name} = {entry.value} does not load: {error}") from error
    if not (isinstance(method, type) and issubclass(method, Method)) or getattr(method, "name", None) != name:
        raise ValueError(
            f"the entry point {entry.name} = {entry.value} must name a class of gossamer.methods.Method whose name is "
            f"{name!r}"
        )
    return method


def create(name: str, /, **fields: Any) -> Method:
    """A method by name, with any of its fields.

    Raises:
        ValueError: an unknown name or field (the message lists the known ones), or a value out of range.
    """
    return class_of(name).from_fields({field: _built(value) for field, value in fields.items()})


def from_dict(data: dict[str, Any]) -> Method:
    """Inverse of `Method.to_dict`.

    Raises:
        ValueError: as `create`; or no ``method`` key.
    """
    if not isinstance(data, dict) or not isinstance(data.get("method"), str):
        raise ValueError(f"a method's dictionary needs the key 'method', one of: {', '.join(available())}")
    return create(data["method"], **{key: value for key, value in data.items() if key != "method"})


def _built(value: Any) -> Any:
    """A field's value, with methods where it holds their dictionaries."""
    if isinstance(value, (list, tuple)):  # fields are hashable: methods that are equal are planned together
        return tuple(_built(item) for item in value)
    return from_dict(value) if isinstance(value, dict) and "method" in value else value


@functools.cache
def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
