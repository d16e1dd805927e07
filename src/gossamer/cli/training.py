"""What the subcommands that train share: texts, progress, and where the result goes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gossamer.cli.common import BadInput
from gossamer.profiles.files import read_text

__all__ = ["check_length", "check_place", "check_seed", "read_texts", "step_progress"]


def step_progress(steps: int) -> Callable[[int, float], None]:
    """A bar on a terminal, else ten lines."""
    from tqdm import tqdm

    begun = time.monotonic()
    bar = tqdm(total=steps, file=sys.stderr, disable=not sys.stderr.isatty(), unit="step")
    first: list[int] = []

    def show(step: int, loss: float) -> None:
        first.append(step) if not first else None
        bar.set_description(f"loss {loss:.4g}")
        bar.update(step - bar.n)
        if step == steps:
            bar.close()
        if bar.disable and (step == steps or step % max(1, steps // 10) == 0):
            spent = time.monotonic() - begun
            left = spent / (step - first[0] + 1) * (steps - step)
            print(
                f"step {step}/{steps}: loss {loss:.4g}; {spent:.0f} s so far, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    return show


def check_seed(seed: int) -> None:
    if abs(seed) >= 2**63:
        raise BadInput(f"--seed must fit into 64 bits, got {seed}")


def check_place(out: Path) -> None:
    """That a file or a folder can be written there, and that nothing is lost."""
    if os.path.lexists(out):
        raise BadInput(f"{out} is there already; give another name, or remove it")
    if not os.path.isdir(out.parent) or not os.access(out.parent, os.W_OK):
        raise BadInput(f"cannot write into {out.parent}; give another --out")


def check_length(length: int, limit: int | None) -> None:
    """That a model takes samples of so many tokens."""
    if limit is not None and length > limit:
        raise BadInput(f"this model takes {limit} tokens, got a length of {length}; add --length {limit}")


def read_texts(names: list[str]) -> list[str]:
    return [_text(name) for name in names]


def _text(name: str) -> str:
    try:
        return read_text(name)
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8 text") from error
    except OSError as error:
        raise BadInput(f"cannot read {name}: {error.strerror}") from error
