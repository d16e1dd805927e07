"""What gossamer adds to a backend of vLLM's, on CPUs and GPUs: rows with many queries run a plan, all others stay.

`SparseBuilder` and `SparseImpl` stand before vLLM's own classes, which do all that is not said here.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from gossamer.call import AttentionCall
from gossamer.integrations.vllm.bounds import PageStore
from gossamer.integrations.vllm.decoding import Memory
from gossamer.integrations.vllm.engine import Engine, call_of, logger
from gossamer.integrations.vllm.limits import fills_unseen, why_not
from gossamer.integrations.vllm.pages import ROWS, paged, read, verify
from gossamer.integrations.vllm.plugin import engine_of, policies_of, requests_of, settings_of
from gossamer.integrations.vllm.rows import Readers, Row, Step, put, taken

__all__ = ["SparseBuilder", "SparseImpl", "is_asked_for"]

Stock: Any = object  # vLLM's own class comes behind in the order of inheritance


def is_asked_for() -> bool:
    """Whether the server that is being made asks for gossamer; true where nobody knows."""
    config = get_current_vllm_config_or_none()
    return config is None or settings_of(config) is not None


class SparseImpl(Stock):
    """One layer's attention.

    A subclass says what of the cache and of vLLM's class is its own: `misfit` and `window`.
    """

    engine: Engine | None = None
    index: int | None = None
    reason: str | None = "not in a group of layers"
    isa: str = ""
    page: tuple[int, ...] = ()
    number: int = -1

    def misfit(self, query: Tensor, cache: Tensor) -> bool:
        """Whether the cache is another one than was verified."""
        return tuple(cache.shape[1:]) != self.page or cache.dtype != query.dtype

    @property
    def window(self) -> int | None:
        """The layer's sliding window."""
        raise NotImplementedError

    def join(
        self,
        engine: Engine,
        index: int | None,
        reason: str | None,
        isa: str,
        page: tuple[int, ...],
        written_here: bool = True,
    ) -> None:
        """Become a layer that the plug-in counts and, without a reason not to, serves.

        Args:
            isa, page: the layout of its cache, and the shape ``(G, tokens, 2 * D)`` of a page.
            written_here: whether all that comes into its pages comes by `do_kv_cache_update`.
        """
        self.engine, self.index, self.isa, self.page = engine, index, isa, page
        self.reason = reason if reason is not None else engine.why_not(index, self.num_heads)
        decodes = self.reason is None and self.window is None and isa != ROWS and written_here
        self.number = engine.decoders.join(index, self.num_heads, self.num_kv_heads, page[1], decodes)

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
        if step is None or self.engine is None:
            return super().forward(*given, attn_metadata, output, output_scale, output_block_scale)
        reason = self._why_not(step, query, kv_cache)
        if output_scale is not None or output_block_scale is not None:
            reason = "quantised output"
        if reason is None and step.without is not None:
            decoders = self.engine.decoders
            whole = [id(some.policy) for some in step.readers if decoders.reads_whole(some.policy, self.number)]
            step = step.without(whole) if whole else step
        if reason is not None or step.is_stock:
            self.engine.counters.add_stock(self.index, [(reason, step.count())] if reason else step.reasons.items())
            return super().forward(*given, attn_metadata, output, output_scale, output_block_scale)
        if step.others:
            # They need not come first, nor together: then their tokens are taken out and put back.
            some = taken(query, step.others)
            apart = len(step.others) > 1
            into = output.new_empty(len(some), *output.shape[1:]) if apart else taken(output, step.others)
            super().forward(layer, some, key, value, kv_cache, step.stock, into)
            if apart:
                put(output, step.others, into)
        if step.reasons:
            self.engine.counters.add_stock(self.index, step.reasons.items())
        for row in step.rows:
            self._attend(row, query, key, value, kv_cache, attn_metadata.block_table, output)
        for some in step.readers:
            self._decode(some, query, kv_cache, attn_metadata.block_table, output)
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.engine is not None:
            self.engine.written(kv_cache, slot_mapping)

    def _why_not(self, step: Step, query: Tensor, cache: Tensor) -> str | None:
        if self.reason is not None:
            return self.reason
        if self.misfit(query, cache):
            return "unknown cache layout"
        window = self.window
        short = window is not None and all(window < (row.policy.min_tokens or 0) for row in step.rows)
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
        heads, groups, dim, window = self.num_heads, self.num_kv_heads, self.head_size, self.window
        if row.past == 0 and key is not None and value is not None and self.kv_sharing_target_layer_name is None:
            keys, values = (t[mine].view(row.queries, groups, -1).transpose(0, 1)[None] for t in (key, value))
        else:
            first = 0 if window is None else max(0, row.past - window + 1)
            take = read if self.isa == ROWS else paged
            keys, values = take(cache, table[row.index], first, row.tokens, self.isa)
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

    def _decode(self, some: Readers, query: Tensor, cache: Tensor, table: Tensor, out: Tensor) -> None:
        assert self.engine is not None
        extent, listed = some.ready(table, cache.shape[2])
        keys, values = paged(cache, listed, 0, max(some.counts), self.isa)
        span = some.span
        places = span if span is not None else torch.tensor(some.places, device=query.device)
        call = AttentionCall(
            query[places].view(len(some.places), self.num_heads, 1, self.head_size),
            keys,
            values,
            extent,
            self.scale,
            self.sinks,
            self.logits_soft_cap or None,
            self.index,
            PageStore(self.engine.bounds_of(cache), cache, keys, extent.key_count),
            state=some.states or None,
        )
        result = self.engine.decode(call, some)
        out[places] = result.view(len(some.places), *out.shape[1:])


