"""What may mix the tokens of a model of associative recall: one table, `MIXERS`, of which each line is one kind.

A mixer is written ``name`` or ``name(budget)``, and ``a+b`` where layers differ in turn: ``window(16)+dense``. One
number, the budget, says how much a kind with a choice may read, so that kinds stand beside each other at equal cost:
keys of a window, keys of a top-k, tokens of Combiner's span, keys of a cluster, taps of a convolution.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gossamer.evaluate.mqar.layers import GatedConvolution, MaskedAttention, MaskedByValues
from gossamer.modules import (
    Axial,
    CombinerAttention,
    Fixed,
    Learnable,
    LogSparse,
    Mixture,
    RoutingAttention,
    SeqBoatLayer,
)

__all__ = ["MIXERS", "Kind", "Mixer", "parse_mixer"]

_SPEC = re.compile(r"([a-z_0-9]+)(?:\((\d+)\))?")


@dataclass(frozen=True)
class Sizes:
    """What a layer is built for: E, T and the budget (T where none was given)."""

    width: int
    tokens: int
    budget: int
    dropout: float = 0.0  # of attention weights, where a layer has it


@dataclass(frozen=True)
class Kind:
    """One way of mixing tokens.

    Fields:
        build: a causal layer, ``[B, T, E]`` to the same.
        reads: from a query's position i and the sizes, how many logits it computes for its output.
        holds: from the sizes, vectors of E numbers that a step of decoding needs of the tokens before it.
        positions: whether the model adds learned positions.
        budget: what the budget is; empty where there is none.
        whole: whether it is a block with a norm and a residual of its own, and with its own start.
        leaks: how its outputs depend on later tokens; empty: they don't.
        dearer: what ``reads`` leaves out.
    """

    build: Callable[[Sizes], nn.Module]
    reads: Callable[[int, Sizes], float]
    holds: Callable[[Sizes], int]
    budget: str = ""
    positions: bool = True
    whole: bool = False
    leaks: str = ""
    dearer: str = ""


def _masked(select: str, heads: int = 1) -> Callable[[Sizes], nn.Module]:
    return lambda s: MaskedAttention(s.width, select, s.budget, heads=heads, dropout=s.dropout)


def _routing(assign: str) -> Callable[[Sizes], nn.Module]:
    """Of two heads one is local, as half of the paper's are; as many clusters as the budget has room in the length."""
    return lambda s: RoutingAttention(
        s.width,
        2,
        _clusters(s),
        window=s.budget,
        assign="prefix" if assign == "prefix" else "balanced",
        bias=True,
    )


