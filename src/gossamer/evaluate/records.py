"""Lines of a results file: their labels, what each is the result of, and whether a file may be gone on with.

The documentation describes the format (``results-format``). Needs no transformers, so that a report does not either.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from gossamer.evaluate.schema import checked
from gossamer.methods import Method
from gossamer.methods.registry import class_of
from gossamer.policy import Policy
from gossamer.profiles.costs import MIN_TOKENS
from gossamer.profiles.files import parse_json, read_file, shown

__all__ = ["cell_of", "check_out", "label_of", "policy_fields", "policy_text", "read_lines", "read_own", "relabel"]

Record = dict[str, Any]

_OPENING = b'{"kind": "run"'
# A list or object that is longer than this in JSON is named by its hash: the layers of a profile.
_LONGEST_VALUE = 40


def policy_text(policy: Policy) -> str:
    """The thresholds as they stand in a line: ``min_tokens=2048,max_density=0.9``.

    What depends on the machine must be resolved before (`Policy.resolved`); else it is as where nothing was measured.
    """
    least = MIN_TOKENS if policy.min_tokens is None else policy.min_tokens
    return f"min_tokens={least},max_density={policy.max_density:g}"


def label_of(policy: Policy) -> str:
    """A method's name and what differs from the defaults: ``max_relative(alpha=0.02,min_tokens=0)``.

    Methods of a profile go by its name and the hash of their layers: ``profile.json(layers=5c3a0f)``. The thresholds of
    dense attention decide nothing and are left out. What decode steps read by follows, and what caches keep:
    ``dense+quest(budget=512)+int8``.
    """
    steps = None if policy.decode is None else policy.decode.to_dict()
    label = _label(policy.method.to_dict(), policy_text(policy), policy.profile, steps)
    kept: Any = policy.cache
    if kept is None:
        return label
    usual = {f.name: f.default for f in fields(kept) if f.default is not MISSING}
    return f"{label}+{_with_changes(kept.name, kept.to_dict(), usual | {'cache': kept.name})}"


def policy_fields(policy: Policy) -> Record:
    """What a line says of the policy that it is the result of."""
    named = {"profile": policy.profile} if policy.profile else {}
    more = {"method_fields": policy.method.to_dict(), "policy": policy_text(policy)}
    steps = {} if policy.decode is None else {"decode_fields": policy.decode.to_dict()}
    kept = {} if policy.cache is None else {"cache_fields": policy.cache.to_dict()}
    return {"method": label_of(policy)} | named | more | steps | kept


def _label(given: Mapping[str, Any], thresholds: str, profile: str, steps: Mapping[str, Any] | None = None) -> str:
    if steps is not None:
        usual = policy_text(Policy.of("dense"))  # thresholds are said once
        return f"{_label(given, thresholds, profile)}+{_label(steps, usual, '')}"
    method = given["method"]
    usual = {f.name: f.default for f in fields(class_of(method)) if f.default is not MISSING}
    # A field may hold a method.
    given, usual = (json.loads(json.dumps(values, default=Method.to_dict)) for values in (dict(given), usual))
    usual_thresholds = policy_text(Policy.of("dense")).split(",")
    more = [part for part in thresholds.split(",") if part not in usual_thresholds] if method != "dense" else []
    return _with_changes(profile or str(method), given, usual | {"method": method}, more)


def _with_changes(name: str, given: Mapping[str, Any], usual: Mapping[str, Any], more: Sequence[str] = ()) -> str:
    """A name, with the fields that differ from the usual ones."""
    changed = [f"{field}={_shown(value)}" for field, value in given.items() if value != usual.get(field)]
    return f"{name}({','.join([*changed, *more])})" if changed or more else name


def _shown(value: Any) -> str:
    if not isinstance(value, list | tuple | dict):
        return str(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return text if len(text) <= _LONGEST_VALUE else hashlib.sha256(text.encode()).hexdigest()[:6]


def relabel(record: Record) -> Record:
    """The line with the label that `label_of` gives now: labels of old lines left out thresholds and profiles."""
    # Labels of caches are as they should be; and their defaults are known where transformers is alone.
    if "method_fields" not in record or "policy" not in record or "cache_fields" in record:
        return record
    try:
        parts = record["method_fields"], record["policy"], record.get("profile", ""), record.get("decode_fields")
        return record | {"method": _label(*parts)}
    except (ValueError, TypeError):  # a method that this version does not have, or whose defaults are not JSON
        return record


def cell_of(record: Record) -> tuple[Any, ...]:
    """What a line is the result of, within one file."""
    fields = json.dumps(record.get("method_fields"), sort_keys=True)
    steps = json.dumps(record.get("decode_fields"), sort_keys=True)
    kept = json.dumps(record.get("cache_fields"), sort_keys=True)
    dense = (record.get("method_fields") or {}).get("method") == "dense" and "decode_fields" not in record
    length = record.get("length") or str(record.get("lengths"))
    window = record.get("text_sha256"), record.get("start")
    policy = None if dense else record.get("policy")
    # Of these a file has several seeds; of others the whole file has one.
    seed = record.get("seed") if record["kind"] in ("fill", "overlap") else None
    return (
        record["kind"],
        fields,
        policy,
        record.get("profile"),
        steps,
        kept,
        record.get("task"),
        length,
        record.get("index"),
        window,
        seed,
    )


def read_lines(content: bytes, source: Path) -> list[Record]:
    """The records of all whole lines, with the fields that this version knows; see `gossamer.evaluate.schema`.

    What follows the last line end is left out. Of lines of an unknown kind the kind alone is kept.

    Raises:
        ValueError: a line is no JSON object with a kind, or a field is not what it must be; the message says where.
    """
    records = []
    # Not splitlines(): an answer may hold U+2028 and its like, which end a line for Python and not in this format.
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        what = f"{source} is not a results file: line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{what} is {error}") from None
        if not isinstance(record, dict) or "kind" not in record:
            raise ValueError(f"{what} is not a JSON object with a kind, as `gossamer eval` writes them")
        try:
            records.append(relabel(checked(record)))
        except ValueError as error:
            raise ValueError(f"{what}, of kind {shown(record['kind'])}: {error}") from None
    return records


def read_own(path: Path) -> tuple[list[Record], int]:
    """The records of a file to go on with, and the bytes of its whole lines.

    Raises:
        ValueError: nothing shows that `gossamer eval` wrote it; it must not be cut or appended to.
        OSError: it cannot be read, or is a device.
    """
    content = read_file(path)
    whole = content.rfind(b"\n") + 1
    try:
        records = read_lines(content, path)
    except ValueError as error:
        raise ValueError(f"{error}; choose another --out") from None
    tail = content[whole:]
    if any(record["kind"] == "run" for record in records):
        return records, whole
    if not records and (tail.startswith(_OPENING) or _OPENING.startswith(tail)):
        return records, whole
    raise ValueError(
        f"{path} is not a results file: no line of it says how `gossamer eval` was started; it is left as it is, "
        "choose another --out"
    )


def check_out(path: Path) -> None:
    """Find out before anything slow is done whether results can go to a file.

    Raises:
        ValueError: it cannot be written, or holds something else.
    """
    try:
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            _check_folder(path)
            return
        if stat.S_ISDIR(mode):
            raise ValueError(f"cannot write {path}: it is a folder; name a file with --out")
        if not stat.S_ISREG(mode):
            raise ValueError(f"cannot write {path}: it is a device or a pipe, not a file; choose another --out")
        read_own(path)
        with path.open("ab"):
            return
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose another --out") from error


def _check_folder(path: Path) -> None:
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is not a folder; choose another --out")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: you may not write to {folder}; choose another --out")
