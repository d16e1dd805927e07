"""`Paged`: keys or values of one sequence, where they lie in the pages of a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.unread import Unread

__all__ = ["FORMS", "Paged"]

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


class Paged(Unread):
    """Keys or values ``[1, G, T, D]`` of one sequence.

    Args:
        pages: ``[any number, G, page * D]``, all pages of the cache; the last dimension is contiguous.
        table: int ``[n]``, the sequence's pages in order. It is copied.
        tokens: T. The sequence has no more, whatever else is in its pages.
        page: tokens of a page.
        form: of `FORMS`.

    Raises:
        ValueError: the table is too short, or names a page that is not there.
    """

    pages: Tensor
    table: Tensor
    page: int
    form: str

    @staticmethod
    def __new__(cls, pages: Tensor, table: Tensor, tokens: int, page: int, form: str) -> Paged:
        if pages.ndim != 3 or pages.stride(2) != 1 or pages.shape[2] % page or form not in FORMS:
            raise ValueError(
                f"pages must be [number, heads, {page} tokens * channels], the last contiguous, in a form of "
                f"{', '.join(FORMS)}; got shape {tuple(pages.shape)}, strides {pages.stride()} and form {form!r}"
            )
        if not 0 <= tokens <= table.numel() * page:
            raise ValueError(f"{table.numel()} pages of {page} tokens cannot hold {tokens} tokens")
        shape = (1, pages.shape[1], tokens, pages.shape[2] // page)
        return Unread.made(cls, shape, pages)

    def __init__(self, pages: Tensor, table: Tensor, tokens: int, page: int, form: str) -> None:
        used = table[: -(-tokens // page)]
        self.table = used.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
        if tokens and not 0 <= int(used.min()) <= int(used.max()) < pages.shape[0]:
            raise ValueError(f"the table names pages {int(used.min())} to {int(used.max())} of {pages.shape[0]}")
        self.pages, self.page, self.form = pages, page, form

    def copied(self) -> Tensor:
        _, groups, tokens, dim = self.shape
        chosen = self.pages.index_select(0, self.table.long())
        rows = FORMS[self.form](chosen, self.page, dim).reshape(1, groups, -1, dim)
        return rows[:, :, :tokens]

    def of_some_heads(self, first: int, last: int) -> Tensor:
        return Paged(self.pages[:, first:last], self.table, self.shape[2], self.page, self.form)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Paged({tuple(self.shape)}, {self.dtype}, {self.form}, pages of {self.page})"
