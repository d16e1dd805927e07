"""What one query learns of each token of a cache without its key, defined: scores by labels, collisions of hashes."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.plan import on_device
from gossamer.summaries import LabelSet

__all__ = ["collisions", "label_queries", "label_scores"]


def label_scores(call: AttentionCall, labels: LabelSet) -> Tensor:
    """The part of each logit that is of the channels of its label (Double Sparsity, 2408.07092, section 3.3).

    ``scale * sum_c q_c * label_c`` over the channels c of the label.

    Returns:
        fp32 ``[B, H, N]``; -inf for tokens that a row does not have.
    """
    queries = label_queries(call, labels).unflatten(1, (labels.channels.shape[1], -1))
    # What a row does not have may be anything.
    keys = on_device(call.extent.key_count, call.device)[:, None]
    live = torch.arange(labels.codes.shape[-1], device=call.device) < keys
    return (queries @ labels.values()).flatten(1, 2).masked_fill(~live[:, None], float("-inf"))


def label_queries(call: AttentionCall, labels: LabelSet) -> Tensor:
    """The channels of the query that keys have labels of, scaled: fp32 ``[B, H, r]``."""
    channels = labels.channels.repeat_interleave(call.heads // labels.channels.shape[1], dim=1)
    return call.q[:, :, 0].gather(2, channels).float() * call.scale


def collisions(queries: Tensor, codes: Tensor) -> Tensor:
    """In how many hash tables each token has the code of a query (MagicPIG, 2410.16179, section 4.2).

    Args:
        queries: int16 ``[B, H, L]``, a code in each of L tables.
        codes: int16 ``[B, G, tiles, L, 64]``, of 64 tokens a tile; see `gossamer.summaries.HashSet`.

    Returns:
        int16 ``[B, H, tiles * 64]``.
    """
    groups, tiles = codes.shape[1], codes.shape[2]
    found = torch.empty(*queries.shape[:2], tiles * 64, dtype=torch.int16, device=queries.device)
    shared = queries.unflatten(1, (groups, -1))
    for member in range(shared.shape[2]):  # of as many comparisons at a time as there are codes
        same = codes == shared[:, :, member, None, :, None]
        found.unflatten(1, (groups, -1))[:, :, member] = same.sum(dim=3).flatten(2, 3).to(torch.int16)
    return found
