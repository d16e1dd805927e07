"""What becomes of a linear layer: recipes by name, each with what it has to see of the layer's inputs."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from gossamer.compressed.billm import binarise, rounded, sign_and_scale
from gossamer.compressed.hessian import Hessian
from gossamer.compressed.int8 import InputScale, Int8Linear, row_scale
from gossamer.compressed.packed import OneBitLinear, SparseLinear
from gossamer.compressed.sparsegpt import Pattern, magnitude, prune

__all__ = ["RECIPES", "BiLLM", "Int8", "Magnitude", "Recipe", "Rounded", "SignAndScale", "SparseGPT", "recipe_of"]


class Statistic(Protocol):
    """Something that inputs ``[..., in]`` of a layer are added to."""

    def add(self, x: Tensor, /) -> None: ...


class Recipe(ABC):
    """A dataclass whose fields are what can be set.

    Attributes:
        name: in commands and in saved models.
        in_turn: each layer of the model is replaced before the next one sees its inputs.
        looks: at the inputs of layers; one that does not needs no samples.
    """

    name: ClassVar[str]
    in_turn: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    @abstractmethod
    def statistic(self, linear: nn.Linear) -> Statistic:
        """What the inputs of a layer are to be added to."""

    def check(self, linears: Mapping[str, nn.Linear]) -> None:
        """Raise ValueError where one of a model's linear layers does not fit, before anything is done."""
        return

    @abstractmethod
    def replaced(self, linears: Mapping[str, nn.Linear], seen: Mapping[str, Any]) -> dict[str, nn.Module]:
        """New layers by name, of the linear layers that were seen together."""

    def to_dict(self) -> dict[str, Any]:
        """Its name and fields, as JSON has them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"recipe": self.name, **fields}


def _check_pattern(pattern: str | float, linears: Mapping[str, nn.Linear]) -> None:
    of = Pattern.parse(pattern).of
    for name, linear in linears.items():
        if of and linear.in_features % of:
            raise ValueError(f"{pattern} needs inputs in multiples of {of}, and {name} has {linear.in_features}")


def _check_hessian(recipe: Any) -> None:
    if isinstance(recipe.block, bool) or not isinstance(recipe.block, int) or recipe.block < 1:
        raise ValueError(f"{recipe.name}.block must be an integer of at least 1, got {recipe.block!r}")
    if isinstance(recipe.damp, bool) or not isinstance(recipe.damp, (int, float)) or not 0 < recipe.damp < 1e9:
        raise ValueError(f"{recipe.name}.damp must be a number above 0, got {recipe.damp!r}")


class _OneByOne(Recipe):
    """A recipe that looks at each layer alone."""

    def replaced(self, linears: Mapping[str, nn.Linear], seen: Mapping[str, Any]) -> dict[str, nn.Module]:
        return {name: self.layer(linear, seen[name]) for name, linear in linears.items()}

    @abstractmethod
    def layer(self, linear: nn.Linear, seen: Any) -> nn.Module:
        """The new layer."""


class _ByHessian(_OneByOne):
    def statistic(self, linear: nn.Linear) -> Statistic:
        return Hessian(linear.in_features, linear.weight.device)


class _Blind(_OneByOne):
    """A recipe that looks at the weight alone: what the others are compared with."""

    looks: ClassVar[bool] = False

    def statistic(self, linear: nn.Linear) -> Statistic:
        return _Nothing()


class _Nothing:
    def add(self, x: Tensor, /) -> None:
        pass


@dataclass(frozen=True)
class SparseGPT(_ByHessian):
    """Zeros by SparseGPT; ``pattern`` is their share, or N:M (`Pattern.parse`).

    With ``bits=8`` the others are int8 with a scale a row, and what rounding loses is handed on as well.
    """

    name: ClassVar[str] = "sparsegpt"
    pattern: str | float = "0.5"
    damp: float = 0.01
    block: int = 128
    bits: int | None = None

    def __post_init__(self) -> None:
        _check_hessian(self)
        if self.bits not in (None, 8) or isinstance(self.bits, float):
            raise ValueError(f"sparsegpt.bits must be 8, or None for the weight's own dtype, got {self.bits!r}")
        pattern = Pattern.parse(self.pattern)
        if pattern.of and self.block % pattern.of:
            raise ValueError(f"sparsegpt.block must be a multiple of {pattern.of} for {pattern}, got {self.block}")

    def check(self, linears: Mapping[str, nn.Linear]) -> None:
        _check_pattern(self.pattern, linears)

    def layer(self, linear: nn.Linear, seen: Hessian) -> nn.Module:
        factor, pattern = seen.factor(self.damp), Pattern.parse(self.pattern)
        scale = row_scale(linear.weight) if self.bits else None
        weight = prune(linear.weight, factor, pattern, self.block, dead=seen.dead, scale=scale)
        return SparseLinear.of(weight, linear.bias, scale, linear.weight.dtype)


@dataclass(frozen=True)
class Magnitude(_Blind):
    """Zeros where weights are least."""

    name: ClassVar[str] = "magnitude"
    pattern: str | float = "0.5"

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)

    def check(self, linears: Mapping[str, nn.Linear]) -> None:
        _check_pattern(self.pattern, linears)

    def layer(self, linear: nn.Linear, seen: Any) -> nn.Module:
        weight = magnitude(linear.weight, Pattern.parse(self.pattern))
        return SparseLinear.of(weight.to(linear.weight.dtype), linear.bias)


@dataclass(frozen=True)
class BiLLM(_ByHessian):
    """One bit by BiLLM; fields as `binarise` has them."""

    name: ClassVar[str] = "billm"
    block: int = 128
    damp: float = 0.01
    search: str = "weights"
    salient: bool = True
    split: bool = True
    compensate: bool = True

    def __post_init__(self) -> None:
        _check_hessian(self)
        if self.search not in ("weights", "saliency"):
            raise ValueError(f"billm.search must be 'weights' or 'saliency', got {self.search!r}")

    def layer(self, linear: nn.Linear, seen: Hessian) -> nn.Module:
        fields = ("block", "search", "salient", "split", "compensate")
        options: dict[str, Any] = {name: getattr(self, name) for name in fields}
        found = binarise(linear.weight.detach().float(), seen.factor(self.damp), dead=seen.dead, **options)
        return OneBitLinear.of(found, linear.bias, linear.weight.dtype)


@dataclass(frozen=True)
class SignAndScale(_Blind):
    """One bit: signs and each row's mean magnitude. The weights are stored whole."""

    name: ClassVar[str] = "sign_and_scale"

    def layer(self, linear: nn.Linear, seen: Any) -> nn.Module:
        return _with_weight(linear, sign_and_scale(linear.weight))