class SparseBuilder(Stock):
    """Decides which rows of a step run a plan, and has vLLM's metadata made for the others alone.

    A subclass says which layers and steps it cannot serve, where a step's lengths stand, and how pages lie.
    """

    runner: Any = None
    sparse: Engine | None = None
    serves: bool = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.sparse = engine_of(vllm_config)
        self.memory = Memory()
        if self.sparse is None:
            return
        spec = kv_cache_spec
        of_server = why_not(vllm_config)
        page, isa = (spec.num_kv_heads, spec.block_size, 2 * spec.head_size), self.layout()
        for name, layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).items():
            impl = layer.impl
            if isinstance(impl, SparseImpl):
                reason = of_server or _why_not(layer) or self.why_not(impl) or self._verified(impl, page, isa)
                impl.join(self.sparse, _index(name), reason, isa, page, not fills_unseen(vllm_config))
                self.serves |= impl.reason is None

    def layout(self) -> str:
        """Of pages, as `pages.read` knows it."""
        raise NotImplementedError

    def stand_in(self) -> Any:
        """As much of a layer as writing to a cache asks for."""
        raise NotImplementedError

    def why_not(self, impl: Any) -> str | None:
        """Why a layer stays with vLLM's kernel, beside what holds for all backends; or None."""
        raise NotImplementedError

    def why_not_step(self, common: Any) -> str | None:
        """Likewise a whole step."""
        return None

    def lengths(self, common: Any) -> tuple[Tensor, Tensor]:
        """Of a step, on the host: where each row's queries begin and the last end, and tokens of each sequence."""
        raise NotImplementedError

    def _verified(self, impl: Any, page: tuple[int, int, int], isa: str) -> str | None:
        def write(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
            impl.do_kv_cache_update(self.stand_in(), keys, values, cache, slots)

        wrong = verify(write, (3, *page), self.vllm_config.model_config.dtype, isa, self.device)
        if wrong is None:
            return None
        logger.warning("gossamer: the cache of this vLLM is not as expected, its own kernel runs: %s", wrong)
        return "unknown cache layout"

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.sparse is not None:
            whole.__class__ = _with_step(type(whole))
            whole.gossamer = self._step(self.sparse, common_attn_metadata)
        return whole

    def _step(self, sparse: Engine, common: Any) -> Step:
        rows = common.num_reqs
        if not self.serves:
            return sparse.refused(rows, "layers are not served")
        if isinstance(common.causal, Tensor) or not common.causal:
            return sparse.refused(rows, "not causal")
        reason = self.why_not_step(common)
        if reason is not None:
            return sparse.refused(rows, reason)
        policies = policies_of(self, sparse, rows) if common.max_query_len > 1 or sparse.decodes else None
        starts, lengths = self.lengths(common)
        prompts = getattr(common, "is_prefilling", None) if sparse.decodes else None
        of_prompts = () if prompts is None else prompts[:rows].tolist()
        step = sparse.step(starts, lengths, common.max_query_len, policies, of_prompts)
        if sparse.decodes:
            self.memory.join(step, requests_of(self, rows))
        self._give_stock(step, common, starts, lengths)
        former = step.without
        if former is not None:
            made: dict[frozenset[int], Step] = {}

            def without(whole: Collection[int]) -> Step:
                key = frozenset(whole)
                if key not in made:
                    made[key] = former(key)
                    self.memory.join(made[key])
                    self._give_stock(made[key], common, starts, lengths)
                return made[key]

            step.without = without
        return step

    def _give_stock(self, step: Step, common: Any, starts: Tensor, lengths: Tensor) -> None:
        if step.others and not step.is_stock:
            step.stock = super().build(0, _others(common, step, starts, lengths))


@functools.cache
def _with_step(metadata: type) -> type:
    """vLLM's metadata with a field for ours: where it is copied (as for ``--kv-sharing-fast-prefill``), fields are."""
    names = {"__annotations__": {"gossamer": Any}, "gossamer": None}
    return dataclass(type(metadata.__name__, (metadata,), names))


def _why_not(layer: Any) -> str | None:
    impl = layer.impl
    if getattr(layer, "attention_chunk_size", None) is not None:
        return "chunked attention"  # its rows are parts of sequences, and do not say whose
    if impl.attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
        return "encoder attention"
    if impl.attn_type != AttentionType.DECODER:
        return "cross-attention"
    return "ALiBi" if impl.alibi_slopes is not None else None


def _index(name: str) -> int | None:
    """The number in a layer's name; None for a draft model's, which count from 0 again."""
    if name.startswith("draft_model."):
        return None
    try:
        return extract_layer_index(name)
    except (AssertionError, ValueError):
        return None


def _others(common: Any, step: Step, starts: Tensor, lengths: Tensor) -> Any:
    """vLLM's description of a step, of the rows that run no plan alone."""
    chosen = set(step.chosen())
    rows = torch.tensor([index for index in range(len(lengths)) if index not in chosen], device="cpu")
    counts = (starts[1:] - starts[:-1])[rows]
    begins = torch.zeros(len(rows) + 1, dtype=starts.dtype, device="cpu")
    torch.cumsum(counts, 0, out=begins[1:])
    device = common.query_start_loc.device
    there = rows.to(device)
    return replace(
        common,
        query_start_loc=begins.to(device),
        query_start_loc_cpu=begins,
        seq_lens=common.seq_lens[there],
        num_reqs=len(rows),
        num_actual_tokens=int(begins[-1]),
        max_query_len=int(counts.max()),
        max_seq_len=int(lengths[rows].max()),
        block_table_tensor=common.block_table_tensor[there],
        slot_mapping=taken(common.slot_mapping, step.others),
        **dict(_per_row(common, rows)),
    )


def _per_row(common: Any, rows: Tensor) -> Iterator[tuple[str, Any]]:
    """What else a description may hold by row, and what it remembers of all of them."""
    bounds = getattr(common, "seq_lens_cpu_upper_bound", None)
    if bounds is not None:
        yield "seq_lens_cpu_upper_bound", bounds[rows]
    for name in ("_num_computed_tokens_cache", "_token_to_req_indices_cache"):
        if hasattr(common, name):
            yield name, None
