"""What decodes by a method in vLLM: which methods can, which layers do, and from how many tokens on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gossamer.call import AttentionCall
from gossamer.integrations.vllm.rows import Readers, Step
from gossamer.methods import Method, OracleTopK, Reducing
from gossamer.plan import Extent
from gossamer.policy import Policy
from gossamer.summaries import PageBounds

__all__ = ["Decoders", "Memory", "check_decode", "check_pages", "check_sizes"]

_OFFERED = frozenset({"store", "causal", "one query", "state", "layer"})
_READS_KEYS = (OracleTopK, Reducing)
_MOST_TOKENS = 1 << 24  # a sequence of so many is the longest of which anything is asked


def check_decode(method: Method | None) -> None:
    """That a method for decoding finds in vLLM's pages what it needs.

    Raises:
        ValueError: it does not, and what it is.
    """
    if method is None:
        return
    # Pages are read where they lie, by the kernels alone: not by methods that look at keys in torch.
    lacking = ["keys in one piece"] * isinstance(method, _READS_KEYS) + sorted(method.needs - _OFFERED)
    wanted = [kind if isinstance(kind, type) else type(kind) for kind in method.summaries()]
    lacking += [kind.__name__ for kind in wanted if kind is not PageBounds]
    if lacking:
        raise ValueError(
            f"{method.name} needs {lacking[0]}, which vLLM's pages do not keep: they keep bounds of their keys, for "
            "such methods as quest and lserve"
        )


def check_pages(method: Method | None, page: int) -> None:
    """That the pages of a cache hold whole pages of a method's.

    Raises:
        ValueError: its bounds do not divide pages of so many tokens.
    """
    for kind in () if method is None else method.summaries():
        if isinstance(kind, PageBounds) and page % kind.size:
            raise ValueError(
                f"{method.name if method else ''} has bounds of {kind.size} tokens, which do not divide this server's "
                f"pages of {page}: choose another size, or start the server with another --block-size"
            )


def check_sizes(policy: Policy, settings: Any) -> None:
    """That a request's choices need no bounds that the server has not: each size of pages takes memory of its own.

    Raises:
        ValueError: they do, and which the server has.
    """
    known = {16} | {size for one in (settings.policy, *settings.policies.values()) for size in _sizes(one)}
    if other := sorted(_sizes(policy) - known):
        raise ValueError(
            f"decode: bounds of {other[0]} tokens are not kept by this server, only of "
            f"{', '.join(map(str, sorted(known)))}; choose one of these, or name a policy with others when it starts"
        )


def _sizes(policy: Policy) -> set[int]:
    kinds = () if policy.decode is None else policy.decode.summaries()
    return {kind.size for kind in kinds if isinstance(kind, PageBounds)}


@dataclass(frozen=True, slots=True)
class _Layer:
    index: int | None
    heads: int
    groups: int
    page: int
    serves: bool


class Decoders:
    """Of a worker's policies, which queries choose what they read, in which layers.

    Args:
        least: no sequence of fewer tokens does.
    """

    def __init__(self, least: int = 0) -> None:
        self._least_tokens = least
        self._layers: list[_Layer] = []
        # By id, with the policy itself, which keeps its id from becoming another's.
        self._known: dict[int, tuple[Policy, int | None, frozenset[int]]] = {}

    def join(self, index: int | None, heads: int, groups: int, page: int, serves: bool) -> int:
        """A layer, which gets a number.

        Args:
            page: tokens of its cache's pages.
            serves: whether it could decode by a method at all.
        """
        self._layers.append(_Layer(index, heads, groups, page, serves))
        self._known.clear()
        return len(self._layers) - 1

    def shortest(self, policy: Policy) -> int | None:
        """Tokens of the shortest sequence of which a query reads less in every layer that decodes; None if none does.

        By the method's own word (`gossamer.methods.Method.least_density`) and `Policy.max_density`.
        """
        return self._of(policy)[1]

    def reads_whole(self, policy: Policy, layer: int) -> bool:
        """Whether a layer reads the whole cache under a policy."""
        return layer in self._of(policy)[2]

    def _of(self, policy: Policy) -> tuple[Policy, int | None, frozenset[int]]:
        known = self._known.get(id(policy))
        if known is None:
            if len(self._known) >= 2048:
                self._known.clear()
            least = [_least(policy, layer) for layer in self._layers]
            found = [tokens for tokens in least if tokens is not None]
            whole = frozenset(number for number, tokens in enumerate(least) if tokens is None)
            shortest = max(self._least_tokens, *found) if found else None
            known = self._known[id(policy)] = policy, shortest, whole
        return known


def _least(policy: Policy, layer: _Layer) -> int | None:
    method = policy.decode
    if method is None or not layer.serves:
        return None
    try:
        check_pages(method, layer.page)
    except ValueError:
        return None

    def too_dense(tokens: int) -> bool:
        return method.least_density(_like(layer, tokens)) > policy.max_density

    if too_dense(_MOST_TOKENS):
        return None
    below, enough = 0, _MOST_TOKENS
    while enough - below > 1:
        middle = (below + enough) // 2
        below, enough = (middle, enough) if too_dense(middle) else (below, middle)
    return enough


def _like(layer: _Layer, tokens: int) -> AttentionCall:
    """A call of one query on so many tokens, of which nothing is looked at but numbers."""
    one = torch.empty(1, 1, 1, 1, device="cpu")
    q, k = one.expand(1, layer.heads, 1, 1), one.expand(1, layer.groups, tokens, 1)
    extent = Extent([tokens - 1], [1], [0], [tokens])
    store: Any = object()  # there is one
    return AttentionCall(q, k, k, extent, layer=layer.index, store=store)


class Memory:
    """What methods remember of requests from step to step, for the layers of one group.

    A request forgets when it runs anything but a choice: a prompt of its own comes, or it was preempted.

    A method with an ``interval`` chooses in every so-many-th step of a request. Those that choose and those that
    remember are called apart, so that a request chooses in the same steps whoever is in its batch.
    """

    _MOST = 256

    def __init__(self) -> None:
        self._of: dict[str, tuple[int, dict[str, Any]]] = {}  # steps, and what is remembered
        self._ids: Sequence[str] = ()

    def join(self, step: Step, ids: Sequence[str] | None = None) -> None:
        """Give a step's readers their states, and part them.

        Args:
            ids: the requests of a new step's rows; None for one whose rows were parted anew, or where nobody knows.
        """
        if ids is not None:
            self._ids = ids
            self._count({index for some in step.readers for index in some.indices})
        parted: list[Readers] = []
        for some in step.readers:
            rows = set(some.indices)
            if max(rows) >= len(self._ids):
                parted.append(some)
                continue
            interval = getattr(some.policy.decode, "interval", 1)
            chooses = {index for index in rows if self._of[self._ids[index]][0] % interval == 0}
            for part in (chooses, rows - chooses):
                if part:
                    own = some if len(part) == len(rows) else some.part(part)
                    own.states = [self._of[self._ids[index]][1] for index in own.indices]
                    parted.append(own)
        step.readers = tuple(parted)

    def _count(self, reading: set[int]) -> None:
        for index, one in enumerate(self._ids):
            if index in reading:
                steps, state = self._of.pop(one, (-1, {}))  # the last used come last
                self._of[one] = steps + 1, state
            else:
                self._of.pop(one, None)
        while len(self._of) > max(self._MOST, len(self._ids)):
            del self._of[next(iter(self._of))]
