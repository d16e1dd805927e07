"""Prefill in chunks of a fixed size, with the cache as prefix (llm.npu, 2407.05858, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["prefill"]


def prefill(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    chunk: int = 256,
    past_key_values: Any = None,
    **more: Any,
) -> tuple[Tensor, Any]:
    """Read prompts a chunk at a time: what would be said next, and the cache to go on with.

    Linear layers then see at most ``chunk`` tokens of each row, whatever the prompt's length, and attention sees the
    chunk's queries on all keys so far; `gossamer.enable` serves each chunk. The last chunk is as long as what is left
    (llm.npu pads it); of a single token it is a decode step, which runs dense unless ``enable`` was given ``decode``.
    ``generate(prefill_chunk_size=...)`` of transformers does the same before it decodes; this one also reads rows that
    are padded on the right.

    Args:
        model: a causal language model of transformers.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, or ``[B, P + T]`` after a cache of P tokens: 0 where a row is padded, on the left or
            on the right; None where no row is.
        chunk: tokens of each chunk.
        past_key_values: a cache that has read what comes before; None begins a new one.
        more: what else the model is given with each chunk. ``position_ids`` ``[B, T]`` are cut as the tokens are.

    Returns:
        Logits ``[B, vocabulary]`` after each row's last token, and the cache.

    Raises:
        ValueError: no tokens; a chunk below 1; a mask of another length; or a row of padding alone.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be [B, T] with at least one token, got {list(input_ids.shape)}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be an integer of at least 1, got {chunk!r}")
    rows, length = input_ids.shape
    before = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    last = torch.full((rows,), length - 1, device=input_ids.device)
    if attention_mask is not None:
        if attention_mask.shape != (rows, before + length):
            raise ValueError(
                f"attention_mask must be [B, T] of the cache and the tokens together, {[rows, before + length]}, got "
                f"{list(attention_mask.shape)}"
            )
        live = attention_mask[:, before:].bool()
        if not bool(live.any(1).all()):
            raise ValueError("attention_mask leaves a row without tokens; leave the row out")
        last = length - 1 - live.flip(1).int().argmax(1)
    positions = more.pop("position_ids", None)
    kept: list[Tensor] = []
    of_rows: list[Tensor] = []
    for start in range(0, length, chunk):
        here = slice(start, min(start + chunk, length))
        given = {} if positions is None else {"position_ids": positions[:, here]}
        if attention_mask is not None:
            given["attention_mask"] = attention_mask[:, : before + here.stop]
        mine = ((last >= start) & (last < here.stop)).nonzero()[:, 0]
        # Logits of the rows that end in this chunk, and of no other position: a vocabulary is wide.
        wanted = (last[mine] - start).unique()
        keep = wanted if len(wanted) else torch.tensor([here.stop - start - 1], device=last.device)
        out = model(
            input_ids=input_ids[:, here],
            past_key_values=past_key_values,
            use_cache=True,
            logits_to_keep=keep,
            **given,
            **more,
        )
        past_key_values = out.past_key_values
        if len(mine):
            kept.append(out.logits[mine, torch.searchsorted(wanted, last[mine] - start)])
            of_rows.append(mine)
    return torch.cat(kept)[torch.cat(of_rows).argsort()], past_key_values
