"""What commands that evaluate a model share: their numbers, the device, and the model with its tokenizer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from gossamer.cli.common import BadInput, first_line, unicode

if TYPE_CHECKING:
    from gossamer.evaluate.subject import Subject

__all__ = ["check_device", "check_numbers", "load_subject"]


def check_numbers(arguments: argparse.Namespace, least_of: Mapping[str, int]) -> None:
    """Refuse options below their least value, and a seed that no results file could hold."""
    for name, least in least_of.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise BadInput(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if abs(arguments.seed) >= 2**63:
        raise BadInput(f"--seed must fit into 64 bits, got {arguments.seed}")


def check_device(name: str) -> None:
    """That there is such a device here, and that it computes."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # whatever a kind of device raises that torch lacks
        raise BadInput(f"--device {name}: {first_line(error)}") from error
    if device.type == "meta":
        raise BadInput("--device meta: its tensors have a shape and no numbers; use cpu or cuda")


def load_subject(arguments: argparse.Namespace, longest: int) -> Subject:
    """The model of ``arguments``, which has prompts of up to ``longest`` tokens to read."""
    from gossamer.cli.generation import load_checked, load_tokenizer
    from gossamer.evaluate.subject import Subject

    tokenizer = load_tokenizer(arguments.model)
    if arguments.chat and not tokenizer.chat_template:
        raise BadInput("--chat: this model's tokenizer has no chat template; leave --chat out")
    # Samples are cut to their length here; the tokenizer's own limit only makes it warn.
    tokenizer.model_max_length = sys.maxsize
    model = load_checked(arguments.model, arguments.dtype, arguments.device)
    subject = Subject(model, tokenizer, unicode(arguments.model.name), chat=arguments.chat)
    if subject.max_length is not None and longest > subject.max_length:
        raise BadInput(f"this model takes {subject.max_length} tokens, got a length of {longest}; ask for less")
    return subject
