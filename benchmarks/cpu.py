"""Speed of the C++ executor against torch's SDPA and FlexAttention, and vLLM where installed, on this machine.

    python benchmarks/cpu.py [--only SECTION,...] [--missing] [--quick] [--threads N] [--out FILE]

First the contenders are verified against fp64; nothing is timed while one of them is wrong. Contenders take turns in
one process on inputs that are fresh each round, and figures are medians of seven rounds (five at 64K, three at 128K,
two there of a call of more than 40 seconds). Beside seconds on the clock stands how many threads each call got, and how
much of the machine other programs took; a call that was short of a core is repeated. All sections take somewhat over an
hour on two cores. Planning is measured by planning.py, whole layers by end_to_end.py; pictures.py draws the figures of
this one.

The file stands in a folder of this machine, beside those of others, and is written after each row. A section that is
measured again replaces its rows in the file; the others stay. With --missing only the rows are measured that the file
lacks, so that a run goes on where one was stopped. A section whose contender is missing here is skipped, and the file
says why, unless it has rows of that section already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from comparison import Request, identity
from cpu_sections import SECTIONS
from machines import machine, results
from timing import LOW_SHARE, ROUNDS, Bystanders, write
from vllm_attention import Unavailable, versions
from workloads import verify

from gossamer.backends import cpu

NAME = "cpu.json"
SHOWN = (
    "speedup",
    "speedup_over_flex",
    "speedup_over_vllm",
    "speedup_over_vllm_with_cache_write",
    "gflops",
    "gb_per_s",
    "share_of_peak",
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
    if "threads_used" in row and statistics.median(row["threads_used"]) < LOW_SHARE * torch.get_num_threads():
        figures.append(f"on {statistics.median(row['threads_used']):.1f} of {torch.get_num_threads()} threads")
    return f"{row['what']:<28} {' '.join(where):<32} {density:>6}  {'  '.join(figures)}"


def differing(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What makes figures of two sections incomparable: field, old value, new value."""
    for field in ("cpu", "generation", "cores", "torch"):
        if old["machine"].get(field) != new["machine"].get(field):
            yield field, old["machine"].get(field), new["machine"].get(field)
    if old.get("threads", new["threads"]) != new["threads"]:
        yield "number of threads", old["threads"], new["threads"]


class Report:
    """The file of results, of which rows can be renewed."""

    def __init__(self, path: Path | None, missing_only: bool) -> None:
        self.path, self._missing_only = path, missing_only
        self.sections: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.sections = json.loads(path.read_text()).get("sections", {})
        self._before = dict(self.sections)

    def held(self, name: str) -> tuple[dict[str, Any], ...]:
        """Rows that are not to be measured again.

        Raises:
            ValueError: they are another machine's.
        """
        rows = self._before.get(name, {}).get("rows", [])
        if not self._missing_only or not rows:
            return ()
        here = {"machine": machine() | versions(), "threads": torch.get_num_threads()}
        for field, there, now in differing(self._before[name], here):
            raise ValueError(
                f"{self.path} has rows of a machine whose {field} is {there}, this one's is {now}; leave --missing out "
                "or give another --out"
            )
        return tuple(rows)

    def put(self, name: str, section: dict[str, Any], finished: bool) -> None:
        """A section's new rows, among those that the file had when this run began.

        A row of the same contender and shape is replaced. The others, if they are this machine's, stay for good with
        --missing, and else until the section is finished.
        """
        old = self._before.get(name, {})
        if not section["rows"] and old.get("rows") and ("skipped" in section or self._missing_only):
            print(f"the rows that {self.path} has stay")
            return
        measured = {identity(row) for row in section["rows"]}
        kept = [row for row in old.get("rows", []) if identity(row) not in measured]
        if kept and (self._missing_only or not finished) and not any(differing(old, section)):
            shares = [part["used_by_others"] for part in (old, section) if part.get("used_by_others") is not None]
            rows = [*({"date": old.get("date")} | row for row in kept), *section["rows"]]
            section = section | {"used_by_others": max(shares, default=None), "rows": sorted(rows, key=order)}
        self.sections[name] = section
        self.sections = {n: self.sections[n] for n in SECTIONS if n in self.sections}
        if self.path is not None:
            write(self.path, {"sections": self.sections})


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Of rows from several runs: prompts before decoding, then by dtype, head dimension and length."""
    what = row["what"].startswith("decode"), row.get("dtype") or "none"
    return *what, -row.get("dim", 0), row.get("length", 0)


def measure(name: str, request: Request, threads: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """A section with its circumstances after each row, and whether it is finished."""
    print(f"\n{name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}")
    bystanders, started = Bystanders(), time.perf_counter()
    section: dict[str, Any] = {
        "machine": machine() | versions(),
        "threads": threads,
        "rounds": ROUNDS,
        "date": date.today().isoformat(),
    }
    rows: list[dict[str, Any]] = []

    def so_far() -> dict[str, Any]:
        seconds = round(time.perf_counter() - started, 1)
        return section | {"seconds": seconds, "used_by_others": bystanders.share(), "rows": rows}

    try:
        for row in SECTIONS[name](request):
            print(line(row), flush=True)
            rows.append(row | {"date": section["date"]})
            yield so_far(), False
    except Unavailable as error:
        section["skipped"] = str(error)
        print(f"skipped: {error}")
    share = bystanders.share()
    if share:
        print(f"other programs used {share:.0%} of the machine")
    yield so_far(), True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--missing", action="store_true", help="only the rows that the file lacks")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing unless --out is given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help=f"default: {NAME} in the folder of this machine in results/")
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
    out = arguments.out or (None if arguments.quick else results(NAME))
    report = Report(out, arguments.missing)
    try:
        requests = {name: Request(arguments.quick, report.held(name)) for name in chosen}
    except ValueError as error:
        parser.error(str(error))
    for name, request in requests.items():
        for section, finished in measure(name, request, arguments.threads):
            report.put(name, section, finished)
        if out is not None:
            print(f"wrote {name} to {out}")
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
