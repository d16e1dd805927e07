"""Every method on the CPU executor, against the definition: one list, a new method joins by one line.

The full product of dtypes, GQA shares, head dimensions, lengths and situations runs on the instruction set that is
chosen here; the others run it without its largest length, which they get for one shape.
"""

import functools
import math

import pytest
import torch

from gossamer import Extent, HeadPattern, Profile, methods
from gossamer.backends import cpu
from gossamer.backends import torch as reference
from gossamer.methods import Method
from gossamer.testing import SITUATIONS, Case, assert_accurate, assert_keeps_diagonal, make_case

# Budgets small enough that plans are sparse from a few hundred tokens on.
METHODS: list[tuple[str, dict]] = [
    ("dense", {}),
    ("a_shape", {"sink": 9, "window": 150}),
    ("tri_shape", {"sink": 9, "window": 150, "last": 100}),
    ("vertical_slash", {"vertical_size": 60, "slash_size": 300}),
    ("vertical_slash", {"vertical_size": 60, "slash_size": 120, "exact": True}),
    ("block_sparse", {"blocks": 4}),
    ("minference", {"vertical_size": 60, "slash_size": 300}),
    ("max_relative", {"alpha": 0.3, "sink_blocks": 1, "window_blocks": 2, "last_rows": 256}),
]
FULL_BUDGETS: list[tuple[str, dict]] = [
    ("dense", {}),
    ("a_shape", {"window": 10_000}),
    ("tri_shape", {"window": 10_000}),
    ("vertical_slash", {"slash_size": 10_000}),
    ("vertical_slash", {"vertical_size": 10_000}),
    ("vertical_slash", {"slash_size": 10_000, "exact": True}),
    ("block_sparse", {"blocks": 1000}),
    ("minference", {"slash_size": 10_000}),
    ("max_relative", {"alpha": 0.0}),
]
# Methods whose plan for a query block depends on nothing after that block.
PLANNED_CAUSALLY = ["dense", "a_shape", "tri_shape", "block_sparse", "max_relative"]

LENGTHS = (1, 63, 64, 65, 1000)
LONG = 4097
DIMS = (64, 80, 96, 128, 256)
SHARES = (1, 4, 8)
DTYPES = (torch.float32, torch.bfloat16)

needs_kernels = pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}")


def method_id(entry: tuple[str, dict]) -> str:
    name, fields = entry
    return name + ("-exact" if fields.get("exact") else "")


every_method = pytest.mark.parametrize("entry", METHODS, ids=method_id)


def run(method: Method, case: Case):
    plan = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
    return plan, *cpu.execute(case.q, case.k, case.v, plan, scale=case.scale)


@functools.cache
def other_isas() -> tuple[str, ...]:
    if not cpu.is_available():
        return ()
    active = {cpu.active_isa(dtype) for dtype in DTYPES}
    return tuple(isa for isa in cpu.supported_isas() if isa not in active)


def test_every_available_method_is_in_the_list() -> None:
    assert {name for name, _ in METHODS} == set(methods.available())
    assert {name for name, _ in FULL_BUDGETS} == set(methods.available())


@needs_kernels
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@every_method
def test_conformance(entry, dtype: torch.dtype, share: int, dim: int) -> None:
    check(entry, dtype, share, dim, (*LENGTHS, LONG))


@needs_kernels
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@every_method
@pytest.mark.parametrize("isa", other_isas())
def test_conformance_of_other_instruction_sets(monkeypatch, isa: str, entry, dtype, share: int, dim: int) -> None:
    monkeypatch.setenv("GOSSAMER_CPU_ISA", isa)
    lengths = (*LENGTHS, LONG) if (share, dim) == (4, 64) and isa != "amx_emulated" else LENGTHS
    check(entry, dtype, share, dim, lengths)


def check(entry: tuple[str, dict], dtype: torch.dtype, share: int, dim: int, lengths: tuple[int, ...]) -> None:
    method = methods.create(entry[0], **entry[1])
    groups = 2 if share == 1 else 1
    for length in lengths:
        for situation in SITUATIONS:
            case = make_case(
                situation, length=length, heads=groups * share, groups=groups, dim=dim, dtype=dtype, seed=length
            )
            plan, out, lse = run(method, case)
            assert_accurate(case, plan, out, lse, most_rows=100 if length < 1000 else 40)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("length", [1, 63, 65, 500])
