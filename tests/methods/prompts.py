"""Calls as a model that reads images makes them: text, images and videos in one prompt, with planted heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.layout import IMAGE, TEXT, VIDEO, ModalityLayout
from gossamer.methods import MMInference, VerticalSlash

__all__ = ["layout_of", "of_weights", "planted_boundary", "planted_grid", "prompt", "weights"]

_NUMBERS = {"t": TEXT, "i": IMAGE, "v": VIDEO}


def layout_of(*rows: str, strides: Any = ()) -> ModalityLayout:
    """From strings such as ``"t5 i20 t3"``."""
    kinds = [[_NUMBERS[run[0]] for run in row.split() for _ in range(int(run[1:]))] for row in rows]
    longest = max(map(len, kinds))
    padded = [row + [TEXT] * (longest - len(row)) for row in kinds]
    return ModalityLayout(torch.tensor(padded, dtype=torch.int8), strides)


def prompt(
    *rows: str,
    heads: int = 4,
    groups: int = 2,
    dim: int = 16,
    left: int = 0,
    seed: int = 0,
    sharp: float = 2.0,
    **f: Any,
) -> AttentionCall:
    """Random q, k and v for prompts of these runs; the shorter ones and ``left`` have padding on the left, of NaN."""
    counts = [sum(int(run[1:]) for run in row.split()) for row in rows]
    tokens = max(counts) + left
    generator = torch.Generator().manual_seed(seed)
    q = sharp * torch.randn(len(rows), heads, tokens, dim, generator=generator)
    k, v = (torch.randn(len(rows), groups, tokens, dim, generator=generator) for _ in "kv")
    pads = [tokens - count for count in counts]
    extent = Extent([-pad for pad in pads], counts, pads, counts)
    dead = ~extent.live_keys(tokens)[:, None, :, None]
    q, k, v = (x.masked_fill(dead, float("nan")) for x in (q, k, v))
    return AttentionCall(q, k, v, extent, **({"layer": 0, "layout": layout_of(*rows)} | f))


def of_weights(wanted: Tensor, layout: ModalityLayout | None = None, sharp: float = 40.0) -> AttentionCall:
    """A call whose heads attend evenly to the pairs of bool masks ``[H, N, N]`` (causal, no row empty), and no others.

    Keys are unit vectors, one for each token, and queries their sums: N is the head dimension.
    """
    count = wanted.shape[-1]
    q = wanted.float().view(1, -1, count, count) * sharp
    k = torch.eye(count)[None, None]
    v = torch.randn(1, 1, count, count, generator=torch.Generator().manual_seed(0))
    return AttentionCall(q, k, v, Extent.full(1, count, count), scale=1.0, layer=0, layout=layout)


def weights(call: AttentionCall, row: int = 0) -> Tensor:
    """The softmax of a batch row, by position: fp64 ``[H, queries, keys]``."""
    extent = call.extent
    start, count = int(extent.key_start[row]), int(extent.key_count[row])
    first, queries = int(extent.first_query[row]), int(extent.query_count[row])
    keys = call.k[row, :, start : start + count].double().repeat_interleave(call.share, dim=0)
    logits = call.q[row, :, first : first + queries].double() @ keys.transpose(-1, -2) * call.scale
    later = torch.arange(count) > torch.arange(queries)[:, None]
    return logits.masked_fill(later, float("-inf")).softmax(dim=-1)


def planted_grid(count: int, s: int, p_k: int | None, p_q: int | None, p_d: int | None) -> Tensor:
    """Pairs on columns, rows and slashes of a stride, by their phases, and each token's own."""
    i, j = torch.arange(count)[:, None], torch.arange(count)
    on = torch.zeros(count, count, dtype=torch.bool)
    for phase, of in ((p_k, j), (p_q, i), (p_d, i - j)):
        if phase is not None:
            on = on | (of % s == phase)
    return (on | (i == j)) & (j <= i)


def planted_boundary(kind: str) -> tuple[Tensor, ModalityLayout, MMInference]:
    """A head with one kind of boundary, and the method that it calls for."""
    layout = layout_of("t200 v320 t60 v100 t120")
    vision = layout.kinds[0] > 0
    count = len(vision)
    i, j = torch.arange(count)[:, None], torch.arange(count)
    diagonal, near = i == j, i - j < 20
    columns = {name: torch.isin(j, torch.tensor(at)) for name, at in (("t", [40, 300]), ("v", [90, 260, 410]))}
    few = VerticalSlash(40, 128)
    if kind == "k":  # all rows alike: keys of a modality stand out
        return (columns["t"] | columns["v"] | diagonal) & (j <= i), layout, MMInference("none", (few,))
    if kind == "q":  # queries of each modality see other keys
        wanted = (~vision[:, None] & columns["t"]) | (vision[:, None] & (columns["v"] | near)) | diagonal
        return wanted & (j <= i), layout, MMInference("q", (few, few))
    of_text = columns["t"] & ~vision | near & vision  # of one modality columns, of the other a window
    of_vision = columns["v"] & vision | (i - j < 150) & (i - j > 128) & ~vision
    wanted = torch.where(vision[:, None], of_vision, of_text) | diagonal
    return wanted & (j <= i), layout, MMInference("2d", (few, few, VerticalSlash(30, 320), few))
