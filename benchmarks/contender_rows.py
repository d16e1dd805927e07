"""What benchmarks/contenders.py makes of its measurements."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
REFERENCE = "transformers sdpa"
_ROWS = 64


def closeness(reference: Path, other: Path) -> Row:
    """KL divergence (nats, of the other from the reference) and share of equal choices, from saved log-probabilities.

    Both files are ``[positions, vocabulary]``; one with a single position is of the last. A vocabulary may be padded:
    what both have counts.
    """
    expected, found = np.load(reference, mmap_mode="r"), np.load(other, mmap_mode="r")
    expected = expected[-len(found) :]
    if len(expected) != len(found):
        raise ValueError(f"{other} has {len(found)} positions, {reference} has {len(expected)}")
    width = min(expected.shape[1], found.shape[1])
    divergence, same = [], []
    for start in range(0, len(found), _ROWS):
        p, q = (_normal(part[start : start + _ROWS, :width]) for part in (expected, found))
        divergence.append((np.exp(p) * (p - q)).sum(-1).clip(min=0))
        same.append(p.argmax(-1) == q.argmax(-1))
    all_kl = np.concatenate(divergence)
    return {
        "positions": len(all_kl),
        "kl": float(all_kl.mean()),
        "kl_half": float(np.median(all_kl)),
        "top1": float(np.concatenate(same).mean()),
        "last_kl": float(all_kl[-1]),
    }


def _normal(part: Any) -> Any:
    part = np.asarray(part, dtype=np.float64)
    return part - np.log(np.exp(part).sum(-1, keepdims=True))


def summary(runs: Sequence[Row], losses: Sequence[Row], order: Sequence[str]) -> Iterator[Row]:
    """A row for each length and contender: medians, ratios within rounds to torch's attention, and means of losses."""
    base = {(row["length"], row["round"]): row for row in runs if row["contender"] == REFERENCE}
    places = sorted(
        {(row["length"], row["contender"]) for row in (*runs, *losses)}, key=lambda p: (p[0], order.index(p[1]))
    )
    for length, name in places:
        own = [row for row in runs if (row["length"], row["contender"]) == (length, name)]
        lost = [row for row in losses if (row["length"], row["contender"]) == (length, name)]
        row: Row = {"contender": name, "length": length}
        if own:
            beside = [(row, base[length, row["round"]]) for row in own if (length, row["round"]) in base]
            row |= {
                "seconds": statistics.median(one["seconds"] for one in own),
                "each_s": [one["seconds"] for one in own],
                "rounds": len(own),
                "ratio": statistics.median(b["seconds"] / a["seconds"] for a, b in beside) if beside else None,
                "same_first_tokens": sum(a["token"] == b["token"] for a, b in beside),
                "compared": len(beside),
            }
            for part in ("attention_s", "density"):
                if all(part in one for one in own):
                    row[part] = statistics.median(one[part] for one in own)
        if lost:
            row |= {name: statistics.fmean(one[name] for one in lost) for name in ("kl", "kl_half", "top1", "last_kl")}
            row |= {"prompts": len(lost), "positions": sum(one["positions"] for one in lost)}
        yield row
