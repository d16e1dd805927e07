"""sparse_attention: what it chooses, that every path is right, and what it says of it."""

import pytest
import torch
import torch.nn.functional as F

from gossamer import Extent, Policy, SparsePlan, backends, methods, sparse_attention
from gossamer.attention import CallRecord, dense_attention
from gossamer.backends import torch as reference


def tensors(query_len: int, key_len: int, dtype=torch.float32, heads: int = 4, groups: int = 2):
    generator = torch.Generator().manual_seed(query_len)
    return (
        torch.randn(1, heads, query_len, 32, generator=generator).to(dtype),
        torch.randn(1, groups, key_len, 32, generator=generator).to(dtype),
        torch.randn(1, groups, key_len, 32, generator=generator).to(dtype),
    )


def call(q, k, v, method, **kwargs) -> tuple[torch.Tensor, CallRecord]:
    records: list[CallRecord] = []
    out = sparse_attention(q, k, v, method, record=records.append, **kwargs)
    assert len(records) == 1
    return out, records[0]


SPARSE = Policy(methods.create("a_shape", sink=4, window=20), min_tokens=0)


def test_a_sparse_call_computes_the_plan() -> None:
    q, k, v = tensors(300, 300)
    out, record = call(q, k, v, SPARSE, layer=3)
    plan = SPARSE.method.plan(q, k, scale=32**-0.5, extent=Extent.full(1, 300, 300))
    expected, _ = reference.execute(q, k, v, plan, scale=32**-0.5)
    torch.testing.assert_close(out, expected)
    assert (record.path, record.reason, record.layer) == ("sparse", None, 3)
    assert record.density == pytest.approx(plan.density())
    assert record.density < 0.2
    assert record.executor == backends.executor_for(q)


@pytest.mark.parametrize(
    ("policy", "lengths", "kwargs", "reason"),
    [
        (Policy(methods.create("a_shape"), min_tokens=500), (300, 300), {}, "short prompt"),
        (Policy(methods.create("a_shape"), min_tokens=200), (300, 300), {"limit": 100}, "short model window"),
        (Policy(methods.create("a_shape"), min_tokens=200), (20, 300), {}, "few queries"),
        (Policy(methods.create("a_shape"), min_tokens=0), (300, 300), {}, "plan too dense to pay"),
        (SPARSE, (1, 300), {}, "decode"),
        (SPARSE, (300, 300), {"causal": False}, "not causal"),
        (Policy(methods.create("dense"), min_tokens=0), (300, 300), {}, None),
    ],
)
def test_dense_calls_say_why(policy: Policy, lengths: tuple[int, int], kwargs: dict, reason: str | None) -> None:
    q, k, v = tensors(*lengths)
    out, record = call(q, k, v, policy, **kwargs)
    assert (record.path, record.reason, record.density) == ("dense", reason, 1.0)
    plan = SparsePlan.dense(
        2, *lengths, Extent.full(1, *lengths), causal=kwargs.get("causal", True), limit=kwargs.get("limit")
    )
    expected, _ = reference.execute(q, k, v, plan, scale=32**-0.5)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_a_plan_too_dense_to_pay_runs_dense_on_our_own_kernel() -> None:
    q, k, v = tensors(300, 300)
    _, record = call(q, k, v, Policy(methods.create("a_shape"), min_tokens=0))
    assert record.reason == "plan too dense to pay"
    assert record.executor == ("sdpa" if backends.executor_for(q) == "reference" else backends.executor_for(q))
    _, record = call(q, k, v, Policy(methods.create("dense"), min_tokens=0))
    assert record.executor == "sdpa"


@pytest.mark.parametrize("query_len", [1, 5])
def test_long_caches_are_decoded_on_our_own_kernel(query_len: int) -> None:
    q, k, v = (t.bfloat16() for t in tensors(query_len, 1000))
    if backends.executor_for(q) == "reference":
        pytest.skip("no C++ kernels")
    policy = Policy(SPARSE.method, min_tokens=500)
    out, record = call(q, k, v, policy)
    assert record.executor == backends.executor_for(q)
    assert record.reason == ("decode" if query_len == 1 else "few queries")
    plan = SparsePlan.dense(2, query_len, 1000, Extent.full(1, query_len, 1000))
    expected, _ = reference.execute(q.double(), k.double(), v.double(), plan, scale=32**-0.5)
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=2e-2)
    _, record = call(q[:, :, :1], k[:, :, :100], v[:, :, :100], policy)
    assert record.executor == "sdpa"
    _, record = call(q[:, :, :1], k, v, Policy(methods.create("dense")))
    assert record.executor == "sdpa"