def _clusters(s: Sizes) -> int:
    return max(1, s.tokens // s.budget)


def _few(i: int, s: Sizes) -> int:
    return min(i + 1, s.budget)


def _spans(i: int, s: Sizes) -> int:
    """The span so far, and one key of each before it."""
    return i % s.budget + 1 + i // s.budget


def _two_a_span(s: Sizes) -> int:
    """Keys and values of a span, and a key and a value of each."""
    return 2 * (min(s.budget, s.tokens) + s.tokens // s.budget)


def _three_in_a_span(s: Sizes) -> int:
    """Queries, keys and values of the open span, and a key and a value of each."""
    return _two_a_span(s) + min(s.budget, s.tokens)


def _axial(i: int, s: Sizes) -> int:
    """The row so far, the column above, and the other columns above as spans."""
    row, column = divmod(i, s.budget)
    return column + 1 + row + (s.budget - 1 if row else 0)


def _seqboat(router: bool) -> Kind:
    return Kind(
        lambda s: SeqBoatLayer(s.width, key_dim=s.width, window=s.budget, router=router),
        lambda i, s: min(i, s.budget) + 1,
        lambda s: 16 + 3 * min(s.budget, s.tokens),  # averages, keys, and values of twice the width
        "activated tokens that one looks back" if router else "tokens that one looks back",
        positions=False,
        whole=True,
        dearer="averages over all tokens" + ("; a token that is not activated computes no logit" if router else ""),
    )


_SPAN = "tokens of a span"
MIXERS: dict[str, Kind] = {
    "dense": Kind(_masked("all"), lambda i, s: i + 1, lambda s: 2 * s.tokens),
    "window": Kind(_masked("window"), _few, lambda s: 2 * min(s.budget, s.tokens), "keys, the query's own with them"),
    # Of as many heads as "routing" has, half of which it gives to this.
    "window_heads": Kind(
        _masked("window", 2), _few, lambda s: 2 * min(s.budget, s.tokens), "keys of each of two heads"
    ),
    "fixed": Kind(_masked("fixed"), _spans, _two_a_span, _SPAN),
    "oracle_topk": Kind(
        _masked("largest"), _few, lambda s: 2 * s.tokens, "keys", dearer="the choice: every logit is computed for it"
    ),
    "random_topk": Kind(_masked("random"), _few, lambda s: 2 * s.tokens, "keys"),
    "combiner": Kind(
        lambda s: CombinerAttention(s.width, 1, Fixed(s.budget), bias=True),
        _spans,
        _three_in_a_span,
        _SPAN,
        dearer="the summary of each span",
    ),
    "combiner_axial": Kind(
        lambda s: CombinerAttention(s.width, 1, Axial(s.budget), bias=True),
        _axial,
        lambda s: 2 * s.tokens,
        "tokens of a row",
        dearer="the summary of each column, in each row anew",
    ),
    "combiner_logsparse": Kind(
        lambda s: CombinerAttention(s.width, 1, LogSparse(), bias=True),
        lambda i, s: 1 + i.bit_count(),
        lambda s: 2 * s.tokens,
        dearer="the summary of each node",
    ),
    "combiner_mixture": Kind(
        lambda s: CombinerAttention(s.width, 1, Mixture((Fixed(s.budget), Axial(s.budget))), bias=True),
        lambda i, s: _spans(i, s) + _axial(i, s),
        lambda s: 2 * s.tokens + 2 * (s.tokens // s.budget) + min(s.budget, s.tokens),  # the open span's queries
        "tokens of a span, and of a row",
        dearer="the summaries of spans and columns",
    ),
    "combiner_learnable": Kind(
        lambda s: CombinerAttention(s.width, 1, Learnable(_clusters(s)), bias=True),
        lambda i, s: 1 + i / _clusters(s) + min(i, _clusters(s) - 1),
        lambda s: 2 * s.tokens,
        "tokens of a cluster, were all as large",
        dearer="the scores of centroids, and summaries for each query anew; masked and dense",
    ),
    "routing": Kind(
        _routing("prefix"),
        lambda i, s: _few(i, s) + 0.5,
        lambda s: 2 * s.tokens,
        "keys of a cluster, and of the local head's window",
        dearer="the scores of centroids; whole sequences are masked and dense",
    ),
    "routing_balanced": Kind(
        _routing("balanced"),
        lambda i, s: _few(i, s) + 0.5,
        lambda s: 2 * s.tokens,
        "tokens of a cluster, and keys of the local head's window",
        leaks="which tokens share a cluster is decided over the whole sequence",
        dearer="the scores of centroids",
    ),
    "dynamic_mask": Kind(
        lambda s: MaskedByValues(s.width, s.budget),
        _few,
        lambda s: 2 * min(s.budget, s.tokens),
        "keys that are kept",
        dearer="whole sequences are masked and dense",
    ),
    "seqboat": _seqboat(router=True),
    # Its base pattern: every token is active.
    "seqboat_local": _seqboat(router=False),
    "convolution": Kind(
        lambda s: GatedConvolution(s.width, min(s.budget, s.tokens)),
        _few,
        lambda s: min(s.budget, s.tokens),
        "taps",
        positions=False,
    ),
}


@dataclass(frozen=True)
class Mixer:
    """A kind for each layer in turn, with its budget: ``parse_mixer("window(16)+dense")``.

    Fields:
        layers: (name, budget or None) of each, in turn.
    """

    layers: tuple[tuple[str, int | None], ...]

    @property
    def label(self) -> str:
        return "+".join(name if budget is None else f"{name}({budget})" for name, budget in self.layers)

    @property
    def positions(self) -> bool:
        """Whether the model has learned positions: where no layer knows places by itself."""
        return all(MIXERS[name].positions for name, _ in self.layers)

    @property
    def leaks(self) -> str:
        """How it depends on later tokens; empty where it does not."""
        return "; ".join(dict.fromkeys(kind.leaks for name, _ in self.layers if (kind := MIXERS[name]).leaks))

    def sizes(self, index: int, width: int, tokens: int, dropout: float = 0.0) -> tuple[Kind, Sizes]:
        """Kind and sizes of layer ``index``."""
        name, budget = self.layers[index % len(self.layers)]
        return MIXERS[name], Sizes(width, tokens, tokens if budget is None else budget, dropout)

    def whole(self, index: int) -> bool:
        """Whether layer ``index`` is a block with a norm and a residual of its own."""
        return MIXERS[self.layers[index % len(self.layers)][0]].whole

    def build(self, index: int, width: int, tokens: int, dropout: float = 0.0) -> nn.Module:
        """Layer ``index`` for ``[B, T, E]``."""
        kind, sizes = self.sizes(index, width, tokens, dropout)
        return kind.build(sizes)

    def state(self, layers: int, width: int, tokens: int) -> int:
        """Numbers that a step of decoding after T tokens needs of them, over all layers."""
        made = (self.sizes(index, width, tokens) for index in range(layers))
        return sum(kind.holds(sizes) * width for kind, sizes in made)

    def reads(self, layers: int, width: int, tokens: int) -> float:
        """Logits that a query computes, its mean over T queries and all layers."""
        made = [self.sizes(index, width, tokens) for index in range(layers)]
        return sum(kind.reads(i, sizes) for kind, sizes in made for i in range(tokens)) / (tokens * layers)


def parse_mixer(spec: str) -> Mixer:
    """``name``, ``name(budget)``, or several with ``+`` between them.

    Raises:
        ValueError: an unknown name, a budget below 1, or one of a kind that has none.
    """
    layers = []
    for part in spec.replace(" ", "").split("+"):
        found = _SPEC.fullmatch(part)
        if found is None or found[1] not in MIXERS:
            raise ValueError(
                f"unknown mixer {part!r}; give a name or name(budget), or several joined by +. Names: "
                f"{', '.join(MIXERS)}"
            )
        budget = None if found[2] is None else int(found[2])
        if budget is not None and not MIXERS[found[1]].budget:
            raise ValueError(f"{found[1]} has no budget, got {part!r}; write {found[1]}")
        if budget == 0:
            raise ValueError(f"a budget must be 1 or more, got {part!r}")
        layers.append((found[1], budget))
    return Mixer(tuple(layers))
