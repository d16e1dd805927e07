"""Speed of the Triton executor and planner on a CUDA device, in one call of less than nine minutes.

    python benchmarks/gpu.py [--quick] [--only SECTION,...] [--tune] [--minutes M] [--out FILE]
    python benchmarks/gpu.py --verify [--quick]

First kernels and planners are verified against fp64; nothing is timed while one of them is wrong. Contenders take turns
on inputs that are fresh each round, measured with CUDA events after the L2 cache was flushed; figures are medians of
seven rounds (three where a call takes seconds). What does not fit the time is left out, and the file says so.

--verify runs the whole conformance matrix and times nothing. --quick takes small sizes; without a CUDA device it runs
under Triton's interpreter, where it shows that everything works and nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import date
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from gpu_sections import SECTIONS, Setting
from gpu_timing import ROUNDS, Timer, machine
from gpu_verify import verify
from timing import write

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SHOWN = (
    "density",
    "tflops",
    "gb_per_s",
    "efficiency",
    "share_of_best_sdpa",
    "speedup_over_flex",
    "speedup_over_sdpa",
    "speedup_over_dense",
    "planning_share",
    "plan_mib",
    "peak_gib",
    "seconds_whole",
    "failure",
)


def line(row: dict) -> str:
    """A row for the terminal."""
    where = " ".join(f"{row[name]}" for name in ("length", "dim") if name in row)
    figures = [f"{name} {_figure(row[name])}" for name in SHOWN if row.get(name) is not None]
    seconds = row.get("median_s") or row.get("seconds_whole")
    if seconds:
        figures.insert(0, f"{seconds * 1e3:.2f} ms")
    return f"{row['what']:<44} {where:>11}  {'  '.join(figures)}"


def _figure(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return str(value)


def verified(device: torch.device, whole: bool, small: bool) -> bool:
    """Verify, and print what is wrong."""
    started = time.perf_counter()
    count, failures = verify(device, whole=whole, small=small)
    for name, message in failures[:20]:
        print(f"WRONG  {name}: {message}", file=sys.stderr)
    seconds = time.perf_counter() - started
    print(f"verified: {count - len(failures)} of {count} checks right, {seconds:.0f} s", flush=True)
    return not failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="the whole conformance matrix; time nothing")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing unless --out is given")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--tune", action="store_true", help="measure tile shapes first, as ops.triton.autotune does")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no further row after this long")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name} in results/")
    arguments = parser.parse_args()
    started = time.monotonic()
    chosen = arguments.only.split(",")
    unknown = sorted(set(chosen) - set(SECTIONS))
    if unknown:
        parser.error(f"--only takes {', '.join(SECTIONS)}; got {unknown[0]!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.quick:
        print("no CUDA device: --quick runs small sizes under Triton's interpreter", file=sys.stderr)
        return 1
    interpreted = device.type == "cpu"
    if not verified(device, whole=arguments.verify, small=interpreted):
        print("nothing timed", file=sys.stderr)
        return 1
    if arguments.verify:
        return 0
    out = arguments.out or (None if arguments.quick else RESULTS)
    setting = Setting(
        device, arguments.quick, Timer(device), lambda: time.monotonic() - started > 60 * arguments.minutes
    )
    if arguments.tune and not interpreted:
        setting.tune()
    report: dict = {"machine": machine(device), "date": date.today().isoformat(), "rounds": ROUNDS, "sections": {}}
    report |= {"quick": arguments.quick, "tuned": arguments.tune}
    for name in chosen:
        print(f"\n{name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}")
        rows = []
        for row in SECTIONS[name](setting):
            print(line(row), flush=True)
            rows.append(row)
        report["sections"][name] = {"complete": not setting.out_of_time(), "rows": rows}
        report["seconds"] = round(time.monotonic() - started, 1)
        if out is not None:
            write(out, report)
    print(f"\n{report['seconds']:.0f} s" + (f"; wrote {out}" if out is not None else ""))
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
