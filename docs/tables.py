"""Fills the tables of the benchmarks page from the measured files when the documentation is built (an mkdocs hook)."""

import json
from pathlib import Path
from typing import Any

from gossamer.evaluate.summary import read_results, summary_rows

ROOT = Path(__file__).resolve().parent.parent


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers ``<!-- table: name -->`` of a page."""
    for name, make in (("cpu", cpu_table), ("demo", demo_table), ("methods", methods_table)):
        marker = f"<!-- table: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def cpu_table() -> str:
    """Speed-up over SDPA by length, dtype and density, for blocks of 64 and head dimension 64."""
    data = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    rows = [row for row in data["rows"] if row["block_k"] == 64 and row["dim"] == 64]
    machine = data["machine"]
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores, {data['threads']} threads, torch {machine['torch']}; medians "
            f"over {data['rounds']} rounds; 4 query heads on one key/value head of 64.",
            "",
            "| tokens | dtype | kernel | density | times as fast as torch's dense attention |",
            "|---|---|---|---|---|",
            *(
                f"| {row['length']:,} | {row['dtype']} | `{row['isa']}` | {row['density']:.3f} | "
                f"{row['speedup_wall']:.1f} |"
                for row in rows
            ),
        ]
    )


def demo_table() -> str:
    """The rows of the demo."""
    data = json.loads((ROOT / "examples" / "demo.json").read_text())
    return "\n".join(
        [
            f"{data['machine']['model']}, {data['machine']['usable_cores']} cores, {data['dtype']}, prompts of "
            f"{min(data['prompt_tokens']):,} tokens.",
            "",
            "| method | prefill s | attention s | density | right | top-1 as dense |",
            "|---|---|---|---|---|---|",
            *(
                f"| {name} | {row['prefill_seconds']:.2f} | {row['attention_seconds']:.2f} | {row['density']:.3f} | "
                f"{row['right']}/{row['asked']} | {row['top1_agreement']:.1%} |"
                for name, row in data["rows"].items()
            ),
        ]
    )


def methods_table() -> str:
    """The methods on the reference model at the longest length that was measured."""
    records = read_results(ROOT / "benchmarks" / "results" / "reference_eval.jsonl")
    rows = summary_rows(records)
    longest = max(row.length for row in rows)
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    machine = next(record for record in records if record["kind"] == "run")["machine"]

    def share(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return "\n".join(
        [
            f"{machine['processor']}, {machine['threads']} threads, {longest:,} tokens, bfloat16; "
            f"{rows[-1].tasks[tasks[0]][2]} samples of each task, mean scores.",
            "",
            f"| method | {' | '.join(tasks)} | recall | oracle | density | prefill s | times dense |",
            "|---|" + "---|" * (len(tasks) + 5),
            *(
                f"| `{row.method}` | {' | '.join(share(row.tasks[task][0]) for task in tasks)} | {share(row.recall)} | "
                f"{share(row.oracle_recall)} | {share(row.density)} | {share(row.prefill_s, 2)} | "
                f"{share(row.speedup, 1)} |"
                for row in rows
                if row.length == longest
            ),
        ]
    )
