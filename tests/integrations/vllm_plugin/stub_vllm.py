"""As much of vLLM as gossamer's backends stand on, without vLLM: its names, and a slow kernel that reads its pages.

Attributes and signatures are those of vLLM 0.32; what they compute is written from the formulas.
"""

from __future__ import annotations

import enum
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

GROUPS, HEADS, DIM, PAGE = 2, 4, 16, 16
OURS = tuple(f"gossamer.integrations.vllm.{name}" for name in ("backend", "cpu", "gpu"))


class AttentionType:
    DECODER, ENCODER, ENCODER_ONLY, ENCODER_DECODER = "decoder", "encoder", "encoder_only", "encoder_decoder"


class AttentionCGSupport(enum.Enum):
    NEVER, UNIFORM_SINGLE_TOKEN_DECODE, UNIFORM_BATCH, ALWAYS = range(4)


@dataclass
class Common:
    """``CommonAttentionMetadata``."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: Any = True
    seq_lens_cpu_upper_bound: Tensor | None = None
    is_prefilling: Tensor | None = None
    mm_req_doc_ranges: Any = None
    _num_computed_tokens_cache: Any = None


@dataclass
class Metadata:
    """What a stock builder makes."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor


class Builder:
    """A stock builder."""

    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_draft_decode_metadata_update = True
    rswa_window: int | None = None
    isa = "vec"
    is_encoder_only_attention = is_cross_attention = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kv_cache_spec, self.layer_names, self.vllm_config = kv_cache_spec, layer_names, vllm_config
        self.device = device

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        common = common_attn_metadata
        assert common.query_start_loc.tolist() == common.query_start_loc_cpu.tolist()
        assert len(common.seq_lens) == len(common.block_table_tensor) == common.num_reqs
        assert len(common.slot_mapping) == common.num_actual_tokens == int(common.query_start_loc[-1])
        return Metadata(common.query_start_loc, common.seq_lens, common.block_table_tensor)


class Impl:
    """A stock layer: it notes which rows it was given."""

    def __init__(self, window: int | None = None, softcap: float = 0, sinks: Tensor | None = None, **more: Any) -> None:
        self.num_heads, self.num_kv_heads, self.head_size, self.scale = HEADS, GROUPS, DIM, 0.3
        self.sliding_window: Any = (-1, -1) if window is None else (window - 1, 0)
        self.logits_soft_cap, self.sinks, self.alibi_slopes = softcap, sinks, None
        self.attn_type, self.kv_sharing_target_layer_name = AttentionType.DECODER, None
        self.kv_cache_dtype, self.use_alibi_sqrt, self.chunk_lookback = "auto", False, -1
        self.is_fp8_kv_cache = False
        self.given: list[list[int]] = []
        vars(self).update(more)

    def half(self, cache: Tensor, block: int, place: int, group: int, which: int) -> Tensor:
        """The key or value in one slot of one head."""
        return cache[block, group, place, which * DIM : (which + 1) * DIM]

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        assert float(layer._k_scale) == float(layer._v_scale) == 1
        for token, slot in enumerate(slot_mapping.tolist()):
            for group in range(GROUPS):
                for which, rows in enumerate((key, value)):
                    self.half(kv_cache, slot // PAGE, slot % PAGE, group, which).copy_(rows[token, group])

    def forward(self, layer: Any, query: Tensor, key: Any, value: Any, kv_cache: Tensor, attn_metadata: Any,
                output: Tensor, output_scale: Any = None, output_block_scale: Any = None) -> Tensor:  # fmt: skip
        if attn_metadata is None:
            return output.fill_(0)
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        self.given.append(lengths)
        for row, (start, end, tokens) in enumerate(zip(starts[:-1], starts[1:], lengths, strict=True)):
            table = attn_metadata.block_table[row].tolist()
            for head in range(HEADS):
                for token in range(start, end):
                    position = tokens - (end - token)
                    reach = self.reach()
                    seen = range(0 if reach is None else max(0, position - reach + 1), position + 1)
                    slots = [(table[at // PAGE], at % PAGE, head // (HEADS // GROUPS)) for at in seen]
                    keys, values = (torch.stack([self.half(kv_cache, *at, which) for at in slots]) for which in (0, 1))
                    logits = keys.double() @ query.view(-1, HEADS, DIM)[token, head].double() * self.scale
                    if self.logits_soft_cap:
                        logits = self.logits_soft_cap * torch.tanh(logits / self.logits_soft_cap)
                    sink = -math.inf if self.sinks is None else float(self.sinks[head])
                    weights = torch.cat([logits, torch.tensor([sink])]).softmax(0)[:-1]
                    output.view(-1, HEADS, DIM)[token, head] = (weights @ values.double()).to(output.dtype)
        return output

    def reach(self) -> int | None:
        return None if self.sliding_window[0] < 0 else self.sliding_window[0] + 1


class CPUImpl(Impl):
    """Of the CPU backend: another spelling of the window, keys as columns."""

    def __init__(self, window: int | None = None, **more: Any) -> None:
        super().__init__(None, **more)
        self.sliding_window = -1 if window is None else window

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        assert (layer.isa, layer._k_scale_float, layer._v_scale_float) == ("vec", 1, 1)
        super().do_kv_cache_update(SimpleNamespace(_k_scale=1, _v_scale=1), key, value, kv_cache, slot_mapping)

    def half(self, cache: Tensor, block: int, place: int, group: int, which: int) -> Tensor:
        flat = cache[block, group].reshape(-1) if not cache.is_contiguous() else cache[block, group].view(-1)
        if which:
            return flat[(PAGE + place) * DIM : (PAGE + place + 1) * DIM]
        return flat[place : PAGE * DIM : PAGE]

    def reach(self) -> int | None:
        return self.sliding_window if self.sliding_window > 0 else None


class Attention:
    """A layer of a model, with its implementation."""

    def __init__(self, impl: Any) -> None:
        self.impl = impl


@dataclass
class Config:
    """``VllmConfig``."""

    additional_config: Any
    layers: dict[str, Attention] = field(default_factory=dict)
    parallel_config: Any = field(default_factory=lambda: SimpleNamespace(tensor_parallel_size=1))
    kv_transfer_config: Any = None

    @property
    def model_config(self) -> Any:
        text = SimpleNamespace(num_attention_heads=HEADS, num_hidden_layers=9, num_key_value_heads=GROUPS)
        text.get_text_config = lambda decoder: text
        return SimpleNamespace(
            hf_config=text,
            hf_text_config=text,
            dtype=torch.float32,
            get_total_num_kv_heads=lambda: GROUPS,
            get_head_size=lambda: DIM,
        )


def modules() -> dict[str, dict[str, Any]]:
    backend = type("Backend", (), {"get_name": staticmethod(lambda: "STOCK")})
    return {
        "vllm": {},
        "vllm.config": {
            "get_current_vllm_config_or_none": lambda: current[-1],
            "get_layers_from_vllm_config": lambda config, kind, names: {n: config.layers[n] for n in names},
        },
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: 0},
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type="cpu")},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.attention": {"Attention": Attention},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {"extract_layer_index": lambda name: int(name.rpartition(".")[2])},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {"AttentionType": AttentionType, "AttentionCGSupport": AttentionCGSupport},
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.triton_attn": {
            "TritonAttentionBackend": backend,
            "TritonAttentionImpl": Impl,
            "TritonAttentionMetadataBuilder": Builder,
        },
        "vllm.v1.attention.backends.cpu_attn": {
            "CPUAttentionBackend": backend,
            "CPUAttentionBackendImpl": CPUImpl,
            "CPUAttentionMetadataBuilder": Builder,
        },
    }


