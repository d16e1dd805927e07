"""SeerAttention's gate and its cuts, block by block from the paper's formulas; and its files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from definitions import call_in, everywhere, rows_of
from torch import Tensor

from gossamer import AttentionCall
from gossamer.methods import SeerAttention
from gossamer.methods.seer_gates import LayerGate, SeerGates, save_tensors
from gossamer.rotary import Rotary
from gossamer.testing import make_call

HEADS, GROUPS, DIM, BLOCK = 4, 2, 4, 4
ROTARY = {
    "usual": Rotary.of_base(DIM, 30.0),
    "partial": Rotary(torch.tensor([0.3])),
    "interleaved and scaled": Rotary(torch.tensor([0.3, 0.02]), 1.4, True),
}


def random_gate(kind: str) -> LayerGate:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "by query head":
        return LayerGate(draw(HEADS, 3 * DIM, DIM))
    return LayerGate(draw(GROUPS, 3 * DIM, DIM), draw(HEADS, DIM, DIM))


def naive_turn(rotary: Rotary, x: Tensor, position: int, back: bool = False) -> Tensor:
    """As a matrix, and its inverse."""
    turn = torch.eye(DIM, dtype=torch.float64)
    half = len(rotary.frequencies)
    for n, frequency in enumerate(rotary.frequencies.tolist()):
        a, b = (2 * n, 2 * n + 1) if rotary.interleaved else (n, n + half)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        turn[a, a] = turn[b, b] = rotary.scaling * cos
        turn[b, a], turn[a, b] = rotary.scaling * sin, -rotary.scaling * sin
    return (torch.linalg.inv(turn) if back else turn) @ x


def naive(call: AttentionCall, gate: LayerGate, b: int, h: int) -> dict[tuple[int, int], float]:
    """P of each query block (by its number among the row's positions) and key block."""
    row, rotary, g = rows_of(call.extent)[b], call.rotary, h // call.share
    assert rotary is not None
    q = {row.query_start + i: call.q[b, h, i].double() for i in row.live_queries()}
    k = {j - row.key_start: call.k[b, g, j].double() for j in row.live_keys()}
    q = {p: naive_turn(rotary, x, p, back=True) for p, x in q.items()}
    k = {p: naive_turn(rotary, x, p, back=True) for p, x in k.items()}
    queries, keys = {}, {}
    for m in {p // BLOCK for p in q}:
        mean = torch.stack([x for p, x in q.items() if p // BLOCK == m]).mean(0)
        made = mean if gate.queries is None else mean @ gate.queries[h].double()
        queries[m] = naive_turn(rotary, made, m * BLOCK)
    weights = gate.keys[h if gate.keys.shape[0] == HEADS else g].double()
    for n in {p // BLOCK for p in k}:
        block = torch.stack([x for p, x in k.items() if p // BLOCK == n])
        made = torch.cat([block.amax(0), block.amin(0), block.mean(0)]) @ weights
        keys[n] = naive_turn(rotary, made, n * BLOCK)
    found = {}
    for m, query in queries.items():
        mine = [p for p in q if p // BLOCK == m]
        seen = sorted({j // BLOCK for i in mine for j in k if row.allows(i, j)})
        weight = {n: float(query @ keys[n]) / math.sqrt(DIM) for n in seen}
        most = max(weight.values(), default=0.0)
        total = sum(math.exp(w - most) for w in weight.values())
        found |= {(m, n): math.exp(w - most) / total for n, w in weight.items()}
    return found


def selected(call: AttentionCall, method: SeerAttention, b: int, shares: dict[tuple[int, int], float]) -> set[Any]:
    row = rows_of(call.extent)[b]
    positions, blocks = row.positions(), -(-row.key_count // BLOCK)
    chosen = set()
    for m in {m for m, _ in shares}:
        mine = {n: share for (at, n), share in shares.items() if at == m}
        if method.share:
            count = max(1, int((1 - math.sqrt(1 - method.share)) * blocks))
            best = sorted(mine, key=lambda n: (-mine[n], n))[:count]
        else:
            best = [n for n, share in mine.items() if share > method.threshold or method.threshold == 0]
        last = sorted({p // BLOCK for p in positions})[-method.last_blocks :] if method.last_blocks else []
        own = min(m, max(0, blocks - 1)) if not row.causal else m
        chosen |= {(m, n) for n in mine if n in best or m in last or n == own}
    return chosen


METHODS = [
    {"threshold": 0.2},
    {"threshold": 0.2, "last_blocks": 0},
    {"threshold": 0.02, "last_blocks": 1},
    {"threshold": 0.0, "last_blocks": 0},
    {"share": 0.5, "last_blocks": 0},
    {"share": 0.9},
    {"share": 0.01, "last_blocks": 3},
]


@everywhere
@pytest.mark.parametrize(
    ("kind", "rotary"),
    [("by query head", "usual"), ("both sides", "interleaved and scaled"), ("both sides", "partial")],
)
def test_blocks_are_those_of_the_formula(tmp_path: Path, situation: str, kind: str, rotary: str) -> None:
    call = replace(call_in(situation, length=21, dim=DIM), rotary=ROTARY[rotary], scale=-3.0, layer=1)
    gate, path = random_gate(kind), str(tmp_path / "gates")
    other = LayerGate.untrained(HEADS, DIM)
    SeerGates([other, gate], BLOCK).save(path)
    shares = {(b, h): naive(call, gate, b, h) for b in range(call.batch) for h in range(HEADS)}
    for fields in METHODS:
        method = SeerAttention(path, **fields)
        plan = method.plan(call)
        chosen = plan.block_mask()
        for (b, h), mine in shares.items():
            first = int(plan.grid.first_block[b])
            got = {(int(m) + first, int(n)) for m, n in chosen[b, h].nonzero()}
            assert got == selected(call, method, b, mine), (fields, b, h)


def test_a_share_keeps_that_share_of_causal_blocks() -> None:
    """The triangular correction: k of each row is less than the share of the row."""
    call = make_call("no padding", length=4096, heads=2, groups=1, dim=8)
    for share in (0.2, 0.5, 0.8):
        mask = SeerAttention(share=share, last_blocks=0).plan(call).block_mask()
        assert float(mask.sum()) / (2 * 64 * 65 / 2) == pytest.approx(share, abs=0.03)


def test_a_high_threshold_leaves_the_diagonal() -> None:
    call = make_call("no padding", length=300, heads=2, groups=1, dim=8)
    plan = SeerAttention(threshold=1.0, last_blocks=0).plan(call)
    assert torch.equal(plan.block_mask()[0, 0], torch.eye(5, dtype=torch.bool))


def test_the_untrained_gate_is_mean_pooled_attention() -> None:
    gate = LayerGate.untrained(2, 3)
    pooled = torch.randn(1, 2, 5, 9)
    assert torch.equal(gate.of_keys(pooled), pooled[..., 6:])
    queries = torch.randn(1, 4, 5, 3)
    assert gate.of_queries(queries) is queries


def test_a_call_must_say_how_it_was_turned() -> None:
    call = replace(make_call("no padding", length=100, heads=2, groups=1, dim=8), rotary=None)
    assert SeerAttention().lacks(call) == "rotary"
    with pytest.raises(ValueError, match="does not say how"):
        SeerAttention().plan(call)


def test_gates_of_another_model_are_refused(tmp_path: Path) -> None:
    path, call = str(tmp_path / "gates"), make_call("no padding", length=100, heads=4, groups=2, dim=8)
    SeerGates([LayerGate.untrained(3, 8)]).save(path)
    with pytest.raises(
        ValueError, match="are for 3 heads of 8 channels, but the call has 4 query heads and 2 key/value"
    ):
        SeerAttention(path).plan(call)
    SeerGates([LayerGate.untrained(4, 16)]).save(path)
    with pytest.raises(ValueError, match=r"are for 4 heads of 16 channels, .* heads of 8"):
        SeerAttention(path).plan(call)
    with pytest.raises(ValueError, match="1 layers"):
        SeerAttention(path).plan(replace(call, layer=1))
    with pytest.raises(ValueError, match=r"cannot read the gates .*nowhere"):
        SeerAttention(path + "/nowhere").plan(call)
    with pytest.raises(TypeError, match=r"seer_attention\.gates must be the path of a file, got list"):
        SeerAttention([])  # pyright: ignore[reportArgumentType]


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path, call = str(tmp_path / "gates"), make_call("no padding", length=100, heads=4, groups=2, dim=8)
    SeerGates([LayerGate.untrained(2, 8)], 32).save(path)
    assert SeerAttention(path).plan(call).block_q == 32
    SeerGates([LayerGate.untrained(4, 8)], 16).save(path)
    assert SeerAttention(path).plan(call).block_q == 16


# Files


def test_gates_survive_the_round_trip(tmp_path: Path) -> None:
    gates = SeerGates([random_gate("by query head"), random_gate("both sides")], 32)
    gates.save(tmp_path / "gates", {"model": "tiny"})
    again = SeerGates.load(tmp_path / "gates")
    assert again.block == 32
    assert [p.name for p in tmp_path.iterdir()] == ["gates"]
    for one, other in zip(gates.layers, again.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert (one.queries is None) == (other.queries is None)
        assert one.queries is None or other.queries is None or torch.equal(one.queries, other.queries)


ABOUT = {"format": "gossamer seer_attention gates", "schema": "1", "block": "64"}
KEYS = torch.zeros(2, 12, 4)


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({"layers.0.keys": KEYS}, {}, "holds no gates of SeerAttention"),
        ({"layers.0.keys": KEYS}, ABOUT | {"schema": "2"}, "holds no gates"),
        ({"layers.0.keys": KEYS}, ABOUT | {"block": "0"}, "block must be an integer of at least 1, got '0'"),
        ({"layers.0.keys": KEYS}, ABOUT | {"block": "9" * 99}, "block must be an integer"),
        ({"layers.0.weights": KEYS}, ABOUT, "a tensor 'layers.0.weights', which is no gate's"),
        ({"layers.1.keys": KEYS}, ABOUT, r"layers 0, 1, \.\.\. without a gap, got \[1\]"),
        ({"layers.0.queries": torch.zeros(2, 4, 4)}, ABOUT, "must have keys"),
        ({"layers.0.keys": KEYS[:, :8]}, ABOUT, r"must be \[heads, 3 \* head_dim, head_dim\], got \(2, 8, 4\)"),
        ({"layers.0.keys": KEYS[0]}, ABOUT, r"got \(12, 4\)"),
        (
            {"layers.0.keys": KEYS, "layers.0.queries": torch.zeros(3, 4, 4)},
            ABOUT,
            r"queries must be .* got \(3, 4, 4\)",
        ),
        ({"layers.0.keys": KEYS, "layers.0.queries": torch.zeros(2, 4, 5)}, ABOUT, r"queries must be"),
        ({"layers.0.keys": KEYS / 0}, ABOUT, "must hold finite numbers"),
        ({"layers.0.keys": KEYS.long()}, ABOUT, "must hold finite numbers, got torch.int64"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, tensors: Any, about: Any, message: str) -> None:
    save_tensors(tmp_path / "gates", tensors, about)
    with pytest.raises(ValueError, match=message):
        SeerGates.load(tmp_path / "gates")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, json.dumps({"a": 1}).encode()])
def test_what_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "gates").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        SeerGates.load(tmp_path / "gates")
