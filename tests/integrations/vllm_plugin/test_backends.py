"""The plumbing of both backends on stubs of vLLM's classes: whose rows run where, and what is never read."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stub_server import DENSE, ROWS, SPEC, Served, plain, refused, stubs
from stub_vllm import DIM as SIZE
from stub_vllm import GROUPS, HEADS, PAGE, AttentionCGSupport, AttentionType, Config, current
from triton_support import MARKS

from gossamer.backends import cpu
from gossamer.integrations.vllm.plugin import engine_of
from gossamer.paged import Paged

__all__ = ["plain", "stubs"]  # fixtures

both = pytest.mark.parametrize("kind", ["cpu", "gpu"])


@both
@pytest.mark.parametrize(
    "more",
    [{}, {"window": 21}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}],
    ids=["plain", "window", "softcap", "sinks"],
)
def test_long_rows_run_a_plan_and_the_others_the_stock_kernel(kind: str, more: dict[str, Any]) -> None:
    served = Served(kind, **more)
    out = served.run(ROWS)
    assert served.impl.given == [[21, 38, 2]]
    torch.testing.assert_close(out, served.expected(ROWS), atol=2e-5, rtol=1e-4)
    assert served.total("gossamer_rows", layer="3", method="dense", path="dense") == 2
    assert served.total("gossamer_dense_rows", layer="3", reason="decode") == 1
    assert served.total("gossamer_dense_rows", layer="3", reason="few queries") == 2


def test_on_gpus_memory_may_have_tokens_before_heads() -> None:
    served = Served("gpu", window=21)
    torch.testing.assert_close(served.run(ROWS, nhd=True), served.expected(ROWS, nhd=True), atol=2e-5, rtol=1e-4)


@both
def test_where_all_rows_run_plans_the_stock_kernel_is_not_asked(kind: str) -> None:
    served = Served(kind)
    out = served.run([(40, 7), (33, 0)])
    assert served.impl.given == []
    torch.testing.assert_close(out, served.expected([(40, 7), (33, 0)]), atol=2e-5, rtol=1e-4)


@both
def test_a_layer_that_shares_another_s_keys_reads_its_pages(kind: str) -> None:
    served = Served(kind, kv_sharing_target_layer_name="layers.1")
    out = served.run([(33, 0), (1, 3)], shared=True)
    torch.testing.assert_close(out, served.expected([(33, 0), (1, 3)]), atol=2e-5, rtol=1e-4)
    assert served.total("gossamer_rows", path="dense") == 1


@both
def test_a_method_leaves_pairs_out(kind: str) -> None:
    served = Served(kind, {"method": "a_shape", "sink": 1, "window": 4, "min_tokens": 0, "min_queries": 32})
    out = served.run(ROWS)
    assert not out.isnan().any()
    assert served.total("gossamer_rows", method="a_shape", path="sparse") == 2
    assert served.total("gossamer_computed_pairs") < 0.5 * served.total("gossamer_pairs")
    assert not torch.allclose(out, served.expected(ROWS), atol=1e-2)


@pytest.mark.skipif(not cpu.is_available(), reason="needs the C++ kernels")
@pytest.mark.parametrize("method", ["a_shape", "max_relative", "minference"])
def test_on_cpus_nothing_is_copied_out_of_the_pages(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Paged] = []
    rows = Paged.rows
    monkeypatch.setattr(Paged, "rows", lambda self: copied.append(self) or rows(self))
    served = Served("cpu", {"method": method, "min_tokens": 0, "min_queries": 32, "max_density": 2}, window=200)
    served.run([(40, 300), (33, 10)])
    assert served.total("gossamer_rows", method=method, path="sparse") == 2
    # Only where the layout is verified, which is once.
    assert sum(one.shape[2] > 2 * PAGE for one in copied) == 0


@both
def test_a_step_of_short_rows_is_the_stock_kernel_s(kind: str) -> None:
    served = Served(kind)
    rows = [(1, 20), (31, 0)]
    assert torch.equal(served.run(rows), served.expected(rows))
    assert served.total("gossamer_dense_rows") == 2


@both
def test_a_warm_up_computes_nothing(kind: str) -> None:
    impl, out = Served(kind).impl, torch.ones(3, HEADS, SIZE)
    assert impl.forward(None, out, out, out, torch.empty(0), None, out) is out


@both
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"alibi_slopes": torch.ones(HEADS)}, "ALiBi"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder attention"),
        ({"attn_type": AttentionType.ENCODER}, "encoder attention"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "cross-attention"),
    ],
)
def test_a_layer_that_cannot_be_served_says_why(kind: str, more: dict[str, Any], reason: str) -> None:
    refused(Served(kind, **more), reason)


@both
def test_a_layer_whose_rows_are_parts_of_sequences_stays(kind: str) -> None:
    """vLLM's chunked attention: a step's rows are not its requests', whose policies would go to other rows."""
    served = Served(kind)
    vars(served.config.layers["layers.3"])["attention_chunk_size"] = 64
    refused(served, "chunked attention")


