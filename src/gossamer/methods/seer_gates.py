"""SeerAttention's gates: weights for each layer, as a file of safetensors and as what they make of pooled q and k."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gossamer import scores
from gossamer.call import AttentionCall
from gossamer.methods.head_tables import of_layer
from gossamer.plan import Grid

__all__ = ["LayerGate", "SeerGates", "gate_inputs", "gate_of", "gate_scores", "load_tensors", "save_tensors"]

FORMAT, SCHEMA = "gossamer seer_attention gates", "1"
BLOCK = 64
_NAME = re.compile(r"layers\.(\d{1,5})\.(keys|queries)")


@dataclass(frozen=True, eq=False)
class LayerGate:
    """One layer's weights. C is the head dimension.

    Fields:
        keys: ``[H, 3 * C, C]``, for key blocks as each query head sees them; or ``[G, 3 * C, C]``. The 3 are the
            largest, the smallest and the mean of a block's keys by channel.
        queries: ``[H, C, C]``, or None: query blocks are their means (the authors' usual gate).
    """

    keys: Tensor
    queries: Tensor | None = None

    def __post_init__(self) -> None:
        heads, given, made = self.keys.shape if self.keys.ndim == 3 else (0, 0, 0)
        if not heads or given != 3 * made:
            raise ValueError(f"a gate's keys must be [heads, 3 * head_dim, head_dim], got {tuple(self.keys.shape)}")
        q = self.queries
        if q is not None and (q.ndim != 3 or q.shape[0] % heads or q.shape[1:] != (made, made)):
            raise ValueError(f"a gate's queries must be [query heads, {made}, {made}], got {tuple(q.shape)}")

    @classmethod
    def untrained(cls, heads: int, dim: int) -> LayerGate:
        """Mean keys as they are: what training starts from."""
        keys = torch.zeros(heads, 3, dim, dim, device="cpu")
        keys[:, 2] = torch.eye(dim, device="cpu")
        return cls(keys.flatten(1, 2))

    def fits(self, heads: int, groups: int, dim: int) -> bool:
        own = self.keys.shape[0] in (heads, groups) and (self.queries is None or self.queries.shape[0] == heads)
        return own and self.keys.shape[2] == dim

    def of_keys(self, pooled: Tensor) -> Tensor:
        """``[B, G, N, 3 * C]`` to ``[B, heads of keys, N, C]``."""
        weights = self.keys.to(pooled).unflatten(0, (pooled.shape[1], -1))
        return torch.einsum("bgnc,gscd->bgsnd", pooled, weights).flatten(1, 2)

    def of_queries(self, pooled: Tensor) -> Tensor:
        """``[B, H, M, C]`` likewise."""
        return pooled if self.queries is None else pooled @ self.queries.to(pooled)


@dataclass(frozen=True, eq=False)
class SeerGates:
    """Gates of a model's layers, and the block that they were trained for."""

    layers: Sequence[LayerGate]
    block: int = BLOCK

    def save(self, path: str | os.PathLike[str], about: Mapping[str, str] | None = None) -> None:
        """Write as safetensors, to a temporary name first. ``about`` is said in the file's metadata.

        Raises:
            OSError: it cannot be written.
            ImportError: safetensors is missing.
        """
        tensors = {}
        for layer, gate in enumerate(self.layers):
            tensors[f"layers.{layer}.keys"] = gate.keys
            if gate.queries is not None:
                tensors[f"layers.{layer}.queries"] = gate.queries
        own = {"format": FORMAT, "schema": SCHEMA, "block": str(self.block)}
        save_tensors(path, tensors, dict(about or {}) | own)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SeerGates:
        """Read what `save` writes.

        Raises:
            ValueError: it cannot be read, or is something else; the message says what.
            ImportError: safetensors is missing.
        """
        tensors, about = load_tensors(path)
        if about.get("format") != FORMAT or about.get("schema") != SCHEMA:
            raise ValueError(f"{path} holds no gates of SeerAttention: make them with `gossamer train-gates`")
        block = about.get("block", "")
        if not re.fullmatch(r"[1-9]\d{0,5}", block):
            raise ValueError(f"{path}: its block must be an integer of at least 1, got {block[:20]!r}")
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            match = _NAME.fullmatch(name)
            if match is None:
                raise ValueError(f"{path} has a tensor {name[:60]!r}, which is no gate's")
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise ValueError(f"{path}: {name} must hold finite numbers, got {tensor.dtype}")
            found.setdefault(int(match[1]), {})[match[2]] = tensor
        if sorted(found) != list(range(len(found))) or not all("keys" in parts for parts in found.values()):
            raise ValueError(f"{path} must have keys for the layers 0, 1, ... without a gap, got {sorted(found)[:9]}")
        try:
            layers = [LayerGate(found[layer]["keys"], found[layer].get("queries")) for layer in range(len(found))]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(layers, int(block))


def gates_of_file(path: str) -> SeerGates:
    """`SeerGates.load`, once for each state of the file."""
    try:
        state = os.stat(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the gates {path}: {getattr(error, 'strerror', None) or error}") from error
    return _loaded(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _loaded(path: str, *state: int) -> SeerGates:
    return SeerGates.load(path)


def gate_of(call: AttentionCall, path: str) -> tuple[LayerGate, int]:
    """The gate of the call's layer from a file, and its block; without a path the untrained one.

    Raises:
        ValueError: the file cannot be read, or is for another model.
    """
    if not path:
        return LayerGate.untrained(call.groups, call.q.shape[-1]), BLOCK
    file, what = gates_of_file(path), f"the gates of {path}"
    gate = of_layer([(gate,) for gate in file.layers], call.layer, [1], what)[0]
    if not gate.fits(call.heads, call.groups, call.q.shape[-1]):
        raise ValueError(
            f"{what} are for {gate.keys.shape[0]} heads of {gate.keys.shape[2]} channels, but the call has "
            f"{call.heads} query heads and {call.groups} key/value heads of {call.q.shape[-1]}"
        )
    return gate, file.block


def gate_inputs(call: AttentionCall, grid: Grid) -> tuple[Tensor, Tensor]:
    """Pooled q ``[B, H, M, C]`` and k ``[B, G, N, 3 * C]``, fp32, as they were before the rotary embedding."""
    queries, low, high, keys = scores.pool_before_rotary(call, grid)
    return queries, torch.cat([high, low, keys], dim=-1)


def gate_scores(
    call: AttentionCall, grid: Grid, gate: LayerGate, queries: Tensor, keys: Tensor
) -> Iterator[tuple[range, Tensor]]:
    """P of the plan's rows, from `gate_inputs`: parts of fp32 ``[B, H, rows, N]``."""
    assert call.rotary is not None
    at_queries = (grid.first_block[:, None] + torch.arange(grid.query_blocks, device="cpu")) * grid.block_q
    at_keys = (torch.arange(grid.key_blocks, device="cpu") * grid.block_k).expand(call.batch, -1)
    q = call.rotary.turn(gate.of_queries(queries), at_queries.to(call.device))
    k = call.rotary.turn(gate.of_keys(keys), at_keys.to(call.device))
    yield from scores.block_attention(call, grid, q, k, q.shape[-1] ** -0.5)


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """A file of safetensors, written to a temporary name first."""
    files = _safetensors()
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        files.save_file(
            {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary, dict(about)
        )
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file of safetensors, on the CPU, and its metadata.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {next(iter(str(error).splitlines()), error)}"
        ) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("gates are files of safetensors: pip install safetensors") from error
    return safetensors.torch
