"""`Paged`: keys or values of sequences, where they lie in the pages of a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.unread import Unread

__all__ = ["FORMS", "Paged", "Table"]

Form = Callable[[Tensor, int, int], Tensor]


def _rows(pages: Tensor, page: int, dim: int) -> Tensor:
    return pages.unflatten(2, (page, dim)).permute(1, 0, 2, 3)


def _columns(pages: Tensor, page: int, dim: int) -> Tensor:
    return pages.unflatten(2, (dim, page)).permute(1, 0, 3, 2)


def _key_tiles(pages: Tensor, page: int, dim: int) -> Tensor:
    return pages.unflatten(2, (page // 16, dim // 2, 16, 2)).permute(1, 0, 2, 4, 3, 5)


def _value_tiles(pages: Tensor, page: int, dim: int) -> Tensor:
    return pages.unflatten(2, (dim // 16, page // 2, 16, 2)).permute(1, 0, 3, 5, 2, 4)


FORMS: dict[str, Form] = {
    "rows": _rows,
    "columns": _columns,
    "key_tiles": _key_tiles,
    "value_tiles": _value_tiles,
}
"""How the ``page * D`` numbers of a head lie in a page: ``[page, D]``, ``[D, page]``, ``[page/16, D/2, 16, 2]`` and
``[D/16, page/2, 16, 2]``. By name, views of pages ``[n, G, page * D]`` as ``[G, n, (tokens), (channels)]``."""


class Table:
    """Which pages sequences have, looked at once for all layers whose pages are numbered alike.

    Args:
        pages: int ``[n]`` of one sequence, or ``[B, n]`` of several, in order. It is copied.

    Attributes:
        numbers: int32 ``[B, n]``.
        least, most: of them; 0 and -1 where there are none.
    """

    def __init__(self, pages: Tensor) -> None:
        rows = pages if pages.ndim == 2 else pages[None]
        self.numbers = rows.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
        empty = not rows.numel()
        self.least, self.most = (0, -1) if empty else (int(self.numbers.min()), int(self.numbers.max()))


class Paged(Unread):
    """Keys or values ``[B, G, T, D]`` of sequences.

    Args:
        pages: ``[any number, G, page * D]``, all pages of the cache; the last dimension is contiguous.
        table: a `Table` of B sequences; or int ``[n]`` or ``[B, n]``, the pages of each in order, which are copied.
        tokens: T. The sequences have no more, whatever else is in their pages; an extent says which have fewer.
        page: tokens of a page.
        form: of `FORMS`.

    Raises:
        ValueError: the table is too short, or names a page that is not there.
    """

    pages: Tensor
    listed: Table
    page: int
    form: str

    @staticmethod
    def __new__(cls, pages: Tensor, table: Tensor | Table, tokens: int, page: int, form: str) -> Paged:
        if pages.ndim != 3 or pages.stride(2) != 1 or pages.shape[2] % page or form not in FORMS:
            raise ValueError(
                f"pages must be [number, heads, {page} tokens * channels], the last contiguous, in a form of "
                f"{', '.join(FORMS)}; got shape {tuple(pages.shape)}, strides {pages.stride()} and form {form!r}"
            )
        numbers = table.numbers if isinstance(table, Table) else table
        if not 0 <= tokens <= numbers.shape[-1] * page:
            raise ValueError(f"{numbers.shape[-1]} pages of {page} tokens cannot hold {tokens} tokens")
        batch = numbers.shape[0] if numbers.ndim == 2 else 1
        return Unread.made(cls, (batch, pages.shape[1], tokens, pages.shape[2] // page), pages)

    def __init__(self, pages: Tensor, table: Tensor | Table, tokens: int, page: int, form: str) -> None:
        listed = table if isinstance(table, Table) else Table(table[..., : -(-tokens // page)])
        if not 0 <= listed.least <= listed.most + 1 <= pages.shape[0]:
            raise ValueError(f"the table names pages {listed.least} to {listed.most} of {pages.shape[0]}")
        self.pages, self.listed, self.page, self.form = pages, listed, page, form

    @property
    def table(self) -> Tensor:
        """int32 ``[B, n]``: the pages of each sequence, in order."""
        return self.listed.numbers

    def copied(self) -> Tensor:
        batch, groups, tokens, dim = self.shape
        used = self.table[:, : -(-tokens // self.page)]
        chosen = self.pages.index_select(0, used.flatten().long())
        rows = FORMS[self.form](chosen, self.page, dim).reshape(groups, batch, used.shape[1] * self.page, dim)
        return rows.transpose(0, 1)[:, :, :tokens]

    def of_some_heads(self, first: int, last: int) -> Tensor:
        return Paged(self.pages[:, first:last], self.listed, self.shape[2], self.page, self.form)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Paged({tuple(self.shape)}, {self.dtype}, {self.form}, pages of {self.page})"
