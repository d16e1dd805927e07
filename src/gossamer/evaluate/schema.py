"""What a line of a results file must be: each field of each kind, its type and its range (``results-format``).

A check takes a value and the field's name, and returns the first thing that is wrong with it, if anything is.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from gossamer.profiles.files import shown

__all__ = ["FORMAT", "KINDS", "checked"]

FORMAT = 1
_MISSING = object()
_MOST_LAYERS, _MOST_MAP = 100_000, 4096
# Shares are sums of rounded masses: they may pass 1 by a hair.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Misfit:
    """A field that is not what it should be: which one, what it should be, and what it is."""

    field: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.field} must be {self.expected}, found {self.found}"


Check = Callable[[Any, str], Misfit | None]


def _leaf(expected: str, fits: Callable[[Any], bool]) -> Check:
    def check(value: Any, where: str) -> Misfit | None:
        return None if fits(value) else Misfit(where, expected, "nothing" if value is _MISSING else shown(value))

    return check


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(low: int, high: int = 2**63 - 1) -> Check:
    above = f" to {high:,}" if high < 2**63 - 1 else " or more"
    return _leaf(f"an integer, {low:,}{above}", lambda value: _is_integer(value) and low <= value <= high)


def _number(expected: str, fits: Callable[[float], bool]) -> Check:
    return _leaf(expected, lambda value: (_is_integer(value) or isinstance(value, float)) and fits(value))


def _list(check: Check, least: int = 0) -> Check:
    itself = _leaf(
        "a list that is not empty" if least else "a list", lambda value: isinstance(value, list) and len(value) >= least
    )

    def check_all(value: Any, where: str) -> Misfit | None:
        return itself(value, where) or _first(check(item, f"{where}[{i}]") for i, item in enumerate(value))

    return check_all


_OBJECT = _leaf("an object", lambda value: isinstance(value, dict))


def _mapping(check: Check) -> Check:
    """An object with any names."""

    def check_all(value: Any, where: str) -> Misfit | None:
        return _OBJECT(value, where) or _first(check(item, f"{where}[{shown(name)}]") for name, item in value.items())

    return check_all


@dataclass(frozen=True, slots=True)
class _Object:
    """An object with the fields of ``needed``, and with those of ``more`` or without.

    Fields:
        whole: what the fields must be together; asked when each is as it should be.
    """

    needed: Mapping[str, Check]
    more: Mapping[str, Check] = field(default_factory=dict)
    whole: tuple[Check, ...] = ()

    def __call__(self, value: Any, where: str) -> Misfit | None:
        if wrong := _OBJECT(value, where):
            return wrong
        inside = f"{where}." if where else ""
        return (
            _first(check(value.get(name, _MISSING), f"{inside}{name}") for name, check in self.needed.items())
            or _first(check(value[name], f"{inside}{name}") for name, check in self.more.items() if name in value)
            or _first(check(value, where) for check in self.whole)
        )


def _or_null(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _first(found: Any) -> Misfit | None:
    return next((wrong for wrong in found if wrong is not None), None)


_TEXT = _leaf("text", lambda value: isinstance(value, str))
_FLAG = _leaf("true or false", lambda value: isinstance(value, bool))
_COUNT = _integer(0)
_LENGTH = _integer(1, 2**40)
_LINE = _Object({"kind": _TEXT})
_PLACE = {"layer": _integer(0, _MOST_LAYERS - 1), "head": _integer(0, _MOST_LAYERS - 1)}
_SCORE = _number("a number, 0 to 1", lambda value: 0 <= value <= 1)
_SHARE = _number("a share, 0 to 1", lambda value: -_ROUNDING <= value <= 1 + _ROUNDING)
_COSINE = _number("a cosine, -1 to 1", lambda value: abs(value) <= 1 + _ROUNDING)
_AMOUNT = _number("a number, 0 or more", lambda value: value >= 0)
_NATS = _number("nats, 0 to 1e9", lambda value: 0 <= value <= 1e9)
# Ratios and logarithms of them stay finite.
_SECONDS = _number("seconds, 0 to 1e9", lambda value: value == 0 or 1e-15 <= value <= 1e9)
_POSITIVE_SECONDS = _number("seconds, above 0 to 1e9", lambda value: 1e-15 <= value <= 1e9)
_FORMAT = _leaf(f"{FORMAT}, which is all that this version reads", lambda value: _is_integer(value) and value == FORMAT)


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
    return _first(Misfit(f"{where}.{name}", expected, f"{len(value[name])} of them") for name in wrong)


def _shapes_fit(value: dict[str, Any], where: str) -> Misfit | None:
    """As many layers and heads in each table of figures as in ``recall``."""
    heads = [len(layer) for layer in value["recall"]]
    names = [name for name in _TABLES if name in value and [len(layer) for layer in value[name]] != heads]
    return _first(Misfit(name, "a list of as many layers and heads as recall", "others") for name in names)


_MAP = _Object({**_PLACE, "size": _integer(1, _MOST_MAP), "data": _TEXT}, whole=(_pixels_fit,))
_MODEL_SIZES = ("layers", "heads", "kv_heads", "head_dim", "parameters")
_MODEL = _Object(
    {"name": _TEXT, "fingerprint": _TEXT}, {"architecture": _TEXT, "dtype": _TEXT} | dict.fromkeys(_MODEL_SIZES, _COUNT)
)
_METHOD = {"method": _TEXT, "length": _LENGTH, "index": _COUNT, "density": _SHARE}
_MORE_OF_A_METHOD = {
    "run": _TEXT,
    "profile": _TEXT,
    "method_fields": _Object({"method": _TEXT}),
    "policy": _TEXT,
    "decode_fields": _Object({"method": _TEXT}),
    "cache_fields": _Object({"cache": _TEXT}),
    "task": _TEXT,
    "task_fields": _OBJECT,
    "dense_because": _or_null(_mapping(_COUNT)),
}
_MORE_SECONDS = {"plan_s": _SECONDS, "attention_s": _SECONDS}
_RUN = _Object(
    {},
    {
        "format": _FORMAT,
        "run": _TEXT,
        "started": _TEXT,
        "model": _MODEL,
        "machine": _OBJECT,
        "versions": _OBJECT,
        "haystack": _Object({}, {"name": _TEXT, "sha256": _TEXT, "characters": _COUNT}),
        "seed": _or_null(_integer(-(2**63))),
        "chat": _FLAG,
    },
)
_TURN = _Object({"score": _SCORE}, {"generated": _TEXT, "references": _list(_TEXT), "depth": _or_null(_SCORE)})
_SAMPLE = _Object(
    {**_METHOD, "task": _TEXT, "score": _SCORE, "prefill_s": _SECONDS},
    {
        **_MORE_OF_A_METHOD,
        **_MORE_SECONDS,
        "prompt_tokens": _COUNT,
        "turns": _list(_TURN),
        "one_line": _FLAG,
        "read": _SHARE,
        "cache_bytes": _COUNT,
        "cache_peak_bytes": _COUNT,
        "decode_s": _SECONDS,
        "decode_tokens": _COUNT,
    },
)
_OF_A_TEXT = {"text": _TEXT, "text_sha256": _TEXT, "start": _COUNT}
_PERPLEXITY = _Object(
    {**_METHOD, "nats": _NATS, "prefill_s": _SECONDS},
    {**_MORE_OF_A_METHOD, **_MORE_SECONDS, **_OF_A_TEXT, "tokens": _COUNT},
)
_TABLES = {"head_density": _SHARE, "recall": _SHARE, "oracle_recall": _SHARE, "relative_l2": _AMOUNT, "cosine": _COSINE}
_TABLES_OF_HEADS = {name: _list(_list(check, 1), 1) for name, check in _TABLES.items()}
_FIDELITY = _Object(
    {
        **_METHOD,
        **{name: check for name, check in _TABLES_OF_HEADS.items() if name != "cosine"},
        "mean": _Object({"recall": _SHARE, "oracle_recall": _SHARE}, _TABLES),
        "logits": _Object(
            {
                "edges": _list(_COUNT),
                "kl": _list(_NATS),
                "top1": _list(_SHARE),
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
        "maps": _list(_MAP),
    },
    (_shapes_fit,),
)
_HEAD = _Object(
    {**_PLACE, "pattern": _TEXT, "mass": _mapping(_SHARE)},
    {
        **dict.fromkeys(("budget", "first_token", "first_tokens", "sink_logit"), _SHARE),
        **dict.fromkeys(("sink_tokens", "local_tokens", "window"), _COUNT),
        "columns": _list(_Object({"position": _COUNT, "mass": _SHARE})),
        "diagonals": _list(_Object({"distance": _COUNT, "mass": _SHARE})),
        "blocks": _list(_Object({"query_block": _COUNT, "key_block": _COUNT, "mass": _SHARE})),
    },
)


def _named_model(value: Any, where: str) -> Misfit | None:
    """An object; older files have the name alone, or nothing."""
    return None if value is None or isinstance(value, str) else _MODEL(value, where)


_HEADS = _Object(
    {"heads": _list(_HEAD, 1)},
    {
        "run": _TEXT,
        "model": _named_model,
        "task": _or_null(_TEXT),
        "length": _or_null(_LENGTH),
        "index": _or_null(_COUNT),
        "rows": _or_null(_COUNT),
        "maps": _list(_MAP),
    },
)
_LM_EVAL = _Object(
    {"method": _TEXT, "scores": _mapping(_OBJECT)},
    {
        "run": _TEXT,
        "profile": _TEXT,
        "method_fields": _Object({"method": _TEXT}),
        "policy": _TEXT,
        "decode_fields": _Object({"method": _TEXT}),
        "cache_fields": _Object({"cache": _TEXT}),
        "task": _TEXT,
        "index": _COUNT,
        "lengths": _list(_LENGTH),
        "versions": _OBJECT,
        "density": _or_null(_SHARE),
    },
)
_PROMPT = {"task": _TEXT, "length": _LENGTH, "index": _COUNT}
_OF_A_PROMPT = {"run": _TEXT, "task_fields": _OBJECT, **_OF_A_TEXT}
_LISTS = {"density": _list(_SHARE, 1), "recall": _list(_SHARE, 1), "error": _list(_AMOUNT, 1)}
_POINT = _Object(
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
        "layers": _Object(_LISTS),
        "observed": _list(_COUNT),
        "rounds": _COUNT,
    },
)


def _lists_fit(value: dict[str, Any], where: str) -> Misfit | None:
    """As many numbers in each list as in ``density``."""
    count = len(value["density"])
    others = ((name, len(value[name])) for name in ("recall", "error") if len(value[name]) != count)
    return _first(Misfit(f"{where}.{name}", f"a list of {count} numbers", f"{n} of them") for name, n in others)


_BOUND = _Object(_LISTS, whole=(_lists_fit,))
_BOUNDS = _Object({**_PROMPT, "blocks": _BOUND, "columns": _BOUND}, _OF_A_PROMPT)
_LOGITS = _Object(
    {"method": _TEXT, **_PROMPT, "density": _SHARE, "kl": _NATS, "top1": _SHARE, "prefill_s": _SECONDS},
    {**_OF_A_PROMPT, **_MORE_OF_A_METHOD, **_MORE_SECONDS},
)
_INTERVAL = _leaf(
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
_SUMMED = _Object(
    {**dict.fromkeys(_FIGURES, _AMOUNT), "prompts": _LENGTH},
    dict.fromkeys(_LATER, _AMOUNT) | {"intervals": _Object({}, dict.fromkeys((*_FIGURES, *_LATER), _INTERVAL))},
)
_OF_HEADS = {name: _list(_list(_AMOUNT, 1), 1) for name in _FIGURES}
_LATER_OF_HEADS = {"last_error": _list(_list(_AMOUNT, 1), 1)}
_OF_PART = _Object(_OF_HEADS, _LATER_OF_HEADS)


def _heads_fit(value: dict[str, Any], where: str) -> Misfit | None:
    """As many layers and heads in each table of figures as there are methods."""
    shape = [len(layer) for layer in value["heads"]]
    if len(shape) != len(value["layers"]) or len(set(shape)) != 1:
        return Misfit("heads", "a list of as many layers as layers, of as many heads each", "others")
    parts = [part for part in ("calibration", "held_out") if part in value]
    tables = [(p, name) for p in parts for name in _OF_HEADS | _LATER_OF_HEADS if name in value[p]]
    names = [(p, name) for p, name in tables if [len(layer) for layer in value[p][name]] != shape]
    return _first(Misfit(f"{p}.{name}", "a list of as many layers and heads as heads", "others") for p, name in names)


_CALIBRATION = _Object(
    {
        "model": _MODEL,
        "mode": _TEXT,
        "layers": _list(_COUNT, 1),
        "heads": _list(_list(_Object({"method": _TEXT}), 1), 1),
        "calibration": _OF_PART,
        "frontier": _list(
            _Object(
                {"mode": _TEXT, "budget": _AMOUNT, "cost": _AMOUNT, "error": _AMOUNT},
                {"loss": _AMOUNT, "held_out": _or_null(_AMOUNT), "held_out_interval": _or_null(_INTERVAL)},
            )
        ),
    },
    {
        "about": _OBJECT,
        "profile": _TEXT,
        "held_out": _OF_PART,
        "summary": _Object({"calibration": _SUMMED}, {"held_out": _SUMMED}),
    },
    (_heads_fit,),
)
# By ``kind``. Others are those of later versions.
KINDS: Mapping[str, _Object] = {
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
