"""``gossamer eval-video MODEL``: clips of one seed, dense and with sparse attention."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.cli.common import BadInput, add_command, first_line, one_line, print_json, table, unicode
from gossamer.cli.specs import parse_method, split_specs
from gossamer.evaluate.clips import clip_rows, clip_table
from gossamer.evaluate.records import read_own
from gossamer.policy import Policy
from gossamer.profiles import Profile
from gossamer.report.png import png

__all__ = ["add_parser", "side_by_side"]

Record = dict[str, Any]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FRAMES, _LARGEST = 4, 96  # of the frames in a line: how many, and their longer side


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
    parser.add_argument(
        "--profiles", type=Path, nargs="+", default=[], metavar="FILE", help="methods by layer and head, besides"
    )
    parser.add_argument(
        "--beside", metavar="METHOD", help="what dense clips are made with (default: the model's own attention)"
    )
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32", help="(default: %(default)s)")
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
    if arguments.limit is not None and arguments.limit < 1:
        raise BadInput(f"--limit must be at least 1, got {arguments.limit}")
    try:
        from gossamer.evaluate.video import compare_videos, header_of, load_video_model
    except ImportError as error:
        raise BadInput(f"eval-video needs diffusers ({error}): pip install 'gossamer[diffusers]'") from error
    try:
        policies, beside = _policies(arguments)
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    except OSError as error:
        raise BadInput(f"cannot read {error.filename}: {error.strerror}") from error
    lines = _read(arguments.out)
    try:
        if arguments.pictures is not None:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
        if arguments.out is not None:
            arguments.out.open("ab").close()
    except OSError as error:
        raise BadInput(f"cannot write {error.filename}: {error.strerror}; name another") from error
    try:
        dtype = _DTYPES[arguments.dtype]
        model = load_video_model(arguments.model, _prompts(arguments.prompts), _size(arguments.size), dtype)
    except ValueError as error:
        raise BadInput(first_line(error)) from error
    model.prompts = model.prompts[: arguments.limit]
    if not model.prompts:
        raise BadInput("there is no prompt: give a file with --prompts")
    of = {
        "model": unicode(model.name),
        "steps": arguments.steps,
        "size": arguments.size,
        "dtype": arguments.dtype,
        "beside": arguments.beside or "",
    }
    header = header_of(model)
    _check_model(arguments.out, header, [line for line in lines if line["kind"] == "run"])
    clips = [line for line in lines if line["kind"] == "clip"]
    found = [clip for clip in clips if {name: clip.get(name) for name in of} == of]
    shown, begun = {clip["method"] for clip in found}, [False]

    def write(record: Record, clip: Tensor, dense: Tensor) -> None:
        if record["method"] not in shown:
            record["frames"] = _small(dense, clip)
        shown.add(record["method"])
        record |= of | {"run": header["run"]}
        found.append(record)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as out:
                for line in [record] if begun[0] else [header, record]:
                    out.write(json.dumps(line, allow_nan=False) + "\n")
            begun[0] = True
        if arguments.pictures is not None:
            name = f"{record['method']} {record['prompt']} {record['seed']}"
            mark = hashlib.sha256(json.dumps([name, of]).encode()).hexdigest()[:8]
            readable = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:100]
            path = arguments.pictures / f"{readable}-{mark}.png"
            path.write_bytes(side_by_side(dense, clip))
        print(one_line(f"{record['method']}: {record['prompt']}, {record['seconds']:.1f} s"), file=sys.stderr)

    try:
        made = [(clip["method"], clip["prompt"], clip["seed"]) for clip in found]
        seeds = range(arguments.seeds)
        compare_videos(model, policies, steps=arguments.steps, seeds=seeds, beside=beside, known=made, write=write)
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    rows = clip_rows(found)
    if arguments.json:
        print_json({"rows": [row.to_dict() for row in rows]})
        return 0
    print(table(clip_table(rows)))
    return 0


def _policies(arguments: argparse.Namespace) -> tuple[list[Policy], Policy | None]:
    """Of the methods and profiles, and of what dense clips are made with.

    Raises:
        ValueError, TypeError: a name, a field or a file that is none.
        OSError: a file that cannot be read.
    """
    if not arguments.methods and not arguments.profiles:
        raise ValueError("there is no method: name some with --methods, or give --profiles")
    specs = split_specs(arguments.methods) if arguments.methods else []
    policies = [Policy(parse_method(spec), min_tokens=arguments.min_tokens) for spec in specs]
    for path in arguments.profiles:
        policies.append(dataclasses.replace(Policy.of(Profile.load(path)), min_tokens=arguments.min_tokens))
    beside = None if arguments.beside is None else Policy(parse_method(arguments.beside))
    return policies, beside


def side_by_side(dense: Tensor, clip: Tensor, most: int = 8) -> bytes:
    """A PNG of up to ``most`` frames of clips ``[F, 3, H, W]`` in 0 .. 1, the dense ones above."""
    count = min(most, len(dense))
    chosen = torch.linspace(0, len(dense) - 1, count).round().long()
    rows = [torch.cat(list(x[chosen]), dim=2) for x in (dense, clip)]
    picture = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().to(torch.uint8)
    return png(picture.contiguous().numpy().tobytes(), picture.shape[1], picture.shape[0], 3)


def _small(dense: Tensor, clip: Tensor) -> str:
    """`side_by_side` in base64, of few and small frames."""
    scale = min(1.0, _LARGEST / max(dense.shape[2:]))
    size = [max(1, round(side * scale)) for side in dense.shape[2:]]
    small = [F.interpolate(x, size, mode="area") if scale < 1 else x for x in (dense, clip)]
    return base64.b64encode(side_by_side(small[0], small[1], _FRAMES)).decode()


def _read(out: Path | None) -> list[Record]:
    """The lines of a file to go on with; what was cut off at its end goes."""
    if out is None or not out.exists():
        return []
    try:
        records, whole = read_own(out)
        others = sorted({record["kind"] for record in records} - {"run", "clip"})
        if others:
            raise ValueError(f"{out} has lines of kind {others[0]}; choose another --out")
        if whole < out.stat().st_size:
            with out.open("r+b") as file:
                file.truncate(whole)
    except OSError as error:
        raise BadInput(f"cannot read {out}: {error.strerror}; choose another --out") from error
    except ValueError as error:
        raise BadInput(first_line(error)) from error
    return records


def _check_model(out: Path | None, header: Record, runs: list[Record]) -> None:
    mine = header["model"]["fingerprint"]
    for run in runs:
        theirs = (run.get("model") or {}).get("fingerprint")
        if theirs != mine:
            raise BadInput(f"{out} holds clips of another model or dtype ({theirs}, now {mine}); choose another --out")


def _prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {first_line(error)}; give a text file with one prompt a line") from error
    if not found:
        raise BadInput(f"{path} has no prompt; give a text file with one prompt a line")
    return found


def _size(text: str) -> dict[str, int]:
    found = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if not name.isidentifier() or not number.isdigit():
            raise BadInput(f"--size takes NAME=NUMBER,..., such as height=256,num_frames=17; got {part!r}")
        found[name] = int(number)
    return found
