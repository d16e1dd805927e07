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
    or_null,
)
from gossamer.evaluate.leaves import (
    AMOUNT,
    COSINE,
    COUNT,
    FLAG,
    LENGTH,
    MORE_OF_A_METHOD,
    NATS,
    POSITIVE_SECONDS,
    SCORE,
    SECONDS,
    SHARE,
    TEXT,
)
from gossamer.evaluate.model_lines import CLIP, FILL, MQAR, OVERLAP
from gossamer.profiles.files import shown

__all__ = ["FORMAT", "KINDS", "checked"]

FORMAT = 1
_MOST_LAYERS, _MOST_MAP = 100_000, 4096
_LINE = Fields({"kind": TEXT})
_PLACE = {"layer": integer(0, _MOST_LAYERS - 1), "head": integer(0, _MOST_LAYERS - 1)}
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


_MAP = Fields({**_PLACE, "size": integer(1, _MOST_MAP), "data": TEXT}, whole=(_pixels_fit,))
_MODEL_SIZES = ("layers", "heads", "kv_heads", "head_dim", "parameters")
_MODEL = Fields(
    {"name": TEXT, "fingerprint": TEXT}, {"architecture": TEXT, "dtype": TEXT} | dict.fromkeys(_MODEL_SIZES, COUNT)
)
_METHOD = {"method": TEXT, "length": LENGTH, "index": COUNT, "density": SHARE}
_MORE_SECONDS = {"plan_s": SECONDS, "attention_s": SECONDS}
_RUN = Fields(
    {},
    {
        "format": _FORMAT,
        "run": TEXT,
        "started": TEXT,
        "model": _MODEL,
        "machine": OBJECT,
        "versions": OBJECT,
        "haystack": Fields({}, {"name": TEXT, "sha256": TEXT, "characters": COUNT}),
        "seed": or_null(integer(-(2**63))),
        "chat": FLAG,
        "mqar": OBJECT,
    },
)
_TURN = Fields({"score": SCORE}, {"generated": TEXT, "references": list_of(TEXT), "depth": or_null(SCORE)})
_SAMPLE = Fields(
    {**_METHOD, "task": TEXT, "score": SCORE, "prefill_s": SECONDS},
    {
        **MORE_OF_A_METHOD,
        **_MORE_SECONDS,
        "prompt_tokens": COUNT,
        "turns": list_of(_TURN),
        "one_line": FLAG,
        "read": SHARE,
        "cache_bytes": COUNT,
        "cache_peak_bytes": COUNT,
        "decode_s": SECONDS,
        "decode_tokens": COUNT,
    },
)
_OF_A_TEXT = {"text": TEXT, "text_sha256": TEXT, "start": COUNT}
_PERPLEXITY = Fields(
    {**_METHOD, "nats": NATS, "prefill_s": SECONDS},
    {**MORE_OF_A_METHOD, **_MORE_SECONDS, **_OF_A_TEXT, "tokens": COUNT},
)
_TABLES = {"head_density": SHARE, "recall": SHARE, "oracle_recall": SHARE, "relative_l2": AMOUNT, "cosine": COSINE}
_TABLES_OF_HEADS = {name: list_of(list_of(check, 1), 1) for name, check in _TABLES.items()}
_FIDELITY = Fields(
    {
        **_METHOD,
        **{name: check for name, check in _TABLES_OF_HEADS.items() if name != "cosine"},
        "mean": Fields({"recall": SHARE, "oracle_recall": SHARE}, _TABLES),
        "logits": Fields(
            {
                "edges": list_of(COUNT),
                "kl": list_of(NATS),
                "top1": list_of(SHARE),
                "mean_kl": NATS,
                "mean_top1": SHARE,
            },
            {"nats": NATS, "dense_nats": NATS},
            whole=(_edges_ascend, _buckets_fit),
        ),
    },
    {
        **MORE_OF_A_METHOD,
        **_MORE_SECONDS,
        **_OF_A_TEXT,
        "prefill_s": SECONDS,
        "prompt_tokens": COUNT,
        "cosine": _TABLES_OF_HEADS["cosine"],
        "maps": list_of(_MAP),
    },
    (_shapes_fit,),
)
_HEAD = Fields(
    {**_PLACE, "pattern": TEXT, "mass": mapping_of(SHARE)},
    {
        **dict.fromkeys(("budget", "first_token", "first_tokens", "sink_logit"), SHARE),
        **dict.fromkeys(("sink_tokens", "local_tokens", "window"), COUNT),
        "columns": list_of(Fields({"position": COUNT, "mass": SHARE})),
        "diagonals": list_of(Fields({"distance": COUNT, "mass": SHARE})),
        "blocks": list_of(Fields({"query_block": COUNT, "key_block": COUNT, "mass": SHARE})),
    },
)


