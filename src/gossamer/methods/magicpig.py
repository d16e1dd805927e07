"""MagicPIG: a decode step samples tokens by hashes, and weighs them by how likely they were to be sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.backends import backend_of
from gossamer.call import AttentionCall
from gossamer.methods.base import Settings, require_at_least
from gossamer.methods.reduced import Reduced, Reducing, gathered, listed, reduced_call
from gossamer.plan import on_device
from gossamer.summaries import Hashes, HashSet

__all__ = ["MagicPIG"]


@dataclass(frozen=True)
class MagicPIG(Reducing):
    """MagicPIG (2410.16179, section 4): attention as an expectation, from tokens that hashes sample.

    Keys less their mean, and the query, are hashed into ``hash_tables`` tables by ``bits`` random planes each. A token
    is sampled for a query head if the two collide in two tables or more, which for an angle ``a`` between them has the
    probability ``w = 1 - (1 - p)^L - L p (1 - p)^(L - 1)`` with ``p = (1 - a / pi)^K``; its logit counts less
    ``ln(w + 1e-4)``. The first ``sinks`` tokens, the last ``local`` ones and those that are not hashed yet are attended
    as they are. Layers in ``dense_layers`` read everything, and prompts are not part of the method.

    Fields:
        bits: K, planes of a table; 0: dense.
        hash_tables: L.
        local: recent tokens that are attended as they are.
        buffer: tokens that come after a prompt are hashed so many at a time (`gossamer.summaries.Hashes`).
        seed: of the planes: equal seeds sample equal tokens.

    Defaults: 10 bits, 150 tables, 4 and 64 tokens, layers 0, 16, 32, 48 and 64, as the authors have.

    Deviations: tokens of an answer are hashed once there are ``buffer`` of them, and not kept out for good; codes are
    compared with one another, without tables of buckets, which costs a step ``2 L`` bytes a token and key/value head;
    all layers and heads share the planes, as in the authors' server.
    """

    name: ClassVar[str] = "magicpig"
    needs: ClassVar[frozenset[str]] = frozenset({"store", "causal", "one query", "values"})
    settings: ClassVar[Settings] = tuple({"hash_tables": tables} for tables in (75, 150, 300))
    bits: int = 10
    hash_tables: int = 150
    sinks: int = 4
    local: int = 64
    buffer: int = 256
    dense_layers: tuple[int, ...] = (0, 16, 32, 48, 64)
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(self, 0, "bits", "sinks", "seed")
        require_at_least(self, 1, "local", "buffer")
        require_at_least(self, 2, "hash_tables")
        if self.bits > 15 or self.hash_tables > 32767:
            raise ValueError(
                f"{self.name} has at most 15 bits and 32767 tables, got {self.bits} and {self.hash_tables}"
            )
        layers = self.dense_layers
        if not isinstance(layers, (list, tuple)) or not all(type(n) is int and n >= 0 for n in layers):
            raise TypeError(f"{self.name}.dense_layers must be a list of layers, 0 or more, got {layers!r}")
        object.__setattr__(self, "dense_layers", tuple(layers))

    def beside(self, dim: int, itemsize: int) -> float:
        del dim, itemsize
        return 2.0 * self.hash_tables

    def least_density(self, call: AttentionCall) -> float:
        return 1.0 if self.bits == 0 or call.layer in self.dense_layers else 0.0

    def reduce(self, call: AttentionCall) -> Reduced | None:
        assert call.store is not None
        kind = self.hashes(call)
        if self.bits == 0:
            return None
        hashes = call.store.summary(kind)
        if not any(hashes.ends):
            return None
        codes = kind.codes(call.q[:, :, 0].float())
        counts = backend_of(call, "collisions").collisions(codes, hashes.codes)
        sampled = listed((counts >= 2) & _hashed(call, hashes, kind)[:, None])
        exact = listed(~_hashed(call, hashes, kind, call.extent.longest)[:, None] & _live(call)[:, None])
        index = torch.cat([sampled, exact.expand(-1, call.heads, -1)], dim=2)
        k, v = gathered(call, index)
        bias = torch.zeros(index.shape, device=call.device)
        bias[..., : sampled.shape[2]] = -(self.likelihood(call, hashes, sampled, k) + 1e-4).log()
        return reduced_call(call, k, v, bias.masked_fill(index < 0, float("-inf")))

    def hashes(self, call: AttentionCall) -> Hashes:
        """What the cache of a call's layer keeps of each key."""
        assert call.store is not None
        sinks, recent = max(self.sinks, call.store.sinks), max(self.local, call.store.recent)
        return Hashes(self.bits, self.hash_tables, sinks, recent, self.buffer, self.seed)

    def likelihood(self, call: AttentionCall, hashes: HashSet, sampled: Tensor, keys: Tensor) -> Tensor:
        """How likely each token was to be sampled, fp32 ``[B, H, n]``, from the keys of positions ``sampled``."""
        q = call.q[:, :, 0].float()
        mean = hashes.mean.repeat_interleave(call.share, dim=1)
        products = (keys[:, :, : sampled.shape[2]].float() @ q[..., None])[..., 0] - (q * mean).sum(-1, keepdim=True)
        shared = sampled.clamp(min=0).unflatten(1, (call.groups, call.share)).flatten(2)
        norms = hashes.norms.gather(2, shared).view(sampled.shape)
        cosine = products / (norms * q.norm(dim=-1, keepdim=True)).clamp(min=1e-30)
        return collision_probability(cosine.clamp(-1, 1).double().acos(), self.bits, self.hash_tables).float()


def collision_probability(angle: Tensor, bits: int, tables: int) -> Tensor:
    """That vectors at an angle have equal codes in two tables or more (2410.16179, equation 6)."""
    same = (1 - angle / math.pi) ** bits
    return 1 - (1 - same) ** tables - tables * same * (1 - same) ** (tables - 1)


def _hashed(call: AttentionCall, hashes: HashSet, kind: Hashes, count: int | None = None) -> Tensor:
    """Positions that may be sampled, bool ``[B, count]``."""
    ends = torch.tensor(hashes.ends, device=call.device)[:, None]
    position = torch.arange(hashes.norms.shape[2] if count is None else count, device=call.device)
    return (position >= kind.sinks) & (position < ends)


def _live(call: AttentionCall) -> Tensor:
    """bool ``[B, longest]``."""
    return (
        torch.arange(call.extent.longest, device=call.device) < on_device(call.extent.key_count, call.device)[:, None]
    )
