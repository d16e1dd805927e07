"""What ``gossamer calibrate`` writes: the profile with its provenance, and a line of results beside it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer import __version__
from gossamer.calibrate.summary import held_out_words
from gossamer.cli.common import BadInput
from gossamer.profiles import Profile, Provenance
from gossamer.profiles.files import MOST_BYTES, file_name, parse_json, read_file, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from gossamer.calibrate.samples import Samples
    from gossamer.calibrate.search import Found
    from gossamer.evaluate.subject import Subject

__all__ = ["check_places", "line_path", "write"]

_FRONTIER = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)


def line_path(out: Path) -> Path:
    """Of the line of results beside a profile."""
    return out.with_name(f"{out.name}.jsonl")


def check_places(out: Path) -> None:
    """Refuse to write over what no calibration wrote, before anything is measured.

    Raises:
        BadInput: a file of something else.
    """
    _check_place(out, _is_profile, "profile")
    _check_place(line_path(out), _is_line, "line of gossamer calibrate")


def _check_place(path: Path, ours: Callable[[Path], bool], what: str) -> None:
    try:
        if not path.exists() or (path.is_file() and ours(path)):
            return
    except (OSError, ValueError):
        pass
    raise BadInput(f"{path} exists and is no {what}: it would be lost; give another --out, or delete it first")


def _is_profile(path: Path) -> bool:
    content = read_file(path, MOST_BYTES)
    data = parse_json(content) if content else {"schema": None}
    return isinstance(data, dict) and "schema" in data


def _is_line(path: Path) -> bool:
    first = read_file(path, MOST_BYTES).partition(b"\n")[0]
    record = parse_json(first) if first else {"kind": "calibration"}
    return isinstance(record, dict) and record.get("kind") == "calibration"


def write(
    arguments: argparse.Namespace,
    subject: Subject,
    samples: Samples,
    found: Found,
    chosen: Tensor,
    facts: dict[str, Any],
) -> None:
    """Write the profile, and the line for pictures beside it.

    Args:
        facts: how it was found.

    Raises:
        OSError: they cannot be written.
    """
    from gossamer.evaluate.results import machine_of
    from gossamer.profiles.models import config_hash, written

    summary = found.summary(chosen)
    known = facts | {"samples": arguments.samples, "seed": arguments.seed, "machine": machine_of(subject.device)}
    known |= {"model_fingerprint": subject.fingerprint(), "figures": summary}
    provenance = Provenance(
        model=subject.name,
        architecture=type(subject.model).__name__,
        samples=json.dumps(known, sort_keys=True),
        lengths=tuple(sorted({sample.length for sample in samples.listed})),
        metric=f"relative L2 error of the output, mean over the prompts that chose; chosen by {found.objective}",
        held_out=held_out_words(summary),
        library_version=__version__,
        config=written(subject.model.config),
        config_hash=config_hash(subject.model.config),
        prompts_hash=facts["calibration_sha256"],
        kernel=f"{facts['cost']} on {facts['kernel']}",
        machine=str(known["machine"].get("processor", "")),
    )
    methods = found.methods(chosen)
    of_heads = found.of_choice(chosen)
    errors, costs = (_by_layer(found, of_heads[name], len(methods)) for name in ("error", "cost"))
    Profile(methods, None, provenance, errors, costs).save(arguments.out)
    from gossamer.calibrate.record import calibration_record

    line = calibration_record(subject.to_dict(), found, chosen, known, _FRONTIER)
    line["profile"] = file_name(arguments.out)
    write_whole(line_path(arguments.out), json.dumps(line, ensure_ascii=False) + "\n")


def _by_layer(found: Found, table: Tensor, layers: int) -> list[list[float | None]]:
    """Figures of heads; null for layers that were not looked at."""
    rows = dict(zip(found.layers, table.tolist(), strict=True))
    return [rows.get(layer, [None] * table.shape[1]) for layer in range(layers)]
