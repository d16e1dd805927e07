"""Profiles: which pattern each head of a model uses, as JSON with a schema version and provenance."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["HeadPattern", "Profile"]

SCHEMA = 1
KINDS = {
    "vertical_slash": ("vertical_size", "slash_size"),
    "a_shape": ("sink", "window"),
    "block_sparse": ("blocks",),
    "dense": (),
}
_PUBLISHED_KINDS = {"vertical_and_slash": "vertical_slash", "stream_llm": "a_shape", "block_sparse": "block_sparse"}


@dataclass(frozen=True, slots=True)
class HeadPattern:
    """One head's pattern and budget: `kind` is a key of ``KINDS``, `budget` its numbers in that order.

    ``vertical_slash`` (vertical_size, slash_size), ``a_shape`` (sink, window), ``block_sparse`` (blocks), ``dense``
    (nothing); all in tokens but blocks. `score` is what the search measured, if anything.
    """

    kind: str
    budget: tuple[int, ...] = ()
    score: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown pattern {self.kind!r}; known: {', '.join(KINDS)}")
        names = KINDS[self.kind]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.budget)
        if len(self.budget) != len(names) or not whole:
            raise ValueError(
                f"pattern {self.kind!r} takes {len(names)} non-negative integers ({', '.join(names) or 'none'}), "
                f"got {self.budget!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        values = dict(zip(KINDS[self.kind], self.budget, strict=True))
        return {"pattern": self.kind} | values | ({} if self.score is None else {"score": self.score})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HeadPattern:
        kind = data.get("pattern")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"unknown pattern {kind!r}; known: {', '.join(KINDS)}")
        wrong = sorted(set(data) - {"pattern", "score", *KINDS[kind]})
        missing = [name for name in KINDS[kind] if name not in data]
        if wrong or missing:
            raise ValueError(f"pattern {kind!r}: unknown fields {wrong}, missing fields {missing}")
        return cls(kind, tuple(data[name] for name in KINDS[kind]), data.get("score"))


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a profile comes from. Free text and lists; nothing is looked up by it."""

    model: str = ""
    architecture: str = ""
    samples: str = ""
    lengths: tuple[int, ...] = ()
    metric: str = ""
    library_version: str = ""


@dataclass(frozen=True, slots=True)
class Profile:
    """Patterns ``[layer][head]`` (query heads). Found by a model's shape, not by a hub name.

    Raises:
        ValueError: no layers, or layers of different numbers of heads.
    """

    patterns: tuple[tuple[HeadPattern, ...], ...]
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        heads = {len(layer) for layer in self.patterns}
        if len(heads) != 1 or 0 in heads:
            raise ValueError(
                f"a profile needs at least one layer and the same number of heads in each, got {sorted(heads)} heads"
            )

    @property
    def layers(self) -> int:
        return len(self.patterns)

    @property
    def heads(self) -> int:
        return len(self.patterns[0])

    @classmethod
    def uniform(cls, layers: int, heads: int, pattern: HeadPattern) -> Profile:
        """The same pattern for every head."""
        return cls(((pattern,) * heads,) * layers)

    def layer(self, index: int | None, heads: int) -> tuple[HeadPattern, ...]:
        """The patterns of one layer.

        Raises:
            ValueError: no layer was given, it is beyond the profile, or the number of heads differs.
        """
        if index is None:
            raise ValueError("a profile differs between layers: pass layer=, the index of the model's layer")
        if not 0 <= index < self.layers or heads != self.heads:
            raise ValueError(
                f"the profile is for {self.layers} layers of {self.heads} heads, but layer {index} with {heads} heads "
                "was asked for; use a profile made for this model"
            )
        return self.patterns[index]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "layers": self.layers,
            "heads": self.heads,
            "provenance": asdict(self.provenance),
            "patterns": [[head.to_dict() for head in layer] for layer in self.patterns],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Profile:
        """Inverse of `to_dict`.

        Raises:
            ValueError: another schema, or a field that does not fit; the message says which head.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            given = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"profile schema {given!r} is not supported; this version reads schema {SCHEMA}")
        layers: list[tuple[HeadPattern, ...]] = []
        for i, layer in enumerate(data.get("patterns") or []):
            try:
                layers.append(tuple(HeadPattern.from_dict(head) for head in layer))
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(f"profile layer {i}: {error}") from error
        provenance = dict(data.get("provenance") or {})
        provenance["lengths"] = tuple(provenance.get("lengths", ()))
        known = {name: provenance[name] for name in Provenance.__slots__ if name in provenance}
        return cls(tuple(layers), Provenance(**known))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, to a temporary name first: a profile on disk is always whole."""
        path = Path(path)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(self.to_dict(), file, indent=1)
        os.replace(file.name, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile, or a pattern file in the format that MInference publishes (a list of layers).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or not a profile.
        """
        text = Path(path).read_text()
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return cls.from_minference(data) if isinstance(data, list) else cls.from_dict(data)

    @classmethod
    def from_minference(cls, layers: Sequence[dict[str, Sequence[Any]]]) -> Profile:
        """From MInference's published pattern files: a list (layers) of ``{"head": [type, a, b, score]}``."""
        patterns: list[tuple[HeadPattern, ...]] = []
        for i, layer in enumerate(layers):
            row: list[HeadPattern] = []
            for head in range(len(layer)):
                entry = layer.get(str(head))
                if entry is None or len(entry) < 3 or entry[0] not in _PUBLISHED_KINDS:
                    raise ValueError(
                        f"layer {i}, head {head}: expected [type, number, number, score] with a type of "
                        f"{', '.join(_PUBLISHED_KINDS)}, got {entry!r}"
                    )
                kind = _PUBLISHED_KINDS[entry[0]]
                budget = tuple(int(n) for n in entry[1 : 1 + len(KINDS[kind])])
                row.append(HeadPattern(kind, budget, float(entry[3]) if len(entry) > 3 else None))
            patterns.append(tuple(row))
        return cls(tuple(patterns), Provenance(samples="a pattern file in MInference's published format"))
