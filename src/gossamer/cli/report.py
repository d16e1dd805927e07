"""``gossamer report``: one page with pictures from results of ``gossamer eval``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from gossamer.cli.common import BadInput, add_command, first_line, one_line, print_json, unicode

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "report", execute, "draw results as one HTML page")
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        help="files that `gossamer eval`, `eval-video`, `compare`, `calibrate`, `inspect` or `mqar` wrote",
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    parser.add_argument("--title", default="Sparse attention, measured", help="its heading")


def execute(arguments: argparse.Namespace) -> int:
    from gossamer.evaluate.clips import clip_rows
    from gossamer.evaluate.masked.summary import fill_rows, overlap_rows
    from gossamer.evaluate.mqar.summary import recall_rows
    from gossamer.evaluate.schema import KINDS
    from gossamer.evaluate.summary import read_results, summary_rows
    from gossamer.report import write_report

    if unicode(arguments.title) != arguments.title:
        raise BadInput(f"--title must be UTF-8 text, got {arguments.title}")

    try:
        records = [record for path in arguments.results for record in read_results(path)]
        written = write_report(records, arguments.out, arguments.title, keep=arguments.results)
    except ValueError as error:
        raise BadInput(str(error)) from error
    except OSError as error:
        where = error.filename or arguments.out
        raise BadInput(f"cannot write {where}: {error.strerror or first_line(error)}") from error
    if others := Counter(record["kind"] for record in records if record["kind"] not in KINDS):
        listed = ", ".join(f"{count} of kind {kind}" for kind, count in others.items())
        print(one_line(f"note: lines that this version does not know are left out: {listed}"), file=sys.stderr)
    if arguments.json:
        rows = [*summary_rows(records), *clip_rows(records), *fill_rows(records), *overlap_rows(records)]
        rows += recall_rows(records)
        print_json({"files": [str(path) for path in written], "rows": [row.to_dict() for row in rows]})
    else:
        print(written[0])
        print(f"and {len(written) - 1} CSV files in {written[1].parent}", file=sys.stderr)
    return 0
