"""vLLM's CPU backend with sparse prefill: rows with many queries run a plan, all others vLLM's own kernel."""
# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from gossamer.integrations.vllm.engine import Engine, call_of, logger
from gossamer.integrations.vllm.pages import read, verify
from gossamer.integrations.vllm.plugin import engine_of, policies_of, settings_of
from gossamer.integrations.vllm.rows import Row, Step

__all__ = ["SparseCPUBackend", "SparseCPUBuilder", "SparseCPUImpl"]


class SparseCPUBackend(CPUAttentionBackend):
    """`CPUAttentionBackend`, and itself where nobody asked for gossamer."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        config = get_current_vllm_config_or_none()
        return CPUAttentionBackendImpl if config is not None and settings_of(config) is None else SparseCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return SparseCPUBuilder


class SparseCPUBuilder(CPUAttentionMetadataBuilder):
    """Decides which rows of a step run a plan, and has vLLM's metadata made for the others alone."""

    runner: Any = None

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.sparse = engine_of(vllm_config)
        self.serves = False
        if self.sparse is None:
            return
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for name, layer in layers.items():
            impl = layer.impl
            if isinstance(impl, SparseCPUImpl):
                impl.join(self.sparse, _index(name), self._why_not(impl), self.isa, self._page())
                self.serves |= impl.reason is None

    def _why_not(self, impl: SparseCPUImpl) -> str | None:
        """Why a layer stays with vLLM's kernel, or None."""
        if self.is_encoder_only_attention or impl.attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
            return "encoder attention"
        if self.is_cross_attention or impl.attn_type != AttentionType.DECODER:
            return "cross-attention"
        if impl.alibi_slopes is not None:
            return "ALiBi"
        if impl.is_fp8_kv_cache:
            return "fp8 cache"

        def write(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
            impl.do_kv_cache_update(_Isa(self.isa), keys, values, cache, slots)

        wrong = verify(write, (3, *self._page()), self.dtype, self.isa)
        if wrong is not None:
            logger.warning("gossamer: the cache of this vLLM is not as expected, its own kernel runs: %s", wrong)
            return "unknown cache layout"
        return None

    def _page(self) -> tuple[int, int, int]:
        """The shape of a page of one layer's cache."""
        return self.num_kv_heads, self.block_size, 2 * self.head_dim

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.sparse is not None:
            whole.gossamer = self._step(common_attn_metadata)  # type: ignore[attr-defined]
        return whole

    def _step(self, common: Any) -> Step:
        assert self.sparse is not None
        rows = common.num_reqs
        if not self.serves:
            return self.sparse.refused(rows, "layers are not served")
        if isinstance(common.causal, Tensor) or not common.causal:
            return self.sparse.refused(rows, "not causal")
        policies = policies_of(self, self.sparse, rows) if common.max_query_len > 1 else None
        starts, lengths = common.query_start_loc[: rows + 1], common.seq_lens[:rows]
        step = self.sparse.step(starts, lengths, common.max_query_len, policies)
        if step.rows and step.reasons:
            step.stock = super().build(0, _others(common, step))
        return step


class SparseCPUImpl(CPUAttentionBackendImpl):
    """One layer's attention."""

    engine: Engine | None = None
    index: int | None = None
    reason: str | None = "not in a group of layers"
    isa: str = ""
    page: tuple[int, ...] = ()

    def join(self, engine: Engine, index: int | None, reason: str | None, isa: str, page: tuple[int, ...]) -> None:
        """Become a layer that the plug-in counts and, without a reason not to, serves.

        Args:
            isa, page: the layout of its cache, and the shape ``(G, tokens, 2 * D)`` of a page.
        """
        self.engine, self.index, self.isa, self.page = engine, index, isa, page
        self.reason = reason if reason is not None else engine.why_not(index, self.num_heads)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        step: Step | None = getattr(attn_metadata, "gossamer", None)
        given = (layer, query, key, value, kv_cache)
        if step is None or self.engine is None or output_scale is not None or output_block_scale is not None:
            return super().forward(*given, attn_metadata, output, output_scale, output_block_scale)
        reason = self._why_not(step, kv_cache)
        if reason is not None or not step.rows:
            self.engine.counters.add_stock(self.index, [(reason, step.count())] if reason else step.reasons.items())
            return super().forward(*given, attn_metadata, output)
        if step.stock is not None:
            # They need not come first: their tokens are taken out and put back.
            some = torch.empty(len(step.others), *output.shape[1:], dtype=output.dtype)
            super().forward(layer, query[step.others], key, value, kv_cache, step.stock, some)
            output[step.others] = some
            self.engine.counters.add_stock(self.index, step.reasons.items())
        for row in step.rows:
            self._attend(row, query, key, value, kv_cache, attn_metadata.block_table, output)
        return output

    def _why_not(self, step: Step, cache: Tensor) -> str | None:
        if self.reason is not None:
            return self.reason
        if tuple(cache.shape[1:]) != self.page or not cache.is_contiguous():
            return "unknown cache layout"
        window = self.sliding_window
        short = window > 0 and all(window < (row.policy.min_tokens or 0) for row in step.rows)
        return "short model window" if step.rows and short else None

    def _attend(
        self,
        row: Row,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        cache: Tensor,
        table: Tensor,
        out: Tensor,
    ) -> None:
        assert self.engine is not None
        mine = slice(row.start, row.end)
        heads, groups, dim = self.num_heads, self.num_kv_heads, self.head_size
        window = self.sliding_window if self.sliding_window > 0 else None
        if row.past == 0 and key is not None and value is not None and self.kv_sharing_target_layer_name is None:
            keys, values = (t[mine].view(row.queries, groups, -1).transpose(0, 1)[None] for t in (key, value))
        else:
            first = 0 if window is None else max(0, row.past - window + 1)
            keys, values = read(cache, table[row.index], first, row.tokens, self.isa)
        call = call_of(
            row,
            query[mine].view(row.queries, heads, dim),
            keys,
            values,
            window=window,
            scale=self.scale,
            softcap=self.logits_soft_cap or None,
            sinks=self.sinks,
            layer=self.index,
        )
        result = self.engine.attend(call, row.policy)
        out[mine].view(row.queries, heads, -1).copy_(result[0].transpose(0, 1))


class _Isa:
    """As much of a layer as writing to a cache asks for."""

    _k_scale_float = 1.0
    _v_scale_float = 1.0

    def __init__(self, isa: str) -> None:
        self.isa = isa


def _index(name: str) -> int | None:
    """The number in a layer's name."""
    try:
        return extract_layer_index(name)
    except (AssertionError, ValueError):
        return None


def _others(common: Any, step: Step) -> Any:
    """vLLM's description of a step, of the rows that run no plan alone."""
    chosen = {row.index for row in step.rows}
    rows = torch.tensor([index for index in range(common.num_reqs) if index not in chosen])
    counts = (common.query_start_loc[1:] - common.query_start_loc[:-1])[rows]
    starts = torch.zeros(len(rows) + 1, dtype=common.query_start_loc.dtype)
    torch.cumsum(counts, 0, out=starts[1:])
    lengths = common.seq_lens[rows]
    return replace(
        common,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(rows),
        num_actual_tokens=len(step.others),
        max_query_len=int(counts.max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=common.block_table_tensor[rows],
        slot_mapping=common.slot_mapping[step.others],
    )
