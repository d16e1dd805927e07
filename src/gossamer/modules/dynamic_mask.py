"""Dynamic Mask Attention (2508.02124): values decide which keys are read, and are read louder or softer.

The paper and its code base describe two selections, and two code bases two forms of the bias. All are here:

- ``per="query"`` (transformers' Doge): each query keeps the ``keep`` best keys among those that it may see. A key that
  was displaced never comes back, and nothing depends on the future.
- ``per="sequence"`` (the paper's kernel, flash-dmattn): all queries of a key/value head share the ``keep`` best keys of
  the whole sequence, of which each sees those before it. In training that selects with tokens of the future, early
  queries may see no key, and have an output of 0, and a decoder that has fewer keys selects otherwise.
- ``form="exp"``: the bias is ``exp(A * softplus(v W))`` (paper, Doge); ``form="linear"``: ``A * softplus(v W)``
  (flash-dmattn, for numerical stability). The two are not the same function.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.backends import attend
from gossamer.call import AttentionCall
from gossamer.plan import Extent, Grid, SparsePlan
from gossamer.plan.plan import WHOLE

__all__ = ["DynamicMask", "DynamicMaskAttention", "plan_of_scores"]

Form = Literal["exp", "linear"]
Per = Literal["query", "sequence"]
# Numbers that a step of the selection holds at once.
_AT_ONCE = 1 << 24


class DynamicMask(nn.Module):
    """The bias of each key from the values of all key/value heads at its token.

    Parameters have the names of transformers' Doge: ``A`` ``[G]``, 0 at first, and ``dt_proj``, linear from G * Dv to
    G.
    """

    def __init__(
        self,
        kv_heads: int,
        value_dim: int,
        *,
        form: Form = "exp",
        proj_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if form not in ("exp", "linear"):
            raise ValueError(f"form must be 'exp' or 'linear', got {form!r}")
        self.form: Form = form
        self.A = nn.Parameter(torch.zeros(kv_heads, device=device, dtype=dtype))
        self.dt_proj = nn.Linear(kv_heads * value_dim, kv_heads, bias=proj_bias, device=device, dtype=dtype)

    def forward(self, values: Tensor) -> Tensor:
        """``[B, G, T, Dv]`` to ``[B, G, T]``."""
        return _bias(values, self.A, self.dt_proj, self.form)


def _bias(values: Tensor, factor: Tensor, proj: nn.Linear, form: Form) -> Tensor:
    bias = factor * F.softplus(proj(values.transpose(1, 2).flatten(2)))
    return (bias.exp() if form == "exp" else bias).transpose(1, 2)


@torch.no_grad()
def plan_of_scores(
    scores: Tensor, extent: Extent, query_len: int, *, keep: int, per: Per = "query", shared: int = 64
) -> SparsePlan:
    """The keys with the largest scores, as columns of each key/value head.

    Of equal scores the later key counts as the larger: with equal scores everywhere, as at initialisation, this is a
    window. (Which of equal ones Doge keeps is not defined; in its first layer a token that recurs has equal scores.)

    Args:
        scores: ``[B, G, T]``; what dead slots have is not looked at.
        extent: causal.
        keep: keys that a query computes at most.
        per: see the module.
        shared: of ``per="query"``: so many queries, a block by position, share the keys that the first of them keeps,
            and see all keys of their block up to themselves besides. 1 is Doge's selection exactly; its lists hold
            S * keep numbers a head.

    Raises:
        ValueError: ``keep`` or ``shared`` is below 1, ``per`` is not known, the extent is not causal, or the scores
            are not as many as the extent's rows and keys.
    """
    if keep < 1 or shared < 1:
        raise ValueError(f"keep and shared must be 1 or more, got {keep} and {shared}")
    if per not in ("query", "sequence"):
        raise ValueError(f"per must be 'query' or 'sequence', got {per!r}")
    if not extent.causal:
        raise ValueError("Dynamic Mask Attention is causal; give a causal extent")
    if scores.ndim != 3 or scores.shape[0] != extent.batch:
        raise ValueError(f"scores must be [{extent.batch}, heads, keys], got shape {tuple(scores.shape)}")
    groups, tokens = scores.shape[1:]
    extent.check(query_len, tokens)
    given = {"heads": groups, "query_len": query_len, "key_len": tokens, "extent": extent}
    if extent.longest <= keep:
        return SparsePlan(**given, window=WHOLE)
    grid = Grid(extent, shared, 64)
    rows = [_kept_rows(scores[b], extent, grid, b, keep, per) for b in range(extent.batch)]
    lists = [columns for row in rows for columns in row]
    lengths = torch.tensor([0, *(len(columns) for columns in lists)], device="cpu")
    return SparsePlan(
        **given,
        block_q=shared,
        column_group=max(1, grid.query_blocks) if per == "sequence" else 1,
        column_indptr=lengths.cumsum(0),
        column_indices=torch.cat(lists).to(torch.int32),
    )


def _kept_rows(scores: Tensor, extent: Extent, grid: Grid, b: int, keep: int, per: Per) -> list[Tensor]:
    """Ascending key positions for each head and query block of a batch row."""
    first, count = int(extent.key_start[b]), int(extent.key_count[b])
    live = scores[:, first : first + count].float().cpu()
    # Positions from the largest score on; of equal ones the later first.
    order = count - 1 - live.flip(-1).argsort(dim=-1, descending=True, stable=True)
    if per == "sequence":
        return [head[:keep].sort().values for head in order]
    # Blocks begin where they do for all chunks of a prompt, whether or not their first query is among these.
    starts = (grid.first_block[b] + torch.arange(grid.query_blocks, device="cpu")) * grid.block_q
    bounds = torch.stack([starts, grid.queries[b, :, 1]], dim=-1)
    return [columns for head in order for columns in _kept_by_block(head, bounds, keep)]


def _kept_by_block(order: Tensor, bounds: Tensor, keep: int) -> list[Tensor]:
    """Of each block ``[begin, end)`` of queries: the first ``keep`` of the order that its first query sees, and the
    keys after that."""
    kept: list[Tensor] = []
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device="cpu"))
    for part in bounds.split(max(1, _AT_ONCE // max(1, len(order)))):
        seen = order <= part[:, :1]
        chosen = (seen & (seen.cumsum(-1) <= keep))[:, places]
        for (start, end), row in zip(part.tolist(), chosen, strict=True):
            row[start + 1 : end] = True
            kept.append(row.nonzero()[:, 0] if end > start else order[:0])
    return kept


class DynamicMaskAttention(nn.Module):
    """An attention layer with a dynamic mask, with the parameters of transformers' Doge and the same arguments.

    Queries and keys are normalised by head (RMS), turned by the rotary embedding that the model passes, and attended
    with the bias of `DynamicMask` over the keys of `plan_of_scores`. Everything but the selection is differentiable:
    the bias has a gradient to ``A``, ``dt_proj`` and the values.

    Args:
        config: of a transformers model: ``hidden_size``, ``num_attention_heads``, ``num_key_value_heads``,
            and, where it has them, ``head_dim``, ``attention_bias``, ``rms_norm_eps``, ``keep_window_size`` (2048).
        layer_idx: index of the layer, for its cache.
        form, per, shared: see the module and `plan_of_scores`. ``shared=1`` is Doge's selection exactly.

    A layer of Doge is replaced with its weights by ``new.load_state_dict(old.state_dict())``.
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int | None = None,
        *,
        form: Form = "exp",
        per: Per = "query",
        shared: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads}, {kv_heads}")
        if getattr(config, "attention_dropout", 0.0):
            raise ValueError("attention_dropout has no sparse form; set it to 0.0 in the config")
        self.layer_idx = layer_idx
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.keep: int = getattr(config, "keep_window_size", 2048)
        self.per: Per = per
        self.shared = shared
        bias, eps = getattr(config, "attention_bias", False), getattr(config, "rms_norm_eps", 1e-6)
        width, factory = config.hidden_size, {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias, **factory)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=bias, **factory)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=eps, **factory)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=eps, **factory)
        mask = DynamicMask(kv_heads, self.head_dim, form=form, proj_bias=bias, **factory)
        self.form: Form = mask.form
        self.A, self.dt_proj = mask.A, mask.dt_proj  # under Doge's names

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_kwargs: Any,
    ) -> tuple[Tensor, None]:
        """``[B, S, hidden]`` to the same; cosine and sine are ``[B or 1, S, head_dim]``.

        Args:
            attention_mask: None; of live keys ``[B, T]``; or ``[B, 1, S, T]``, bool or added to logits, whose padding
                alone counts: attention is causal.

        Raises:
            ValueError: the mask has holes, or a shape of its own.
        """
        by_head = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(by_head)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(by_head)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        q, k = ((x * cos + _rotated(x) * sin).to(v.dtype) for x in (q, k))  # under autocast they are wider
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        bias = _bias(v, self.A, self.dt_proj, self.form)
        extent = _extent(attention_mask, hidden_states.shape[0], q.shape[2], k.shape[2])
        plan = plan_of_scores(bias, extent, q.shape[2], keep=self.keep, per=self.per, shared=self.shared)
        out, _ = attend(AttentionCall(q, k, v, extent, bias=bias), plan)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def _rotated(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([-high, low], dim=-1)


def _extent(mask: Tensor | None, batch: int, queries: int, keys: int) -> Extent:
    if mask is None:
        return Extent.full(batch, queries, keys)
    if mask.ndim == 4 and mask.shape[2:] == (queries, keys):
        mask = (mask if mask.dtype == torch.bool else mask >= 0).any(dim=1).any(dim=1)
    if mask.shape != (batch, keys):
        raise ValueError(
            f"attention_mask must be [{batch}, {keys}] or [{batch}, 1, {queries}, {keys}], got {tuple(mask.shape)}"
        )
    return Extent.from_key_mask(mask.bool(), queries)
