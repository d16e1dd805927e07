"""Tables of what replaced linear layers cost and give."""

from typing import Any

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


def first_token_table(found: dict[str, Any]) -> Table:
    """Of `benchmarks/first_token.py`: seconds to the first token, by length and contender."""
    rows = []
    for row in found["rows"]:
        spent = row.get("attention_s"), row.get("planning_s")
        said = (f"{row['length']:,}", f"`{row['contender']}`", "kept" if row["memory"] == "kept" else "given back")
        seconds = f"{row['total_s']:.1f}", f"{row['linear_s']:.1f}" if "linear_s" in row else ""
        attention = f"{sum(spent):.1f}" if None not in spent else ""  # type: ignore[arg-type]
        times = f"{row['times_sdpa_bfloat16']:.1f}" if "times_sdpa_bfloat16" in row else ""
        quality = (f"{row['kl']:.3f}", f"{row['top1']:.3f}") if "kl" in row else ("", "")
        rows.append((*said, *seconds, attention, times, *quality, row["rounds"]))
    header = ("tokens", "model", "freed memory is", "seconds", "of them linear", "attention", "times sdpa bfloat16")
    above = (
        f"{found['model']['name']}, {found['threads']} threads; medians, and the median of the ratios of each round."
    )
    return above, (*header, "KL", "top-1", "rounds"), rows
