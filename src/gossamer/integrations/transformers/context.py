"""A prompt that several processes share: each holds a part of its tokens, keys and values (context parallelism)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache

from gossamer import backends
from gossamer.call import AttentionCall
from gossamer.distributed import Layout, RingPlan, plan_vertical_slash, ring_attention
from gossamer.methods import AShape, Dense, Method, VerticalSlash
from gossamer.plan import Extent, SparsePlan
from gossamer.policy import Policy

__all__ = ["Context"]

UNIT = 128
_METHODS = (Dense, AShape, VerticalSlash)


class Context:
    """The ranks of a group as one reader of prompts; `gossamer.enable` makes it with ``context_parallel``.

    All ranks call the same methods with the same arguments. Each runs the whole model on its part of the tokens; a
    layer's keys and values pass by in a ring (`gossamer.distributed.ring_attention`). A new token is run by all ranks
    alike: each attends to the keys that it has, and what they find is merged. Of new keys rank 0 has the count.

    Args:
        model: the causal language model, as it is called.
        policy: its method is ``dense``, ``a_shape`` or ``vertical_slash`` (with ``exact=False``).
        group: a ``torch.distributed`` group, or True for all processes.
        kind: of the `Layout`: ``contiguous``, ``zigzag`` or ``striped``.

    Raises:
        ValueError: another method or layout, a model with windows of its own, or no process group.
    """

    def __init__(self, model: Callable[[], Any], policy: Policy, group: Any, kind: str = "striped") -> None:
        method = policy.method
        if not isinstance(method, _METHODS) or (isinstance(method, VerticalSlash) and method.exact):
            raise ValueError(
                f"{method.name} looks at the whole prompt at once, which no rank of a context-parallel group has; use "
                "dense, a_shape or vertical_slash with exact=False"
            )
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("context_parallel needs processes; call torch.distributed.init_process_group first")
        _refuse_windows(model().config)
        self.group = None if group is True else group
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._model, self._policy, self._kind = model, policy, Layout(kind, 0, self.ranks).kind
        self._layout: Layout | None = None
        self._plan: RingPlan | None = None
        self._cache: DynamicCache | None = None
        self._decoded = 0

    @property
    def method(self) -> Method:
        return self._policy.method

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Read a prompt, ``[B, N]`` without padding, the same on all ranks; what was read before is forgotten.

        Returns:
            Logits of the token after it, ``[B, vocabulary]``, on all ranks.

        Raises:
            ValueError: a prompt so short that a rank would own none of it.
            RuntimeError: a rank has ended, or did not answer within the group's time-out.
        """
        length = input_ids.shape[1]
        layout = Layout(self._kind, length, self.ranks, UNIT)
        if min(layout.tokens(rank) for rank in range(self.ranks)) == 0:
            raise ValueError(
                f"{length} tokens are too few for {self.ranks} ranks in units of {UNIT}: a rank would own none; "
                "read such prompts with one process"
            )
        self._layout, self._plan, self._cache, self._decoded = layout, None, DynamicCache(), 0
        positions = layout.positions(self.rank).to(input_ids.device)
        logits = self._run(layout.split(input_ids, self.rank, dim=1), positions)
        owner = int(layout.unit_owners()[-1])
        dist.broadcast(logits, owner if self.group is None else dist.get_global_rank(self.group, owner), self.group)
        return logits

    def decode(self, token: Tensor) -> Tensor:
        """Read one token more, ``[B, 1]``, the same on all ranks.

        Returns:
            Logits of the token after it, ``[B, vocabulary]``, on all ranks.

        Raises:
            ValueError: there is no prompt, or it is not one token.
            RuntimeError: a rank has ended, or did not answer within the group's time-out.
        """
        if self._layout is None:
            raise ValueError("there is no prompt to go on from; call prefill first")
        if token.ndim != 2 or token.shape[1] != 1:
            raise ValueError(f"decode takes one token of each row, [batch, 1], got {tuple(token.shape)}")
        position = torch.tensor([self._layout.length + self._decoded], device=token.device)
        self._decoded += 1
        return self._run(token, position)

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """The likeliest tokens after a prompt, one after the other: int64 ``[B, N + max_new_tokens]``.

        Nothing ends it before: cut the answer at the model's end token.
        """
        ids, logits = input_ids, self.prefill(input_ids) if max_new_tokens else None
        for n in range(max_new_tokens):
            if n:
                logits = self.decode(ids[:, -1:])
            assert logits is not None
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        return ids

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        positions = positions[None].expand(ids.shape[0], -1)
        given = {"input_ids": ids, "position_ids": positions, "past_key_values": self._cache, "use_cache": True}
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return self._model()(**given, logits_to_keep=1).logits[:, -1].contiguous()

    def attend(self, call: AttentionCall) -> Tensor:
        """Of a layer: out ``[B, H, S, Dv]`` for this rank's queries. Its extent is not looked at.

        Raises:
            ValueError: a pass through the model that `prefill` and `decode` did not ask for.
        """
        layout = self._layout
        own = None if layout is None else layout.tokens(self.rank)
        if layout is None or own is None or call.key_len != own + self._decoded:
            raise ValueError(
                "a context-parallel model reads prompts by handle.context.prefill, decode and generate alone; its own "
                "forward and generate know nothing of the other ranks. Call disable() on the handle to run it by itself"
            )
        if self._decoded:
            return self._attend_one(call, own if self.rank else call.key_len)
        out, _ = ring_attention(
            call.q,
            call.k,
            call.values,
            self._planned(call, layout),
            group=self.group,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        return out

    def _planned(self, call: AttentionCall, layout: Layout) -> RingPlan:
        method, length = self.method, layout.length
        dense = isinstance(method, Dense) or length < (self._policy.resolved(call).min_tokens or 0)
        if not dense and isinstance(method, VerticalSlash):
            fields = {"budget": method, "group": self.group, "scale": call.scale}
            return RingPlan(plan_vertical_slash(call.q, call.k, layout, **fields), layout, self.rank)
        if self._plan is None:  # the same for all layers
            if dense or not isinstance(method, AShape):
                self._plan = RingPlan.dense(layout, self.rank, call.groups, batch=call.batch)
            else:
                extent = Extent.full(call.batch, length, length)
                plan = SparsePlan(call.groups, length, length, extent, sink=method.sink, window=method.window)
                self._plan = RingPlan(plan, layout, self.rank)
        return self._plan

    def _attend_one(self, call: AttentionCall, keys: int) -> Tensor:
        """Of one query, to the first ``keys`` of this rank and those of all others."""
        k, v = call.k[:, :, :keys], call.values[:, :, :keys]
        extent = Extent.full(call.batch, 1, keys, causal=False)
        own = AttentionCall(call.q, k, v, extent, call.scale, softcap=call.softcap)
        out, lse = backends.attend(own, SparsePlan.dense(call.groups, 1, keys, extent))
        largest = lse.clone()
        if call.sinks is not None:
            largest = torch.maximum(largest, call.sinks.to(lse).view(1, -1, 1))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        share = torch.exp(lse - largest)[..., None]
        sums = torch.cat([out.to(lse) * share, share], dim=-1)
        dist.all_reduce(sums, group=self.group)
        total = sums[..., -1:]
        if call.sinks is not None:
            total = total + torch.exp(call.sinks.to(lse).view(1, -1, 1) - largest)[..., None]
        return (sums[..., :-1] / total).to(out.dtype)


def _refuse_windows(config: Any) -> None:
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    windowed = kinds - {"full_attention"} or (not kinds and getattr(text, "sliding_window", None))
    if windowed:
        raise ValueError(
            f"context_parallel takes models whose layers all attend to the whole prompt, got {type(config).__name__} "
            f"with {', '.join(sorted(map(str, kinds))) or 'a sliding window'}; run it by one process"
        )
