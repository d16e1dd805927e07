"""Profiles: a method for each layer and head of a model, as JSON with a schema version and provenance."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gossamer.methods import AShape, BlockSparse, Method, MInference, PerHead, VerticalSlash, from_dict
from gossamer.profiles.files import MOST_BYTES, file_name, parse_json, read_file, shown, write_whole
from gossamer.profiles.minference import from_entry, is_number, to_entry
from gossamer.profiles.models import config_hash, differing, key_value_heads

__all__ = ["Profile", "Provenance"]

SCHEMA = 2
_FIGURES = ("scores", "errors", "costs")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a profile comes from: texts and lists. `Profile.check_config` compares the config; all else is for readers.

    Fields:
        model: its id or path; config: what of its config attention depends on, a text of JSON, and config_hash: its
            SHA-256 in hexadecimal (`gossamer.profiles.models`).
        samples, prompts_hash: which prompts, and their hash; lengths: in tokens.
        metric: what ``errors`` measure, and by what the methods were chosen; held_out: what they are on prompts that
            did not choose.
        kernel: what ``costs`` hold for; machine: where they were measured.
    """

    model: str = ""
    architecture: str = ""
    samples: str = ""
    lengths: tuple[int, ...] = ()
    metric: str = ""
    library_version: str = ""
    config_hash: str = ""
    prompts_hash: str = ""
    kernel: str = ""
    machine: str = ""
    config: str = ""
    held_out: str = ""


