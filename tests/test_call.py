"""`AttentionCall`: what it refuses, what it keeps, and what it offers to methods."""

import math
import warnings
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu, flex
from gossamer.layout import DenoisingStep, TokenLayout
from gossamer.rotary import Rotary


def tensors(
    *, batch: int = 1, heads: int = 4, groups: int = 2, query_len: int = 5, key_len: int = 9, dim: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    keys = (batch, groups, key_len)
    return torch.zeros(batch, heads, query_len, dim), torch.zeros(*keys, dim), torch.zeros(*keys, dim + 1)


class Store:
    def summaries(self, layer: int | None) -> dict[str, Tensor]:
        return {}


# Every field but the tensors, none at its default.
OTHERS: dict[str, Any] = {
    "extent": Extent([0], [5], [1], [7], causal=False, limit=6),
    "scale": 0.7,
    "sinks": torch.ones(4),
    "softcap": 30.0,
    "layer": 3,
    "store": Store(),
    "layout": TokenLayout((3,), 2, 1, 2),
    "step": DenoisingStep(2, 9, 1),
    "state": [{"seen": 1}],
    "rotary": Rotary.of_base(8),
    "bias": torch.ones(1, 2, 9),
}


def test_every_field_is_in_the_list() -> None:
    assert [part.name for part in fields(AttentionCall)] == ["q", "k", "v", *OTHERS]


def assert_keeps(call: AttentionCall, given: dict[str, Any]) -> None:
    for name, value in given.items():
        got = getattr(call, name)
        assert got is value or (isinstance(value, float) and got == value), name


def test_a_call_keeps_every_field() -> None:
    q, k, v = tensors()
    assert_keeps(AttentionCall(q, k, v, **OTHERS), {"q": q, "k": k, "v": v} | OTHERS)


def test_a_call_of_keywords_keeps_every_field() -> None:
    q, k, v = tensors()
    assert_keeps(AttentionCall.of(q, k, v, **OTHERS), {"q": q, "k": k, "v": v} | OTHERS)


@pytest.mark.parametrize("changed", ["q", "k", "v", *OTHERS])
def test_a_replaced_field_changes_no_other(changed: str) -> None:
    q, k, v = tensors()
    given: dict[str, Any] = {"q": q, "k": k, "v": v, **OTHERS}
    other = {
        "scale": 0.1,
        "softcap": 2.0,
        "layer": 9,
        "layout": TokenLayout((1,)),
        "step": DenoisingStep(5),
        "state": None,
        "store": None,
    }
    value = given[changed].clone() if isinstance(given[changed], Tensor) else other.get(changed)
    again = replace(AttentionCall(**given), **{changed: value})
    if changed == "extent":
        assert again.extent.causal
    else:
        assert_keeps(again, {changed: value})
    assert_keeps(again, {name: kept for name, kept in given.items() if name != changed})


def test_a_call_is_frozen() -> None:
    with pytest.raises(AttributeError):
        AttentionCall(*tensors()).scale = 1.0  # type: ignore[misc]


def test_without_an_extent_causal_queries_are_the_last_tokens() -> None:
    call = AttentionCall(*tensors(batch=2))
    extent = call.extent
    assert (extent.query_start.tolist(), extent.key_count.tolist(), extent.causal) == ([4, 4], [9, 9], True)


def test_the_scale_is_one_over_the_root_of_the_head_dimension_of_keys() -> None:
    assert AttentionCall(*tensors(dim=9)).scale == pytest.approx(1 / 3)


def test_zero_is_a_scale() -> None:
    assert AttentionCall(*tensors(), scale=0).scale == 0.0


@pytest.mark.parametrize("causal", [True, False])
def test_keywords_make_the_extent_where_none_is_given(causal: bool) -> None:
    extent = AttentionCall.of(*tensors(), causal=causal, limit=3).extent
    start = 4 if causal else 0
    assert (int(extent.query_start), extent.causal, extent.limit) == (start, causal, 3)


@pytest.mark.parametrize(
    ("extent", "keywords"),
    [
        ({"causal": True}, {"causal": False}),
        ({"limit": None}, {"limit": 3}),
        ({"limit": 4}, {"limit": 3}),
    ],
)
def test_keywords_that_contradict_the_extent_are_named(extent: dict, keywords: dict) -> None:
    (name, value), (_, had) = *keywords.items(), *extent.items()
    with pytest.raises(ValueError, match=f"{name}={value}.* do not fit the extent, .*{name}={had}"):
        AttentionCall.of(*tensors(), extent=Extent.full(1, 5, 9, **extent), **keywords)


@pytest.mark.parametrize("keywords", [{}, {"causal": False}, {"limit": 4}, {"causal": False, "limit": 4}])
def test_keywords_that_say_what_the_extent_says_pass(keywords: dict) -> None:
    extent = Extent.full(1, 5, 9, causal=False, limit=4)
    assert AttentionCall.of(*tensors(), extent=extent, **keywords).extent is extent


def test_sizes_are_those_of_the_tensors() -> None:
    call = AttentionCall(*tensors(batch=3, heads=6, groups=2))
    got = (call.batch, call.heads, call.groups, call.share, call.query_len, call.key_len, call.device)
    assert got == (3, 6, 2, 3, 5, 9, torch.device("cpu"))


def test_a_call_without_values_says_so_when_they_are_asked_for() -> None:
    q, k, v = tensors()
    assert AttentionCall(q, k, v).values is v
    with pytest.raises(ValueError, match="this call has no values"):
        _ = AttentionCall(q, k).values


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (3.0, TypeError, "bias must be a tensor of floating point, got float"),
        (torch.ones(1, 2, 9, dtype=torch.int64), TypeError, "bias must be a tensor of floating point, got torch.int64"),
        (torch.ones(1, 4, 9), ValueError, r"bias must have shape \(1, 2, 9\), .* got \(1, 4, 9\) on cpu"),
        (torch.ones(1, 2, 9, device="meta"), ValueError, r"bias must have .* on cpu, got \(1, 2, 9\) on meta"),
    ],
)
def test_a_bias_that_does_not_fit_is_named(bias: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        AttentionCall(*tensors(), bias=bias)


def test_heads_take_their_bias_along() -> None:
    bias = torch.arange(3.0).view(1, 3, 1).expand(1, 3, 9)
    call = AttentionCall(*tensors(heads=6, groups=3), bias=bias)
    for part in (call.of_groups([1, 2]), call.of_heads([2, 4])):
        assert part.bias is not None
        assert part.bias[0, :, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("attend", "softcap"), [(cpu.attend, 3.0), (flex.attend, None)])
def test_backends_without_a_bias_say_so(attend: Any, softcap: float | None) -> None:
    call = AttentionCall(*tensors(), bias=torch.zeros(1, 2, 9), softcap=softcap)
    with pytest.raises(ValueError, match=r"knows no bias; use gossamer\.backends\.attend"):
        attend(call, SparsePlan.dense(2, 5, 9, call.extent))


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks", "bias"])
def test_a_gradient_is_needed_where_any_tensor_wants_one(name: str) -> None:
    q, k, v = tensors()
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "sinks": torch.ones(4), "bias": torch.ones(1, 2, 9)}
    assert not AttentionCall(**given).needs_gradient
    given[name] = given[name].requires_grad_()
    call = AttentionCall(**given)
    assert call.needs_gradient
    with torch.no_grad():
        assert not call.needs_gradient


