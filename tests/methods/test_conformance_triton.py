"""Every method, planned and attended in Triton, against the definition: the matrix of `test_conformance`.

Dtypes and shares take turns, since a device compiles a kernel for each combination and Triton's interpreter is slow:
each method meets each head dimension, each dtype and each share of heads. Where it interprets, lengths are small, and a
method's head dimensions share out the situations.
"""

import itertools
from dataclasses import replace

import pytest
import torch
import triton_interpreter
from listed import LISTED, Listed

from gossamer.backends import PLAN, triton
from gossamer.call import AttentionCall
from gossamer.testing import SITUATIONS, assert_accurate, make_call

triton_interpreter.hasten()
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LENGTHS = (1, 63, 64, 65, 1000, 4097) if ON_GPU else (97,)
DIMS = (64, 80, 96, 128, 256)
SHARES = (1, 4, 8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # the interpreter's NumPy
    pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def moved(call: AttentionCall) -> AttentionCall:
    sinks = None if call.sinks is None else call.sinks.to(DEVICE)
    return replace(call, q=call.q.to(DEVICE), k=call.k.to(DEVICE), v=call.values.to(DEVICE), sinks=sinks)


def matrix() -> list:
    cells = []
    for number, listed in enumerate(LISTED):
        for turn, dim in enumerate(DIMS):
            situations = SITUATIONS if ON_GPU else SITUATIONS[turn :: len(DIMS)]
            name, dtype = list(DTYPES.items())[(number + turn) % len(DTYPES)]
            share = SHARES[(number + 2 * turn) % len(SHARES)]
            cell_id = f"{listed.id}-{name}-{dim}-{share}"
            cells.append(pytest.param(listed, dtype, dim, share, situations, id=cell_id))
    return cells


@pytest.mark.parametrize(("listed", "dtype", "dim", "share", "situations"), matrix())
def test_conformance(monkeypatch, listed: Listed, dtype: torch.dtype, dim: int, share: int, situations) -> None:
    monkeypatch.setenv(PLAN, "triton")
    groups = 2 if share == 1 else 1
    method = listed.create(groups * share)
    shape = {"heads": groups * share, "groups": groups, "dim": dim, "dtype": dtype}
    for length in LENGTHS:
        for situation in situations:
            call = make_call(situation, length=length, seed=length, **shape)
            if call.lacks(method.needs) is None:
                there = moved(call)
                plan = method.plan(there)
                out, lse = triton.attend(there, plan)
                assert_accurate(call, plan.to("cpu"), out.cpu(), lse.cpu(), most_rows=100 if length < 1000 else 40)


def test_the_matrix_has_every_method_dimension_dtype_share_and_situation() -> None:
    cells = [cell.values for cell in matrix()]
    for listed in LISTED:
        own = [cell for cell in cells if cell[0] is listed]
        assert {cell[1] for cell in own} == set(DTYPES.values())
        assert {cell[2] for cell in own} == set(DIMS)
        assert {cell[3] for cell in own} == set(SHARES)
        assert {situation for cell in own for situation in cell[4]} == set(SITUATIONS)
    assert {(cell[1], cell[2]) for cell in cells} == set(itertools.product(DTYPES.values(), DIMS))