@dataclass(frozen=True, slots=True)
class Profile:
    """Methods ``[layer][head]`` (query heads) of one model, found by its shape, not by a hub name.

    Fields:
        layers: any methods with any fields.
        scores: what the search measured for each, if anything, by layer and head.
        provenance: where it comes from.
        errors, costs: of each head's output and of its kernel, likewise.
        decode: what a decode step reads of the cache (`gossamer.Policy.decode`); None: all of it.
        name: by which results and tables know it; of one that was loaded, its file's. No part of what is saved.

    Raises:
        ValueError, TypeError: no layers, layers of different numbers of heads, scores of another shape, or something
            that is no method.
    """

    layers: Sequence[Sequence[Method]]
    scores: Sequence[Sequence[float | None]] | None = None
    provenance: Provenance = field(default_factory=Provenance)
    errors: Sequence[Sequence[float | None]] | None = None
    costs: Sequence[Sequence[float | None]] | None = None
    decode: Method | None = None
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a profile needs at least one layer")
        object.__setattr__(self, "layers", PerHead(self.layers).layers)
        shape = [len(layer) for layer in self.layers]
        for name in _FIGURES:
            rows = getattr(self, name)
            if rows is not None and [len(layer) for layer in rows] != shape:
                raise ValueError(f"a profile's {name} must be [layer][head] as its methods, {shape} heads")
        if self.decode is not None and not (isinstance(self.decode, Method) and self.decode.decodes):
            given = self.decode.name if isinstance(self.decode, Method) else shown(self.decode)
            raise ValueError(f"a profile's decode must be a method that chooses what a decode step reads, got {given}")

    @property
    def heads(self) -> int:
        return len(self.layers[0])

    @property
    def method(self) -> PerHead:
        """The method that runs it; MInference, if it has no others than MInference's patterns."""
        known = (AShape, VerticalSlash, BlockSparse)
        minference = all(type(method) in known for layer in self.layers for method in layer)
        return MInference(self.layers) if minference else PerHead(self.layers)

    def check(self, layers: int, heads: int) -> None:
        """That it is for a model of so many layers and query heads.

        Raises:
            ValueError: it is for another one.
        """
        if (len(self.layers), self.heads) != (layers, heads):
            made_for = f" ({shown(self.provenance.model)[1:-1]})" if self.provenance.model else ""
            raise ValueError(
                f"the profile is for {len(self.layers)} layers of {self.heads} heads{made_for}, but this model has "
                f"{layers} layers of {heads}; use a profile made for it"
            )

    def check_config(self, config: Any) -> str | None:
        """That it is for the model of a transformers config.

        Another shape, or another kind, number of key/value heads, width or dimension of a head where the profile says
        which it was made for, is another model. All else, such as another base of the rotary embedding, may be a
        version of the same.

        Returns:
            in what the model differs from the one that it was made for, as a sentence; None if in nothing known.

        Raises:
            ValueError: it is for another model; the message says in what it differs.
        """
        text = config.get_text_config(decoder=True)
        layers, heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
        if isinstance(layers, int) and isinstance(heads, int):
            self.check(layers, heads)
        made_for = f"the profile was made for {shown(self.provenance.model)[1:-1] or 'another model'}"
        found = differing(self.provenance.config, config)
        if found is None:
            given = self.provenance.config_hash
            return f"{made_for}, whose config differs" if given and given != config_hash(config) else None
        shape, others = found
        if shape:
            raise ValueError(f"{made_for}, with {', '.join(shape)}; use a profile made for this model")
        return f"{made_for}, with {', '.join(others)}" if others else None

    def shard(self, rank: int, ranks: int, groups: int | None = None) -> Profile:
        """What one rank of a tensor-parallel model runs: its query heads of each layer, counted from 0 as in its calls.

        Ranks hold query heads in their order, as many each, with the key/value heads that these read; with fewer
        key/value heads than ranks, each lies on all the ranks that read it. Where a rank has all query heads of its
        key/value heads, its plans are those of the whole model. Where it has some of them, methods that choose for a
        key/value head with all its query heads (`docs/methods.md` says which) choose by those that are there.

        The provenance stays: compare with the config of the whole model (`check_config`) before.

        Args:
            rank: 0 to ``ranks - 1``.
            groups: key/value heads of the whole model; by default as the provenance has them, and where it does not,
                any number that can be split.

        Raises:
            TypeError: something is no integer.
            ValueError: numbers that do not divide, as of a model that cannot be split so either; or a method that a
                rank has no part of (`Method.of_rank`).
        """
        groups = key_value_heads(self.provenance.config) if groups is None else groups
        for name, value in {"rank": rank, "ranks": ranks, "groups": 1 if groups is None else groups}.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {ranks}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be 0 to {ranks - 1}, got {rank}")
        if groups is not None and (groups < 1 or self.heads % groups):
            raise ValueError(f"the profile's {self.heads} heads must be a multiple of the {groups} key/value heads")
        if self.heads % ranks or (groups is not None and groups % ranks and ranks % groups):
            with_groups = "" if groups is None else f" with {groups} key/value heads"
            raise ValueError(
                f"{self.heads} heads{with_groups} cannot be split over {ranks} ranks: both numbers must be a multiple "
                "of the ranks, or the ranks a multiple of the key/value heads"
            )
        layers = self.method.of_rank(rank, ranks, self.heads, self.heads if groups is None else groups).layers
        mine = slice(rank * self.heads // ranks, (rank + 1) * self.heads // ranks)
        figures = {n: rows and tuple(tuple(row)[mine] for row in rows) for n in _FIGURES if (rows := getattr(self, n))}
        steps = self.decode
        if steps is not None:
            steps = steps.of_rank(rank, ranks, self.heads, self.heads if groups is None else groups)
        return replace(self, layers=layers, decode=steps, **figures)

    @classmethod
    def uniform(cls, layers: int, heads: int, method: Method) -> Profile:
        """The same method for every head."""
        return cls(((method,) * heads,) * layers)

    def to_dict(self) -> dict[str, Any]:
        return (
            {
                "schema": SCHEMA,
                "layers": len(self.layers),
                "heads": self.heads,
                "provenance": asdict(self.provenance) | {"lengths": list(self.provenance.lengths)},
                "methods": [[method.to_dict() for method in layer] for layer in self.layers],
            }
            | {
                name: [list(layer) for layer in getattr(self, name)]
                for name in _FIGURES
                if getattr(self, name) is not None
            }
            | ({} if self.decode is None else {"decode": self.decode.to_dict()})
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Profile:
        """Inverse of `to_dict`.

        Raises:
            ValueError: another schema, or a field that does not fit; the message says which layer and head.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            given = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"profile schema {shown(given)} is not supported; this version reads schema {SCHEMA}")
        methods = data.get("methods")
        if not _is_table(methods):
            raise ValueError("a profile's methods must be a list (layers) of lists (heads)")
        scores, errors, costs = (_figures(data.get(name), name) for name in _FIGURES)
        layers: list[list[Method]] = []
        for i, layer in enumerate(methods or []):
            layers.append([])
            for j, head in enumerate(layer):
                try:
                    layers[-1].append(from_dict(head))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"profile layer {i}, head {j}: {error}") from error
        provenance = _provenance(data.get("provenance"))
        try:
            steps = None if data.get("decode") is None else from_dict(data["decode"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"a profile's decode: {error}") from error
        try:
            profile = cls(tuple(map(tuple, layers)), scores, provenance, errors, costs, steps)
        except TypeError as error:  # a method of several heads
            raise ValueError(f"a profile's methods: {error}") from error
        _check_shape(data, profile)
        return profile

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, to a temporary name first: a profile on disk is always whole.

        Raises:
            OSError: it cannot be written.
            ValueError: a figure is NaN or infinite, which `load` would refuse.
        """
        write_whole(path, json.dumps(self.to_dict(), indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile, or a pattern file in the format that MInference publishes (a list of layers).

        Raises:
            FileNotFoundError: no such file.
            OSError: it cannot be read, or is a device.
            ValueError: not JSON, not a profile, or more than 64 MiB.
        """
        content = read_file(path, MOST_BYTES)
        try:
            data = parse_json(content)
        except ValueError as error:
            raise ValueError(f"{path} is {error}") from error
        profile = cls.from_minference(data) if isinstance(data, list) else cls.from_dict(data)
        return replace(profile, name=file_name(path))

    def to_minference(self) -> list[dict[str, list[Any]]]:
        """In MInference's published format, which holds its three patterns and the budgets alone.

        Raises:
            ValueError: a head that the format cannot hold; the message says which.
        """
        scores = self.scores or [[None] * self.heads] * len(self.layers)
        return [
            {str(j): to_entry(method, scores[i][j], f"layer {i}, head {j}") for j, method in enumerate(layer)}
            for i, layer in enumerate(self.layers)
        ]

    @classmethod
    def from_minference(cls, layers: Sequence[dict[str, Sequence[Any]]]) -> Profile:
        """From MInference's published pattern files: a list (layers) of ``{"head": [type, a, b, score]}``.

        Raises:
            ValueError: an entry is something else; the message says of which layer and head.
        """
        methods: list[tuple[Method, ...]] = []
        scores: list[tuple[float | None, ...]] = []
        for i, layer in enumerate(layers):
            if not isinstance(layer, dict):
                raise ValueError(f"layer {i}: expected an object of heads, got {shown(layer)}")
            missing = next((head for head in range(len(layer)) if str(head) not in layer), None)
            if missing is not None:
                raise ValueError(
                    f"layer {i} has no head {missing}: MInference's format names its {len(layer)} heads 0 to "
                    f"{len(layer) - 1}"
                )
            found = [from_entry(layer[str(head)], f"layer {i}, head {head}") for head in range(len(layer))]
            methods.append(tuple(method for method, _ in found))
            scores.append(tuple(score for _, score in found))
        return cls(tuple(methods), tuple(scores), Provenance(samples="a file in MInference's published format"))


def _check_shape(data: dict[str, Any], profile: Profile) -> None:
    """That no layer and no head is missing, where the file says how many there are."""
    for name, counted in (("layers", len(profile.layers)), ("heads", profile.heads)):
        given = data.get(name, counted)
        if type(given) is not int or given != counted:
            raise ValueError(f"{name} of a profile must be how many its methods are for, {counted}, got {shown(given)}")


def _provenance(data: Any) -> Provenance:
    """What is known of it; fields of a later version are passed over.

    Raises:
        ValueError: no object, or a field of another type.
    """
    if data is None:
        return Provenance()
    if not isinstance(data, dict) or not isinstance(data.get("lengths", []), list):
        raise ValueError("a profile's provenance must be an object, and its lengths a list")
    known = {name: data[name] for name in Provenance.__slots__ if name in data}
    known["lengths"] = tuple(known.get("lengths", ()))
    for length in known["lengths"]:
        if not isinstance(length, int) or isinstance(length, bool):
            raise ValueError(f"the lengths of a profile's provenance must be integers, got {shown(length)}")
    for name, value in known.items():
        if name != "lengths" and not isinstance(value, str):
            raise ValueError(f"{name} of a profile's provenance must be text, got {shown(value)}")
    return Provenance(**known)


def _figures(rows: Any, name: str) -> tuple[tuple[float | None, ...], ...] | None:
    """Numbers or nulls by layer and head."""
    if rows is None:
        return None
    if not _is_table(rows):
        raise ValueError(f"a profile's {name} must be a list (layers) of lists (heads)")
    for i, layer in enumerate(rows):
        for j, value in enumerate(layer):
            if value is not None and not is_number(value):
                one = {"scores": "a score", "errors": "an error", "costs": "a cost"}[name]
                raise ValueError(f"profile layer {i}, head {j}: {one} is a number or null, got {shown(value)}")
    return tuple(tuple(layer) for layer in rows)


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, list) for row in rows)
