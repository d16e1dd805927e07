"""What one worker process of a server knows: its policies, its counters, and which layers it serves."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer import backends
from gossamer.attention import CallRecord, attend
from gossamer.call import AttentionCall
from gossamer.integrations.vllm.bounds import KeptBounds
from gossamer.integrations.vllm.counters import FOLDER, Counters
from gossamer.integrations.vllm.decoding import Decoders
from gossamer.integrations.vllm.rows import Decoding, Readers, Row, Step, choose
from gossamer.integrations.vllm.settings import Settings
from gossamer.methods import Dense, PerHead
from gossamer.plan import Extent, SparsePlan
from gossamer.policy import Policy

__all__ = ["Engine", "salt_of"]

# Under vLLM's own name its log shows it as it shows its own lines.
logger = logging.getLogger("vllm.gossamer")
SECONDS_BETWEEN_LINES = 10.0


class Engine:
    """The plug-in in one worker.

    Args:
        settings: for the heads of this rank.
        like: a query ``[1, H, 1, D]`` of the dtype and device that layers have, which decides ``min_tokens``.
        rank: of tensor parallelism; rank 0 writes the log.
        most_queries: of a row that decodes: one, and the drafts of speculative decoding.
    """

    def __init__(self, settings: Settings, like: Tensor, rank: int = 0, most_queries: int = 1) -> None:
        self.settings = settings
        self.default = settings.policy.resolved(like)
        self.counters = Counters(rank)
        self.decoders = Decoders(settings.min_context)
        self.decodes = self.default.decode is not None  # whether any policy seen so far names a method for it
        self._most_queries = most_queries
        self._bounds: dict[tuple[int, torch.Size], dict[int, KeptBounds]] = {}
        self._bytes_told = 0
        self._like = like
        self._rank = rank
        self._next_line = 0.0
        self._of_request: dict[str, Policy] = {}
        self._failed: set[str] = set()
        if FOLDER in os.environ:
            self.counters.write_in(Path(os.environ[FOLDER]))

    def why_not(self, layer: int | None, heads: int) -> str | None:
        """Why a layer of this index and number of query heads is not served, or None."""
        for policy in (self.settings.policy, *self.settings.policies.values()):
            methods = [policy.method] if policy.decode is None else [policy.method, policy.decode]
            for part in (part for method in methods for part in method.parts()):
                names = (*part.tables, "layers") if isinstance(part, PerHead) else part.tables
                tables = [getattr(part, name) for name in names]
                if any(rows and (layer is None or layer >= len(rows)) for rows in tables):
                    return "layer is not in the profile"
                if isinstance(part, PerHead) and part.layers and len(part.layers[0]) != heads:
                    return "layer has other heads than the profile"
        return None

    def policy_of(self, given: Any) -> Policy:
        """The policy of a request that names one in ``extra_args["gossamer"]``; of others, the server's."""
        if given is None:
            return self.default
        key = given if isinstance(given, str) else repr(given)
        if key not in self._of_request:
            if len(self._of_request) >= 1024:
                self._of_request.clear()
            try:
                policy = self.settings.of_request(given)[1].resolved(self._like)
            except (ValueError, TypeError) as error:  # refused where it came in; here for engines without that door
                logger.warning("gossamer: a request's policy cannot be used, it runs dense: %s", error)
                policy = Policy(Dense("gossamer"), 0)
            self._of_request[key] = policy
            self.decodes |= policy.decode is not None
        return self._of_request[key]

    def step(
        self,
        starts: Tensor,
        lengths: Tensor,
        longest: int,
        policies: Sequence[Policy] | None,
        prompts: Sequence[bool] = (),
    ) -> Step:
        """Part the rows of a step; see `rows.choose`.

        Args:
            prompts: of each row whether its queries are a prompt's tokens; where it is not known, none are.
        """
        self._tell()
        rows, given = starts.numel() - 1, policies or [self.default]
        least = ((id(one), self.decoders.shortest(one)) for one in given if one.decode is not None)
        shortest = {number: tokens for number, tokens in least if tokens is not None} if self.decodes else {}
        if longest < self.settings.min_queries and not shortest:
            return Step((), (), Counter({"decode" if longest <= 1 else "few queries": rows}))
        decoding = Decoding(shortest, self._most_queries, prompts)
        ours = starts.tolist(), lengths.tolist(), policies or [self.default] * rows, self.settings.min_queries
        step = choose(*ours, decoding)
        if step.readers:
            step.without = lambda whole: choose(*ours, replace(decoding, whole=frozenset(whole)))
        return step

    def refused(self, rows: int, reason: str) -> Step:
        """A step of which no row runs a plan."""
        self._tell()
        return Step((), (), Counter({reason: rows}))

    def attend(self, call: AttentionCall, policy: Policy) -> Tensor:
        """``[1, H, S, D]``. A method that fails is no reason to fail a server: its row runs dense, and is counted."""
        name, pairs = policy.profile or policy.method.name, float(call.extent.count_allowed().sum())
        try:
            out = attend(call, policy, record=lambda record: self.counters.add(record, name, pairs))
        except Exception as error:
            self._say_failed(name, error)

            def count(record: CallRecord) -> None:
                self.counters.add(replace(record, reason="method failed"), name, pairs)

            out = attend(call, Policy(Dense("gossamer")), record=count)
        assert isinstance(out, Tensor)
        return out

    def bounds_of(self, cache: Tensor) -> dict[int, KeptBounds]:
        """What is kept of the keys in a cache, by size; layers that share it share this."""
        return self._bounds.setdefault((cache.data_ptr(), cache.shape), {})

    def written(self, cache: Tensor, slots: Tensor) -> None:
        """Tokens were written to a cache, at ``slots`` as vLLM has them."""
        if self._bounds:
            for kept in self._bounds.get((cache.data_ptr(), cache.shape), {}).values():
                kept.forget(slots)

    def decode(self, call: AttentionCall, some: Readers) -> Tensor:
        """``[B, H, 1, D]``, of queries that read what their policy's `decode` chooses. A failure is as in `attend`."""
        method = some.policy.decode
        assert method is not None
        started, reason = time.perf_counter(), None
        try:
            plan = method.plan(call)
            planned = time.perf_counter()
            out, _ = backends.attend(call, plan)
        except Exception as error:
            self._say_failed(method.name, error)
            plan, reason = SparsePlan.dense(call.groups, 1, call.key_len, call.extent), "method failed"
            planned = time.perf_counter()
            out, _ = backends.attend(call, plan)
        pairs = sum(some.counts)
        density = float(plan.count_pairs().sum()) / (pairs * plan.heads)
        path, ended = "sparse" if reason is None else "dense", time.perf_counter()
        record = CallRecord(call.layer, path, reason, density, planned - started, ended - planned, "", 1, call.key_len)
        self.counters.add(record, method.name, float(pairs), some.rows)
        return out

    def _say_failed(self, name: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            logger.warning("gossamer: %s fails, its rows run dense (said once): %s", name, error)

    def _tell(self) -> None:
        """A line in the log, now and then."""
        now = time.monotonic()
        if self._rank == 0 and now >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            line = self.counters.news()
            if line is not None:
                logger.info("gossamer: %s", line)
            taken = sum(one.nbytes for layer in self._bounds.values() for one in layer.values())
            if taken != self._bytes_told:
                self._bytes_told = taken
                logger.info("gossamer: bounds of all pages take up to %.0f MiB beside the cache", taken / 2**20)


def call_of(
    row: Row,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    layer: int | None,
) -> AttentionCall:
    """One row as a call.

    Args:
        query: ``[S, H, D]``.
        key, value: ``[1, G, T, D]``, the sequence's last T tokens; those before them lie outside every window.
        window: the layer's sliding window, None without one.
    """
    keys = key.shape[2]
    extent = Extent([keys - row.queries], [row.queries], [0], [keys], limit=window)
    q = query.transpose(0, 1)[None]
    return AttentionCall(q, key, value, extent, scale, sinks, softcap, layer)


def salt_of(settings: Settings, given: Any, salt: str | None, shared: bool = False) -> str | None:
    """What a request's cache salt becomes: pages written under one policy are never read under another.

    Args:
        given: the policy that a request names, None for the server's.
        salt: its own ``cache_salt``, which cannot pass for one of ours.
        shared: whether pages outlive the server or go to others, as by a KV connector: then the server's own policy is
            in the salt too, unless it is dense, whose pages are as vLLM's.

    Raises:
        ValueError, TypeError: a policy that is none.
    """
    text, policy = (settings.text, settings.policy) if given is None else settings.of_request(given)
    plain = isinstance(policy.method, Dense) and policy.decode is None
    if policy != settings.policy or (shared and not plain):
        return f"gossamer:{hashlib.sha256(text.encode()).hexdigest()}:{salt or ''}"
    return f"gossamer:plain:{salt}" if salt is not None and salt.startswith("gossamer:") else salt
