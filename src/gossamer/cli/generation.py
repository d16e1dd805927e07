"""Loading a model from a folder, and one timed greedy generation. Imports transformers."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

import gossamer
from gossamer.cache import CachePolicy
from gossamer.cli.common import BadInput, first_line
from gossamer.cli.machine import fast_dtype
from gossamer.integrations.transformers import filter_prompt
from gossamer.policy import Policy

__all__ = [
    "Filtered",
    "Generation",
    "check_weights",
    "compare_top1",
    "filtered",
    "generate",
    "layer_progress",
    "load_checked",
    "load_model",
    "load_tokenizer",
    "tokenize",
]

_HEAD_ROWS = 512


@dataclass
class Generation:
    """What one generation gave and cost. Seconds are wall-clock; plan, attention and density are the prefill's alone.

    ``step_density`` is the share of the cache that new tokens read; None where nobody chose. ``top1`` is the model's
    choice at every position of the prompt, int64 ``[S]``, where it was asked for.
    """

    text: str
    tokens: list[int]
    prefill_seconds: float
    plan_seconds: float
    attention_seconds: float
    decode_seconds: float
    density: float
    executors: list[str]
    dense_because: dict[str, int]
    step_density: float | None = None
    top1: Tensor | None = field(default=None, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token is the prefill's."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        names = [name for name in self.__dataclass_fields__ if name != "top1"]
        return {name: getattr(self, name) for name in names} | {"tokens_per_second": self.tokens_per_second}

    def summary(self) -> str:
        because = ", ".join(f"{reason} x{count}" for reason, count in self.dense_because.items())
        return (
            f"prefill {self.prefill_seconds:.2f} s (planning {self.plan_seconds:.2f}, attention "
            f"{self.attention_seconds:.2f}), density {self.density:.3f}, executor {', '.join(self.executors)}; "
            f"{len(self.tokens)} new tokens, {self.tokens_per_second:.1f} a second"
            + (f", which read {self.step_density:.3f} of the cache" if self.step_density is not None else "")
            + (f"\nlayers whose prefill ran dense: {because}" if because else "")
        )


@dataclass(frozen=True)
class Filtered:
    """What is left of a prompt ``[1, S]``, by which layer, and what choosing it cost."""

    prompt: Tensor
    layer: int
    before: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"layer": self.layer, "tokens": self.prompt.shape[1], "seconds": self.seconds}

    def summary(self) -> str:
        return f"layer {self.layer} kept {self.prompt.shape[1]} of {self.before} tokens, in {self.seconds:.2f} s"


def load_tokenizer(path: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers do
        raise BadInput(f"{path} has no tokenizer that transformers can load: {first_line(error)}") from error


def load_model(path: Path, dtype: str, progress: bool, device: str = "cpu", shown: bool = False) -> Any:
    """The model of a folder, not moved: the device tells which dtype ``auto`` is.

    Args:
        shown: it is to read images. One that reads them reads text alone as well.
    """
    wanted = fast_dtype(device)[0] if dtype == "auto" else getattr(torch, dtype)
    if not progress:
        transformers_logging.disable_progress_bar()
    importlib.import_module("gossamer.compressed")  # so that transformers knows what `gossamer.compress` saved
    try:
        kind = AutoModelForImageTextToText if shown or _reads_images(path) else AutoModelForCausalLM
        model = kind.from_pretrained(path, dtype=wanted, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        what = "model that reads images" if shown else "language model"
        raise BadInput(f"{path} is no {what} that transformers can load: {first_line(error)}") from error
    return model.eval()


def _reads_images(path: Path) -> bool:
    """Whether a folder holds a model that transformers has no other class for."""
    config = type(AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False))
    return config not in MODEL_FOR_CAUSAL_LM_MAPPING and config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_checked(path: Path, dtype: str, device: str = "cpu", shown: bool = False) -> Any:
    """`load_model` on a device, looked at before anything slow is done; says which dtype ``auto`` took."""
    model = load_model(path, dtype, progress=sys.stderr.isatty(), device=device, shown=shown)
    try:
        model = model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device}: {first_line(error)}") from error
    _check_model(model, path)
    if dtype == "auto":
        taken, because = fast_dtype(device)
        print(f"dtype {str(taken).removeprefix('torch.')}: {because}", file=sys.stderr)
    return model


@torch.inference_mode()
def _check_model(model: Any, path: Path) -> None:
    """Look at every weight and read one token, so that what is not a number shows before anything slow is done.

    One token alone would not do: attention to few keys hides NaN in queries and keys, which longer prompts then show.
    """
    check_weights(model, path)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    if bool(model(input_ids=token, use_cache=False).logits.isnan().any()):
        raise BadInput(f"{path} predicts NaN: it overflows in {model.dtype}; try another --dtype")


def check_weights(model: Any, path: Path) -> None:
    broken = next((name for name, weight in model.named_parameters() if _holds_nan(weight)), None)
    if broken is not None:
        raise BadInput(f"{path} predicts NaN: its weights hold NaN, {broken} first; get the model again")


def _holds_nan(weight: Tensor) -> bool:
    """By the sum first, which takes no memory; it is NaN for infinities of both signs as well."""
    return weight.is_floating_point() and bool(weight.sum().isnan()) and bool(weight.isnan().any())


def _decoder_layers(model: Any) -> nn.ModuleList | None:
    """The longest list of modules in the part that reads text: a tower for images may have more layers, and stands
    still where none are given. Lists in a layer, as of experts, do not count."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [own for name, own in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return max(outer, key=len, default=None)


