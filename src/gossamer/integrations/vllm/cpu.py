"""vLLM's CPU backend with sparse prefill."""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from gossamer.integrations.vllm.backend import SparseBuilder, SparseImpl, is_asked_for

__all__ = ["SparseCPUBackend", "SparseCPUBuilder", "SparseCPUImpl"]


class SparseCPUBackend(CPUAttentionBackend):
    """`CPUAttentionBackend`, and itself where nobody asked for gossamer."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return SparseCPUImpl if is_asked_for() else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return SparseCPUBuilder


class SparseCPUBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    """Reads pages as vLLM's C++ kernels lay them out."""

    def layout(self) -> str:
        return self.isa

    def stand_in(self) -> _Isa:
        return _Isa(self.isa)

    def why_not(self, impl: Any) -> str | None:
        if self.is_encoder_only_attention:
            return "encoder attention"
        if self.is_cross_attention:
            return "cross-attention"
        return "fp8 cache" if impl.is_fp8_kv_cache else None

    def lengths(self, common: Any) -> tuple[Tensor, Tensor]:
        rows = common.num_reqs
        return common.query_start_loc[: rows + 1], common.seq_lens[:rows]


class _Isa:
    _k_scale_float = _v_scale_float = 1.0

    def __init__(self, isa: str) -> None:
        self.isa = isa


class SparseCPUImpl(SparseImpl, CPUAttentionBackendImpl):
    """One layer's attention."""

    def misfit(self, query: Tensor, cache: Tensor) -> bool:
        return super().misfit(query, cache) or not cache.is_contiguous()

    @property
    def window(self) -> int | None:
        return self.sliding_window if self.sliding_window > 0 else None
