"""Every method on the Triton executor, against the definition: the matrix of `test_conformance`.

Dtypes and shares take turns, since a device compiles a kernel for each combination and Triton's interpreter is slow:
each method meets each head dimension, each dtype and each share of heads. Lengths are small where it interprets.
"""

import itertools

import pytest
import torch
from test_conformance import DIMS, LONG, METHODS, SHARES, method_id

from gossamer import methods
from gossamer.backends import triton
from gossamer.testing import SITUATIONS, assert_accurate, make_case

ON_GPU = torch.cuda.is_available()
LENGTHS = (1, 63, 64, 65, 1000, LONG) if ON_GPU else (1, 97)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),  # the interpreter's NumPy
    pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def matrix() -> list:
    cells = []
    for number, entry in enumerate(METHODS):
        for at, dim in enumerate(DIMS):
            for turn, (name, dtype) in enumerate(DTYPES.items()):
                for place, share in enumerate(SHARES):
                    ours = (turn, place) == ((number + at) % len(DTYPES), (number + 2 * at) % len(SHARES))
                    if ours:
                        cell_id = f"{method_id(entry)}-{name}-{dim}-{share}"
                        cells.append(pytest.param(entry, dtype, dim, share, id=cell_id))
    return cells


@pytest.mark.parametrize(("entry", "dtype", "dim", "share"), matrix())
def test_conformance(entry, dtype: torch.dtype, dim: int, share: int) -> None:
    method = methods.create(entry[0], **entry[1])
    groups = 2 if share == 1 else 1
    for length in LENGTHS:
        for situation in SITUATIONS:
            case = make_case(
                situation, length=length, heads=groups * share, groups=groups, dim=dim, dtype=dtype, seed=length
            )
            plan = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
            q, k, v = (t.to("cuda" if ON_GPU else "cpu") for t in (case.q, case.k, case.v))
            out, lse = triton.execute(q, k, v, plan, scale=case.scale)
            assert_accurate(case, plan, out.cpu(), lse.cpu(), most_rows=100 if length < 1000 else 40)


def test_the_matrix_has_every_method_dimension_dtype_and_share() -> None:
    cells = [cell.values for cell in matrix()]
    for entry in METHODS:
        own = [cell for cell in cells if cell[0] is entry]
        assert {cell[1] for cell in own} == set(DTYPES.values())
        assert {cell[2] for cell in own} == set(DIMS)
        assert {cell[3] for cell in own} == set(SHARES)
    assert {(cell[1], cell[2]) for cell in cells} == set(itertools.product(DTYPES.values(), DIMS))


def test_the_matrix_is_small() -> None:
    """A device compiles about ten kernels a cell."""
    assert len(matrix()) <= len(METHODS) * len(DIMS)
