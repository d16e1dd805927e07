"""Every method on the CPU backend, against the definition.

Every method meets every dtype in every situation; head dimensions and shares of heads take turns, and the methods
together meet all of them. Each instruction set that is not chosen here runs every method on one head dimension, in half
of the situations.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from listed import LISTED, Listed

from gossamer import AttentionCall, Extent, backends, methods
from gossamer.backends import cpu
from gossamer.rotary import Rotary
from gossamer.testing import SITUATIONS, assert_accurate, assert_keeps_diagonal, make_call

LENGTHS = (1, 64, 65, 300)
DIMS = (64, 80, 96, 128, 256)
SHARES = (1, 4, 8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

needs_kernels = pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}")
every_method = pytest.mark.parametrize("listed", LISTED, ids=lambda listed: listed.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@functools.cache
def other_isas() -> tuple[str, ...]:
    if not cpu.is_available():
        return ()
    active = {cpu.active_isa(dtype) for dtype in DTYPES.values()}
    return tuple(isa for isa in cpu.supported_isas() if isa not in active)


def test_every_available_method_is_listed() -> None:
    assert {listed.name for listed in LISTED} == set(methods.available())


def matrix() -> list:
    """Two head dimensions of each method and dtype."""
    cells = []
    for number, (listed, dtype) in enumerate(itertools.product(LISTED, DTYPES)):
        for turn in (2 * number, 2 * number + 1):
            dim, share = DIMS[turn % len(DIMS)], SHARES[turn // len(DIMS) % len(SHARES)]
            cells.append(pytest.param(listed, dtype, dim, share, id=f"{listed.id}-{dtype}-{dim}-{share}"))
    return cells


def check(
    listed: Listed,
    dtype: str,
    dim: int,
    share: int,
    lengths: tuple[int, ...],
    situations: Sequence[str] = SITUATIONS,
    most_rows: int = 60,
) -> None:
    groups = 2 if share == 1 else 1
    shape = {"heads": groups * share, "groups": groups, "dim": dim, "dtype": DTYPES[dtype]}
    method = listed.create(groups * share)
    for length in lengths:
        for situation in situations:
            call = make_call(situation, length=length, seed=length, **shape)
            if method.lacks(call) is None:
                plan = method.plan(call)
                assert_accurate(call, plan, *cpu.attend(call, plan), most_rows=most_rows)


@needs_kernels
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("listed", "dtype", "dim", "share"), matrix())
def test_conformance(listed: Listed, dtype: str, dim: int, share: int) -> None:
    check(listed, dtype, dim, share, LENGTHS)


def test_the_matrix_has_every_method_and_dtype_and_every_pair_of_dtype_dimension_and_share() -> None:
    cells = [cell.values for cell in matrix()]
    ids = [listed.id for listed in LISTED]
    assert {(cell[0].id, cell[1]) for cell in cells} == set(itertools.product(ids, DTYPES))
    assert {cell[1:3] for cell in cells} == set(itertools.product(DTYPES, DIMS))
    assert {cell[2:] for cell in cells} == set(itertools.product(DIMS, SHARES))
    assert {(cell[1], cell[3]) for cell in cells} == set(itertools.product(DTYPES, SHARES))


@needs_kernels
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("isa", other_isas())
@every_dtype
@every_method
def test_conformance_of_other_instruction_sets(monkeypatch, listed: Listed, dtype: str, isa: str) -> None:
    monkeypatch.setenv("GOSSAMER_CPU_ISA", isa)
    turn = LISTED.index(listed) + other_isas().index(isa)
    lengths = (65,) if isa == "amx_emulated" else (1, 65, 200)  # its emulation is slow
    check(
        listed,
        dtype,
        DIMS[turn % len(DIMS)],
        SHARES[turn % len(SHARES)],
        lengths,
        SITUATIONS[turn % 2 :: 2],
        most_rows=40,
    )


@needs_kernels
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("situation", ["no padding", "padded chunk"])
@every_dtype
@every_method
def test_conformance_of_long_prompts(listed: Listed, dtype: str, situation: str) -> None:
    call = make_call(situation, length=4097, heads=4, groups=1, dim=64, dtype=DTYPES[dtype], seed=1)
    plan = listed.create(4).plan(call)
    assert 0 < plan.density() < 1 or listed.name == "dense"
    assert_accurate(call, plan, *cpu.attend(call, plan), most_rows=40)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("length", [1, 63, 65, 500])
@every_method
def test_plans_keep_the_diagonal(listed: Listed, length: int, situation: str) -> None:
    call = make_call(situation, length=length, heads=4, groups=2, dim=16)
    method = listed.create(4)
    if method.lacks(call) is None:
        assert_keeps_diagonal(call, method.plan(call))


@pytest.mark.parametrize("situation", SITUATIONS)
@every_method
def test_full_budget_is_dense(listed: Listed, situation: str) -> None:
    call = make_call(situation, length=700, heads=4, groups=2, dim=16)
    method = listed.create(4, full=True)
    if method.lacks(call) is None:
        assert method.plan(call).density() == 1.0


@every_method
def test_a_small_budget_is_sparse(listed: Listed) -> None:
    """The negative control of full budgets."""
    call = make_call("no padding", length=1500, heads=4, groups=2, dim=16)
    density = listed.create(4).plan(call).density()
    assert density == 1.0 if listed.name == "dense" else density < (1.0 if listed.small.get("exact") else 0.8)


NOTHING = [(0, 70, 70), (1, 0, 70), (2, 0, 0), (1, 70, 0), (0, 0, 0)]  # batch, query_len, key_len


@pytest.mark.parametrize("planner", ["", "torch"], ids=["fastest", "torch"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("batch", "query_len", "key_len"), NOTHING)
@every_method
def test_nothing_to_plan(
    monkeypatch, listed: Listed, batch: int, query_len: int, key_len: int, causal: bool, planner: str
) -> None:
    monkeypatch.setenv("GOSSAMER_PLANNER", planner)
    q, k = torch.randn(batch, 4, query_len, 16), torch.randn(batch, 2, key_len, 16)
    each = torch.ones(batch, dtype=torch.int64)
    start = max(0, key_len - query_len)
    extent = Extent(each * start, each * query_len, each * 0, each * key_len, causal=causal)
    call = AttentionCall(q, k, k, extent, layer=0, rotary=Rotary.of_base(16))
    method = listed.create(4)
    if method.lacks(call) is not None:
        return
    plan = method.plan(call)
    assert plan.density() == 1.0
    assert int(plan.count_pairs().sum()) == 0
    for backend in ("torch", "cpu") if cpu.is_available() else ("torch",):
        monkeypatch.setenv("GOSSAMER_BACKEND", backend)
        out, lse = backends.attend(call, plan)
        assert out.shape == q.shape
        assert bool((out == 0).all())
        assert bool((lse == -math.inf).all())


@needs_kernels
@every_dtype
@every_method
def test_no_output_depends_on_a_later_token(listed: Listed, dtype: str) -> None:
    """With the plan held, perturbing key and value j leaves every output before j bit-identical."""
    call = make_call("no padding", length=500, heads=4, groups=2, dim=64, dtype=DTYPES[dtype])
    plan = listed.create(4).plan(call)
    out, lse = cpu.attend(call, plan)
    for j in (1, 63, 64, 200, 499):
        k, v = call.k.clone(), call.values.clone()
        k[:, :, j:] += 3.0
        v[:, :, j:] = 1e4
        again, again_lse = cpu.attend(AttentionCall(call.q, k, v, call.extent), plan)
        assert torch.equal(again[:, :, :j], out[:, :, :j]), f"an output before token {j} changed"
        assert torch.equal(again_lse[:, :, :j], lse[:, :, :j])
        assert not torch.equal(again[:, :, j:], out[:, :, j:])


@needs_kernels
@pytest.mark.parametrize("listed", [one for one in LISTED if one.by_block], ids=lambda listed: listed.id)
def test_no_plan_by_block_depends_on_a_later_block(listed: Listed) -> None:
    """Planning again after the perturbation leaves every query block before j as it was, end to end."""
    call = make_call("no padding", length=1000, heads=4, groups=2, dim=64)
    method = listed.create(4)
    out, _ = cpu.attend(call, method.plan(call))
    j = 640
    q, k, v = call.q.clone(), call.k.clone(), call.values.clone()
    for tensor in (q, k, v):
        tensor[:, :, j:] += 2.0
    other = replace(call, q=q, k=k, v=v)
    again, _ = cpu.attend(other, method.plan(other))
    assert torch.equal(again[:, :, :j], out[:, :, :j])
    assert not torch.equal(again[:, :, j:], out[:, :, j:])


@every_method
def test_round_trip_through_a_dictionary(listed: Listed) -> None:
    method = listed.create(4)
    assert methods.from_dict(method.to_dict()) == method


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("nonesuch", {}, "unknown method 'nonesuch'; known: dense, auto, a_shape"),
        ("a_shape", {"windw": 3}, "has no field 'windw'; its fields are: sink, window"),
        ("a_shape", {"window": 0}, "window must be at least 1, got 0"),
        ("a_shape", {"sink": 1 << 31}, "sink must be at most 2147483647, got 2147483648"),
        ("max_relative", {"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ("max_relative", {"alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0.1"),
        ("dense", {"kernel": "other"}, "kernel must be 'torch' or 'gossamer', got 'other'"),
    ],
)
def test_bad_configurations_are_named(name: str, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.create(name, **fields)


LEAST = {
    "a_shape": {"sink": 0, "window": 1},
    "tri_shape": {"sink": 0, "window": 1, "last": 0, "block": 1},
    "triangle_mix": {"sink": 0, "window": 1, "last": 0, "block": 1, "first_layer": 0},
    "vertical_slash": {"vertical_size": 0, "slash_size": 0, "last": 1},
    "minference": {"vertical_size": 0, "slash_size": 0, "last": 1},
    "grid": {"stride": 0, "max_stride": 1, "last": 1},
    "block_sparse": {"blocks": 1, "block": 1},
    "sparge": {"sink_blocks": 0, "block_q": 1, "block_k": 1},
    "prism": {"sink_blocks": 0, "block": 1},
    "vec_attention": {"sink_blocks": 0, "window_blocks": 1, "block": 1},
    "duo_attention": {"sink": 0, "recent": 1},
    "lserve": {
        "sink": 0,
        "local": 1,
        "block": 1,
        "step_local": 1,
        "budget": 64,
        "page": 16,
        "logical": 1,
        "interval": 1,
    },
    "quest": {"budget": 16, "page": 1, "dense_layers": 0},
    "infllm": {"blocks": 0, "block": 1, "count": 1, "init": 0, "local": 1, "every": 1},
    "oracle_topk": {"budget": 1, "dense_layers": 0},
    "adaspa": {"block": 1},
    "sparse_vdit": {"block": 1, "every": 1},
    "attention_tile": {"frames": 1, "block": 1},
    "paro": {"block": 1, "buckets": 1},
    "sparsed": {"block": 1},
    "moa": {"sink": 0, "least": 1, "block": 1, "new_tokens": 0},
    "seer_attention": {"last_blocks": 0},
    "max_relative": {"sink_blocks": 0, "window_blocks": 1, "last_rows": 0, "block_q": 1, "block_k": 1},
}


@pytest.mark.parametrize("name", LEAST)
def test_every_number_has_a_least_value(name: str) -> None:
    defaults = methods.create(name).to_dict()
    assert {field for field, value in defaults.items() if type(value) is int} == set(LEAST[name])
    for field, least in LEAST[name].items():
        assert methods.create(name, **{field: least}).to_dict() == defaults | {field: least}
        with pytest.raises(ValueError, match=f"{name}.{field} must be at least {least}, got {least - 1}"):
            methods.create(name, **{field: least - 1})


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("block_sparse", {"blocks": 1.5}, r"blocks must be an integer, got 1\.5"),
        ("a_shape", {"sink": True}, "sink must be an integer, got True"),
        ("max_relative", {"alpha": "much"}, "alpha must be a number, got 'much'"),
    ],
)
def test_fields_of_another_type_are_named(name: str, fields: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        methods.create(name, **fields)


@pytest.mark.parametrize("data", [{}, {"method": 3}, []])
def test_a_dictionary_without_a_method_is_an_error(data) -> None:
    with pytest.raises(ValueError, match="needs the key 'method'"):
        methods.from_dict(data)
