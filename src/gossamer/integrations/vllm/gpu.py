"""vLLM's Triton backend with sparse prefill, as ``--attention-backend CUSTOM``. Not yet run on a GPU.

Written from vLLM 0.32's source. Its parts that need no GPU are tested on stubs of vLLM's classes.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from gossamer.integrations.vllm.backend import SparseBuilder, SparseImpl, is_asked_for
from gossamer.integrations.vllm.pages import ROWS

__all__ = ["SparseTritonBackend", "SparseTritonBuilder", "SparseTritonImpl"]

_PLAIN = ("auto", "float16", "bfloat16", "float32")  # caches that hold numbers as the model computes them


class SparseTritonBackend(TritonAttentionBackend):
    """`TritonAttentionBackend`, and in all but its name itself where nobody asked for gossamer."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return SparseTritonImpl if is_asked_for() else TritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return SparseTritonBuilder if is_asked_for() else TritonAttentionMetadataBuilder


class SparseTritonBuilder(SparseBuilder, TritonAttentionMetadataBuilder):
    """Reads pages whose tokens are rows of keys and values, in whatever order memory has them."""

    # What a plan holds depends on values: a step with prompts must not become part of a graph.
    _cudagraph_support: ClassVar[Any] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # A description that is changed in place would keep the rows of another step.
        self.supports_draft_decode_metadata_update = False

    def layout(self) -> str:
        return ROWS

    def stand_in(self) -> SimpleNamespace:
        one = torch.ones((), device=self.device)
        return SimpleNamespace(_k_scale=one, _v_scale=one)

    def why_not(self, impl: Any) -> str | None:
        if impl.use_alibi_sqrt:
            return "ALiBi"
        if impl.kv_cache_dtype not in _PLAIN:
            return "quantised cache"
        if impl.chunk_lookback >= 0:
            return "chunked attention"
        if self.rswa_window is not None:
            return "reference sliding window"
        parallel = self.vllm_config.parallel_config
        sizes = (f"{name}_context_parallel_size" for name in ("decode", "prefill"))
        return "context parallelism" if any(getattr(parallel, name, 1) > 1 for name in sizes) else None

    def why_not_step(self, common: Any) -> str | None:
        if common.mm_req_doc_ranges is not None:
            return "tokens that see each other both ways"
        return "lengths are on the device" if common.seq_lens_cpu_upper_bound is None else None

    def lengths(self, common: Any) -> tuple[Tensor, Tensor]:
        # The bound is exact for rows of a prompt; `min_queries` keeps drafts of speculative decoding out.
        rows = common.num_reqs
        return common.query_start_loc_cpu[: rows + 1], common.seq_lens_cpu_upper_bound[:rows]


class SparseTritonImpl(SparseImpl, TritonAttentionImpl):
    """One layer's attention."""

    @property
    def window(self) -> int | None:
        return self.sliding_window[0] + 1 if self.sliding_window[0] >= 0 else None
