"""Lines of small models: recall (``mqar``), clips of videos, and what masked models fill in."""

from __future__ import annotations

import base64
import binascii

from gossamer.evaluate.checks import OBJECT, Fields, integer, is_integer, leaf, list_of, mapping_of, number, or_null
from gossamer.evaluate.leaves import (
    AMOUNT,
    COUNT,
    FLAG,
    LENGTH,
    MORE_OF_A_METHOD,
    NATS,
    ROUNDING,
    SCORE,
    SECONDS,
    SHARE,
    TEXT,
)

__all__ = ["CLIP", "FILL", "MQAR", "OVERLAP"]


def _is_png(text: str) -> bool:
    try:
        return base64.b64decode(text, validate=True).startswith(b"\x89PNG\r\n\x1a\n")
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        return False


_ANSWERS = leaf(
    "a distance, how many are right, and of how many",
    lambda value: (
        isinstance(value, list)
        and len(value) == 3
        and all(is_integer(x) and 0 <= x <= 2**40 for x in value)
        and value[0] > 0
        and value[1] <= value[2] > 0
    ),
)
MQAR = Fields(
    {
        "mixer": TEXT,
        "task": TEXT,
        "length": LENGTH,
        "width": LENGTH,
        "rate": AMOUNT,
        "seed": integer(-(2**63)),
        "accuracy": SCORE,
        "state": COUNT,
        "reads": AMOUNT,
    },
    {
        "run": TEXT,
        "setting": TEXT,
        "task_fields": OBJECT,
        "training": OBJECT,
        "loss": or_null(NATS),
        "curve": list_of(SCORE),
        "by_distance": list_of(_ANSWERS),
        "active": list_of(mapping_of(SHARE)),
        **dict.fromkeys(("steps", "parameters", "batch", "diverged"), COUNT),
        "seconds": SECONDS,
    },
)
_IMAGE = leaf("a PNG in base64", lambda value: isinstance(value, str) and _is_png(value))
CLIP = Fields(
    {
        "method": TEXT,
        "model": TEXT,
        "prompt": TEXT,
        "seed": integer(-(2**63)),
        "steps": LENGTH,
        "seconds": SECONDS,
        "psnr": or_null(number("dB", lambda value: abs(value) <= 1e9)),
        "ssim": number("a similarity, -1 to 1", lambda value: abs(value) <= 1 + ROUNDING),
        "distance": number("a distance, 0 to 1e9", lambda value: 0 <= value <= 1e9),
        "by_step": list_of(Fields({"density": SHARE, "plan_s": SECONDS, "attention_s": SECONDS}), 1),
    },
    {
        **{name: MORE_OF_A_METHOD[name] for name in ("run", "profile", "method_fields", "policy", "dense_because")},
        **dict.fromkeys(("size", "dtype", "beside"), TEXT),
        "shape": list_of(COUNT),
        "finite": FLAG,
        "frames": _IMAGE,
    },
)
_OF_A_FILL = {"task": TEXT, "length": LENGTH, "index": COUNT, "seed": integer(-(2**63))}
_MORE_OF_A_FILL = {n: MORE_OF_A_METHOD[n] for n in ("run", "profile", "method_fields", "policy", "task_fields")}
_STEP = Fields({"density": SHARE}, dict.fromkeys(("plan_s", "attention_s", "seconds", "cpu_s"), SECONDS))
FILL = Fields(
    {
        **{"method": TEXT, **_OF_A_FILL, "density": SHARE, "accuracy": SCORE, "agreement": SCORE},
        **{"kl": or_null(NATS), "top1": or_null(SHARE)},
    },
    {
        **_MORE_OF_A_FILL,
        "dense_because": MORE_OF_A_METHOD["dense_because"],
        "seconds": SECONDS,
        **dict.fromkeys(("copied_accuracy", "rest_accuracy", "copied_agreement"), or_null(SCORE)),
        **dict.fromkeys(("filled", "copied"), COUNT),
        "compared": list_of(Fields({"step": COUNT, "kl": NATS, "top1": SHARE}, {"masks": COUNT})),
        "by_step": list_of(_STEP),
    },
)
OVERLAP = Fields(
    {"method": TEXT, **_OF_A_FILL, "chosen": COUNT, "by_step": list_of(SHARE, 1), "chance": SHARE},
    {
        **_MORE_OF_A_FILL,
        "blocks": SHARE,
        "by_head": list_of(list_of(SHARE, 1)),
        **dict.fromkeys(("seeds", "texts"), list_of(SHARE)),
    },
)
