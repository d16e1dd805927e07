"""What a search found, as a line of results that `gossamer report` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gossamer.calibrate.search import Found, Mode

__all__ = ["calibration_record"]


def calibration_record(
    model: Mapping[str, Any], found: Found, chosen: Tensor, about: Mapping[str, Any], budgets: Sequence[float]
) -> dict[str, Any]:
    """A record of kind ``calibration``; its fields are described in the format of results."""
    parts = {"calibration": False} | ({} if found.held_out is None else {"held_out": True})
    return {
        "kind": "calibration",
        "model": dict(model),
        "mode": about["mode"],
        "about": dict(about),
        "layers": list(found.layers),
        "heads": [[found.candidates[index].to_dict() for index in layer] for layer in chosen.tolist()],
        "summary": found.summary(chosen),
        **{
            part: {name: t.tolist() for name, t in found.of_choice(chosen, held_out=out).items() if name != "loss"}
            for part, out in parts.items()
        },
        "frontier": [point for mode in ("fixed", "global") for point in _points(found, mode, budgets)],
    }


def _points(found: Found, mode: Mode, budgets: Sequence[float]) -> list[dict[str, Any]]:
    points = []
    for budget in budgets:
        try:
            summary = found.summary(found.choose(mode, budget))
        except ValueError:  # nothing is so cheap
            continue
        mean, other = summary["calibration"], summary.get("held_out", {})
        points.append(
            {
                "mode": mode,
                "budget": budget,
                "cost": mean["cost"],
                "error": mean["error"],
                "loss": mean["loss"],
                "held_out": other.get("error"),
                "held_out_interval": other.get("intervals", {}).get("error"),
            }
        )
    return points