# What methods need


@pytest.mark.parametrize("need", ["causal", "values", "store", "layout", "step", "layer", "state", "rotary"])
def test_a_call_lacks_what_it_was_not_given(need: str) -> None:
    q, k, v = tensors()
    bare = AttentionCall(q, k, extent=Extent.full(1, 5, 9, causal=False))
    assert bare.lacks({need}) == need
    full = replace(AttentionCall(q, k, v, **OTHERS), extent=Extent.full(1, 5, 9))
    assert full.lacks({need}) is None


@pytest.mark.parametrize(("starts", "lacking"), [([0, -2], None), ([0, 1], "whole prompt")])
def test_a_prompt_is_whole_if_no_row_begins_after_its_start(starts: list[int], lacking: str | None) -> None:
    call = AttentionCall(*tensors(batch=2), extent=Extent(starts, [3, 3], [0, 0], [9, 9]))
    assert call.lacks({"whole prompt"}) == lacking


def test_the_first_need_that_is_lacking_is_named() -> None:
    call = AttentionCall(*tensors(), extent=Extent.full(1, 5, 9))
    assert call.lacks({"store", "layout", "causal"}) == "layout"
    assert call.lacks(()) is None


def test_a_need_that_no_call_could_offer_is_an_error() -> None:
    with pytest.raises(ValueError, match="a method needs 'quiet', which is none of causal, values, store"):
        AttentionCall(*tensors()).lacks({"quiet"})


# Plans


