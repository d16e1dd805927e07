"""Double Sparsity: a decode step finds its tokens by a few heavy channels, and reads those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gossamer.backends import backend_of
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_flag
from gossamer.methods.head_tables import of_layer
from gossamer.methods.pages import plan_of_tokens, share_read
from gossamer.plan import SparsePlan
from gossamer.summaries import Labels

__all__ = ["Channels", "DoubleSparsity", "require_channels"]

Channels = Sequence[Sequence[Sequence[int]]]
"""``[layer][head]``, channels by falling weight; nothing where a method was made without."""


@dataclass(frozen=True)
class DoubleSparsity(Method):
    """Double Sparsity (2408.07092, section 3): scores of tokens by few channels, exact attention to the best tokens.

    Beside its keys the cache has a label of each, ``D // group_factor`` channels in ``bits`` bits. A token's score is
    the part of its logit that is of these channels; a step attends the ``budget`` tokens with the best scores. Caches
    of no more tokens are read whole; so are the first ``dense_layers`` layers, and prompts are not part of the method.

    Fields:
        budget: tokens that a step reads of each key/value head.
        group_factor: head dimension over the channels of a label.
        bits: of a channel, 4 or 8 (`gossamer.summaries.Labels`), 16 or 32.
        channels: by `gossamer.calibrate.channels` or the authors' files (`gossamer.profiles.read_channels`), of
            key/value heads (their ``k`` tables) or of query heads (``q``, ``qk``). None: of each row and key/value head
            those with the largest mean magnitude over its first 512 keys.
        per_query_head: choose for each query head, as published, and not for those of a key/value head together.

    Defaults: an eighth of the channels in 4 bits and two dense layers, as in the authors' conversion script; 2,048
    tokens, which is the paper's sixteenth of 32K (their script has 256).

    Deviations: the query heads of a key/value head share a choice, by the sum of the softmaxes of their scores, as in
    `Quest`; scores have the scale of the logits, of which they are a part, and not that of so few channels, which a
    choice for each query head would not see. The query is not quantised. The newest token is always read, and sinks and
    recent tokens that the store asks for. Tables of query heads make a label for each of them, as published: as many
    times the memory as query heads share a key/value head.
    """

    name: ClassVar[str] = "double_sparsity"
    needs: ClassVar[frozenset[str]] = frozenset({"store", "causal", "one query"})
    decodes: ClassVar[bool] = True
    apart: ClassVar[bool] = False
    tables: ClassVar[tuple[str, ...]] = ("channels",)
    settings: ClassVar[Settings] = tuple({"budget": budget} for budget in (256, 512, 1024, 2048, 4096))
    budget: int = 2048
    group_factor: int = 8
    bits: int = 4
    dense_layers: int = 2
    channels: Channels = ()
    per_query_head: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, 0, "dense_layers")
        require_at_least(self, 1, "budget", "group_factor")
        require_flag(self, "per_query_head")
        require_channels(self)
        if self.bits not in (4, 8, 16, 32):
            raise ValueError(f"{self.name}.bits must be 4, 8, 16 or 32, got {self.bits!r}")

    def summaries(self) -> tuple[type[Labels]]:
        return (Labels,)

    def beside(self, dim: int, itemsize: int) -> float:
        del itemsize
        return dim // self.group_factor * self.bits / 8 + (4 if self.bits < 16 else 0)

    def least_density(self, call: AttentionCall) -> float:
        dense = call.layer is not None and call.layer < self.dense_layers
        return 1.0 if dense else share_read(call, self.budget, 1)

    def plan(self, call: AttentionCall) -> SparsePlan:
        assert call.store is not None
        labels = call.store.summary(self.labels(call))
        scores = backend_of(call, "label_scores").label_scores(call, labels)
        return plan_of_tokens(call, scores, 1, self.budget, call.heads if self.per_query_head else call.groups)

    def labels(self, call: AttentionCall) -> Labels:
        """What the cache of a call's layer keeps of each key."""
        count = max(1, call.q.shape[-1] // self.group_factor)
        if not self.channels:
            return Labels(count, self.bits)
        heads = of_layer(self.channels, call.layer, [call.groups, call.heads], f"{self.name}.channels")
        return Labels(count, self.bits, tuple(tuple(row[:count]) for row in heads))


def require_channels(method: DoubleSparsity) -> None:
    """Validate the field ``channels``, and keep it as tuples.

    Raises:
        TypeError: it holds something else than lists of integers.
        ValueError: a channel below 0 or named twice, or layers that have different numbers of heads or channels.
    """
    what = f"{method.name}.channels"
    _require_list(method.channels, f"{what} must be a list (layers) of lists (heads) of channels")
    layers = []
    for layer, heads in enumerate(method.channels):
        _require_list(heads, f"{what} must hold a list of heads for layer {layer}")
        for head, row in enumerate(heads):
            _require_list(row, f"{what} must hold a list of channels for layer {layer}, head {head}")
            if not all(isinstance(channel, int) and not isinstance(channel, bool) for channel in row):
                raise TypeError(f"{what}, layer {layer}, head {head}: channels are integers, got {row!r:.60}")
            if not row or min(row) < 0 or len(set(row)) < len(row):
                raise ValueError(f"{what}, layer {layer}, head {head}: expected channels, each once, got {row!r:.60}")
        layers.append(tuple(tuple(row) for row in heads))
    shapes = {(len(heads), *(len(row) for row in heads[:1])) for heads in layers}
    if len(shapes) > 1 or (0,) in shapes or any(len(row) != len(heads[0]) for heads in layers for row in heads):
        raise ValueError(f"{what} must have the same number of heads in each layer, and of channels in each head")
    object.__setattr__(method, "channels", tuple(layers))


def _require_list(value: object, what: str) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{what}, got {type(value).__name__}")
