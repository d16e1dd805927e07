"""Tables of what replaced linear layers cost and give."""

import json
from pathlib import Path
from typing import Any

from marked import markdown

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
NOT_MEASURED = "Not measured yet."
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
        others = f"{row['used_by_others']:.0%}" if row.get("used_by_others") is not None else ""
        rows.append((*said, *seconds, attention, times, *quality, row["rounds"], others))
    header = ("tokens", "model", "freed memory is", "seconds", "of them linear", "attention", "times sdpa bfloat16")
    above = (
        f"{found['model']['name']}, {found['threads']} threads; medians, and the median of the ratios of each round."
    )
    return above, (*header, "KL", "top-1", "rounds", "others used"), rows


def quality_table(lines: list[dict[str, Any]]) -> Table:
    """Of `benchmarks/compressed_quality.py`: what each recipe does to a model's predictions."""
    about, original, *rest = lines
    settings = about["settings"]
    rows: list[tuple[Any, ...]] = [("as it is", "", f"{original['perplexity']:.2f}", "", "")]
    for line in rest:
        fields = dict(line["recipe"])
        name = fields.pop("recipe")
        unlike = {key: value for key, value in fields.items() if value != DEFAULTS.get(name, {}).get(key)}
        said = ", ".join(f"`{key}={value}`" for key, value in unlike.items())
        perplexity = f"{line['perplexity']:,.2f}" if line["perplexity"] < 1000 else f"{line['perplexity']:,.0f}"
        rows.append(
            (f"`{name}`", said, perplexity, f"{line['kl']:.3f} ± {line['kl_interval']:.3f}", f"{line['top1']:.3f}")
        )
    above = (
        f"{settings['model']['name']}; calibrated on {settings['samples']} windows of {settings['length']} tokens, "
        f"asked for {settings['windows']} others; in float32."
    )
    return above, ("recipe", "fields", "perplexity", "KL, 95% interval over windows", "top-1"), rows


# What a recipe has unless it is told otherwise, and what a table leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"damp": 0.01, "block": 128, "bits": None},
    "billm": {"block": 128, "damp": 0.01, "search": "weights", "salient": True, "split": True, "compensate": True},
    "int8": {"share": 0.999, "outliers": 1.0},
}


def compressed_table() -> str:
    """What recipes do to a model's predictions, by machine and model."""
    files = sorted(RESULTS.glob("*/compressed_*.jsonl"))
    found = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    return "\n\n".join(markdown(*quality_table(lines)) for lines in found) or NOT_MEASURED
