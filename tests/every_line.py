"""A results file with a line of every kind and every documented field, and ways to spoil it."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from typing import Any

from gossamer.report.png import png

__all__ = ["LINES", "OTHERS", "UNREADABLE", "fields_of", "spoil", "spoilt_everywhere"]

_SPOT = "@spot@"
_PIXELS = base64.b64encode(bytes(range(4))).decode()
_PNG = base64.b64encode(png(bytes(12), 2, 2, 3)).decode()
_MODEL = {
    "name": "model",
    "architecture": "LlamaForCausalLM",
    "fingerprint": "abc",
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "parameters": 1000,
    "dtype": "float32",
}
_NOT_DENSE = {"profile": "mine.json", "decode_fields": {"method": "quest"}, "cache_fields": {"cache": "keep"}}
_FAST = {
    "method": "fast",
    "profile": "mine.json",
    "method_fields": {"method": "fast"},
    "policy": "min_tokens=0,max_density=0.9",
}
_PROMPT = {"run": "r1", "task": "perplexity", "task_fields": {"task": "needle"}, "length": 1024, "index": 0}
_PROMPT |= {"text": "a.txt", "text_sha256": "ab", "start": 7}
_RUN = {
    "kind": "run",
    "format": 1,
    "run": "r1",
    "started": "2026-01-01T00:00:00+00:00",
    "model": _MODEL,
    "machine": {"processor": "a processor", "threads": 2, "kernels": {"float32": "avx2"}},
    "versions": {"torch": "2"},
    "haystack": {"name": "package", "sha256": "h", "characters": 500},
    "seed": 0,
    "chat": False,
    "mqar": {"name": "quick"},
}
_TABLE = [[0.5, 0.25]]
_POINT = {"mode": "fixed", "budget": 0.3, "cost": 0.2, "error": 0.1}
_SUMMED = {"error": 0.2, "recall": 0.8, "cost": 0.3, "loss": 0.2, "prompts": 3, "intervals": {"error": [0.1, 0.3]}}


def _of_method(method: str, length: int) -> dict[str, Any]:
    return {
        "run": "r1",
        "method": method,
        **({} if method == "dense" else _NOT_DENSE),
        "method_fields": {"method": method},
        "policy": "min_tokens=0,max_density=0.9",
        "task": "needle_single",
        "task_fields": {"task": "needle_single", "turns": 1},
        "length": length,
        "index": 0,
        "density": 1.0 if method == "dense" else 0.4,
        "dense_because": {"short prompt": 1},
    }


def _sample(method: str, length: int, seconds: float) -> dict[str, Any]:
    turn = {"generated": "an answer", "references": ["1"], "score": 0.5, "depth": 0.3}
    more = {"prompt_tokens": length - 9, "one_line": True, "turns": [turn], "score": 0.5, "decode_s": 0.1}
    more |= (
        {} if method == "dense" else {"read": 0.1, "cache_bytes": 4096, "cache_peak_bytes": 8192, "decode_tokens": 7}
    )
    return {"kind": "sample"} | _of_method(method, length) | _seconds(seconds) | more


def _seconds(prefill: float) -> dict[str, float]:
    return {"prefill_s": prefill, "plan_s": 0.01, "attention_s": 0.4}


_FILLED = {"task": "fill(steps=3,share=0.5)", "task_fields": {"task": "fill"}, "length": 512, "index": 0}


def _fill(method: str, density: float, seed: int) -> dict[str, Any]:
    step = {"density": density, "plan_s": 0.1, "attention_s": 0.2, "seconds": 0.4, "cpu_s": 0.3}
    of_method = {"method": "dense", "method_fields": {"method": "dense"}} if method == "dense" else _FAST
    scores = dict.fromkeys(("accuracy", "copied_accuracy", "rest_accuracy", "agreement", "copied_agreement"), 0.5)
    more = {"filled": 64, "copied": 32, "kl": 0.1, "top1": 0.9, "density": density, "seconds": 1.2}
    compared = [{"step": 2, "masks": 32, "kl": 0.1, "top1": 0.9}]
    own = {"run": "r1", "seed": seed, "by_step": [step], "compared": compared, "dense_because": {"short prompt": 1}}
    return {"kind": "fill", **of_method, **_FILLED, **scores, **more, **own}


_MAP = {"layer": 0, "head": 1, "size": 2, "data": _PIXELS}
LINES: list[dict[str, Any]] = [
    _RUN,
    _sample("dense", 1024, 1.0),
    _sample("dense", 2048, 3.0),
    _sample("fast", 1024, 0.5),
    _sample("fast", 2048, 1.0),
    {"kind": "perplexity"}
    | _of_method("fast", 1024)
    | _seconds(0.5)
    | {"task": "perplexity", "tokens": 1023, "nats": 2.5, "text": "a", "text_sha256": "t", "start": 7},
    {"kind": "fidelity"}
    | _of_method("fast", 1024)
    | _seconds(0.5)
    | dict.fromkeys(("head_density", "recall", "oracle_recall", "relative_l2", "cosine"), _TABLE)
    | {
        "prompt_tokens": 1015,
        "text": "a",
        "text_sha256": "t",
        "start": 7,
        "mean": dict.fromkeys(("head_density", "recall", "oracle_recall", "relative_l2", "cosine"), 0.5),
        "logits": {"edges": [0, 64, 1024], "kl": [0.1, 0.2], "top1": [0.9, 0.8], "mean_kl": 0.1, "mean_top1": 0.9},
        "maps": [_MAP],
    },
    {
        "kind": "heads",
        "run": "r1",
        "model": _MODEL,
        "task": "prompt",
        "length": 1024,
        "index": 0,
        "rows": 512,
        "heads": [
            {
                "layer": 0,
                "head": 1,
                "pattern": "sink",
                "mass": {"sink": 0.5, "local": 0.1},
                "budget": 0.03,
                "sink_tokens": 64,
                "local_tokens": 64,
                "first_token": 0.2,
                "first_tokens": 0.4,
                "window": 100,
                "sink_logit": 0.0,
                "columns": [{"position": 0, "mass": 0.2}],
                "diagonals": [{"distance": 0, "mass": 0.2}],
                "blocks": [{"query_block": 3, "key_block": 1, "mass": 0.2}],
            }
        ],
        "maps": [_MAP],
    },
    {
        "kind": "lm_eval",
        "run": "r1",
        "method": "fast",
        "profile": "mine.json",
        "method_fields": {"method": "fast"},
        "policy": "min_tokens=0,max_density=0.9",
        "decode_fields": {"method": "quest"},
        "cache_fields": {"cache": "keep"},
        "task": "ruler_vt",
        "index": 5,
        "lengths": [1024],
        "scores": {"ruler_vt": {"1024,none": 0.5}},
        "versions": {"ruler_vt": 1},
        "density": 0.5,
    },
    {
        "kind": "point",
        **_PROMPT,
        **_FAST,
        "density": 0.5,
        "recall": 0.9,
        "error": 0.1,
        "plan_s": 0.1,
        "attend_s": 0.2,
        "dense_s": 0.6,
        "sdpa_s": 0.7,
        "layers": {"density": [0.5], "recall": [0.9], "error": [0.1]},
        "observed": [0],
        "rounds": 3,
        "dense_because": {"short prompt": 1},
    },
    {
        "kind": "bounds",
        **_PROMPT,
        "blocks": {"density": [0.02, 0.05], "recall": [0.5, 0.8], "error": [0.3, 0.1]},
        "columns": {"density": [0.02, 0.05], "recall": [0.5, 0.8], "error": [0.3, 0.1]},
    },
    {
        "kind": "logits",
        **_PROMPT,
        **_FAST,
        **_NOT_DENSE,
        "density": 0.5,
        "kl": 0.01,
        "top1": 0.9,
        "prefill_s": 1.0,
        "plan_s": 0.1,
        "attention_s": 0.2,
        "dense_because": {},
    },
    {
        "kind": "calibration",
        "profile": "mine.json",
        "model": _MODEL,
        "mode": "fixed",
        "layers": [0],
        "heads": [[{"method": "a_shape"}, {"method": "dense"}]],
        "calibration": {name: [[0.1, 0.2]] for name in ("error", "last_error", "recall", "cost")},
        "held_out": {name: [[0.2, 0.3]] for name in ("error", "recall", "cost")},
        "frontier": [_POINT | {"held_out": 0.2, "held_out_interval": [0.1, 0.3]}],
        "summary": {"calibration": _SUMMED, "held_out": _SUMMED},
        "about": {"seed": 0},
    },
    {
        "kind": "clip",
        "run": "r1",
        **{name: _FAST[name] for name in ("method", "profile", "method_fields", "policy")},
        "model": "video",
        "shape": [16, 3, 32, 32],
        "prompt": "red square left",
        "seed": 0,
        "steps": 2,
        "size": "height=32",
        "dtype": "bfloat16",
        "beside": "dense",
        "finite": True,
        "seconds": 3.5,
        "psnr": 20.5,
        "ssim": 0.9,
        "distance": 0.01,
        "dense_because": {"adaspa needs step 1 or later": 6},
        "by_step": [{"density": density, "plan_s": 0.1, "attention_s": 0.2} for density in (1.0, 0.2)],
        "frames": _PNG,
    },
    {
        "kind": "mqar",
        "run": "r1",
        "setting": "quick",
        "mixer": "window(16)+dense",
        "task": "forgetting(vocabulary=256,length=64,pairs=8)",
        "length": 64,
        "task_fields": {
            **{"variant": "forgetting", "vocabulary": 256, "length": 64, "pairs": 8, "power": 0.01},
            **{"fillers": "zero", "passes": 2, "updates": 4, "lasting": False},
        },
        "width": 32,
        "rate": 0.003,
        "seed": 0,
        "training": {"epochs": 16},
        "accuracy": 0.5,
        "loss": 1.5,
        "by_distance": [[8, 1, 4], [16, 3, 4]],
        "curve": [0.25, 0.5],
        "active": [{"key": 0.5, "filler": 0.1}],
        **{"steps": 200, "seconds": 1.5, "parameters": 1000, "state": 1024, "reads": 8.5, "batch": 64, "diverged": 7},
    },
    _fill("dense", 1.0, 0),
    _fill("fast", 0.4, 0),
    _fill("fast", 0.4, 1),
    {
        "kind": "overlap",
        **_FAST,
        **_FILLED,
        "run": "r1",
        "seed": 0,
        "chosen": 1,
        "blocks": 0.3,
        "by_step": [0.5, 1.0, 0.9],
        "chance": 0.2,
        "by_head": [[0.9, 0.8]],
        "seeds": [0.7],
        "texts": [0.4],
    },
]

# JSON to put in the place of a field: of all types,
OTHERS = {
    "null": "null",
    "true": "true",
    "a list": "[]",
    "a list in a list": "[[1]]",
    "an object": "{}",
    "another object": '{"a": {"b": [1]}}',
    "text": '"text"',
    "no text": '""',
    "zero": "0",
    "a negative number": "-1",
    "a fraction": "0.5",
    "a tiny number": "1e-300",
    "a huge number": "1e300",
    "a large integer": str(2**62),
}
# and what is refused wherever it stands.
UNREADABLE = {
    "half of a character": '"\\ud800"',
    "an integer beyond 64 bits": str(10**30),
    "an integer beyond floats": str(10**400),
    "an integer of many digits": "9" * 5000,
    "a number beyond floats": "1e999",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "deep lists": "[" * 3000 + "]" * 3000,
    "deep objects": '{"a":' * 300 + "1" + "}" * 300,
}


def fields_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all fields and items of a value of JSON, itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from fields_of(item, (*path, name))


def spoil(value: Any, path: tuple[Any, ...], spoilt: str | None) -> str:
    """The value as JSON with something else at one place; None leaves the place out."""
    if not path:
        return spoilt or ""
    changed = copy.deepcopy(value)
    owner = changed
    for name in path[:-1]:
        owner = owner[name]
    if spoilt is None:
        del owner[path[-1]]
    else:
        owner[path[-1]] = _SPOT
    return json.dumps(changed).replace(json.dumps(_SPOT), spoilt or "")


def spoilt_everywhere(value: Any) -> Iterator[tuple[str, str]]:
    """Each place of a value with each of `OTHERS`, and left out: what was done, and the JSON.

    The value itself and its own fields with each of `UNREADABLE`, too.
    """
    for path in fields_of(value):
        for name, spoilt in (OTHERS | UNREADABLE if len(path) < 2 else OTHERS).items():
            yield f"{name} in {path}", spoil(value, path, spoilt)
        if path:
            yield f"nothing in {path}", spoil(value, path, None)
