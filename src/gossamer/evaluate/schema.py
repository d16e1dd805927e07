"""What a line of a results file must be: each field of each kind, its type and its range (``results-format``)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from gossamer.evaluate.checks import (
    OBJECT,
    Fields,
    Misfit,
    first_misfit,
    integer,
    is_integer,
    leaf,
    list_of,
    mapping_of,
    number,
    or_null,
)
from gossamer.profiles.files import shown

__all__ = ["FORMAT", "KINDS", "checked"]

FORMAT = 1
_MOST_LAYERS, _MOST_MAP = 100_000, 4096
# Shares are sums of rounded masses: they may pass 1 by a hair.
_ROUNDING = 1e-6


_TEXT = leaf("text", lambda value: isinstance(value, str))
_FLAG = leaf("true or false", lambda value: isinstance(value, bool))
_COUNT = integer(0)
_LENGTH = integer(1, 2**40)
_LINE = Fields({"kind": _TEXT})
_PLACE = {"layer": integer(0, _MOST_LAYERS - 1), "head": integer(0, _MOST_LAYERS - 1)}
_SCORE = number("a number, 0 to 1", lambda value: 0 <= value <= 1)
_SHARE = number("a share, 0 to 1", lambda value: -_ROUNDING <= value <= 1 + _ROUNDING)
_COSINE = number("a cosine, -1 to 1", lambda value: abs(value) <= 1 + _ROUNDING)
_AMOUNT = number("a number, 0 or more", lambda value: value >= 0)
_NATS = number("nats, 0 to 1e9", lambda value: 0 <= value <= 1e9)
# Ratios and logarithms of them stay finite.
_SECONDS = number("seconds, 0 to 1e9", lambda value: value == 0 or 1e-15 <= value <= 1e9)
_POSITIVE_SECONDS = number("seconds, above 0 to 1e9", lambda value: 1e-15 <= value <= 1e9)
_FORMAT = leaf(f"{FORMAT}, which is all that this version reads", lambda value: is_integer(value) and value == FORMAT)


def _pixels_fit(value: dict[str, Any], where: str) -> Misfit | None:
    try:
        pixels = len(base64.b64decode(value["data"], validate=True))
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        return Misfit(f"{where}.data", "base64", shown(value["data"]))
    if pixels != value["size"] ** 2:
        return Misfit(f"{where}.data", f"base64 of {value['size']} x {value['size']} bytes", f"{pixels} bytes")
    return None


def _edges_ascend(value: dict[str, Any], where: str) -> Misfit | None:
    edges = value["edges"]
    ascend = len(edges) > 1 and all(low < high for low, high in pairwise(edges))
    return None if ascend else Misfit(f"{where}.edges", "two or more ascending positions", shown(edges))


def _buckets_fit(value: dict[str, Any], where: str) -> Misfit | None:
    buckets = len(value["edges"]) - 1
    expected = f"a list of {buckets} numbers, one between two edges each"
    wrong = (name for name in ("kl", "top1") if len(value[name]) != buckets)
    return first_misfit(Misfit(f"{where}.{name}", expected, f"{len(value[name])} of them") for name in wrong)


def _shapes_fit(value: dict[str, Any], where: str) -> Misfit | None:
    """As many layers and heads in each table of figures as in ``recall``."""
    heads = [len(layer) for layer in value["recall"]]
    names = [name for name in _TABLES if name in value and [len(layer) for layer in value[name]] != heads]
    return first_misfit(Misfit(name, "a list of as many layers and heads as recall", "others") for name in names)


_MAP = Fields({**_PLACE, "size": integer(1, _MOST_MAP), "data": _TEXT}, whole=(_pixels_fit,))
_MODEL_SIZES = ("layers", "heads", "kv_heads", "head_dim", "parameters")
_MODEL = Fields(
    {"name": _TEXT, "fingerprint": _TEXT}, {"architecture": _TEXT, "dtype": _TEXT} | dict.fromkeys(_MODEL_SIZES, _COUNT)
)
_METHOD = {"method": _TEXT, "length": _LENGTH, "index": _COUNT, "density": _SHARE}
_MORE_OF_A_METHOD = {
    "run": _TEXT,
    "profile": _TEXT,
    "method_fields": Fields({"method": _TEXT}),
    "policy": _TEXT,
    "decode_fields": Fields({"method": _TEXT}),
    "cache_fields": Fields({"cache": _TEXT}),
    "task": _TEXT,
    "task_fields": OBJECT,
    "dense_because": or_null(mapping_of(_COUNT)),
}
_MORE_SECONDS = {"plan_s": _SECONDS, "attention_s": _SECONDS}
_RUN = Fields(
    {},
    {
        "format": _FORMAT,
        "run": _TEXT,
        "started": _TEXT,
        "model": _MODEL,
        "machine": OBJECT,
        "versions": OBJECT,
        "haystack": Fields({}, {"name": _TEXT, "sha256": _TEXT, "characters": _COUNT}),
        "seed": or_null(integer(-(2**63))),
        "chat": _FLAG,
        "mqar": OBJECT,
    },
)
_TURN = Fields({"score": _SCORE}, {"generated": _TEXT, "references": list_of(_TEXT), "depth": or_null(_SCORE)})
_SAMPLE = Fields(
    {**_METHOD, "task": _TEXT, "score": _SCORE, "prefill_s": _SECONDS},
    {
        **_MORE_OF_A_METHOD,
        **_MORE_SECONDS,
        "prompt_tokens": _COUNT,
        "turns": list_of(_TURN),
        "one_line": _FLAG,
        "read": _SHARE,
        "cache_bytes": _COUNT,
        "cache_peak_bytes": _COUNT,
        "decode_s": _SECONDS,
        "decode_tokens": _COUNT,
    },
)
_OF_A_TEXT = {"text": _TEXT, "text_sha256": _TEXT, "start": _COUNT}
_PERPLEXITY = Fields(
    {**_METHOD, "nats": _NATS, "prefill_s": _SECONDS},
    {**_MORE_OF_A_METHOD, **_MORE_SECONDS, **_OF_A_TEXT, "tokens": _COUNT},
)
_TABLES = {"head_density": _SHARE, "recall": _SHARE, "oracle_recall": _SHARE, "relative_l2": _AMOUNT, "cosine": _COSINE}
_TABLES_OF_HEADS = {name: list_of(list_of(check, 1), 1) for name, check in _TABLES.items()}
_FIDELITY = Fields(
    {
        **_METHOD,
        **{name: check for name, check in _TABLES_OF_HEADS.items() if name != "cosine"},
        "mean": Fields({"recall": _SHARE, "oracle_recall": _SHARE}, _TABLES),
        "logits": Fields(
            {
                "edges": list_of(_COUNT),
                "kl": list_of(_NATS),
                "top1": list_of(_SHARE),
                "mean_kl": _NATS,
                "mean_top1": _SHARE,
            },
            {"nats": _NATS, "dense_nats": _NATS},
            whole=(_edges_ascend, _buckets_fit),
        ),
    },
    {
        **_MORE_OF_A_METHOD,
        **_MORE_SECONDS,
        **_OF_A_TEXT,
        "prefill_s": _SECONDS,
        "prompt_tokens": _COUNT,
        "cosine": _TABLES_OF_HEADS["cosine"],
        "maps": list_of(_MAP),
    },
    (_shapes_fit,),
)
_HEAD = Fields(
    {**_PLACE, "pattern": _TEXT, "mass": mapping_of(_SHARE)},
    {
        **dict.fromkeys(("budget", "first_token", "first_tokens", "sink_logit"), _SHARE),
        **dict.fromkeys(("sink_tokens", "local_tokens", "window"), _COUNT),
        "columns": list_of(Fields({"position": _COUNT, "mass": _SHARE})),
        "diagonals": list_of(Fields({"distance": _COUNT, "mass": _SHARE})),
        "blocks": list_of(Fields({"query_block": _COUNT, "key_block": _COUNT, "mass": _SHARE})),
    },
)


def _is_png(text: str) -> bool:
    try:
        return base64.b64decode(text, validate=True).startswith(b"\x89PNG\r\n\x1a\n")
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        return False


def _named_model(value: Any, where: str) -> Misfit | None:
    """An object; older files have the name alone, or nothing."""
    return None if value is None or isinstance(value, str) else _MODEL(value, where)


_HEADS = Fields(
    {"heads": list_of(_HEAD, 1)},
    {
        "run": _TEXT,
        "model": _named_model,
        "task": or_null(_TEXT),
        "length": or_null(_LENGTH),
        "index": or_null(_COUNT),
        "rows": or_null(_COUNT),
        "maps": list_of(_MAP),
    },
)
_LM_EVAL = Fields(
    {"method": _TEXT, "scores": mapping_of(OBJECT)},
    {
        "run": _TEXT,
        "profile": _TEXT,
        "method_fields": Fields({"method": _TEXT}),
        "policy": _TEXT,
        "decode_fields": Fields({"method": _TEXT}),
        "cache_fields": Fields({"cache": _TEXT}),
        "task": _TEXT,
        "index": _COUNT,
        "lengths": list_of(_LENGTH),
        "versions": OBJECT,
        "density": or_null(_SHARE),
    },
)
_PROMPT = {"task": _TEXT, "length": _LENGTH, "index": _COUNT}
_OF_A_PROMPT = {"run": _TEXT, "task_fields": OBJECT, **_OF_A_TEXT}
_LISTS = {"density": list_of(_SHARE, 1), "recall": list_of(_SHARE, 1), "error": list_of(_AMOUNT, 1)}
_POINT = Fields(
    {
        "method": _TEXT,
        **_PROMPT,
        "density": _SHARE,
        "recall": _SHARE,
        "error": _AMOUNT,
        "plan_s": _SECONDS,
        "attend_s": _SECONDS,
        "dense_s": _POSITIVE_SECONDS,
        "sdpa_s": _SECONDS,
    },
    {
        **_OF_A_PROMPT,
        **{name: _MORE_OF_A_METHOD[name] for name in ("profile", "method_fields", "policy", "dense_because")},
        "layers": Fields(_LISTS),
        "observed": list_of(_COUNT),
        "rounds": _COUNT,
    },
)


def _lists_fit(value: dict[str, Any], where: str) -> Misfit | None:
    """As many numbers in each list as in ``density``."""
    count = len(value["density"])
    others = ((name, len(value[name])) for name in ("recall", "error") if len(value[name]) != count)
    return first_misfit(Misfit(f"{where}.{name}", f"a list of {count} numbers", f"{n} of them") for name, n in others)


_BOUND = Fields(_LISTS, whole=(_lists_fit,))
_BOUNDS = Fields({**_PROMPT, "blocks": _BOUND, "columns": _BOUND}, _OF_A_PROMPT)
_LOGITS = Fields(
    {"method": _TEXT, **_PROMPT, "density": _SHARE, "kl": _NATS, "top1": _SHARE, "prefill_s": _SECONDS},
    {**_OF_A_PROMPT, **_MORE_OF_A_METHOD, **_MORE_SECONDS},
)
_INTERVAL = leaf(
    "two ascending numbers, 0 or more",
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(_AMOUNT(end, "") is None for end in value)
        and value[0] <= value[1]
    ),
)
_FIGURES = ("error", "recall", "cost")
_LATER = ("last_error", "loss")  # older lines lack the first
_SUMMED = Fields(
    {**dict.fromkeys(_FIGURES, _AMOUNT), "prompts": _LENGTH},
    dict.fromkeys(_LATER, _AMOUNT) | {"intervals": Fields({}, dict.fromkeys((*_FIGURES, *_LATER), _INTERVAL))},
)
_OF_HEADS = {name: list_of(list_of(_AMOUNT, 1), 1) for name in _FIGURES}
_LATER_OF_HEADS = {"last_error": list_of(list_of(_AMOUNT, 1), 1)}
_OF_PART = Fields(_OF_HEADS, _LATER_OF_HEADS)


def _heads_fit(value: dict[str, Any], where: str) -> Misfit | None:
    """As many layers and heads in each table of figures as there are methods."""
    shape = [len(layer) for layer in value["heads"]]
    if len(shape) != len(value["layers"]) or len(set(shape)) != 1:
        return Misfit("heads", "a list of as many layers as layers, of as many heads each", "others")
    parts = [part for part in ("calibration", "held_out") if part in value]
    tables = [(p, name) for p in parts for name in _OF_HEADS | _LATER_OF_HEADS if name in value[p]]
    names = [(p, name) for p, name in tables if [len(layer) for layer in value[p][name]] != shape]
    return first_misfit(
        Misfit(f"{p}.{name}", "a list of as many layers and heads as heads", "others") for p, name in names
    )


_CALIBRATION = Fields(
    {
        "model": _MODEL,
        "mode": _TEXT,
        "layers": list_of(_COUNT, 1),
        "heads": list_of(list_of(Fields({"method": _TEXT}), 1), 1),
        "calibration": _OF_PART,
        "frontier": list_of(
            Fields(
                {"mode": _TEXT, "budget": _AMOUNT, "cost": _AMOUNT, "error": _AMOUNT},
                {"loss": _AMOUNT, "held_out": or_null(_AMOUNT), "held_out_interval": or_null(_INTERVAL)},
            )
        ),
    },
    {
        "about": OBJECT,
        "profile": _TEXT,
        "held_out": _OF_PART,
        "summary": Fields({"calibration": _SUMMED}, {"held_out": _SUMMED}),
    },
    (_heads_fit,),
)
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
_MQAR = Fields(
    {
        "mixer": _TEXT,
        "task": _TEXT,
        "length": _LENGTH,
        "width": _LENGTH,
        "rate": _AMOUNT,
        "seed": integer(-(2**63)),
        "accuracy": _SCORE,
        "state": _COUNT,
        "reads": _AMOUNT,
    },
    {
        "run": _TEXT,
        "setting": _TEXT,
        "task_fields": OBJECT,
        "training": OBJECT,
        "loss": or_null(_NATS),
        "curve": list_of(_SCORE),
        "by_distance": list_of(_ANSWERS),
        "active": list_of(OBJECT),
        **dict.fromkeys(("steps", "parameters", "batch", "diverged"), _COUNT),
        "seconds": _SECONDS,
    },
)
_IMAGE = leaf("a PNG in base64", lambda value: isinstance(value, str) and _is_png(value))
_CLIP = Fields(
    {
        "method": _TEXT,
        "model": _TEXT,
        "prompt": _TEXT,
        "seed": integer(-(2**63)),
        "steps": _LENGTH,
        "seconds": _SECONDS,
        "psnr": or_null(number("dB", lambda value: abs(value) <= 1e9)),
        "ssim": number("a similarity, -1 to 1", lambda value: abs(value) <= 1 + _ROUNDING),
        "distance": number("a distance, 0 to 1e9", lambda value: 0 <= value <= 1e9),
        "by_step": list_of(Fields({"density": _SHARE, "plan_s": _SECONDS, "attention_s": _SECONDS}), 1),
    },
    {
        **{name: _MORE_OF_A_METHOD[name] for name in ("run", "profile", "method_fields", "policy", "dense_because")},
        **dict.fromkeys(("size", "dtype", "beside"), _TEXT),
        "shape": list_of(_COUNT),
        "finite": _FLAG,
        "frames": _IMAGE,
    },
)
_OF_A_FILL = {"task": _TEXT, "length": _LENGTH, "index": _COUNT, "seed": integer(-(2**63))}
_MORE_OF_A_FILL = {n: _MORE_OF_A_METHOD[n] for n in ("run", "profile", "method_fields", "policy", "task_fields")}
_STEP = Fields({"density": _SHARE}, dict.fromkeys(("plan_s", "attention_s", "seconds", "cpu_s"), _SECONDS))
_FILL = Fields(
    {
        **{"method": _TEXT, **_OF_A_FILL, "density": _SHARE, "seconds": _SECONDS},
        **{"accuracy": _SCORE, "agreement": _SCORE, "kl": _NATS, "top1": _SHARE},
    },
    {
        **_MORE_OF_A_FILL,
        "dense_because": _MORE_OF_A_METHOD["dense_because"],
        **dict.fromkeys(("copied_accuracy", "rest_accuracy", "copied_agreement"), or_null(_SCORE)),
        **dict.fromkeys(("filled", "copied"), _COUNT),
        "compared": list_of(Fields({"step": _COUNT, "kl": _NATS, "top1": _SHARE})),
        "by_step": list_of(_STEP),
    },
)
_OVERLAP = Fields(
    {"method": _TEXT, **_OF_A_FILL, "chosen": _COUNT, "by_step": list_of(_SHARE, 1), "chance": _SHARE},
    {
        **_MORE_OF_A_FILL,
        "blocks": _SHARE,
        "by_head": list_of(list_of(_SHARE, 1)),
        **dict.fromkeys(("seeds", "texts"), list_of(_SHARE)),
    },
)
# By ``kind``. Others are those of later versions.
KINDS: Mapping[str, Fields] = {
    "run": _RUN,
    "sample": _SAMPLE,
    "perplexity": _PERPLEXITY,
    "fidelity": _FIDELITY,
    "heads": _HEADS,
    "lm_eval": _LM_EVAL,
    "point": _POINT,
    "bounds": _BOUNDS,
    "logits": _LOGITS,
    "calibration": _CALIBRATION,
    "mqar": _MQAR,
    "clip": _CLIP,
    "fill": _FILL,
    "overlap": _OVERLAP,
}


def checked(record: Any) -> dict[str, Any]:
    """A line with the fields that this version knows; of a kind that it does not know, the kind alone.

    Raises:
        ValueError: a field is missing, or is not what it must be; the message says which, what it must be, and what
            it is.
    """
    wrong = _LINE(record, "")
    if wrong is None and record["kind"] in KINDS:
        wrong = KINDS[record["kind"]](record, "")
    if wrong is not None:
        raise ValueError(str(wrong))
    kind = KINDS.get(record["kind"], _LINE)
    return {name: value for name, value in record.items() if name == "kind" or name in kind.needed or name in kind.more}