@dataclass(frozen=True)
class Rounded(_Blind):
    """One bit: the nearer end of each row's range. The weights are stored whole."""

    name: ClassVar[str] = "rounded"

    def layer(self, linear: nn.Linear, seen: Any) -> nn.Module:
        return _with_weight(linear, rounded(linear.weight))


@dataclass(frozen=True)
class Int8(Recipe):
    """Weights and inputs in int8, with what is beyond the inputs' scale multiplied apart where it matters most.

    Args:
        share: of a layer's inputs that are within its scale.
        outliers: share of the layers, those with the largest ones, that multiply them apart; the others drop them
            (llm.npu keeps 15%).
    """

    name: ClassVar[str] = "int8"
    in_turn: ClassVar[bool] = False
    share: float = 0.999
    outliers: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"int8.share must be above 0 and at most 1, got {self.share}")
        if not 0.0 <= self.outliers <= 1.0:
            raise ValueError(f"int8.outliers must be in 0 .. 1, got {self.outliers}")

    def statistic(self, linear: nn.Linear) -> Statistic:
        return InputScale(linear.in_features, linear.weight.device)

    def replaced(self, linears: Mapping[str, nn.Linear], seen: Mapping[str, InputScale]) -> dict[str, nn.Module]:
        ranked = sorted(linears, key=lambda name: -seen[name].importance(self.share))
        apart = set(ranked[: round(self.outliers * len(ranked))])
        return {
            name: Int8Linear.of(linear.weight, linear.bias, seen[name].scale(self.share), name in apart)
            for name, linear in linears.items()
        }


def _with_weight(linear: nn.Linear, weight: Tensor) -> nn.Module:
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)
    return linear


RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (SparseGPT, Magnitude, BiLLM, SignAndScale, Rounded, Int8)
}


def recipe_of(data: Mapping[str, Any] | str) -> Recipe:
    """Inverse of `Recipe.to_dict`; a name alone is the recipe with its defaults.

    Raises:
        ValueError: no recipe of that name, or a field or value that it does not have.
    """
    if isinstance(data, str):
        data = {"recipe": data}
    if not isinstance(data, Mapping):
        raise ValueError(f"a recipe is a name, or a dictionary with 'recipe' and its fields; got {data!r}")
    fields = dict(data)
    name = fields.pop("recipe", None)
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"a recipe is one of {', '.join(RECIPES)}; got {name!r}")
    known = {field.name for field in dataclasses.fields(RECIPES[name])}  # type: ignore[arg-type]
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"{name} has no field {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}")
    return RECIPES[name](**fields)
