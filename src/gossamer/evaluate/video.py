"""What sparse attention changes in a video that a model makes: clips of one seed, dense and with methods."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import __version__
from gossamer.evaluate.records import label_of, policy_fields
from gossamer.evaluate.schema import FORMAT
from gossamer.evaluate.video_quality import feature_distance, psnr, ssim
from gossamer.integrations.diffusers import enable
from gossamer.integrations.stats import Stats
from gossamer.policy import Policy

__all__ = [
    "PipelineModel",
    "VideoModel",
    "WordModel",
    "compare_videos",
    "header_of",
    "load_video_model",
    "sampled",
]

Record = dict[str, Any]


class VideoModel(ABC):
    """Something that makes clips of prompts.

    Attributes:
        name: of its folder.
        enabled: the transformer or pipeline that `gossamer.enable` takes.
        prompts: some that it can be asked for.
        dtype: of its products.
    """

    name: str
    enabled: Any
    prompts: tuple[str, ...]
    dtype: torch.dtype

    @property
    def parts(self) -> list[nn.Module]:
        """What of it has weights."""
        whole = self.enabled
        parts = [whole] if isinstance(whole, nn.Module) else list(whole.components.values())
        return [part for part in parts if isinstance(part, nn.Module)]

    def fingerprint(self) -> str:
        """Hash of the configs and of a strided sample of every weight: changes when the model does."""
        digest = hashlib.sha256(str(self.dtype).encode())
        for part in self.parts:
            config: Any = getattr(part, "config", {})
            plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            told = {name: value for name, value in plain.items() if not name.startswith("_")}
            digest.update(json.dumps(told, sort_keys=True, default=str).encode())
            for name, weight in part.named_parameters():
                flat = weight.detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
                digest.update(name.encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    @abstractmethod
    def sample(self, prompt: str, seed: int, steps: int) -> Tensor:
        """A clip fp32 ``[F, 3, H, W]`` in 0 .. 1, of so many denoising steps."""


class PipelineModel(VideoModel):
    """A text-to-video pipeline of diffusers, called with its own defaults but for ``size``.

    Args:
        size: keywords of each call, such as ``height``, ``width`` and ``num_frames``.
    """

    def __init__(self, pipeline: Any, name: str, prompts: Sequence[str], size: Mapping[str, int]) -> None:
        self.name, self.enabled, self.prompts = name, pipeline, tuple(prompts)
        self.dtype = pipeline.dtype
        self._size = dict(size)

    def sample(self, prompt: str, seed: int, steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        fields = {"num_inference_steps": steps, "generator": generator, "output_type": "pt", **self._size}
        return self.enabled(prompt, **fields).frames[0].float().cpu().clamp(0, 1)


class WordModel(VideoModel):
    """A transformer of diffusers whose sentences are codes of words: the small model that this repository trains.

    Its folder has ``transformer`` and ``scheduler`` in diffusers' format, and ``words.json``: the ``words``, the codes
    ``[place][word][channel]`` of each at each place of a sentence, some ``prompts``, the ``size`` ``[C, F, H, W]`` of a
    clip, and the strength of its ``guidance``.
    """

    def __init__(self, transformer: Any, scheduler: Any, words: Mapping[str, Any], name: str) -> None:
        self.name, self.enabled, self.prompts = name, transformer, tuple(words["prompts"])
        self.dtype = transformer.dtype
        self.scheduler, self._words, self._size = scheduler, list(words["words"]), tuple(words["size"])
        self._codes, self._guidance = torch.tensor(words["codes"]), float(words["guidance"])

    def embed(self, prompt: str) -> Tensor:
        """``[1, places, channels]``.

        Raises:
            ValueError: a word that it has none of, or too many.
        """
        found = prompt.split()
        unknown = [word for word in found if word not in self._words]
        if unknown or not 0 < len(found) <= len(self._codes):
            words = ", ".join(filter(None, self._words))
            raise ValueError(
                f"prompts of {self.name} have 1 to {len(self._codes)} of the words {words}; got {prompt!r}"
            )
        out = torch.zeros(1, *self._codes.shape[::2])
        for place, word in enumerate(found):
            out[0, place] = self._codes[place, self._words.index(word)]
        return out

    def sample(self, prompt: str, seed: int, steps: int) -> Tensor:
        noise = torch.randn(1, *self._size, generator=torch.Generator().manual_seed(seed))
        text = self.embed(prompt)
        clip = sampled(self.enabled, self.scheduler, noise, text, torch.zeros_like(text), steps, self._guidance)
        return ((clip[0].permute(1, 0, 2, 3) + 1) / 2).clamp(0, 1)


@torch.no_grad()
def sampled(
    transformer: Any, scheduler: Any, noise: Tensor, text: Tensor, no_text: Tensor, steps: int, guidance: float
) -> Tensor:
    """Clips of noise ``[B, C, F, H, W]``, by classifier-free guidance; its two branches are one batch."""
    scheduler.set_timesteps(steps)
    dtype = transformer.dtype
    x, both = noise * getattr(scheduler, "init_noise_sigma", 1.0), torch.cat([text, no_text]).to(dtype)
    scaled = getattr(scheduler, "scale_model_input", lambda sample, _: sample)  # those for flows have none
    for t in scheduler.timesteps:
        times, given = t.expand(2 * len(x)), scaled(x, t)
        found = transformer(torch.cat([given, given]).to(dtype), times, both, return_dict=False)[0]
        with_text, without = found.float().chunk(2)
        x = scheduler.step(without + guidance * (with_text - without), t, x, return_dict=False)[0]
    return x


def load_video_model(
    folder: Path,
    prompts: Sequence[str] = (),
    size: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> VideoModel:
    """A folder with ``model_index.json`` as a pipeline, and one with ``words.json`` as a `WordModel`.

    Args:
        dtype: of its products; what diffusers keeps in fp32 stays so.

    Raises:
        ValueError: neither; or what is there cannot be loaded.
    """
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        if (folder / "model_index.json").is_file():
            pipeline: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
            return PipelineModel(pipeline, folder.name, prompts, size or {})
        if (folder / "words.json").is_file():
            if size:
                raise ValueError(f"{folder} makes clips of the size in its words.json; leave {', '.join(size)} out")
            words = json.loads((folder / "words.json").read_text())
            transformer_class = getattr(diffusers, _class_in(folder / "transformer"))
            scheduler_class = getattr(diffusers, _class_in(folder / "scheduler", "scheduler_config.json"))
            transformer = transformer_class.from_pretrained(folder / "transformer", torch_dtype=dtype).eval()
            model = WordModel(transformer, scheduler_class.from_pretrained(folder / "scheduler"), words, folder.name)
            model.prompts = tuple(prompts) or model.prompts
            return model
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
    raise ValueError(
        f"{folder} is no video model: it has neither model_index.json, as a pipeline of diffusers, nor words.json"
    )


def _class_in(folder: Path, name: str = "config.json") -> str:
    return json.loads((folder / name).read_text())["_class_name"]


def header_of(model: VideoModel) -> Record:
    """The ``run`` line: of which model, on which machine."""
    import diffusers

    from gossamer.evaluate.results import machine_of

    parameters = [p for part in model.parts for p in part.parameters()]
    device = parameters[0].device if parameters else torch.device("cpu")
    return {
        "kind": "run",
        "format": FORMAT,
        "run": uuid.uuid4().hex[:8],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": {
            "name": model.name,
            "architecture": type(model.enabled).__name__,
            "fingerprint": model.fingerprint(),
            "parameters": sum(p.numel() for p in parameters),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "machine": machine_of(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "gossamer": __version__,
        },
    }


def compare_videos(
    model: VideoModel,
    policies: Iterable[Policy],
    *,
    steps: int,
    seeds: Sequence[int],
    beside: Policy | None = None,
    known: Iterable[tuple[str, str, int]] = (),
    write: Callable[[Record, Tensor, Tensor], None],
) -> None:
    """Make each prompt's clip of each seed densely, and then by each policy, and hold it beside the dense one.

    Args:
        steps: of denoising.
        beside: what the dense clips are made with; None: the model's own attention.
        known: method's label, prompt and seed of what is not to be made again.
        write: gets each record, the clip and the dense one. The documentation of the format (``results-format``) has
            all fields of a record.
    """
    skipped, wanted = set(known), list(policies)
    for prompt in model.prompts:
        for seed in seeds:
            left = [policy for policy in wanted if (label_of(policy), prompt, seed) not in skipped]
            if not left:
                continue
            dense = _sampled(model, beside, prompt, seed, steps)[0]
            for policy in left:
                clip, made = _sampled(model, policy, prompt, seed, steps)
                finite = bool(clip.isfinite().all())
                clip = clip.nan_to_num(0.0)
                near = psnr(clip, dense)
                record = {
                    "kind": "clip",
                    **policy_fields(policy),
                    "model": model.name,
                    "shape": list(clip.shape),
                    "prompt": prompt,
                    "seed": seed,
                    "steps": steps,
                    "finite": finite,
                    "psnr": None if near == float("inf") else round(near, 4),
                    "ssim": round(ssim(clip, dense), 6),
                    "distance": round(feature_distance(clip, dense), 6),
                    **made,
                }
                write(record, clip, dense)


def _sampled(model: VideoModel, policy: Policy | None, prompt: str, seed: int, steps: int) -> tuple[Tensor, Record]:
    """A clip, and what a line says of its making."""
    if policy is None:
        return model.sample(prompt, seed, steps), {}
    with enable(model.enabled, policy, steps=steps) as handle:
        started = time.perf_counter()
        clip = model.sample(prompt, seed, steps)
        seconds = time.perf_counter() - started
        by_step = [_of_step(handle.stats(step=step)) for step in handle.steps]
        reasons: dict[str, int] = {}
        for layer in handle.stats():
            for reason, count in layer.fallbacks.items() if layer.layer is not None else ():
                reasons[reason] = reasons.get(reason, 0) + count
    return clip, {"seconds": round(seconds, 4), "dense_because": reasons, "by_step": by_step}


def _of_step(stats: Stats) -> Record:
    layers = [layer for layer in stats if layer.layer is not None]
    return {
        "density": round(sum(layer.density for layer in layers) / max(1, len(layers)), 6),
        "plan_s": round(sum(layer.plan_seconds for layer in layers), 6),
        "attention_s": round(sum(layer.attention_seconds for layer in layers), 6),
    }