def test_training_goes_dense_and_has_gradients() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(100, 100))
    out, record = call(q, k, v, SPARSE)
    assert (record.path, record.reason) == ("dense", "training: sparse executors have no backward")
    out.sum().backward()
    assert all(t.grad is not None for t in (q, k, v))


@pytest.mark.parametrize("query_len", [1, 40, 120])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("limit", [None, 30])
@pytest.mark.parametrize("method", ["dense", "a_shape"])
def test_every_combination_equals_the_reference(method, query_len, padded, sinks, softcap, limit) -> None:
    q, k, v = tensors(query_len, 120)
    extent = Extent([120 - query_len - 7], [7], [113]) if padded else Extent.full(1, query_len, 120)
    sink_logits = torch.tensor([0.3, -1.0, 2.0, 0.0]) if sinks else None
    policy = Policy(methods.create(method, **({} if method == "dense" else {"window": 1000})), 0, max_density=2.0)
    out, _ = call(q, k, v, policy, extent=extent, sinks=sink_logits, softcap=softcap, limit=limit)
    plan = SparsePlan.dense(2, query_len, 120, extent, limit=limit)
    expected, _ = reference.execute(q, k, v, plan, scale=32**-0.5, sinks=sink_logits, softcap=softcap)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("query_len", [1, 150])
def test_lse_is_returned_on_both_paths(query_len: int) -> None:
    q, k, v = tensors(query_len, 150)
    for method in (SPARSE, "dense"):
        out, lse = sparse_attention(q, k, v, method, return_lse=True)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]
        assert lse.dtype == torch.float32


def test_dense_attention_with_a_mask_equals_the_reference() -> None:
    q, k, v = tensors(60, 60)
    plan = SparsePlan.from_block_mask(torch.rand(1, 1, 15, 15) < 0.5, 60, 60, block_q=4, block_k=4, window=1)
    mask = plan.to_mask()
    plan = SparsePlan.from_block_mask(plan.block_mask().expand(-1, 2, -1, -1), 60, 60, block_q=4, block_k=4, window=1)
    for sinks, softcap in ((None, None), (torch.randn(4), None), (torch.randn(4), 4.0), (None, 4.0)):
        got = dense_attention(q, k, v, mask=mask, scale=0.2, sinks=sinks, softcap=softcap)
        expected, _ = reference.execute(q, k, v, plan, scale=0.2, sinks=sinks, softcap=softcap)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_methods_by_name_and_unknown_names() -> None:
    q, k, v = tensors(50, 50)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(sparse_attention(q, k, v, "minference"), expected)
    with pytest.raises(ValueError, match="unknown method 'nonesuch'; known: "):
        sparse_attention(q, k, v, "nonesuch")


def test_bad_policies_are_named() -> None:
    with pytest.raises(TypeError, match=r"must be a gossamer\.methods\.Method, got str"):
        Policy("dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_tokens must not be negative"):
        Policy(methods.create("dense"), min_tokens=-1)
    with pytest.raises(ValueError, match="max_density must be above 0"):
        Policy(methods.create("dense"), max_density=0)


def test_bad_tensors_are_named_before_any_work() -> None:
    q, k, v = tensors(50, 50)
    with pytest.raises(TypeError, match="must share a dtype"):
        sparse_attention(q, k.double(), v)
    with pytest.raises(ValueError, match="do not fit"):
        sparse_attention(q, k, v[:, :, :10])


def test_the_reference_path_warns_of_its_cost(monkeypatch) -> None:
    from gossamer import attention

    q, k, v = (t.double() for t in tensors(100, 100))  # no kernel for fp64
    attention._warn_reference.cache_clear()
    with pytest.warns(RuntimeWarning, match="slower than dense attention"):
        out = sparse_attention(q, k, v, SPARSE)
    attention._warn_reference.cache_clear()
    assert isinstance(out, torch.Tensor)


def test_dense_runs_on_our_own_kernel_if_asked() -> None:
    q, k, v = tensors(100, 100)
    expected, record = call(q, k, v, Policy.of("dense"))
    assert record.executor == "sdpa"
    out, record = call(q, k, v, Policy(methods.create("dense", kernel="gossamer")))
    assert record.executor == backends.executor_for(q)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="'torch' or 'gossamer'"):
        methods.create("dense", kernel="triton")
