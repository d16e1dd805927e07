"""A cache in a file is the cache in memory: what steps attend, what crops and beams leave, what ends with it."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_steps import Tokens

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.attention import CallRecord, attend
from gossamer.cache import StoreLayer, Tiers, create
from gossamer.cache.block_file import PAGE, BlockFile, aligned
from gossamer.cache.pool import Pool
from gossamer.cache.step_calls import chosen_slots
from gossamer.cache.tiered_tokens import TieredTokens
from gossamer.cache.tiers import TieredLayer
from gossamer.methods import Dense, MagicPIG, Method, OracleTopK, Quest, RetroInfer
from gossamer.policy import Policy
from gossamer.summaries import PageBounds


def layer_of(folder: Path, *, block: int = 4, hot: int = 6, resident: int = 8, **fields: int) -> TieredLayer:
    layer = Tiers(block=block, hot=hot, resident=resident, folder=str(folder), **fields).layer(0, 1)
    assert isinstance(layer, TieredLayer)
    return layer


def step(layer: StoreLayer, tokens: Tokens, policy: Policy | None = None, record: Any = None, **fields) -> torch.Tensor:
    """Add the next token and attend it, as the attention function does."""
    first = layer.length
    part = slice(first, first + 1)
    keys, values = layer.update(tokens.k[:, :, part], tokens.v[:, :, part])
    live = torch.arange(first + 1)[None] >= torch.tensor(tokens.starts)[:, None]
    extent = Extent.from_key_mask(live, 1)
    layer.place(extent)
    call = AttentionCall(tokens.q[:, :, part], keys, values, extent, layer=5, store=layer, state=layer.state, **fields)
    out = attend(call, policy or Policy(Dense("gossamer")), record=record)
    layer.attended(call)
    assert isinstance(out, torch.Tensor)
    return out


def prompt(layer: StoreLayer, tokens: Tokens, *chunks: int) -> None:
    for _ in tokens.run(layer, *chunks):
        pass


@pytest.mark.parametrize("dim", [32, 80, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_again(tmp_path: Path, dim: int, dtype: torch.dtype) -> None:
    tokens = Tokens.random([0, 3], 61, heads=4, groups=2, dim=dim)
    tokens.k, tokens.v = tokens.k.to(dtype), tokens.v.to(dtype)
    tokens.q = tokens.q.to(dtype)
    layer = layer_of(tmp_path)
    seen = 0
    for count in (37, 1, 1, 20, 2):
        part = slice(seen, seen + count)
        seen += count
        layer.update(tokens.k[:, :, part], tokens.v[:, :, part])
        layer.before_update(1)
        keys, values = layer.read()
        assert torch.equal(keys, tokens.k[:, :, :seen])
        assert torch.equal(values, tokens.v[:, :, :seen])
        assert layer.first == max(0, (seen - 6) // 4 * 4)
        assert layer.slots == layer.get_seq_length() == seen
    assert layer.file_bytes >= layer.first * 2 * 2 * 2 * dim * dtype.itemsize


@pytest.mark.parametrize("starts", [[0], [0, 5]])
@pytest.mark.parametrize("extra", [{}, {"scale": 0.3}, {"softcap": 2.0}, {"sinks": True}])
def test_a_step_attends_what_it_would_in_memory(tmp_path: Path, starts: list[int], extra: dict) -> None:
    tokens = Tokens.random(starts, 45, heads=4, groups=2, dim=32)
    fields = {key: torch.tensor([0.5, 1.0, -1.0, 2.0]) if key == "sinks" else value for key, value in extra.items()}
    for policy in (
        Policy(Dense("gossamer")),
        Policy(Dense("gossamer"), decode=Quest(budget=12, page=4)),
        Policy(Dense("gossamer"), decode=Quest(budget=12, page=4, per_query_head=True)),
    ):
        layer, stock = layer_of(tmp_path), StoreLayer()
        prompt(layer, tokens, 30, 8)
        prompt(stock, tokens, 30, 8)
        for _ in range(7):
            out, expected = (step(one, tokens, policy, **fields) for one in (layer, stock))
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert layer.first >= 36


@pytest.mark.parametrize("looked", ["rows", "some heads", "gathered", "another dtype", "arithmetic"])
def test_keys_and_values_are_read_where_somebody_looks(tmp_path: Path, looked: str) -> None:
    tokens = Tokens.random([0, 3], 41, heads=4, groups=2, dim=32)
    layer = layer_of(tmp_path)
    prompt(layer, tokens, 40)
    keys, values = layer.update(tokens.k[:, :, 40:41], tokens.v[:, :, 40:41])
    assert isinstance(keys, TieredTokens)
    assert isinstance(values, TieredTokens)
    assert keys.shape == (2, 2, 41, 32)
    for found, whole in ((keys, tokens.k), (values, tokens.v)):
        if looked == "rows":
            assert torch.equal(found.rows(), whole)
        elif looked == "some heads":
            assert torch.equal(found.of_heads(1, 2), whole[:, 1:])
        elif looked == "another dtype":
            assert isinstance(found.double(), TieredTokens)
            assert torch.equal(found.double() * 1, whole.double())
        elif looked == "arithmetic":
            assert torch.equal(found + 1, whole + 1)
        else:
            slots = torch.tensor([[[0, 33, 40, 7], [1, 2, 3, 3], [40, 39, 39, 6], [5, 5, 5, 20]]] * 2)
            expected = whole.repeat_interleave(2, dim=1).gather(2, slots[..., None].expand(-1, -1, -1, 32))
            assert torch.equal(found.gathered(slots), expected)
    # A prompt's next chunk has them all.
    assert type(layer.update(tokens.k[:, :, :2], tokens.v[:, :, :2])[1]) is torch.Tensor


def test_rows_are_read_once_for_keys_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens.random([0], 45, heads=4, groups=2, dim=32)
    layer = layer_of(tmp_path)
    prompt(layer, tokens, 40)
    passes, read = [], TieredLayer.read
    monkeypatch.setattr(TieredLayer, "read", lambda self: passes.append(1) or read(self))
    step(layer, tokens, Policy(Dense("gossamer"), decode=OracleTopK(budget=8, dense_layers=0)))
    assert len(passes) == 1
    step(layer, tokens, Policy(Dense("gossamer")))
    assert len(passes) == 1  # without a method the file is attended in passing


WEIGHING = [
    OracleTopK(budget=12, dense_layers=0),
    OracleTopK(budget=12, dense_layers=0, per_query_head=True),
    MagicPIG(bits=3, hash_tables=8, sinks=2, local=5, buffer=4),
    RetroInfer(probe=0.2, estimate=0.3, size=3, segment=16, sinks=2, local=5, least=8, update=4),
]


@pytest.mark.parametrize("method", WEIGHING, ids=lambda m: m.name)
@pytest.mark.parametrize("starts", [[0], [0, 5]])
def test_methods_that_look_at_keys_find_them(tmp_path: Path, method: Method, starts: list[int]) -> None:
    tokens = Tokens.random(starts, 60, heads=4, groups=2, dim=32)
    layer, stock = layer_of(tmp_path, hot=12), StoreLayer()
    prompt(layer, tokens, 30, 8)
    prompt(stock, tokens, 30, 8)
    records: list[CallRecord] = []
    for _ in range(22):
        found, expected = (
            step(one, tokens, Policy(Dense("gossamer"), decode=method), record=records.append) for one in (layer, stock)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(record.path == "sparse" and record.reason is None for record in records)
    assert [record.density for record in records[::2]] == [record.density for record in records[1::2]]


@pytest.mark.parametrize("method", WEIGHING[2:], ids=lambda m: m.name)
def test_indexes_are_kept_up_without_reading_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    tokens = Tokens.random([0], 120, heads=4, groups=2, dim=32)
    layer = layer_of(tmp_path, hot=300 if method.name == "magicpig" else 16)
    policy = Policy(Dense("gossamer"), decode=method)
    prompt(layer, tokens, 40)
    step(layer, tokens, policy)
    monkeypatch.setattr(TieredLayer, "_passing", None)
    for _ in range(79):
        step(layer, tokens, policy)


def test_a_step_reads_the_blocks_that_it_attends_and_no_others(tmp_path: Path) -> None:
    tokens = Tokens.random([0], 200, heads=4, groups=2, dim=32)
    layer = layer_of(tmp_path, block=8, hot=8, resident=1000)
    prompt(layer, tokens, 199)
    layer.update(tokens.k[:, :, 199:], tokens.v[:, :, 199:])
    call = AttentionCall(tokens.q[:, :, 199:], *layer.shown(1), store=layer)
    rows = [[3, 70, 71, 199], [3, 198]]
    plan = SparsePlan(
        heads=2,
        query_len=1,
        key_len=200,
        extent=call.extent,
        column_indptr=torch.tensor([0, 4, 6]),
        column_indices=torch.tensor([*rows[0], *rows[1]], dtype=torch.int32),
    )
    for n in range(2):
        out, lse = layer.attend(call, plan)
        assert layer.pool is not None
        assert (layer.pool.read, layer.pool.found) == (3, 3 * n)
    for head in range(4):
        torch.testing.assert_close(out[0, head, 0], tokens.attend(0, head, 199, rows[head // 2]), rtol=1e-5, atol=1e-5)
        logits = tokens.k[0, head // 2, rows[head // 2]] @ tokens.q[0, head, 199] * 32**-0.5
        torch.testing.assert_close(lse[0, head, 0], logits.logsumexp(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "parts",
    [
        {"columns": True},
        {"blocks": True},
        {"columns": True, "blocks": True},
        {"blocks": True, "sink": 3},
        {"columns": True, "window": 5},
        {},
    ],
)
@pytest.mark.parametrize(
    "extent", [Extent([59, 52], [1, 1], [0, 7], [60, 53]), Extent([40, 30], [1, 1], [0, 7], [60, 53])]
)
def test_the_slots_of_a_plan_are_those_of_its_mask(parts: dict, extent: Extent) -> None:
    given: dict = {"heads": 2, "query_len": 1, "key_len": 60, "extent": extent, "block_k": 8}
    indptr, indices = torch.tensor([0, 2, 3, 6, 6]), [0, 7, 3, 1, 5, 6]
    if "blocks" in parts:
        given |= {"block_indptr": indptr, "block_indices": torch.tensor(indices, dtype=torch.int32)}
    if "columns" in parts:
        given |= {"column_indptr": indptr, "column_indices": torch.tensor([0, 52, 30, 3, 4, 5], dtype=torch.int32)}
    plan = SparsePlan(**given, sink=parts.get("sink", 0), window=parts.get("window", 0))
    slots, counts = chosen_slots(plan)
    mask = plan.to_mask()[:, :, 0]
    assert torch.equal(counts, mask.sum(dim=2))
    assert torch.equal(slots, mask.nonzero()[:, 2])


def test_memory_holds_what_was_used_last(tmp_path: Path) -> None:
    file = BlockFile(tmp_path, PAGE)
    blocks = aligned(6, PAGE)
    blocks.copy_(torch.arange(6, dtype=torch.uint8)[:, None])
    numbers = file.write(blocks)
    pool = Pool(file, 3)
    for asked, read in (([0, 1, 2], 3), ([0], 0), ([3], 1), ([0, 2], 0), ([1], 1), ([4, 5, 0, 1], 2), ([1, 0], 0)):
        before = pool.read
        rows = pool.hold([numbers[n] for n in asked])
        assert [int(pool.rows[row, 7]) for row in rows] == asked
        assert pool.read - before == read, asked
    assert pool.nbytes == 4 * PAGE  # a step that needs more makes it hold more


@pytest.mark.parametrize("removed", [1, 5, 9, 10, 33, 40])
def test_tokens_are_taken_back(tmp_path: Path, removed: int) -> None:
    tokens = Tokens.random([0, 2], 60, heads=4, groups=2, dim=32)
    layer = layer_of(tmp_path)
    prompt(layer, tokens, 40)
    bounds = layer.summary(PageBounds(4))
    layer.crop(-removed)
    kept = 40 - removed
    assert layer.get_seq_length() == kept
    if not kept:
        return
    assert torch.equal(layer.read()[0], tokens.k[:, :, :kept])
    stock = StoreLayer()
    prompt(stock, tokens, 60)
    prompt(layer, tokens, 60 - kept)
    assert torch.equal(layer.read()[1], tokens.v)
    bounds = layer.summary(PageBounds(4))
    live = torch.arange(bounds.shape[2])[None] * 4 < 60 - torch.tensor(tokens.starts)[:, None]
    assert torch.equal(
        bounds[live[:, None].expand(bounds.shape[:3])],
        stock.summary(PageBounds(4))[live[:, None].expand(bounds.shape[:3])],
    )


def test_bounds_are_kept_up_without_reading_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens.random([0], 90, heads=4, groups=2, dim=32)
    layer, stock = layer_of(tmp_path), StoreLayer()
    prompt(layer, tokens, 40)
    layer.summary(PageBounds(8))
    monkeypatch.setattr(TieredLayer, "_passing", None)
    for _ in range(50):
        step(layer, tokens, Policy(Dense("gossamer"), decode=Quest(budget=16, page=8)))
    prompt(stock, tokens, 90)
    assert torch.equal(layer.summary(PageBounds(8)), stock.summary(PageBounds(8)))


def test_beams_share_blocks_and_free_them(tmp_path: Path) -> None:
    tokens = Tokens.random([0, 0, 0], 40, heads=4, groups=2, dim=32)
    layer = layer_of(tmp_path)
    prompt(layer, tokens, 40)
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(layer.read()[0], tokens.k[[2, 2, 0]])
    room = layer.file_bytes
    layer.batch_select_indices(torch.tensor([1]))
    layer.batch_repeat_interleave(3)
    assert torch.equal(layer.read()[1], tokens.v[[2, 2, 2]])
    for n in range(16):
        layer.update(tokens.k[:, :, n : n + 1], tokens.v[:, :, n : n + 1])
    assert torch.equal(layer.read()[0][:, :, 40:], tokens.k[:, :, :16])
    assert layer.file_bytes == room  # the dropped rows' blocks were used again


def test_copies_go_their_own_way(tmp_path: Path) -> None:
    tokens = Tokens.random([0], 60, heads=4, groups=2, dim=32)
    layer = layer_of(tmp_path)
    prompt(layer, tokens, 40)
    other = copy.deepcopy(layer)
    prompt(layer, tokens, 20)
    other.crop(-30)
    other.update(tokens.v[:, :, :30], tokens.k[:, :, :30])
    assert torch.equal(layer.read()[0], tokens.k)
    assert torch.equal(other.read()[0], torch.cat([tokens.k[:, :, :10], tokens.v[:, :, :30]], dim=2))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.file_bytes == 0


def test_a_full_disk_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    """With a limit of the system on what a file may hold, in a process of its own."""
    code = f"""
        import resource, signal, torch
        from gossamer.cache import Tiers
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
        layer = Tiers(block=16, hot=16, resident=16, folder={str(tmp_path)!r}).layer(0, 1)
        k, v = torch.randn(2, 1, 2, 400, 32)
        layer.update(k[:, :, :48], v[:, :, :48])
        layer.before_update(1)
        assert layer.first == 32, layer.first
        layer.update(k[:, :, 48:], v[:, :, 48:])
        for _ in range(2):
            try:
                layer.before_update(1)
            except OSError as error:
                assert "has no room for" in str(error) and "as it was" in str(error), error
            else:
                raise AssertionError("it was written")
            assert layer.first == 32
            keys, values = layer.read()
            assert torch.equal(keys, k) and torch.equal(values, v)
        print("held")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "held"), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
        import sys, time, torch
        from gossamer.cache import Tiers
        layer = Tiers(block=16, hot=16, resident=16, folder={str(tmp_path)!r}).layer(0, 1)
        k = torch.randn(1, 2, 400, 32)
        layer.update(k, k)
        layer.before_update(1)
        print(layer.file_bytes, flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert int(process.stdout.readline()) > 0
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list(tmp_path.iterdir())


def test_bad_tiers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is no folder"):
        prompt(layer_of(tmp_path / "none"), Tokens.random([0], 60, 2, 2, 8), 60)
    with pytest.raises(ValueError, match=r"tiers\.block must be at least 1"):
        create("tiers", block=0)
    with pytest.raises(TypeError, match=r"tiers\.folder must be"):
        Tiers(folder=Path("x"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 4096"):
        BlockFile(tmp_path, 100)
    layer = layer_of(tmp_path)
    with pytest.raises(ValueError, match="no gradients"):
        layer.update(*torch.zeros(2, 1, 2, 3, 8, requires_grad=True))
    with pytest.raises(ValueError, match="drops no tokens"):
        layer.keep(torch.zeros(1, 2, 1, dtype=torch.int64))


def test_no_room_grows_over_many_steps(tmp_path: Path) -> None:
    tokens = Tokens.random([0], 1, heads=2, groups=1, dim=8)
    layer = layer_of(tmp_path, block=16, hot=32, resident=32)
    held = []
    for _ in range(1000):
        layer.update(tokens.k, tokens.v)
        layer.before_update(1)
        assert layer._room is not None
        held.append(layer._room[0].shape[2])
    assert max(held) < 32 + 2 * 16 + 32 // 2 + 16 + 1
    assert layer.slots - layer.first < 32 + 16
