"""Keys and values in pages, where they stand in for tensors: anything that torch computes of them is of their rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gossamer import AttentionCall
from gossamer.backends import torch as reference
from gossamer.backends.torch.dense import dense
from gossamer.paged import FORMS, Paged
from gossamer.plan import Grid

PAGE, DIM, TOKENS = 32, 16, 70


def place(form: str, token: int, channel: int) -> int:
    if form == "rows":
        return token * DIM + channel
    if form == "columns":
        return channel * PAGE + token
    if form == "key_tiles":  # [page/16, D/2, 16, 2]
        return ((token // 16 * (DIM // 2) + channel // 2) * 16 + token % 16) * 2 + channel % 2
    return ((channel // 16 * (PAGE // 2) + token // 2) * 16 + channel % 16) * 2 + token % 2  # [D/16, page/2, 16, 2]


def drawn(form: str) -> tuple[Paged, Tensor]:
    rows = torch.randn(1, 2, TOKENS, DIM, generator=torch.Generator().manual_seed(0))
    pages, table = torch.full((5, 2, PAGE * DIM), math.nan), torch.tensor([4, 0, 3])
    for token in range(TOKENS):
        inside = [place(form, token % PAGE, channel) for channel in range(DIM)]
        pages[table[token // PAGE], :, inside] = rows[0, :, token]
    return Paged(pages, table, TOKENS, PAGE, form), rows


@pytest.mark.parametrize("form", FORMS)
def test_it_is_a_tensor_of_its_rows(form: str) -> None:
    found, rows = drawn(form)
    assert found.shape == rows.shape
    assert (found.dtype, found.device, found.layout, found.requires_grad) == (
        rows.dtype,
        rows.device,
        torch.strided,
        False,
    )
    assert found.at_hand() is found
    assert torch.equal(found, rows)
    assert torch.equal(found[:, 1:, 5:] @ rows[0, 0, 0], rows[:, 1:, 5:] @ rows[0, 0, 0])
    assert type(found * 2) is Tensor


def test_rows_are_copied_once_and_stay() -> None:
    found, rows = drawn("columns")
    first = found.rows()
    found.pages.fill_(7)
    found.table.fill_(2)
    assert found.rows() is found.at_hand() is first
    assert torch.equal(found + 0, rows)
    assert torch.equal(found.of_heads(1, 2), rows[:, 1:])


def test_heads_of_it_lie_in_the_same_pages() -> None:
    found, rows = drawn("value_tiles")
    second = found.of_heads(1, 2)
    assert isinstance(second, Paged)
    assert second.pages.data_ptr() == found.pages[:, 1:].data_ptr()
    assert torch.equal(second, rows[:, 1:])
    assert found.at_hand() is found


def test_the_definitions_read_it() -> None:
    found, rows = drawn("key_tiles")
    call, same = (AttentionCall(torch.ones(1, 4, 9, DIM), k, v) for k, v in ((found, found), (rows, rows)))
    assert torch.equal(
        reference.pool_keys(call, Grid(call.extent, 8, 8)), reference.pool_keys(same, Grid(same.extent, 8, 8))
    )
    assert torch.equal(dense(call), dense(same))


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        found, rows = drawn("rows")
        assert torch.equal(found, rows)


def test_the_table_is_copied() -> None:
    pages, table = torch.zeros(3, 1, PAGE * DIM), torch.tensor([1, 2])
    found = Paged(pages, table, TOKENS - PAGE, PAGE, "rows")
    table.fill_(9)
    assert found.table.tolist() == [[1, 2]]
    assert found.table.dtype == torch.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 97}, "3 pages of 32 tokens cannot hold 97 tokens"),
        ({"tokens": -1}, "cannot hold -1 tokens"),
        ({"table": torch.tensor([4, 0, 5])}, "the table names pages 0 to 5 of 5"),
        ({"table": torch.tensor([4, -1, 0])}, "the table names pages -1 to 4 of 5"),
        ({"page": 33}, r"got shape \(5, 2, 512\)"),
        ({"form": "diagonals"}, "a form of rows, columns, key_tiles, value_tiles; .* form 'diagonals'"),
        ({"pages": torch.zeros(5, 512, 2).transpose(1, 2)}, r"the last contiguous.* strides \(1024, 1, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    given = {"pages": torch.zeros(5, 2, PAGE * DIM), "table": torch.tensor([4, 0, 3]), "tokens": TOKENS, "page": PAGE}
    with pytest.raises(ValueError, match=message):
        Paged(**(given | {"form": "rows"} | change))  # type: ignore[arg-type]
