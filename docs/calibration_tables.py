"""Tables of how calibrated profiles hold on other prompts, from `benchmarks/calibration.py`."""

from typing import Any

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
MODES = {
    "rival": "as it is",
    "fixed": "a budget for each head alike",
    "global": "a budget that all heads share",
    "dense": "dense",
}
HEADER = (
    "chosen on, judged on",
    "beside",
    "choice",
    "density",
    "time over dense",
    "time over the other's",
    "error",
    "error over the other's",
    "KL",
    "KL over the other's",
    "top-1",
    "answers right",
)


def calibration_table(found: dict[str, Any]) -> Table:
    """A row a setting, in its direction."""
    model, names = found["model"], {"first": found["first"], "second": found["second"]}
    above = (
        f"**{model['name']}**, {found['length']:,} tokens, {model['dtype']}; profiles chosen on "
        f"{found['samples']} prompts. In brackets 95% intervals over the prompts."
    )
    rows = []
    for row in found["rows"]:
        own = ", ".join(names.get(row["direction"], ()))
        other = ", ".join(names["second" if row["direction"] == "first" else "first"]) if own else ""
        chosen = other if row["mode"] == "rival" else f"{own}, {other}" if own else ""
        figures = (
            _mean(row, "density"),
            _mean(row, "time"),
            "" if row["mode"] == "rival" else _mean(row, "time over the rival's"),
            _mean(row, "error"),
            "" if row["mode"] == "rival" else _interval(row, "error over the rival's"),
            _mean(row, "kl"),
            "" if row["mode"] == "rival" else _interval(row, "kl over the rival's"),
            _mean(row, "top1"),
            _interval(row, "score"),
        )
        rows.append((chosen, f"`{row['rival']}`", MODES[row["mode"]], *figures))
    return above, HEADER, rows


def _mean(row: dict[str, Any], name: str) -> str:
    return f"{row[name][0]:.3f}" if name in row else ""


def _interval(row: dict[str, Any], name: str) -> str:
    return f"{row[name][0]:.2f} ({row[name][1]:.2f} to {row[name][2]:.2f})" if name in row else ""
