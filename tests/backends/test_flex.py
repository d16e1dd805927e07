"""FlexAttention against the definition: on a CUDA device where there is one, else uncompiled."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import attention, call_in, everywhere, of_each_head, plan_pairs
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan, methods
from gossamer.backends import flex
from gossamer.testing import assert_accurate, make_call, random_plan

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("vertical_slash", {"vertical_size": 40, "slash_size": 100}),
    ("max_relative", {"alpha": 0.3, "sink_blocks": 1, "window_blocks": 1, "last_rows": 64}),
]


@pytest.fixture(autouse=True)
def untraced() -> Iterator[None]:
    """On a CPU FlexAttention has torch.compile trace what it then runs uncompiled, anew for every structure."""
    with torch.compiler.set_stance("default" if DEVICE == "cuda" else "force_eager"):
        yield


def run(call: AttentionCall, plan: SparsePlan) -> tuple[Tensor, Tensor]:
    sinks = None if call.sinks is None else call.sinks.to(DEVICE)
    q, k, v = (t.to(DEVICE) for t in (call.q, call.k, call.values))
    out, lse = flex.attend(replace(call, q=q, k=k, v=v, sinks=sinks), plan)
    return out.cpu(), lse.cpu()


def assert_attends(call: AttentionCall, plan: SparsePlan) -> None:
    out, lse = run(call, plan)
    expected, expected_lse = attention(call, of_each_head(plan, call.heads, plan_pairs(plan)))
    assert (out.dtype, lse.dtype) == (call.q.dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=2e-5)


@everywhere
def test_blocks_bands_sinks_and_soft_cap_everywhere(situation: str) -> None:
    call = replace(call_in(situation, length=37, dim=16), sinks=SINKS, softcap=1.5)
    empty = SparsePlan(2, call.query_len, call.key_len, call.extent, block_q=16, block_k=16)
    chosen = torch.rand(empty.block_mask().shape, generator=torch.Generator().manual_seed(0)) < 0.4
    lengths = {"query_len": call.query_len, "key_len": call.key_len, "extent": call.extent}
    bands: dict[str, Any] = {"sink": [1, 0], "window": [0, 2]}
    assert_attends(call, SparsePlan.from_block_mask(chosen, **lengths, **bands, block_q=16, block_k=16))


@pytest.mark.parametrize("seed", range(6))
def test_random_plans(seed: int) -> None:
    """Blocks, columns, bands, overlaps and empty rows, for query heads and for key/value heads."""
    size: dict[str, Any] = {"batch": 1, "query_len": 40, "key_len": 40, "block_q": 16, "block_k": 32}
    plan = random_plan(seed, heads=(2, 4)[seed % 2], **size, padded=True, causal=seed != 4, limit=(None, 15)[seed % 2])
    call = call_in("no padding", length=40, dim=16)
    assert_attends(replace(call, extent=plan.extent, softcap=(None, 2.0)[seed // 2 % 2]), plan)


@pytest.mark.parametrize("situation", ["padded chunk", "bidirectional"])
@pytest.mark.parametrize("entry", METHODS, ids=[name for name, _ in METHODS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_methods(entry: tuple[str, dict], situation: str, dtype: torch.dtype) -> None:
    call = make_call(situation, length=150, heads=2, groups=1, dim=64, dtype=dtype)
    plan = methods.create(entry[0], **entry[1]).plan(call)
    assert_accurate(call, plan, *run(call, plan))


@pytest.mark.parametrize(("dim", "dtype"), [(320, torch.float32), (512, torch.bfloat16)])
def test_head_dimensions_that_only_flex_has(dim: int, dtype: torch.dtype) -> None:
    call = make_call("left padding", length=70, heads=2, groups=1, dim=dim, dtype=dtype)
    plan = methods.create("a_shape", sink=4, window=30).plan(call)
    assert_accurate(call, plan, *run(call, plan))


@pytest.mark.parametrize("sinks", [None, SINKS])
def test_a_row_that_attends_nothing_is_zero(sinks: Tensor | None) -> None:
    call = replace(call_in("no padding", dim=16), sinks=sinks)
    out, lse = run(call, SparsePlan(2, 20, 20, call.extent, block_q=16, block_k=16))
    assert bool((out == 0).all())
    expected = torch.full((1, 4, 20), -math.inf) if sinks is None else sinks[:, None].expand(1, 4, 20)
    torch.testing.assert_close(lse, expected)


def test_infinite_sinks_take_all_or_nothing() -> None:
    call, sinks = call_in("no padding", dim=16), torch.tensor([math.inf, -math.inf, math.inf, -math.inf])
    plan = SparsePlan(2, 20, 20, call.extent, block_q=16, block_k=16, sink=[0, 5])
    (out, lse), (plain, plain_lse) = run(replace(call, sinks=sinks), plan), run(call, plan)
    assert bool((out[:, ::2] == 0).all())
    assert bool((lse[:, ::2] == math.inf).all())
    assert torch.equal(out[:, 1::2], plain[:, 1::2])
    assert torch.equal(lse[:, 1::2], plain_lse[:, 1::2])


@pytest.mark.parametrize("name", ["block_indptr", "sink"])
def test_a_plan_that_was_resized_is_named(name: str) -> None:
    call = call_in("no padding", dim=16)
    plan = SparsePlan(2, 20, 20, call.extent, block_q=16, block_k=16, window=3)
    getattr(plan, name).resize_(1)
    with pytest.raises(ValueError, match=rf"SparsePlan.{name} must .* got .*\(1,\)"):
        run(call, plan)


@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 3, 3), (1, 3, 0), (1, 0, 3)])
def test_nothing_gives_zeros(batch: int, query_len: int, key_len: int, sinks: Tensor | None) -> None:
    row = [0] * batch
    extent = Extent(row, [query_len] * batch, row, [key_len] * batch)
    q, k = torch.ones(batch, 4, query_len, 16), torch.ones(batch, 2, key_len, 16)
    call = AttentionCall(q, k, k[..., :8], extent, sinks=sinks)
    out, lse = run(call, SparsePlan.dense(2, query_len, key_len, extent))
    assert torch.equal(out, torch.zeros(batch, 4, query_len, 8))
    expected = torch.full((4,), -math.inf) if sinks is None else sinks
    assert torch.equal(lse, expected[:, None].expand(batch, 4, query_len))


# Tiles on CUDA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256, 320, 512])
@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (64, 128), (128, 128), (16, 48), (1024, 80)])
def test_tiles_divide_blocks_and_fit_shared_memory(block_q: int, block_k: int, dim: int, dtype: torch.dtype) -> None:
    """FlexAttention refuses others: "Q and KV block size must be divisible by BLOCK_M and BLOCK_N"."""
    options = flex.kernel_options(block_q, block_k, dim, dtype)
    rows, keys = options["BLOCK_M"], options["BLOCK_N"]
    assert (block_q % rows, block_k % keys) == (0, 0)
    assert min(rows, keys) >= 16
    assert max(rows, keys) <= 64
    assert {rows & (rows - 1), keys & (keys - 1)} == {0}
    width = 1 << (dim - 1).bit_length()
    stages = options.get("num_stages", 3)  # torch's own number
    assert (rows + 2 * stages * keys) * width * dtype.itemsize <= 227 << 10


@pytest.mark.parametrize(("block_q", "block_k"), [(8, 64), (64, 17), (40, 64)])
def test_blocks_that_no_tile_divides_are_named(block_q: int, block_k: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 16 tokens, got block_q={block_q} and block_k={block_k}"):
        flex.kernel_options(block_q, block_k, 64, torch.bfloat16)


@pytest.mark.parametrize(("dim", "value_dim"), [(320, 64), (64, 320)])
def test_the_compiled_kernel_gets_tiles_for_the_wider_of_keys_and_values(
    monkeypatch: pytest.MonkeyPatch, dim: int, value_dim: int
) -> None:
    """Whatever the device: what the compiled kernel is called with."""
    seen = []

    def attend(*arguments: Any, kernel_options: dict[str, Any], **options: Any) -> Any:
        seen.append(kernel_options)
        return flex._uncompiled(*arguments, **options)

    monkeypatch.setattr(flex, "_compiled", lambda: attend)
    monkeypatch.setattr(flex, "_on_cuda", lambda q: True)
    q, k, v = torch.rand(1, 2, 70, dim), torch.rand(1, 1, 70, dim), torch.rand(1, 1, 70, value_dim)
    call = AttentionCall(q, k, v)
    plan = SparsePlan(1, 70, 70, call.extent, block_q=32, block_k=128, window=30)
    assert_accurate(call, plan, *run(call, plan))
    assert seen == [flex.kernel_options(32, 128, 320, torch.float32)]


# Refusals


def test_a_permuted_plan_is_refused() -> None:
    plan = random_plan(0, batch=1, heads=2, query_len=20, key_len=20, permuted=True)
    with pytest.raises(ValueError, match="cannot express a permuted plan"):
        run(call_in("no padding", dim=16), plan)


def test_fp64_is_refused() -> None:
    call = call_in("no padding", dim=16, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"takes float32, bfloat16 or float16, got torch\.float64"):
        run(call, SparsePlan.dense(2, 20, 20, call.extent))


def test_a_plan_for_another_call_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the plan is for batch 1, 3 queries and 20 keys"):
        run(call_in("no padding", dim=16), SparsePlan(2, 3, 20, Extent.full(1, 3, 20)))


def test_a_call_without_values_is_an_error() -> None:
    call = replace(call_in("no padding", dim=16), v=None)
    with pytest.raises(ValueError, match="this call has no values"):
        flex.attend(call, SparsePlan.dense(2, 20, 20, call.extent))


def test_a_wrong_plan_shows() -> None:
    """The comparison can fail."""
    call = make_call("no padding", length=100, heads=2, groups=1, dim=32)
    plan, other = (methods.create("a_shape", sink=4, window=window).plan(call) for window in (30, 31))
    out, lse = run(call, other)
    with pytest.raises(AssertionError):
        assert_accurate(call, plan, out, lse)