@every_method
def test_plans_keep_the_diagonal(entry, length: int, situation: str) -> None:
    method = methods.create(entry[0], **entry[1])
    case = make_case(situation, length=length, heads=4, groups=2, dim=16)
    plan = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
    assert_keeps_diagonal(case, plan)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("entry", FULL_BUDGETS, ids=method_id)
def test_full_budget_is_dense(entry, situation: str) -> None:
    method = methods.create(entry[0], **entry[1])
    case = make_case(situation, length=700, heads=4, groups=2, dim=16)
    plan = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
    assert plan.density() == 1.0


NOTHING = [(0, 70, 70), (1, 0, 70), (2, 0, 0), (1, 70, 0), (0, 0, 0)]  # batch, query_len, key_len


@pytest.mark.parametrize("planner", ["", "torch"], ids=["cpp", "torch"])
@pytest.mark.parametrize(("batch", "query_len", "key_len"), NOTHING)
@every_method
def test_nothing_to_plan(monkeypatch, entry, batch: int, query_len: int, key_len: int, planner: str) -> None:
    monkeypatch.setenv("GOSSAMER_PLANNER", planner)
    method = methods.create(entry[0], **entry[1])
    q, k = torch.randn(batch, 4, query_len, 16), torch.randn(batch, 2, key_len, 16)
    extent = Extent([max(0, key_len - query_len)] * batch, [0] * batch, [key_len] * batch)
    plan = method.plan(q, k, scale=1.0, extent=extent, layer=0)
    assert plan.density() == 1.0
    assert int(plan.count_pairs().sum()) == 0
    for executor in (reference, cpu) if cpu.is_available() else (reference,):
        out, lse = executor.execute(q, k, k, plan, scale=1.0)
        assert out.shape == q.shape
        assert bool((out == 0).all())
        assert bool((lse == -math.inf).all())


@needs_kernels
@every_method
def test_no_output_depends_on_a_later_token(entry) -> None:
    """With the plan held, perturbing key and value j leaves every output before j bit-identical."""
    method = methods.create(entry[0], **entry[1])
    for dtype in DTYPES:
        case = make_case("no padding", length=500, heads=4, groups=2, dim=64, dtype=dtype)
        plan, out, lse = run(method, case)
        for j in (1, 63, 64, 200, 499):
            k, v = case.k.clone(), case.v.clone()
            k[:, :, j:] += 3.0
            v[:, :, j:] = 1e4
            again, again_lse = cpu.execute(case.q, k, v, plan, scale=case.scale)
            assert torch.equal(again[:, :, :j], out[:, :, :j]), f"an output before token {j} changed"
            assert torch.equal(again_lse[:, :, :j], lse[:, :, :j])
            assert not torch.equal(again[:, :, j:], out[:, :, j:])


@needs_kernels
@pytest.mark.parametrize("entry", [e for e in METHODS if e[0] in PLANNED_CAUSALLY], ids=method_id)
def test_no_plan_of_a_causal_planner_depends_on_a_later_block(entry) -> None:
    """Planning again after the perturbation leaves every query block before j as it was, end to end."""
    method = methods.create(entry[0], **entry[1])
    case = make_case("no padding", length=1000, heads=4, groups=2, dim=64)
    _, out, _ = run(method, case)
    j = 640
    q, k, v = case.q.clone(), case.k.clone(), case.v.clone()
    for tensor in (q, k, v):
        tensor[:, :, j:] += 2.0
    _, again, _ = run(method, Case(q, k, v, case.extent, case.scale))
    assert torch.equal(again[:, :, :j], out[:, :, :j])


@every_method
def test_round_trip_through_a_dictionary(entry) -> None:
    method = methods.create(entry[0], **entry[1])
    assert methods.from_dict(method.to_dict()) == method


def test_profiles_survive_the_round_trip() -> None:
    method = methods.create("minference", profile=Profile.uniform(2, 3, HeadPattern("a_shape", (4, 9))))
    assert methods.from_dict(method.to_dict()) == method


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("nonesuch", {}, "unknown method 'nonesuch'; known: dense, a_shape"),
        ("a_shape", {"windw": 3}, "has no field 'windw'; its fields are: sink, window"),
        ("a_shape", {"window": 0}, "window must be at least 1, got 0"),
        ("max_relative", {"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_configurations_are_named(name: str, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.create(name, **fields)


def test_fields_of_another_type_are_named() -> None:
    with pytest.raises(TypeError, match=r"must be an integer, got 1\.5"):
        methods.create("block_sparse", blocks=1.5)