@pytest.mark.parametrize("heads", [4, 2])
def test_a_plan_for_query_heads_or_key_heads_passes(heads: int) -> None:
    AttentionCall(*tensors()).check_plan(SparsePlan(heads, 5, 9, Extent.full(1, 5, 9)))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((2, 2, 5, 9), "the plan is for batch 2, .* but q and k have batch 1"),
        ((1, 2, 4, 9), "4 queries and 9 keys, .* 5 queries and 9 keys"),
        ((1, 2, 5, 8), "5 queries and 8 keys, .* 5 queries and 9 keys"),
        ((1, 1, 5, 9), "the plan has 1 heads; q has 4 and k has 2"),
        ((1, 8, 5, 9), "the plan has 8 heads; q has 4 and k has 2"),
    ],
)
def test_a_plan_for_another_call_is_named(size: tuple[int, int, int, int], message: str) -> None:
    batch, heads, query_len, key_len = size
    plan = SparsePlan(heads, query_len, key_len, Extent.full(batch, query_len, key_len))
    with pytest.raises(ValueError, match=message):
        AttentionCall(*tensors()).check_plan(plan)


def plan_written_to() -> SparsePlan:
    plan = SparsePlan.from_block_mask(torch.ones(1, 2, 1, 1, dtype=torch.bool), 5, 9)
    plan.block_indices.numpy()[1] = 7
    return plan


@pytest.mark.parametrize("value", [None, "", "0"])
def test_a_plan_is_not_read_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("GOSSAMER_CHECK", raising=False)
    if value is not None:
        monkeypatch.setenv("GOSSAMER_CHECK", value)
    AttentionCall(*tensors()).check_plan(plan_written_to())


def test_every_number_of_a_plan_is_checked_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    call = AttentionCall(*tensors())
    monkeypatch.setenv("GOSSAMER_CHECK", "1")
    call.check_plan(SparsePlan(2, 5, 9, call.extent))
    with pytest.raises(ValueError, match=r"SparsePlan.block_indices must lie in \[0, 1\) .* got 7"):
        call.check_plan(plan_written_to())


@pytest.mark.parametrize("value", ["2", "yes", " 1"])
def test_an_unknown_wish_for_checks_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    call = AttentionCall(*tensors())
    monkeypatch.setenv("GOSSAMER_CHECK", value)
    with pytest.raises(ValueError, match=f"GOSSAMER_CHECK='{value}' is not known; use one of: 0, 1"):
        call.check_plan(SparsePlan(2, 5, 9, call.extent))


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
def test_tensors_that_are_negated_on_reading_are_what_they_say(name: str) -> None:
    """The bug was an output for the numbers that are stored, which have the other sign."""
    q, k, v = tensors()
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "sinks": torch.arange(4.0)}
    lazy = torch.complex(torch.zeros_like(given[name]), -given[name]).conj().imag
    assert lazy.is_neg()
    changed: dict[str, Any] = given | {name: lazy}
    taken = getattr(AttentionCall(**changed), name)
    assert not taken.is_neg()
    assert torch.equal(taken, given[name])


# Refusals


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the strided kind is a prototype
        return torch.nested.nested_tensor([torch.zeros(2, 9, 8)], layout=layout)


