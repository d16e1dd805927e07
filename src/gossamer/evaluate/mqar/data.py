"""Multi-query associative recall as Zoology (2312.04927, 3.1 and its repository) draws it, in all of its variants.

A sequence begins with pairs of a key and its value. Later its keys come again, each at a place whose distance follows
a power law, and there the model has to say the value; nothing else counts. `Plain` is the paper's. `Forgetting` binds
some keys anew, and the last value wins; `Compositional` asks for two keys together, neither of which tells the value;
`Stacked` has key and value in one token, so that one layer that mixes tokens is enough. `Scattered` is not the paper's:
pairs and queries stand anywhere, so that no distance is likelier by where they begin.

Deviations from HazyResearch/zoology at d88d6f5:

- `Forgetting`: a new value differs from the key's old one. There it is drawn unlike the value of another key, so that a
  key may be bound anew to what it had.
- `Stacked` there is of embeddings without a vocabulary; here its tokens are two numbers, and a model embeds both.
  Its ``per_sequence_mapping=False`` there keeps the order of the pairs and draws keys and values anew, so that nothing
  lasts; ``lasting=True`` here is a map that lasts.
- Draws are torch's: equal in distribution, not in numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from math import isqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

__all__ = ["IGNORED", "VARIANTS", "Compositional", "Examples", "Forgetting", "Plain", "Scattered", "Stacked", "Variant"]

# What a label says where nothing is asked: torch's cross entropy leaves it out.
IGNORED = -100
# Of the map that lasts over all sequences of `Stacked`, whatever the seed of the sequences.
_LASTING_SEED = 0
# Sequences that are drawn at once. Part of what a seed means.
_ROWS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Sequences, and what is asked in them.

    Fields:
        inputs: int64 ``[M, T]``, of `Stacked` ``[M, T, 2]``.
        labels: int64 ``[M, T]``: at a query the value, in place of the next token; else `IGNORED`.
        distances: int64 ``[M, T]``: how many tokens before a query the value stands that answers it, the nearest where
            it stands several times; else 0. A window of w tokens sees it where this is below w.
    """

    inputs: Tensor
    labels: Tensor
    distances: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Variant(ABC):
    """What all variants have.

    Fields:
        vocabulary: V; token 0 is a filler, and keys and values have halves of their own (thirds in `Compositional`).
        length: T, even but for `Stacked`.
        pairs: n, how many keys there are, each asked for once.
        power: a of the power law: slot s of those for queries has a probability of ``(s + 1) ** (a - 1)``.
        fillers: what stands where there is neither pair nor query: ``zero``, or ``random`` tokens of the whole
            vocabulary, which may repeat a key beside another value.

    Raises:
        ValueError: a number out of range, or pairs and queries that do not fit into the length or the vocabulary.
    """

    name: ClassVar[str]
    parts: ClassVar[int] = 1  # numbers of a token

    vocabulary: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    fillers: Literal["zero", "random"] = "zero"

    def __post_init__(self) -> None:
        if self.fillers not in ("zero", "random"):
            raise ValueError(f"fillers must be 'zero' or 'random', got {self.fillers!r}")
        if self.pairs < 1:
            raise ValueError(f"pairs must be 1 or more, got {self.pairs}")
        if self.length % 2 and self.parts == 1:
            raise ValueError(f"length must be even, got {self.length}")
        if self.length < self.needed:
            raise ValueError(
                f"{self.pairs} pairs of {self.name} need a length of {self.needed} or more, got {self.length}"
            )
        if self.most_keys < self.pairs:
            raise ValueError(
                f"a vocabulary of {self.vocabulary} has {max(0, self.most_keys)} keys or values for {self.pairs} "
                "pairs; enlarge it"
            )

    @property
    @abstractmethod
    def needed(self) -> int:
        """Tokens that pairs and queries take at least."""

    @property
    def most_keys(self) -> int:
        """How many different keys, and values, there are."""
        return self.vocabulary // 2 - 1

    def make(self, examples: int, seed: int) -> Examples:
        """So many sequences; equal ones for equal seeds.

        Raises:
            ValueError: ``examples`` is negative.
        """
        if examples < 0:
            raise ValueError(f"examples must be 0 or more, got {examples}")
        generator = torch.Generator().manual_seed(seed)
        drawn = [self._draw(min(_ROWS, examples - done), generator) for done in range(0, max(1, examples), _ROWS)]
        return Examples(*(torch.cat(part) for part in zip(*drawn, strict=True)))

    @abstractmethod
    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels and distances."""

    @property
    def label(self) -> str:
        """As a command line has it: ``plain(vocabulary=256,length=64,pairs=8)``, and what differs from the defaults."""
        always = ("vocabulary", "length", "pairs")
        shown = [f.name for f in fields(self) if f.name in always or getattr(self, f.name) != f.default]
        return f"{self.name}({','.join(f'{name}={getattr(self, name)}' for name in shown)})"

    def to_dict(self) -> dict[str, Any]:
        """All fields, with ``variant``."""
        return {"variant": self.name} | asdict(self)

    def _bound(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Different keys and different values ``[rows, n]``, from the halves of the vocabulary."""
        half = self.vocabulary // 2
        keys = 1 + _different(rows, half - 1, self.pairs, generator)
        return keys, half + _different(rows, self.vocabulary - half, self.pairs, generator)

    def _slots(self, rows: int, count: int, generator: torch.Generator) -> Tensor:
        """Of each key the slot in which it is asked for, ``[rows, n]`` out of ``count``, all different."""
        weights = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") ** (self.power - 1)
        return torch.multinomial(weights.expand(rows, -1), self.pairs, generator=generator)

    def _asked(
        self, context: Tensor, queries: Tensor, asked: Tensor, values: Tensor, held: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sequences of a context ``[rows, c]`` and of queries ``[rows, n, m]``.

        Args:
            asked: int64 ``[rows, n]``, where each query begins; its label is at its last token.
            values: ``[rows, n]``, what answers each.
            held: int64 ``[rows, n]``, where that stands in the context.
        """
        rows, last = len(context), queries.shape[2] - 1
        inputs = torch.zeros(rows, self.length, dtype=torch.int64, device="cpu")
        inputs[:, : context.shape[1]] = context
        for part in range(last + 1):
            inputs.scatter_(1, asked + part, queries[:, :, part])
        labels = torch.full_like(inputs, IGNORED).scatter_(1, asked + last, values)
        distances = torch.zeros_like(inputs).scatter_(1, asked + last, asked + last - held)
        if self.fillers == "random":
            drawn = torch.randint(self.vocabulary, inputs.shape, generator=generator)
            inputs = torch.where(inputs == 0, drawn, inputs)
        return inputs, labels, distances


@dataclass(frozen=True)
class Plain(Variant):
    """The paper's task.

    Fields:
        passes: how often the pairs stand there, one round after the other (2407.05483 reads twice).
    """

    name: ClassVar[str] = "plain"
    passes: int = 1

    def __post_init__(self) -> None:
        _at_least("passes", self.passes, 1)
        super().__post_init__()

    @property
    def needed(self) -> int:
        return 2 * self.pairs * (self.passes + 1)

    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self._bound(rows, generator)
        context = torch.stack([keys, values], -1).flatten(1).repeat(1, self.passes)
        begin = context.shape[1]
        asked = begin + 2 * self._slots(rows, (self.length - begin) // 2, generator)
        held = begin - 2 * self.pairs + 1 + 2 * torch.arange(self.pairs, device="cpu").expand(rows, -1)
        return self._asked(context, keys[..., None], asked, values, held, generator)


@dataclass(frozen=True)
class Scattered(Variant):
    """Pairs and queries at shuffled places of the whole length, each key asked for after its pair; no power law.

    Places are even, and a pair or a query takes two tokens, as in `Plain`. Of 2 n places the sooner of two that were
    drawn together is the pair's.
    """

    name: ClassVar[str] = "scattered"

    def __post_init__(self) -> None:
        _no_power(self)
        super().__post_init__()

    @property
    def needed(self) -> int:
        return 4 * self.pairs

    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self._bound(rows, generator)
        places = 2 * _different(rows, self.length // 2, 2 * self.pairs, generator).unflatten(1, (-1, 2))
        begins, asked = places.amin(-1), places.amax(-1)
        context = torch.zeros(rows, self.length, dtype=torch.int64, device="cpu")
        context.scatter_(1, begins, keys).scatter_(1, begins + 1, values)
        return self._asked(context, keys[..., None], asked, values, begins + 1, generator)


@dataclass(frozen=True)
class Forgetting(Variant):
    """After the pairs, some keys once more with another value, which is the one that counts.

    Fields:
        updates: how many keys.
    """

    name: ClassVar[str] = "forgetting"
    updates: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.updates <= self.pairs:
            raise ValueError(f"updates must be 0 to pairs={self.pairs}, got {self.updates}")
        super().__post_init__()

    @property
    def needed(self) -> int:
        return 4 * self.pairs + 2 * self.updates

    @property
    def most_keys(self) -> int:
        # With one value there is no other to be bound to.
        return super().most_keys if self.vocabulary - self.vocabulary // 2 > 1 else 0

    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self._bound(rows, generator)
        place = torch.arange(self.pairs, device="cpu").expand(rows, -1)
        which = _different(rows, self.pairs, self.updates, generator)
        half = self.vocabulary // 2
        # A step around the circle of values, never a whole round.
        step = 1 + torch.randint(self.vocabulary - half - 1, which.shape, generator=generator)
        new = half + (values.gather(1, which) - half + step) % (self.vocabulary - half)
        context = torch.stack([torch.cat([keys, keys.gather(1, which)], 1), torch.cat([values, new], 1)], -1).flatten(1)
        at = 2 * torch.arange(self.updates, device="cpu").expand(rows, -1) + 2 * self.pairs + 1
        values, held = values.scatter(1, which, new), (2 * place + 1).scatter(1, which, at)
        begin = context.shape[1]
        asked = begin + 2 * self._slots(rows, (self.length - begin) // 2, generator)
        return self._asked(context, keys[..., None], asked, values, held, generator)


@dataclass(frozen=True)
class Compositional(Variant):
    """Keys of two tokens, all combinations of some first and as many second ones: neither alone tells the value.

    First tokens, second tokens and values are thirds of the vocabulary. ``pairs`` is a square: 4, 9, 16. A slot for a
    query has three tokens, the last of which is a filler.
    """

    name: ClassVar[str] = "compositional"

    def __post_init__(self) -> None:
        if self.pairs < 1 or isqrt(self.pairs) ** 2 != self.pairs:
            raise ValueError(f"pairs of compositional must be a square, such as 4, 9 or 16, got {self.pairs}")
        super().__post_init__()

    @property
    def needed(self) -> int:
        return 6 * self.pairs

    @property
    def most_keys(self) -> int:
        third = self.vocabulary // 3
        return min(max(0, third - 1) ** 2, self.vocabulary - 2 * third)

    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        side, third = isqrt(self.pairs), self.vocabulary // 3
        first = 1 + _different(rows, third - 1, side, generator)
        second = third + _different(rows, third, side, generator)
        values = 2 * third + _different(rows, self.vocabulary - 2 * third, self.pairs, generator)
        order = _different(rows, self.pairs, self.pairs, generator)
        keys = torch.stack([first.gather(1, order // side), second.gather(1, order % side)], -1)
        context = torch.cat([keys, values[..., None]], -1).flatten(1)
        begin = context.shape[1]
        asked = begin + 3 * self._slots(rows, (self.length - begin) // 3, generator)
        held = 3 * torch.arange(self.pairs, device="cpu").expand(rows, -1) + 2
        return self._asked(context, keys, asked, values, held, generator)


@dataclass(frozen=True)
class Stacked(Variant):
    """Key and value in one token of two numbers; then each key with 0 for its value. No fillers, no power law.

    The length is what pairs and queries take, ``pairs * (passes + 1)``; each round has an order of its own.

    Fields:
        passes: how often the pairs stand there.
        lasting: one map from keys to values for all sequences, to be learnt rather than looked up.
    """

    name: ClassVar[str] = "stacked"
    parts: ClassVar[int] = 2
    passes: int = 1
    lasting: bool = False

    def __post_init__(self) -> None:
        _at_least("passes", self.passes, 1)
        _no_power(self)
        super().__post_init__()
        if self.length != self.needed:
            raise ValueError(
                f"a length of stacked is pairs * (passes + 1) = {self.needed}, got {self.length}; give --length "
                f"{self.needed}"
            )
        if self.fillers != "zero":
            raise ValueError("stacked has no fillers; leave fillers='zero'")

    @property
    def needed(self) -> int:
        return self.pairs * (self.passes + 1)

    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self._bound(rows, generator)
        if self.lasting:
            half = self.vocabulary // 2
            fixed = torch.Generator().manual_seed(_LASTING_SEED)
            values = half + torch.randperm(self.vocabulary - half, generator=fixed)[keys - 1]
        orders = [_different(rows, self.pairs, self.pairs, generator) for _ in range(self.passes + 1)]
        shown = torch.cat([keys.gather(1, order) for order in orders], 1)
        told = torch.cat([values.gather(1, order) for order in orders[:-1]], 1)
        asked = orders[-1]
        inputs = torch.stack([shown, torch.cat([told, torch.zeros_like(asked)], 1)], -1)
        labels = torch.cat([torch.full_like(told, IGNORED), values.gather(1, asked)], 1)
        begin = told.shape[1]
        last = begin - self.pairs + orders[-2].argsort(1)  # of each key the place in the last round
        place = begin + torch.arange(self.pairs, device="cpu")
        return inputs, labels, torch.cat([torch.zeros_like(told), place - last.gather(1, asked)], 1)


VARIANTS: dict[str, type[Variant]] = {
    kind.name: kind for kind in (Plain, Forgetting, Compositional, Stacked, Scattered)
}


def _different(rows: int, choices: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different ones of ``choices`` numbers in each row, in any order alike: int64 ``[rows, count]``."""
    return torch.rand(rows, choices, dtype=torch.float64, generator=generator).topk(count, dim=1).indices


def _no_power(variant: Variant) -> None:
    if variant.power != Variant.power:
        raise ValueError(f"{variant.name} has no power law, got power={variant.power}; leave power={Variant.power}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
