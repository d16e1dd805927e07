"""A model whose linear layers are replaced, and the form in which transformers saves and loads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gossamer.compressed.int8 import Int8Linear
from gossamer.compressed.packed import OneBitLinear, SparseLinear
from gossamer.compressed.recipes import Recipe, recipe_of
from gossamer.compressed.sequential import decoder_layers, linear_layers, walk

__all__ = ["METHOD", "CompressedConfig", "CompressedQuantizer", "compress"]

METHOD = "gossamer"
_KINDS: dict[str, Any] = {"int8": Int8Linear, "sparse": SparseLinear, "one_bit": OneBitLinear}
_BUFFERS = frozenset(("quantised", "by_row", "scale", "bitmap", "values", "starts", "codes", "levels", "salient"))


@register_quantization_config(METHOD)
class CompressedConfig(QuantizationConfigMixin):
    """What a saved model's ``quantization_config`` says.

    Attributes:
        recipe: `Recipe.to_dict` of what it was made by.
        layers: for each replaced layer by name its ``kind`` and what its buffers' shapes need.
    """

    def __init__(self, recipe: Any = None, layers: Any = None, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        fits = isinstance(recipe, Mapping) and isinstance(layers, Mapping)
        if not fits or not all(isinstance(entry, Mapping) for entry in layers.values()):
            raise ValueError("the quantization_config of a compressed model needs a recipe, and layers by their names")
        self.recipe, self.layers = dict(recipe), {name: dict(entry) for name, entry in layers.items()}


@register_quantizer(METHOD)
class CompressedQuantizer(HfQuantizer):
    """Puts the layers of a saved model in place before its weights are read, and checks them afterwards."""

    quantization_config: Any
    requires_calibration = True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return None  # as saved: scales have a dtype of their own

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        needed: set[str] = set()
        for name, entry in self.quantization_config.layers.items():
            if name not in linears:
                raise ValueError(f"the compressed model has a layer {name!r}, and {type(model).__name__} has none")
            layer = _empty(linears[name], name, entry)
            needed |= {f"{name}.{key}" for key in layer.state_dict()}
            _put(model, name, layer)
        if checkpoint_files is not None:
            _refuse_misfits(checkpoint_files, needed)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name in self.quantization_config.layers:
            try:
                model.get_submodule(name).check()
            except ValueError as error:
                raise ValueError(f"the compressed layer {name} is damaged: {error}") from error
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _refuse_misfits(files: Sequence[Any], needed: set[str]) -> None:
    """Raise ValueError where files lack a tensor of a compressed layer, or have one of a layer that is none."""
    there: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            there |= set(opened.keys())
    if missing := sorted(needed - there):
        raise ValueError(f"the compressed model is damaged: it lacks {len(missing)} tensors, the first {missing[0]}")
    own = {key for key in there - needed if key.rpartition(".")[2] in _BUFFERS}
    if own:
        raise ValueError(f"the compressed model is damaged: nothing says of which layer {min(own)} is")


def _empty(linear: nn.Linear, name: str, entry: Mapping[str, Any]) -> nn.Module:
    known = dict(entry)
    kind = known.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"layer {name} is of kind {kind!r}; known are {', '.join(_KINDS)}")
    if any(not isinstance(value, int) or value < 0 for value in known.values()):
        raise ValueError(f"layer {name} is described by {known}, which are not numbers of 0 or more")
    try:
        return _KINDS[kind].empty(linear, **known)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"layer {name} is described by {known}, which a layer of kind {kind} is not") from error


def described(layer: nn.Module) -> dict[str, Any] | None:
    """An entry of `CompressedConfig.layers`; None for a plain layer."""
    if isinstance(layer, Int8Linear):
        return {"kind": "int8", "outliers": layer.outliers}
    if isinstance(layer, SparseLinear):
        bits = {} if layer.scale is None else {"bits": 8}
        return {"kind": "sparse", "values": len(layer.values), **bits}
    if isinstance(layer, OneBitLinear):
        return {"kind": "one_bit", "block": layer.block}
    return None


def compress(
    model: Any,
    recipe: Recipe | Mapping[str, Any] | str,
    samples: Sequence[Tensor] = (),
    *,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """Replace the linear layers of a model's decoder layers; embeddings and head stay. In place.

    ``save_pretrained`` then writes a folder that ``from_pretrained`` loads where ``gossamer.compressed`` was imported.

    Args:
        model: a causal language model of transformers.
        recipe: one of `gossamer.compressed.recipes`, its dictionary, or its name.
        samples: token ids ``[B, T]`` each, that say what enters the layers; recipes that look at weights alone
            (`Recipe.looks`) need none.
        progress: told the name of each layer once it is done.

    Returns:
        The model.

    Raises:
        ValueError: no samples; a model that is compressed already; or as the recipe has it.
        TypeError: samples that are no list of ids. Whatever is raised, the model is as it was.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipe_of(recipe)
    if isinstance(samples, Tensor) or not all(isinstance(x, Tensor) and x.ndim == 2 for x in samples):
        raise TypeError("samples are a list of tensors of token ids [B, T]")
    if recipe.looks and not samples:
        raise ValueError("compressing needs samples: give token ids of some texts")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model's weights are quantised already; compress the model that they were made from")
    seen: dict[str, Any] = {}
    linears: dict[str, nn.Linear] = {}

    def observe(name: str, linear: nn.Linear, x: Tensor) -> None:
        if name not in seen:
            linears[name], seen[name] = linear, recipe.statistic(linear)
        seen[name].add(x)

    def replace() -> None:
        for name, layer in recipe.replaced(linears, seen).items():
            _put(model, name, layer)
            made[name] = layer
        seen.clear()
        linears.clear()

    def after(name: str, layer: nn.Module) -> None:
        replace()
        if progress is not None:
            progress(name)

    place, layers = decoder_layers(model)
    former = {f"{place}.{name}": linear for name, linear in linear_layers(layers)}
    weights = {name: linear.weight for name, linear in former.items()}
    recipe.check(former)
    made: dict[str, nn.Module] = {}
    training = model.training
    model.eval()
    try:
        if recipe.looks:
            walk(model, samples, observe, after if recipe.in_turn else None)
        else:
            for number, layer in enumerate(layers):
                own = {f"{place}.{number}.{name}": linear for name, linear in linear_layers(layer)}
                linears.update(own)
                seen.update({name: recipe.statistic(linear) for name, linear in own.items()})
                with torch.no_grad():
                    after(f"{place}.{number}", layer)
        with torch.no_grad():
            replace()
    except BaseException:  # nothing is half done
        for name, linear in former.items():
            linear.weight = weights[name]
            _put(model, name, linear)
        raise
    finally:
        model.train(training)
    entries = {name: entry for name, layer in made.items() if (entry := described(layer)) is not None}
    if entries:
        config = cast(Any, CompressedConfig)(recipe.to_dict(), entries)  # transformers' decorators hide what it takes
        model.config.quantization_config = config
        model.hf_quantizer = cast(Any, CompressedQuantizer)(config, pre_quantized=True)
    return model


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
