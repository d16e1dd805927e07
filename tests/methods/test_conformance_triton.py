"""Every method, planned and attended in Triton, against the definition: the matrix of `test_conformance`.

Dtypes and shares take turns, since a device compiles a kernel for each combination and Triton's interpreter is slow:
each method meets each head dimension, each dtype and each share of heads. Where it interprets, lengths and shares are
small, and head dimensions of a method and of its neighbour in the list share out the situations, all of which it meets
with the C++ kernels and with the definition.
"""

import itertools

import pytest
import torch
from listed import LISTED, Listed
from triton_support import DTYPES, MARKS, ON_GPU, moved

from gossamer.backends import PLAN, triton
from gossamer.testing import SITUATIONS, assert_accurate, make_call

pytestmark = MARKS
LENGTHS = (1, 63, 64, 65, 1000, 4097) if ON_GPU else (97,)
DIMS = (64, 80, 96, 128, 256)
SHARES = (1, 4, 8) if ON_GPU else (1, 2, 3)


def matrix() -> list:
    cells = []
    for number, listed in enumerate(LISTED):
        for turn, dim in enumerate(DIMS):
            situations = SITUATIONS if ON_GPU else SITUATIONS[turn + len(DIMS) * (number % 2) :: 2 * len(DIMS)]
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
            if method.lacks(call) is None:
                there = moved(call)
                plan = method.plan(there)
                out, lse = triton.attend(there, plan)
                assert_accurate(call, plan.to("cpu"), out.cpu(), lse.cpu(), most_rows=100 if length < 1000 else 40)


def test_the_matrix_has_every_method_dimension_dtype_share_and_situation() -> None:
    cells = [cell.values for cell in matrix()]
    for listed, neighbour in zip(LISTED, [*LISTED[1:], LISTED[-2]], strict=True):
        own, next_ones = ([cell for cell in cells if cell[0] is one] for one in (listed, neighbour))
        assert {cell[1] for cell in own} == set(DTYPES.values())
        assert {cell[2] for cell in own} == set(DIMS)
        assert {cell[3] for cell in own} == set(SHARES)
        assert {situation for cell in [*own, *next_ones] for situation in cell[4]} == set(SITUATIONS)
    assert {(cell[1], cell[2]) for cell in cells} == set(itertools.product(DTYPES.values(), DIMS))
