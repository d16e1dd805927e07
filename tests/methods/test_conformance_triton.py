"""Every method, planned and attended in Triton, against the definition: the matrix of `test_conformance`.

Dtypes and shares take turns, since a device compiles a kernel for each combination and Triton's interpreter is slow: each
method meets each head dimension, each dtype and each share of heads. Where it interprets, lengths are small, and a method's
head dimensions share out the situations.
"""

import itertools

import pytest
import torch
import triton_interpreter
from test_conformance import DIMS, LONG, METHODS, SHARES, method_id

from gossamer import methods
from gossamer.backends import PLAN, triton
from gossamer.testing import SITUATIONS, assert_accurate, make_call

triton_interpreter.hasten()
ON_GPU = torch.cuda.is_available()
LENGTHS = (1, 63, 64, 65, 1000, LONG) if ON_GPU else (97,)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # the interpreter's NumPy
    pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def matrix() -> list:
    cells = []
    for number, entry in enumerate(METHODS):
        for at, dim in enumerate(DIMS):
            situations = SITUATIONS if ON_GPU else SITUATIONS[at :: len(DIMS)]
            name, dtype = list(DTYPES.items())[(number + at) % len(DTYPES)]
            share = SHARES[(number + 2 * at) % len(SHARES)]
            cell_id = f"{method_id(entry)}-{name}-{dim}-{share}"
            cells.append(pytest.param(entry, dtype, dim, share, situations, id=cell_id))
    return cells


@pytest.mark.parametrize(("entry", "dtype", "dim", "share", "situations"), matrix())
def test_conformance(monkeypatch, entry, dtype: torch.dtype, dim: int, share: int, situations) -> None:
    monkeypatch.setenv(PLAN, "triton")
    method = methods.create(entry[0], **entry[1])
    groups = 2 if share == 1 else 1
    for length, situation in itertools.product(LENGTHS, situations):
        sizes = {"length": length, "heads": groups * share, "groups": groups, "dim": dim}
        call = make_call(situation, **sizes, dtype=dtype, seed=length)
        there = call.to("cuda" if ON_GPU else "cpu")
        plan = method.plan(there)
        out, lse = triton.attend(there, plan)
        assert_accurate(call, plan.to("cpu"), out.cpu(), lse.cpu(), most_rows=100 if length < 1000 else 40)


def test_the_matrix_has_every_method_dimension_dtype_share_and_situation() -> None:
    cells = [cell.values for cell in matrix()]
    for entry in METHODS:
        own = [cell for cell in cells if cell[0] is entry]
        assert {cell[1] for cell in own} == set(DTYPES.values())
        assert {cell[2] for cell in own} == set(DIMS)
        assert {cell[3] for cell in own} == set(SHARES)
        assert {situation for cell in own for situation in cell[4]} == set(SITUATIONS)
    assert {(cell[1], cell[2]) for cell in cells} == set(itertools.product(DTYPES.values(), DIMS))