current: list[Any] = [None]
"""Last: the config of the server that is being made."""


def installed() -> Iterator[None]:
    """The stubs in the place of vLLM, for a fixture."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
            patch.delitem(sys.modules, name)
        for name, content in modules().items():
            module = ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        for name in OURS:
            patch.delitem(sys.modules, name, raising=False)
        yield
        for name in OURS:
            sys.modules.pop(name, None)


def filled(rows: list[tuple[int, int]], impl: Any, nhd: bool = False) -> tuple[Common, Tensor, Tensor, Tensor, Tensor]:
    """A step of rows ``(queries, past)`` with its cache; pages of nobody, and slots past each end, are NaN.

    Returns:
        the description of the step, its query ``[n, H, D]``, key and value ``[n, G, D]``, and the cache.
    """
    generator = torch.Generator().manual_seed(len(rows))
    lengths = [queries + past for queries, past in rows]
    needed = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(needed) + 4, generator=generator).to(torch.int32)
    shape = (len(order), GROUPS, PAGE, 2 * DIM)
    cache = torch.full(shape, math.nan)
    if nhd:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    tables = torch.full((len(rows), max(needed)), int(order[-1]), dtype=torch.int32)
    taken, keys_of_step, values_of_step, slots_of_step = 0, [], [], []
    layer = SimpleNamespace(_k_scale=1, _v_scale=1, _k_scale_float=1, _v_scale_float=1, isa="vec")
    for row, ((queries, _), length, pages) in enumerate(zip(rows, lengths, needed, strict=True)):
        tables[row, :pages] = order[taken : taken + pages]
        taken += pages
        keys, values = (torch.randn(length, GROUPS, DIM, generator=generator) for _ in range(2))
        places = torch.arange(length)
        slots = tables[row, places // PAGE].long() * PAGE + places % PAGE
        impl.do_kv_cache_update(layer, keys, values, cache, slots)
        keys_of_step.append(keys[length - queries :])
        values_of_step.append(values[length - queries :])
        slots_of_step.append(slots[length - queries :])
    counts = torch.tensor([0, *(queries for queries, _ in rows)], dtype=torch.int32)
    starts = counts.cumsum(0, dtype=torch.int32)
    total = int(starts[-1])
    common = Common(
        starts,
        starts.clone(),
        torch.tensor(lengths, dtype=torch.int32),
        len(rows),
        total,
        int(counts.max()),
        max(lengths),
        tables,
        torch.cat(slots_of_step),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
    )
    query = torch.randn(total, HEADS, DIM, generator=generator)
    return common, query, torch.cat(keys_of_step), torch.cat(values_of_step), cache