def _named_model(value: Any, where: str) -> Misfit | None:
    """An object; older files have the name alone, or nothing."""
    return None if value is None or isinstance(value, str) else _MODEL(value, where)


_HEADS = Fields(
    {"heads": list_of(_HEAD, 1)},
    {
        "run": TEXT,
        "model": _named_model,
        "task": or_null(TEXT),
        "length": or_null(LENGTH),
        "index": or_null(COUNT),
        "rows": or_null(COUNT),
        "maps": list_of(_MAP),
    },
)
_LM_EVAL = Fields(
    {"method": TEXT, "scores": mapping_of(OBJECT)},
    {
        **{name: field for name, field in MORE_OF_A_METHOD.items() if name not in ("task_fields", "dense_because")},
        "index": COUNT,
        "lengths": list_of(LENGTH),
        "versions": OBJECT,
        "density": or_null(SHARE),
    },
)
_PROMPT = {"task": TEXT, "length": LENGTH, "index": COUNT}
_OF_A_PROMPT = {"run": TEXT, "task_fields": OBJECT, **_OF_A_TEXT}
_LISTS = {"density": list_of(SHARE, 1), "recall": list_of(SHARE, 1), "error": list_of(AMOUNT, 1)}
_POINT = Fields(
    {
        "method": TEXT,
        **_PROMPT,
        "density": SHARE,
        "recall": SHARE,
        "error": AMOUNT,
        "plan_s": SECONDS,
        "attend_s": SECONDS,
        "dense_s": POSITIVE_SECONDS,
        "sdpa_s": SECONDS,
    },
    {
        **_OF_A_PROMPT,
        **{name: MORE_OF_A_METHOD[name] for name in ("profile", "method_fields", "policy", "dense_because")},
        "layers": Fields(_LISTS),
        "observed": list_of(COUNT),
        "rounds": COUNT,
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
    {"method": TEXT, **_PROMPT, "density": SHARE, "kl": NATS, "top1": SHARE, "prefill_s": SECONDS},
    {**_OF_A_PROMPT, **MORE_OF_A_METHOD, **_MORE_SECONDS},
)
_INTERVAL = leaf(
    "two ascending numbers, 0 or more",
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(AMOUNT(end, "") is None for end in value)
        and value[0] <= value[1]
    ),
)
_FIGURES = ("error", "recall", "cost")
_LATER = ("last_error", "loss")  # older lines lack the first
_SUMMED = Fields(
    {**dict.fromkeys(_FIGURES, AMOUNT), "prompts": LENGTH},
    dict.fromkeys(_LATER, AMOUNT) | {"intervals": Fields({}, dict.fromkeys((*_FIGURES, *_LATER), _INTERVAL))},
)
_OF_HEADS = {name: list_of(list_of(AMOUNT, 1), 1) for name in _FIGURES}
_LATER_OF_HEADS = {"last_error": list_of(list_of(AMOUNT, 1), 1)}
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
        "mode": TEXT,
        "layers": list_of(COUNT, 1),
        "heads": list_of(list_of(Fields({"method": TEXT}), 1), 1),
        "calibration": _OF_PART,
        "frontier": list_of(
            Fields(
                {"mode": TEXT, "budget": AMOUNT, "cost": AMOUNT, "error": AMOUNT},
                {"loss": AMOUNT, "held_out": or_null(AMOUNT), "held_out_interval": or_null(_INTERVAL)},
            )
        ),
    },
    {
        "about": OBJECT,
        "profile": TEXT,
        "held_out": _OF_PART,
        "summary": Fields({"calibration": _SUMMED}, {"held_out": _SUMMED}),
    },
    (_heads_fit,),
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
    "mqar": MQAR,
    "clip": CLIP,
    "fill": FILL,
    "overlap": OVERLAP,
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
