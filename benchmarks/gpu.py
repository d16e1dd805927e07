"""Speed of the Triton kernels and planner on a CUDA device, in commands of at most eight minutes.

    python benchmarks/gpu.py [--quick] [--only SECTION,...] [--tune] [--minutes M] [--out FILE]
    python benchmarks/gpu.py --verify [--quick] [--only GROUP,...]

First kernels and planners are verified against fp64, at small sizes and at those that are timed; nothing is timed while
one of them is wrong. Contenders take turns on inputs that are fresh each round, measured with CUDA events after the L2
cache was flushed; figures are medians of seven rounds (fewer where a call takes seconds). What would not end in time is
not begun, and its row says so. The file stands in a folder of the device, beside those of others, and is whole after
each row; run again, what it lacks is measured.

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

from gpu_report import Report, line
from gpu_sections import SECTIONS
from gpu_setting import Setting
from gpu_timing import COMPILING_SECONDS, ROUNDS, Budget, Timer, machine, reason
from gpu_verify import GROUPS, verify
from machines import results

NAME = "gpu.json"
MINUTES = 8.0
VERIFY_SECONDS = {False: 90.0, True: 120.0}  # before timing, and of --verify


def verified(
    device: torch.device, whole: bool, small: bool, groups: tuple[str, ...] = GROUPS, seconds: float | None = None
) -> dict[str, object] | None:
    """Verify, and print what is wrong: how many checks were right and which were left out, or None if one failed."""
    started = time.perf_counter()
    limit = VERIFY_SECONDS[whole] if seconds is None else min(seconds, VERIFY_SECONDS[whole])
    budget = Budget(limit if device.type == "cuda" else 3600.0)
    count, failures, skipped = verify(device, whole=whole, small=small, groups=groups, budget=budget)
    for name, message in failures[:20]:
        print(f"WRONG  {name}: {message}", file=sys.stderr)
    seconds = time.perf_counter() - started
    left_out = f", {len(skipped)} not run for want of time or memory" if skipped else ""
    print(f"verified: {count - len(failures)} of {count} checks right{left_out}, {seconds:.0f} s", flush=True)
    for name in skipped[:20] if whole else ():
        print(f"not run: {name}", file=sys.stderr)
    return None if failures else {"checks": count, "left_out": skipped}


def measure(setting: Setting, chosen: list[str], report: Report) -> list[str]:
    """Time the sections' cells that the report lacks; returns the cells that broke."""
    broken = []
    for name in chosen:
        print(f"{name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}", flush=True)
        for cell in SECTIONS[name](setting):
            if report.has(name, cell.name):
                continue
            refusal = setting.budget.refusal(COMPILING_SECONDS)
            if refusal is not None:
                keep(report, name, cell.name, {"what": f"{name} {cell.name}", "skipped": refusal})
                continue
            try:
                for row in cell.rows():
                    keep(report, name, cell.name, row)
                report.finish(name, cell.name)
            except torch.OutOfMemoryError as error:
                keep(report, name, cell.name, {"what": f"{name} {cell.name}", "failure": reason(error)})
                report.finish(name, cell.name)
            except Exception as error:  # the other cells are still worth their time
                broken.append(f"{name} {cell.name}")
                keep(report, name, cell.name, {"what": f"{name} {cell.name}", "failure": reason(error)})
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
    return broken


def keep(report: Report, section: str, cell: str, row: dict) -> None:
    report.add(section, cell, row)
    print(line(row), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="the whole conformance matrix; time nothing")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing unless --out is given")
    parser.add_argument("--only", help=f"of {', '.join(SECTIONS)}; with --verify of {', '.join(GROUPS)}")
    parser.add_argument("--tune", action="store_true", help="measure other tile shapes too, after all sections")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"end within, verifying included: {MINUTES:g}")
    parser.add_argument("--out", type=Path, help=f"default: {NAME} in the device's folder in results/")
    arguments = parser.parse_args()
    budget = Budget(60 * arguments.minutes)
    known = GROUPS if arguments.verify else tuple(SECTIONS)
    # The table's figures come first, whatever is tuned.
    default = known if arguments.verify else tuple(name for name in known if name != "tune" or arguments.tune)
    chosen = arguments.only.split(",") if arguments.only else list(default)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        parser.error(f"--only takes {', '.join(known)}; got {unknown[0]!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.quick:
        print("no CUDA device: --quick runs small sizes under Triton's interpreter", file=sys.stderr)
        return 1
    interpreted = device.type == "cpu"
    if arguments.verify:
        return 0 if verified(device, True, interpreted, tuple(chosen)) else 1
    here = machine(device)
    out = arguments.out or (None if arguments.quick else results(NAME, here))
    about = {"machine": here, "date": date.today().isoformat(), "rounds": ROUNDS, "quick": arguments.quick}
    report = Report(out, about)
    if report.verified:
        print(f"verified before, says {out}")
    else:
        found = verified(device, False, interpreted, seconds=budget.left() / 2)
        if not found:
            print("nothing timed", file=sys.stderr)
            return 1
        report.note(verified=found)
    broken = measure(Setting(device, arguments.quick, Timer(device), budget), chosen, report)
    seconds = 60 * arguments.minutes - budget.left()
    report.note(seconds=round(seconds, 1))
    print(f"{seconds:.0f} s" + (f"; wrote {out}" if out is not None else ""))
    for name in broken:
        print(f"BROKEN  {name}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
