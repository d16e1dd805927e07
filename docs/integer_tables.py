"""Tables of what a score product in integers costs and gives, from `benchmarks/quantised.py`."""

from typing import Any

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
ROUNDED = (
    "bf16 throughout",
    "int8 by blocks, not smoothed",
    "int8 by blocks",
    "int8 by blocks, values too",
    "int8 by tokens",
    "int16 by tokens",
)
MADE = ("no product", "int8", "int16", "neither product", "int8, values too")


def errors_table(found: dict[str, Any]) -> Table:
    """Output errors, and how many times that of bf16 they are."""
    rows = []
    for row in found["errors"]:
        errors = row["errors"]
        base = errors[ROUNDED[0]]
        others = (f"{errors[what]:.2%} ({errors[what] / base:.2g})" if what in errors else "" for what in ROUNDED[1:])
        rows.append((f"{row['inputs']}, {row['length']:,} tokens of {row['dim']}", f"{base:.2%}", *others))
    return "Error of the output, and in brackets how many times that of bf16 it is.", ("inputs", *ROUNDED), rows


def speed_table(found: dict[str, Any]) -> Table:
    """Speed-ups of the whole call, with the quartiles of its rounds."""
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in found["speed"]:
        low, high = row["quartiles"]
        case = row["isa"], row["dtype"], row["dim"], f"{row['tiles']} of {row['keys'] // 64}"
        made = cells.setdefault(case, {})
        made[row["scores"]] = f"{row['speedup']:.2f} ({low:.2f} to {high:.2f})"
        if row["scores"] == "int8" and "scores_speedup" in row:
            made["alone"] = f"{row['scores_speedup']:.2f}"
    rounds = max(len(row["attend_s"]) for row in found["speed"])
    columns = [name for name in (*MADE, "alone") if any(name in made for made in cells.values())]
    return (
        f"Whole calls on one thread, medians and quartiles of {rounds} rounds; four query heads on one key/value head.",
        (
            "instruction set",
            "dtype",
            "head dimension",
            "tiles of keys attended",
            *("the product alone, int8" if name == "alone" else name for name in columns),
        ),
        [(*case, *(made.get(name, "") for name in columns)) for case, made in cells.items()],
    )
