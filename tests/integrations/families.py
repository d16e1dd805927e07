"""Which model families run under gossamer, found by running a tiny random model of each: writes families.json.

    python tests/integrations/families.py [--only FAMILY ...] [--out FILE]

Every family goes through `gossamer.verify`. Families that are not run keep their record.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here is to be downloaded

import torch
import transformers
from tiny_families import LISTED, build

import gossamer
from gossamer.integrations.transformers.verify import FULL_BUDGET, SITUATIONS

FILE = Path(__file__).with_name("families.json")
SECONDS = 20
OUTCOMES = ("sparse", "dense", "refused", "unsupported", "wrong", "model fails", "not built")


class _TooLong(BaseException):
    """No `Exception`: what catches those must let it pass."""


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def record(family: str, seconds: int = SECONDS) -> dict[str, Any]:
    """What became of a family: its class, the outcome, and what there is to say about it."""
    found: dict[str, Any] = {"class": LISTED[family].model, "task": LISTED[family].task}
    try:
        with _limited(seconds):
            model = build(family)
    except (Exception, _TooLong) as error:
        return found | {"outcome": "not built", "why": _line(error)}
    try:
        with _limited(seconds):
            return found | {"stock": model.config._attn_implementation} | _verified(model)
    except _TooLong as error:
        return found | {"outcome": "not built", "why": _line(error)}


def _verified(model: Any) -> dict[str, Any]:
    try:
        checks = gossamer.verify(model).to_dict()["checks"]
    except (TypeError, ValueError) as error:
        outcome = "model fails" if "has no vocabulary" in str(error) else "refused"
        return {"outcome": outcome, "why": _line(error)}
    except Exception as error:
        return {"outcome": "model fails", "why": _line(error)}
    failures = {check["situation"]: check["failure"] for check in checks if check["failure"]}
    if all(check["ok"] is None for check in checks):
        return {"outcome": "model fails", "why": next(iter(failures.values())).removeprefix("stock: ")}
    wrong = {check["situation"]: _wrong(check) for check in checks if check["ok"] is False}
    own = [failures.get(situation) or "" for situation in wrong]
    if wrong and all(failure.startswith("NotImplementedError") for failure in own):
        return {"outcome": "unsupported", "why": own[0].removeprefix("NotImplementedError: ")}
    if wrong:
        return {"outcome": "wrong", "situations": wrong}
    layers = _layers(model)
    found = {"outcome": "sparse" if layers["sparse_layers"] else "dense"} | layers
    left_out = [check["situation"] for check in checks if check["ok"] is None]
    return found | ({"model_cannot": left_out} if left_out else {})


def _wrong(check: dict[str, Any]) -> str:
    return check["failure"] or f"differs by {check['difference']:.1e} of {check['largest']:.1e}"


def _layers(model: Any) -> dict[str, Any]:
    """Layers that run a prompt sparse, and why others run it dense. A layer without attention is neither."""
    ids = torch.randint(4, 90, (2, 64), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    with torch.no_grad(), gossamer.enable(model, "max_relative", **FULL_BUDGET) as handle:
        model(input_ids=ids, **more)
        rows = list(handle.stats())
    reasons = {"-" if row.layer is None else str(row.layer): sorted(row.fallbacks) for row in rows if row.fallbacks}
    return {"sparse_layers": sum(row.sparse_calls > 0 for row in rows), "dense_layers": reasons}


def _line(error: BaseException) -> str:
    """The first line of what was said, by whoever said it first."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return said or type(error).__name__


def write(path: Path, records: dict[str, dict[str, Any]]) -> None:
    """Whole, or not at all."""
    about = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    part = path.with_suffix(".part")
    families = dict(sorted(records.items()))
    part.write_text(
        json.dumps({"about": about, "situations": list(SITUATIONS), "families": families}, indent=1) + "\n",
        encoding="utf-8",
    )
    part.replace(path)


def read(path: Path = FILE) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["families"] if path.exists() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=sorted(LISTED), metavar="FAMILY", help="run these alone")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    records = {name: found for name, found in read(options.out).items() if name in LISTED}
    for family in options.only or LISTED:
        started = time.perf_counter()
        records[family] = found = record(family)
        more = found.get("why") or found.get("situations") or found.get("dense_layers") or ""
        print(f"{family:<28} {found['outcome']:<12} {time.perf_counter() - started:5.1f} s  {more}", flush=True)
        write(options.out, records)
    counts = [sum(found["outcome"] == outcome for found in records.values()) for outcome in OUTCOMES]
    print(", ".join(f"{count} {outcome}" for outcome, count in zip(OUTCOMES, counts, strict=True)))
    return int(any(found["outcome"] == "wrong" for found in records.values()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("gossamer").setLevel(logging.ERROR)
    sys.exit(main())
