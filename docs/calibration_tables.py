"""Tables of how calibrated profiles hold on other prompts, and of the memory that a calibration takes.

From `benchmarks/calibration.py` and `benchmarks/calibration_memory.py`.
"""

from typing import Any

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
MODES = {
    "rival": "as it is",
    "fixed": "a budget for each head alike",
    "global": "a budget that all heads share",
    "asked": "the same, last queries as much as all",
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
    "KL of the last 64",
    "top-1",
    "answers right",
)


def calibration_table(found: dict[str, Any]) -> Table:
    """A row a setting, in its direction."""
    model, names = found["model"], {"first": found["first"], "second": found["second"]}
    above = (
        f"**{model['name']}**, {found['length']:,} tokens, {model['dtype']}; prompts that profiles "
        f"were chosen on: {found['samples']}. In brackets 95% intervals and how many prompts."
    )
    digests: dict[str, str] = {}
    for part, own in names.items():
        digests |= zip(own, found.get(f"{part}_sha256", own), strict=True)
    texts = [f"{name} `{digest[:12]}`" for name, digest in digests.items() if digest != name]
    above += f" SHA-256 of the texts: {', '.join(texts)}." if texts else ""
    rows = []
    for row in found["rows"]:
        own = ", ".join(names.get(row["direction"], ()))
        other = ", ".join(names["second" if row["direction"] == "first" else "first"]) if own else ""
        chosen = other if row["mode"] == "rival" else f"{own}, {other}" if own else ""
        figures = (
            _mean(row, "density"),
            _mean(row, "time"),
            "" if row["mode"] == "rival" else _mean(row, "time over the rival's"),
            _mean(row, "error", 4),
            "" if row["mode"] == "rival" else _interval(row, "error over the rival's"),
            _mean(row, "kl", 4),
            "" if row["mode"] == "rival" else _interval(row, "kl over the rival's"),
            _mean(row, "last kl", 4),
            _mean(row, "top1"),
            _interval(row, "score"),
        )
        rows.append((chosen, f"`{row['rival']}`", MODES[row["mode"]], *figures))
    return above, HEADER, rows


def memory_table(found: dict[str, Any]) -> Table:
    """One calibration, in GiB."""
    header = ("tokens", "layers", "peak, GiB", "of these besides weights", "with the weights of all layers")
    sizes = tuple(f"{found[name]:.1f}" for name in ("peak_gib", "besides_weights_gib", "whole_gib"))
    above = "The shape of Llama 3 8B in bfloat16, random weights; of each method the candidate that computes most."
    return above, header, [(f"{found['length']:,}", str(found["layers"]), *sizes)]


def _mean(row: dict[str, Any], name: str, digits: int = 3) -> str:
    return f"{row[name][0]:.{digits}f}" if name in row else ""


def _interval(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    mean, low, high, prompts = row[name]
    return f"{mean:.2f} ({low:.2f} to {high:.2f}; {prompts})" if prompts > 1 else f"{mean:.2f} (one prompt)"