@contextmanager
def layer_progress(model: nn.Module, title: str) -> Iterator[None]:
    """A bar over the decoder's layers during the first forward pass, on a terminal, if it takes over two seconds."""
    layers = _decoder_layers(model)
    if layers is None or not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    bar = tqdm(total=len(layers), desc=title, unit="layer", delay=2, leave=False, file=sys.stderr)

    def advance(*_: Any) -> None:
        if bar.n < len(layers):
            bar.update()
            if bar.n == len(layers):
                bar.close()

    hooks = [layer.register_forward_hook(advance) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        bar.close()


def tokenize(tokenizer: Any, text: str, chat: bool) -> Tensor:
    """Token ids ``[1, S]``."""
    if not chat:
        return tokenizer(text, return_tensors="pt")["input_ids"]
    if not tokenizer.chat_template:
        raise BadInput("--chat: this model's tokenizer has no chat template; leave --chat out")
    # The line end at the end of a file is no part of what was said; small models lose their way over it.
    turns = [{"role": "user", "content": text.rstrip("\n")}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")[
        "input_ids"
    ]


def filtered(model: Any, prompt: Tensor, policy: Policy, layer: int, keep: int) -> Filtered:
    """A prompt without what a layer finds that nobody asks for; the layers before attend by the policy."""
    started = time.perf_counter()
    try:
        kept = filter_prompt(model, prompt, layer, keep, method=policy)
    except ValueError as error:
        raise BadInput(f"--filter: {first_line(error)}") from error
    return Filtered(kept, layer, prompt.shape[1], time.perf_counter() - started)


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: Tensor,
    policy: Policy,
    max_new_tokens: int,
    stream: TextIO | None = None,
    *,
    keep_top1: bool = False,
    cache: CachePolicy | None = None,
    shown: Mapping[str, Tensor] | None = None,
) -> Generation:
    """Prefill ``prompt [1, S]`` by the policy, decode greedily, write the text to ``stream`` as it comes.

    Args:
        shown: what else the model is given with the prompt, such as pictures.
    """
    hidden: list[Tensor] = []
    hooks = []
    if keep_top1:
        hooks.append(model.base_model.register_forward_hook(lambda *call: hidden.append(call[-1][0])))
    printed = ""
    with gossamer.enable(model, policy, cache=cache) as handle:
        held = None if handle.cache is None else handle.new_cache()
        started = time.perf_counter()
        given = _as_model(shown or {}, model)
        out = model(input_ids=prompt, past_key_values=held, use_cache=True, logits_to_keep=1, **given)
        prefilled = time.perf_counter()
        for hook in hooks:
            hook.remove()
        layers = handle.stats()
        result = Generation(
            text="",
            tokens=[],
            prefill_seconds=prefilled - started,
            plan_seconds=sum(layer.plan_seconds for layer in layers),
            attention_seconds=sum(layer.attention_seconds for layer in layers),
            decode_seconds=0.0,
            density=sum(layer.density for layer in layers) / max(1, len(layers)),
            executors=sorted({name for layer in layers for name in layer.executors}),
            dense_because=layers.fallbacks(),
        )
        handle.reset()
        stop = _stop_tokens(model)
        prefilled = time.perf_counter()
        while True:
            token = int(out.logits[0, -1].argmax())
            result.tokens.append(token)
            result.text = tokenizer.decode(result.tokens, skip_special_tokens=True)
            if stream is not None and not result.text.endswith("�"):  # half of a character
                print(result.text[len(printed) :], end="", file=stream, flush=True)
                printed = result.text
            if token in stop or len(result.tokens) == max_new_tokens:
                break
            out = model(
                input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1
            )
        result.decode_seconds = time.perf_counter() - prefilled
        layers = handle.stats()
        if policy.decode is not None and len(layers):
            result.step_density = sum(layer.step_density for layer in layers) / len(layers)
    if stream is not None:
        print(result.text[len(printed) :], file=stream, flush=True)
    if hidden:
        head = model.get_output_embeddings()
        result.top1 = torch.cat([head(rows).argmax(-1) for rows in hidden[0][0].split(_HEAD_ROWS)])
    return result


def _as_model(given: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Pictures in the model's dtype."""
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in given.items()}


def compare_top1(one: Generation, other: Generation) -> float:
    """Share of the prompt's positions at which both would continue with the same token."""
    if one.top1 is None or other.top1 is None:
        raise ValueError("compare_top1 needs two generations that were made with keep_top1=True")
    return float((one.top1 == other.top1).float().mean())


def _stop_tokens(model: Any) -> set[int]:
    stop = model.generation_config.eos_token_id
    return set() if stop is None else set(stop) if isinstance(stop, list) else {stop}