@pytest.mark.parametrize("made_by", [AttentionCall, AttentionCall.of])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        ({"v": 3}, TypeError, "v must be a tensor, got int"),
        ({"q": torch.zeros(4, 5, 8)}, ValueError, r"must be \[batch, heads, tokens, head_dim\], got q \(4, 5, 8\)"),
        ({"v": torch.zeros(1, 2, 9)}, ValueError, r"must be \[batch, .* v \(1, 2, 9\)"),
        ({"q": torch.zeros(2, 4, 5, 8)}, ValueError, r"q \(2, 4, 5, 8\), k \(1, 2, 9, 8\), .* do not fit"),
        ({"q": torch.zeros(1, 4, 5, 7)}, ValueError, r"q \(1, 4, 5, 7\), .* do not fit"),
        ({"v": torch.zeros(2, 2, 9, 8)}, ValueError, r"v \(2, 2, 9, 8\) do not fit"),
        ({"v": torch.zeros(1, 4, 9, 8)}, ValueError, r"v \(1, 4, 9, 8\) do not fit"),
        ({"v": torch.zeros(1, 2, 8, 8)}, ValueError, r"v \(1, 2, 8, 8\) do not fit"),
        ({"q": torch.zeros(1, 4, 5, 0), "k": torch.zeros(1, 2, 9, 0)}, ValueError, "no head_dim may be 0"),
        ({"v": torch.zeros(1, 2, 9, 0)}, ValueError, r"v \(1, 2, 9, 0\) do not fit: .* no head_dim may be 0"),
        (
            {"k": torch.zeros(1, 2, 9, 8).to_sparse()},
            TypeError,
            r"k must be .* got layout torch\.sparse_coo; .*to_dense",
        ),
        ({"q": nested(torch.strided)}, TypeError, "q must be a plain tensor .* got a nested tensor; pad it"),
        ({"v": nested(torch.jagged)}, TypeError, "v must be a plain tensor .* got a nested tensor; pad it"),
        ({"q": torch.zeros(1, 3, 5, 8)}, ValueError, "the 3 query heads must be a multiple of the 2 key/value heads"),
        ({"k": torch.zeros(1, 0, 9, 8), "v": None}, ValueError, "4 query heads must be a multiple of the 0"),
        ({"k": torch.zeros(1, 2, 9, 8).double()}, TypeError, r"share a dtype, got torch\.float32, torch\.float64"),
        ({"v": torch.zeros(1, 2, 9, 8).half()}, TypeError, r"share a dtype, got .* torch\.float16"),
        ({"v": torch.zeros(1, 2, 9, 8, device="meta")}, ValueError, "share a device, got cpu, cpu, meta"),
        ({"extent": Extent.full(2, 5, 9)}, ValueError, "the extent has 2 batch rows, but q has 1"),
        ({"extent": Extent.full(1, 6, 9)}, ValueError, "6 queries in batch row 0, .* but there are 5"),
        ({"extent": Extent.full(1, 5, 10)}, ValueError, "10 keys in batch row 0, .* but there are 9"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number, got nan"),
        ({"scale": math.inf}, ValueError, "scale must be a finite number, got inf"),
        ({"scale": 1e300}, ValueError, r"scale must be a finite number, got 1e\+300 \(kernels take it in float32\)"),
        ({"scale": -4e38}, ValueError, r"scale must be a finite number, got -4e\+38"),
        ({"softcap": 0.0}, ValueError, r"softcap must be above 0 and finite, or None, got 0\.0"),
        ({"softcap": 1e-46}, ValueError, r"softcap must be above 0 .* got 1e-46 \(kernels take it in float32\)"),
        ({"softcap": 4e38}, ValueError, r"softcap must be above 0 and finite, .* got 4e\+38"),
        ({"softcap": -1.0}, ValueError, r"softcap must be above 0 .* got -1\.0"),
        ({"softcap": math.nan}, ValueError, "softcap must be above 0 .* got nan"),
        ({"softcap": math.inf}, ValueError, "softcap must be above 0 and finite, .* got inf"),
        ({"sinks": [0.0] * 4}, TypeError, "sinks must be a tensor, got list"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(4,\), .* got \(2,\)"),
        ({"sinks": torch.zeros(1, 4)}, ValueError, r"sinks must have shape \(4,\), .* got \(1, 4\)"),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, "on cpu, got .* on meta"),
    ],
)
def test_bad_fields_are_named(made_by: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = tensors()
    with pytest.raises(error, match=message):
        made_by(**{"q": q, "k": k, "v": v} | change)


def test_more_causal_queries_than_keys_are_an_error() -> None:
    with pytest.raises(ValueError, match="9 queries cannot be the last tokens of 5 keys"):
        AttentionCall(*tensors(query_len=9, key_len=5))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.complex64])
def test_tensors_that_are_no_floats_of_16_bits_are_named(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in tensors())
    with pytest.raises(TypeError, match=f"floating point of at least 16 bits, got {dtype}"):
        AttentionCall(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_16_bits_and_more_pass(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in tensors())
    assert AttentionCall(q, k, v).q.dtype == dtype


@pytest.mark.parametrize("groups", [[0, 1, 2], [1, 2], [0, 2]])
def test_some_heads_of_a_call(groups: list[int]) -> None:
    q, k, v = (torch.randn(2, heads, 5, 4) for heads in (6, 3, 3))
    call = AttentionCall(q, k, v, scale=0.3, sinks=torch.randn(6), softcap=2.0, layer=3)
    part = call.of_groups(groups)
    heads = [2 * g + n for g in groups for n in range(2)]
    assert torch.equal(part.q, q[:, heads])
    assert torch.equal(part.k, k[:, groups])
    assert torch.equal(part.values, v[:, groups])
    assert part.sinks is not None
    assert call.sinks is not None
    assert torch.equal(part.sinks, call.sinks[heads])
    assert (part.scale, part.softcap, part.layer, part.extent) == (0.3, 2.0, 3, call.extent)
    assert replace(call, v=None, sinks=None).of_groups([1]).v is None
    if groups == [1, 2]:
        assert part.k.data_ptr() == k[:, 1:].data_ptr()
