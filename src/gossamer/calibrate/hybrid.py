"""LongGen's hybrids (2410.01485): some layers attend everything, the others by a static pattern.

Which layers and which pattern is a profile, so that whatever runs profiles serves a hybrid; the light training that
mends a model after its conversion runs on the same profile.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import __version__
from gossamer.calibrate.training import Schedule, Training
from gossamer.integrations.transformers import enable
from gossamer.methods import Method
from gossamer.profiles import Profile
from gossamer.profiles.hybrid import hybrid_profile
from gossamer.profiles.models import config_hash, written

__all__ = ["PROFILE", "hybrid_loss", "hybrid_of", "save_hybrid", "train_hybrid"]

PROFILE = "profile.json"
"""The name of the profile in a hybrid's folder."""
_CLIP = 1.0  # largest norm of a gradient


def hybrid_of(model: Any, full: Sequence[int], pattern: Method, *, name: str = "") -> Profile:
    """`hybrid_profile` for a transformers model, with what it was made for: `gossamer.enable` checks it.

    Args:
        name: of the model, for readers.

    Raises:
        ValueError: as `hybrid_profile`.
    """
    text = model.config.get_text_config(decoder=True)
    profile = hybrid_profile(text.num_hidden_layers, text.num_attention_heads, full, pattern)
    made_for = {"config": written(model.config), "config_hash": config_hash(model.config)}
    known = {"model": name, "architecture": type(model).__name__, "library_version": __version__}
    return replace(profile, provenance=replace(profile.provenance, **made_for, **known))


def hybrid_loss(model: Any, ids: Tensor, teacher: Any = None) -> Tensor:
    """Mean over the tokens of ``ids [1, S]``: of the next token's surprise, or of ``KL(teacher || model)``, in nats.

    Args:
        teacher: a model of the same vocabulary. With one, texts without a next token count too.
    """
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    if teacher is None:
        return F.cross_entropy(logits[:-1], ids[0, 1:])
    with torch.no_grad():
        wanted = teacher(input_ids=ids.to(teacher.device), use_cache=False).logits[0].float().log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), wanted.to(logits.device), reduction="batchmean", log_target=True)


def train_hybrid(
    model: Any,
    profile: Profile,
    sample: Callable[[int], Tensor],
    schedule: Schedule,
    *,
    teacher: Any = None,
    about: Mapping[str, Any] | None = None,
    path: Path | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    save_every: int = 50,
) -> Training:
    """Train all weights of a model under a profile: the layers run as they will be served, forward and backward.

    Logits of a whole sample are held at once, in fp32: some ``16 * S * vocabulary`` bytes, with a teacher twice that.

    Args:
        model: as for `gossamer.enable`; its weights are changed. Train in float32: Adam's steps are lost in 16 bits.
        sample: token ids ``[1, S]`` for each step.
        teacher: a model whose predictions are learned, such as the model before its conversion; None: the text itself.
        about, path: see `Training`.

    Returns:
        the training with its losses.

    Raises:
        ValueError: a profile of another model; or see `Training`.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def backward(step: int) -> float:
        loss = hybrid_loss(model, sample(step).to(model.device), teacher)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), _CLIP)
        return float(loss.detach())

    settings = dict(about or {}) | {"kind": "hybrid", "profile": [[m.to_dict() for m in row] for row in profile.layers]}
    training = Training(parameters, backward, schedule, about=settings | {"distilled": teacher is not None}, path=path)
    was = model.training
    model.train()
    try:
        with enable(model, profile=profile, min_tokens=0, training=True):
            training.run(progress, save_every=save_every)
    finally:
        model.train(was)
    return training


def save_hybrid(model: Any, tokenizer: Any, profile: Profile, folder: str | os.PathLike[str]) -> None:
    """Write a model as transformers does, and its profile beside it as `PROFILE`: the whole folder, or nothing.

    Raises:
        FileExistsError: there is something of this name.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} is there already; give another name, or remove it")
    begun = folder.with_name(f".{folder.name}.{os.getpid()}.begun")
    try:
        model.save_pretrained(begun)
        tokenizer.save_pretrained(begun)
        profile.save(begun / PROFILE)
        os.replace(begun, folder)
    finally:
        shutil.rmtree(begun, ignore_errors=True)
