"""The bound of decoding: the tokens of the cache that matter most, by all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_flag
from gossamer.methods.pages import plan_of_tokens, share_read
from gossamer.plan import SparsePlan, on_device

__all__ = ["OracleTopK"]


@dataclass(frozen=True)
class OracleTopK(Method):
    """The ``budget`` tokens with the largest attention weights, from all logits: what any choice can be held against.

    It reads every key to find them and saves no time. What a step then attends is exactly as much as `Quest` of the
    same budget does, so a difference in accuracy is one of the choice alone. The query heads of a key/value head share
    the tokens with the largest sum of their weights, or choose by themselves.

    Fields:
        budget: tokens that a step attends of each key/value head, the newest, and the store's sinks and recent ones,
            among them.
        dense_layers: the first layers attend everything; as `Quest` has it.
        per_query_head: choose for each query head.
    """

    name: ClassVar[str] = "oracle_topk"
    needs: ClassVar[frozenset[str]] = frozenset({"store", "causal", "one query"})
    decodes: ClassVar[bool] = True
    settings: ClassVar[Settings] = tuple({"budget": budget} for budget in (256, 512, 1024, 2048, 4096))
    budget: int = 2048
    dense_layers: int = 2
    per_query_head: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, 0, "dense_layers")
        require_at_least(self, 1, "budget")
        require_flag(self, "per_query_head")

    def beside(self, dim: int, itemsize: int) -> float:
        return float(itemsize * dim)

    def least_density(self, call: AttentionCall) -> float:
        dense = call.layer is not None and call.layer < self.dense_layers
        return 1.0 if dense else share_read(call, self.budget, 1)

    def plan(self, call: AttentionCall) -> SparsePlan:
        q = call.q[:, :, 0].unflatten(1, (call.groups, call.share))
        wide = torch.promote_types(q.dtype, torch.float32)  # of products rounded to 16 bits the largest are others
        logits = (q.to(wide) @ call.k.to(wide).transpose(-1, -2)).flatten(1, 2) * call.scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        # By position, as plans count: without the padding before a row's first token.
        position = torch.arange(call.extent.longest, device=call.device)
        start = on_device(call.extent.key_start, call.device)[:, None]
        slot = (start + position).clamp(max=call.key_len - 1)
        logits = logits.gather(2, slot[:, None].expand(-1, call.heads, -1))
        live = position < on_device(call.extent.key_count, call.device)[:, None]
        logits = logits.masked_fill(~live[:, None], float("-inf"))
        heads = call.heads if self.per_query_head else call.groups
        return plan_of_tokens(call, logits, 1, self.budget, heads)
