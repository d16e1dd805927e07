"""Speed of the C++ executor against torch's SDPA and FlexAttention, and vLLM where installed, on this machine.

    python benchmarks/cpu.py [--only SECTION,...] [--quick] [--threads N] [--out FILE]

First the contenders are verified against fp64; nothing is timed while one of them is wrong. Contenders take turns in
one process on inputs that are fresh each round, and figures are medians of seven rounds (three where a call takes more
than 40 seconds). Beside seconds on the clock stands CPU time, and how much of the machine other programs took.
Planning is measured by planning.py, whole layers by end_to_end.py; pictures.py draws the figures of this one.
A section that is measured again replaces its rows in the file; the others stay. A section whose contender is missing
here is skipped, and the file says why, unless it has rows of that section already.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

import torch
from cpu_sections import SECTIONS
from timing import ROUNDS, Bystanders, machine, write
from vllm_attention import Unavailable, versions
from workloads import verify

from gossamer.ops import cpu

RESULTS = Path(__file__).parent / "results" / "cpu.json"
SHOWN = (
    "speedup",
    "speedup_over_flex",
    "speedup_over_vllm",
    "speedup_over_vllm_with_cache_write",
    "gflops",
    "gb_per_s",
    "share_of_gemm",
    "efficiency",
    "pair_cost_over_blocks",
    "exponent",
    "beyond_packed_mib",
)


def line(row: dict) -> str:
    """A row for the terminal."""
    where = [str(row[name]) for name in ("dtype", "length", "dim", "isa") if name in row]
    figures = [f"{name} {row[name]}" for name in SHOWN if row.get(name) is not None]
    density = f"{row['density']:.3f}" if "density" in row else ""
    return f"{row['what']:<28} {' '.join(where):<32} {density:>6}  {'  '.join(figures)}"


def measure(name: str, quick: bool, threads: int) -> dict:
    """One section, with its circumstances."""
    print(f"\n{name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}")
    bystanders, started, rows = Bystanders(), time.perf_counter(), []
    missing = None
    try:
        for row in SECTIONS[name](quick):
            print(line(row), flush=True)
            rows.append(row)
    except Unavailable as error:
        missing = str(error)
        print(f"skipped: {missing}")
    share = bystanders.share()
    if share:
        print(f"other programs used {share:.0%} of the machine")
    return {
        "machine": machine() | versions(),
        "threads": threads,
        "rounds": ROUNDS,
        "date": date.today().isoformat(),
        "seconds": round(time.perf_counter() - started, 1),
        "used_by_others": share,
        **({} if missing is None else {"skipped": missing}),
        "rows": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing unless --out is given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name} in results/")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    unknown = sorted(set(chosen) - set(SECTIONS))
    if unknown:
        parser.error(f"--only takes {', '.join(SECTIONS)}; got {unknown[0]!r}")
    if not cpu.is_available():
        print(cpu.why_unavailable(), file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    try:
        verify()
    except AssertionError as error:
        print(f"nothing timed: {error}", file=sys.stderr)
        return 1
    out = arguments.out or (None if arguments.quick else RESULTS)
    report: dict = {"sections": {}}
    if out is not None and out.exists():
        report = {"sections": json.loads(out.read_text()).get("sections", {})}
    for name in chosen:
        section = measure(name, arguments.quick, arguments.threads)
        if "skipped" in section and report["sections"].get(name, {}).get("rows"):
            print(f"the rows that {out} has stay")
        elif out is not None:
            report["sections"][name] = section
            report["sections"] = {n: report["sections"][n] for n in SECTIONS if n in report["sections"]}
            write(out, report)
            print(f"wrote {name} to {out}")
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
