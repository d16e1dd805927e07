"""The table of whole layers and whole models, from `benchmarks/end_to_end.py`."""

from pathlib import Path
from typing import Any

from marked import markdown


def layers_table(report: dict[str, Any], _: Path) -> str:
    """A row for each setting."""
    first = next(iter(report.values()))
    others = max(row["used_by_others"] or 0 for part in report.values() for row in part["rows"])
    what = {"layers": "{number} 8B-shaped layer{s}", "reference": "reference model, 6 layers"}
    return markdown(
        f"{first['threads']} threads, torch {first['machine']['torch']}, bfloat16; medians of as many rounds as stand "
        f"there; other programs used up to {others:.0%} of the machine.",
        ("what", "inputs", "tokens", "method", "rounds", "density", "seconds", "of them attention", "of it planning"),
        [
            (
                what[part].format(number="one" if row["layers"] == 1 else row["layers"], s="s" * (row["layers"] > 1)),
                "text" if part == "reference" else row.get("inputs", "random"),
                f"{row['length']:,}",
                f"`{row['method']}`",
                len(row.get("each_s", [row["total_s"]])),
                f"{row['density']:.3f}",
                f"{row['total_s']:.1f}",
                f"{row['attention_s']:.1f}",
                f"{row['plan_s']:.2f}",
            )
            for part in what
            if part in report
            for row in report[part]["rows"]
        ],
    )