@both
def test_a_draft_model_s_layers_are_not_those_of_a_profile(kind: str) -> None:
    gates = [[1.0, 0.0]] * 9
    served = Served(kind, {"method": "duo_attention", "gates": gates, "min_tokens": 0, "min_queries": 32})
    served.config.layers["draft_model.layers.3"] = served.config.layers["layers.3"]
    served.builder = served.make(SPEC, ["draft_model.layers.3"], served.config, torch.device("cpu"))
    refused(served, "layer is not in the profile")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"use_alibi_sqrt": True}, "ALiBi"),
        ({"kv_cache_dtype": "fp8"}, "quantised cache"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "quantised cache"),
        ({"chunk_lookback": 1}, "chunked attention"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "context parallelism"),
        ({"parallel": {"prefill_context_parallel_size": 2}}, "context parallelism"),
    ],
)
def test_on_gpus_a_layer_may_lack_more(more: dict[str, Any], reason: str) -> None:
    refused(Served("gpu", **more), reason)


def test_on_cpus_an_fp8_cache_stays() -> None:
    refused(Served("cpu", is_fp8_kv_cache=True), "fp8 cache")


def test_on_gpus_a_reference_window_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served("gpu")
    monkeypatch.setattr(served.make, "rswa_window", 64)
    refused(served, "reference sliding window")


@both
@pytest.mark.parametrize("causal", [False, torch.tensor([True])])
def test_a_step_that_is_not_causal_stays(kind: str, causal: Any) -> None:
    served = Served(kind)
    served.run([(33, 0)], causal=causal)
    assert served.total("gossamer_dense_rows", reason="not causal") == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mm_req_doc_ranges": {0: [(1, 2)]}}, "tokens that see each other both ways"),
        ({"seq_lens_cpu_upper_bound": None}, "lengths are on the device"),
    ],
)
def test_on_gpus_a_step_may_stay(change: dict[str, Any], reason: str) -> None:
    served = Served("gpu")
    assert torch.equal(served.run(ROWS, **change), served.expected(ROWS))
    assert served.total("gossamer_dense_rows", reason=reason) == len(ROWS)


@both
def test_a_layout_that_does_not_come_back_stays(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(kind)
    stock = type(served.impl).__mro__[2]
    half = stock.half
    monkeypatch.setattr(stock, "half", lambda self, cache, block, place, group, which: half(
        self, cache, block, place, group, 1 - which))  # fmt: skip
    refused(served, "unknown cache layout")


@both
def test_a_cache_of_another_shape_or_dtype_stays(kind: str) -> None:
    served = Served(kind)
    served.run([(33, 0)])
    assert served.total("gossamer_rows", path="dense") == 1
    served.impl.page = (GROUPS, 2 * PAGE, 2 * SIZE)
    served.run([(33, 0)])
    assert served.total("gossamer_dense_rows", reason="unknown cache layout") == 1


@both
def test_a_window_shorter_than_a_plan_pays_for_stays(kind: str) -> None:
    served = Served(kind, {"method": "a_shape", "min_tokens": 30, "min_queries": 32}, window=21)
    rows = [(33, 0), (1, 2)]
    assert torch.equal(served.run(rows), served.expected(rows))
    assert served.total("gossamer_dense_rows", reason="short model window") == 2


@both
def test_requests_may_name_policies(kind: str) -> None:
    served = Served(
        kind, {**DENSE, "policies": {"few": {"method": "a_shape", "sink": 1, "window": 3, "min_tokens": 0}}}
    )
    served.run([(33, 0)])
    extra = {"a": None, "b": {"gossamer": "few"}, "c": {}, "d": None}
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=["a", "b", "c", "d", "rest"]),
        requests={n: SimpleNamespace(sampling_params=SimpleNamespace(extra_args=one)) for n, one in extra.items()},
    )
    served.builder.runner = lambda: runner
    served.run([(33, 0), (33, 9), (40, 0), (1, 1)])
    assert served.total("gossamer_rows", method="a_shape", path="sparse") == 1
    assert served.total("gossamer_rows", method="dense") == 1 + 2


@both
def test_a_server_that_asks_for_nothing_is_the_stock_one(kind: str) -> None:
    module = importlib.import_module(f"gossamer.integrations.vllm.{kind}")
    name = {"cpu": "CPU", "gpu": "Triton"}[kind]
    backend = getattr(module, f"Sparse{name}Backend")
    current.append(Config({}))
    try:
        assert backend.get_impl_cls() is getattr(module, f"Sparse{name}Impl").__mro__[2]
    finally:
        current.pop()
    assert backend.get_impl_cls() is getattr(module, f"Sparse{name}Impl")
    served = Served(kind, None)
    assert torch.equal(served.run(ROWS), served.expected(ROWS))
    assert engine_of(served.config) is None


def test_on_gpus_steps_with_prompts_are_kept_out_of_graphs() -> None:
    module = importlib.import_module("gossamer.integrations.vllm.gpu")
    assert module.SparseTritonBackend.get_name() == "CUSTOM"
    assert module.SparseTritonBuilder._cudagraph_support is AttentionCGSupport.UNIFORM_BATCH
    served = Served("gpu")
    served.run([(33, 0)])
    assert served.builder.supports_draft_decode_metadata_update is False


class TestTriton:
    pytestmark = MARKS

    def test_the_kernels_read_keys_and_values_by_strides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GOSSAMER_BACKEND", "triton")
        served = Served("gpu")
        rows = [(33, 17), (1, 4)]
        torch.testing.assert_close(served.run(rows), served.expected(rows), atol=2e-5, rtol=1e-4)
        assert served.total("gossamer_rows", path="dense") == 1
