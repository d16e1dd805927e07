"""Files of other projects as profiles: lists of MInference, gates of DuoAttention, spans of MoA, thresholds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gossamer.methods import AShape, Dense, Method, XAttention
from gossamer.methods.head_tables import full_heads
from gossamer.plan.integers import MOST
from gossamer.profiles.files import MOST_BYTES, parse_json, read_file, shown
from gossamer.profiles.profile import Profile, Provenance
from gossamer.profiles.tables import GATES, MOST_HEADS, read_duo, read_moa, read_table

__all__ = ["FORMATS", "import_profile"]

FORMATS = ("profile", "minference", "duo", "moa", "thresholds")


def import_profile(
    path: str | os.PathLike[str],
    form: str | None = None,
    *,
    heads: int | None = None,
    sparsity: float = 0.5,
    length: int | None = None,
) -> Profile:
    """A profile from any of `FORMATS`; which one it is shows in the file, where ``form`` does not say it.

    A file of MInference's whose heads are of a type that no method here is, is refused with the layer and head.
    DuoAttention's full heads become `Dense`, its others `AShape`, which are the same pairs. A line of MoA becomes the
    `AShape` of its span at one length, exact to the token where MoA keeps whole blocks.

    Args:
        heads: query heads, where a file of DuoAttention has key/value heads.
        sparsity: of DuoAttention.
        length: of the prompts that MoA's spans are for.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none of these, or ``heads`` or ``length`` is missing or does not fit.
    """
    path = Path(path)
    if heads is not None and not 1 <= heads <= MOST_HEADS:
        raise ValueError(f"heads must be 1 to {MOST_HEADS:,}, got {heads}")
    form = form or _form_of(path)
    if form in ("profile", "minference"):
        return Profile.load(path)
    layers: Sequence[Sequence[Method]]
    if form == "duo":
        duo = read_duo(path.parent if path.name == GATES else path)
        share, rest = divmod(heads or len(duo.gates[0]), len(duo.gates[0]))
        if rest or not share:
            raise ValueError(f"{path} has {len(duo.gates[0])} heads a layer; {heads} is no multiple of them")
        streaming = AShape(duo.sink, duo.recent)
        full = full_heads(duo.gates, sparsity)
        layers = [[Dense() if whole else streaming for whole in layer for _ in range(share)] for layer in full]
    elif form == "moa":
        moa = read_moa(path)
        if length is None or length < 1:
            raise ValueError(f"{path} has spans that grow with the prompt; say for which length")
        if length > MOST:
            raise ValueError(f"length must be at most {MOST} tokens, got {length}")
        spans = [moa.spans(length, i, len(layer)).tolist() for i, layer in enumerate(moa.alphas)]
        layers = [[AShape(moa.sink, max(1, span - moa.sink)) for span in layer] for layer in spans]
    elif form == "thresholds":
        table = read_table(path, "threshold")
        try:
            layers = [[XAttention(threshold) for threshold in layer] for layer in table]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    else:
        raise ValueError(f"unknown format {form!r} of profiles; known: {', '.join(FORMATS)}")
    return Profile(layers, provenance=Provenance(samples=f"from a file of the format {form}"))


def _form_of(path: Path) -> str:
    if path.is_dir() or path.name == GATES:
        return "duo"
    content = read_file(path, MOST_BYTES)
    if content.lstrip()[:1] not in (b"[", b"{"):
        return "thresholds"
    try:
        data = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None
    if isinstance(data, list):
        return "thresholds" if data and isinstance(data[0], list) else "minference"
    known = {"schema": "profile", "alphas": "moa", "threshold": "thresholds"}
    form = next((form for name, form in known.items() if name in data), None)
    if form is None:
        found = ", ".join(map(shown, list(data)[:5])) or "nothing"
        raise ValueError(
            f"{path} is none of the formats {', '.join(FORMATS)}: it has {found}, none of {', '.join(known)}"
        )
    return form
