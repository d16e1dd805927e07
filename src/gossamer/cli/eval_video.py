"""``gossamer eval-video MODEL``: clips of one seed, dense and with sparse attention."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.cli.common import BadInput, add_command, first_line, one_line, print_json, table, unicode
from gossamer.cli.specs import parse_method, split_specs
from gossamer.policy import Policy
from gossamer.profiles.files import parse_json
from gossamer.report.png import png

__all__ = ["add_parser"]

Record = dict[str, Any]
_FIELDS = {"method", "model", "size", "prompt", "seed", "steps", "seconds", "by_step", "psnr", "ssim", "distance"}


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "eval-video", execute, "measure what videos lose under sparse attention")
    parser.add_argument(
        "model", type=Path, help="folder of a pipeline of diffusers, or of a small model with words.json"
    )
    parser.add_argument(
        "--methods",
        default="dense,adaspa,attention_tile",
        metavar="LIST",
        help="names with fields (default: %(default)s)",
    )
    parser.add_argument("--prompts", type=Path, help="file with one prompt a line (default: those of words.json)")
    parser.add_argument("--limit", type=int, help="of the prompts, so many")
    parser.add_argument("--seeds", type=int, default=1, help="clips of each prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of denoising (default: %(default)s)")
    parser.add_argument(
        "--size",
        default="",
        metavar="NAME=NUMBER,...",
        help="of a pipeline's call, such as height=256,width=256,num_frames=17",
    )
    parser.add_argument("--min-tokens", type=int, default=0, help="shorter clips run dense (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="results, a line a clip; an existing file goes on")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write frames of each clip below the dense ones"
    )


def execute(arguments: argparse.Namespace) -> int:
    for name in ("seeds", "steps"):
        if getattr(arguments, name) < 1:
            raise BadInput(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    try:
        from gossamer.evaluate.video import compare_videos, load_video_model
    except ImportError as error:
        raise BadInput(f"eval-video needs diffusers ({error}): pip install 'gossamer[diffusers]'") from error
    try:
        specs = split_specs(arguments.methods)
        policies = [Policy(parse_method(spec), min_tokens=arguments.min_tokens) for spec in specs]
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    if arguments.limit is not None and arguments.limit < 1:
        raise BadInput(f"--limit must be at least 1, got {arguments.limit}")
    of = {"model": unicode(arguments.model.name), "steps": arguments.steps, "size": arguments.size}
    found = [record for record in _read(arguments.out) if {name: record[name] for name in of} == of]
    try:
        if arguments.pictures is not None:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
        if arguments.out is not None:
            arguments.out.open("ab").close()
    except OSError as error:
        raise BadInput(f"cannot write {error.filename}: {error.strerror}; name another") from error

    def write(record: Record, clip: Tensor, dense: Tensor) -> None:
        record |= of
        found.append(record)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(record) + "\n")
        if arguments.pictures is not None:
            name = f"{record['method']} {record['prompt']} {record['seed']}"
            mark = hashlib.sha256(json.dumps([name, of]).encode()).hexdigest()[:8]
            readable = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:100]
            path = arguments.pictures / f"{readable}-{mark}.png"
            path.write_bytes(side_by_side(dense, clip))
        print(one_line(f"{record['method']}: {record['prompt']}, {record['seconds']:.1f} s"), file=sys.stderr)

    try:
        model = load_video_model(arguments.model, _prompts(arguments.prompts), _size(arguments.size))
        model.prompts = model.prompts[: arguments.limit]
        if not model.prompts:
            raise BadInput("there is no prompt: give a file with --prompts")
        made = [(record["method"], record["prompt"], record["seed"]) for record in found]
        compare_videos(model, policies, steps=arguments.steps, seeds=range(arguments.seeds), known=made, write=write)
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    rows = summarise(found)
    if arguments.json:
        print_json({"rows": rows})
        return 0
    print(table([["method", "clips", "density", "PSNR", "SSIM", "distance", "attention s", "s"], *map(_cells, rows)]))
    return 0


def summarise(records: Sequence[Record]) -> list[Record]:
    """A row for each method: means over its clips; of PSNR over those that differ from the dense clip."""
    rows = []
    for name in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == name]
        steps = [step for record in own for step in record["by_step"]]
        differing = [record["psnr"] for record in own if record["psnr"] is not None]
        rows.append(
            {
                "method": name,
                "clips": len(own),
                "density": _mean([step["density"] for step in steps]),
                "psnr": _mean(differing),
                "ssim": _mean([record["ssim"] for record in own]),
                "distance": _mean([record["distance"] for record in own]),
                "attention_s": _mean([sum(s["plan_s"] + s["attention_s"] for s in r["by_step"]) for r in own]),
                "seconds": _mean([record["seconds"] for record in own]),
            }
        )
    return rows


def side_by_side(dense: Tensor, clip: Tensor, most: int = 8) -> bytes:
    """A PNG of up to ``most`` frames of clips ``[F, 3, H, W]`` in 0 .. 1, the dense ones above."""
    count = min(most, len(dense))
    chosen = torch.linspace(0, len(dense) - 1, count).round().long()
    rows = [torch.cat(list(x[chosen]), dim=2) for x in (dense, clip)]
    picture = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().to(torch.uint8)
    return png(picture.contiguous().numpy().tobytes(), picture.shape[1], picture.shape[0], 3)


def _cells(row: Record) -> list[str]:
    shown = {"density": ".3f", "psnr": ".1f", "ssim": ".4f", "distance": ".4f", "attention_s": ".2f", "seconds": ".2f"}
    numbers = ["-" if row[name] is None else format(row[name], form) for name, form in shown.items()]
    return [row["method"], str(row["clips"]), *numbers]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _read(out: Path | None) -> list[Record]:
    if out is None or not out.exists():
        return []
    records = []
    try:
        lines = out.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {out}: {first_line(error)}; choose another --out") from error
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = parse_json(line.encode())
            if record["kind"] != "clip" or not record.keys() >= _FIELDS:
                raise ValueError
            for step in record["by_step"]:
                if not all(isinstance(step[name], int | float) for name in ("density", "plan_s", "attention_s")):
                    raise ValueError
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{out}, line {number}, is no line of eval-video; choose another --out") from None
        records.append(record)
    if lines[-1]:  # a line that was cut off
        out.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
    return records


def _prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {first_line(error)}; give a text file with one prompt a line") from error


def _size(text: str) -> dict[str, int]:
    found = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if not name.isidentifier() or not number.isdigit():
            raise BadInput(f"--size takes NAME=NUMBER,..., such as height=256,num_frames=17; got {part!r}")
        found[name] = int(number)
    return found
