"""The table of what was timed on a GPU, from `benchmarks/gpu.py`."""

from typing import Any

Cells = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


def gpu_rows(found: dict[str, Any]) -> Cells | None:
    """A row for each that was timed; None if nothing was."""

    def shown(row: dict[str, Any], field: str, form: str) -> str:
        return "" if row.get(field) is None else format(row[field], form)

    rows = [
        (
            name,
            f"`{row['what']}`",
            shown(row, "length", ","),
            shown(row, "density", ".4f"),
            format(1e3 * seconds, ",.2f"),
            shown(row, "speedup_over_sdpa", ".1f") or shown(row, "share_of_best_sdpa", ".2f"),
            shown(row, "speedup_over_flex", ".1f"),
            shown(row, "efficiency", ".2f"),
            shown(row, "planning_share", ".0%"),
        )
        for name, section in found["sections"].items()
        for row in section["rows"]
        if (seconds := row.get("median_s") or row.get("seconds_whole")) and name != "tune"
    ]
    machine = found["machine"]
    above = f"torch {machine['torch']}, Triton {machine['triton']}; medians of up to {found['rounds']} rounds."
    header = ("section", "what", "tokens", "density", "ms", "times SDPA", "times Flex", "efficiency", "of it planning")
    return (above, header, rows) if rows else None
