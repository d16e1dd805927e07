"""Queries that decode and choose what they read, on stubs of vLLM's classes: whose they are, and what they find."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from stub_server import SPEC, Served, plain, stubs
from stub_vllm import DIM, GROUPS, HEADS, PAGE, filled
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.backends import cpu
from gossamer.backends import torch as reference
from gossamer.cache import StoreLayer
from gossamer.integrations.vllm.plugin import engine_of
from gossamer.methods import LServe, Quest
from gossamer.paged import Paged
from gossamer.plan import SparsePlan
from gossamer.summaries import Labels, PageBounds

__all__ = ["plain", "stubs"]  # fixtures

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="needs the C++ kernels")
PROMPTS = {"method": "dense", "kernel": "gossamer", "min_tokens": 0, "min_queries": 32, "min_context": 0}
# Pages of 8 tokens, two in each of the cache's; layer 3 chooses.
QUEST = {"method": "quest", "page": 8, "budget": 24}
WHOLE = PROMPTS | {"decode": QUEST | {"budget": 1 << 20}, "max_density": 2}
FEW = PROMPTS | {"decode": QUEST}
ROWS = [(1, 99), (40, 30), (1, 20), (5, 33), (1, 150)]


def counted(served: Served, path: str, method: str = "quest") -> float:
    return served.total("gossamer_rows", path=path, method=method)


def chosen_by(method: Quest | LServe, query: Tensor, keys: Tensor, values: Tensor, **more: Any) -> Tensor:
    """One query's output ``[H, D]`` by the definitions, from keys as rows ``[T, G, D]``."""
    k, v = (x.transpose(0, 1)[None] for x in (keys, values))
    store = StoreLayer()
    k, v = store.update(k, v)
    store.place(Extent.full(1, 1, k.shape[2]))
    call = AttentionCall(query[None, :, None], k, v, scale=0.3, layer=3, store=store, **more)
    return reference.attend(call, method.plan(call))[0][0, :, 0]


def sequences(rows: list[tuple[int, int]], served: Served) -> list[tuple[Tensor, Tensor]]:
    """All keys and values of each row, ``[T, G, D]``."""
    common, _, _, _, cache = filled(rows, served.impl)
    found = []
    for row, length in enumerate(common.seq_lens.tolist()):
        slots = [(int(common.block_table_tensor[row, t // PAGE]), t % PAGE) for t in range(length)]
        halves = [
            torch.stack([torch.stack([served.impl.half(cache, *at, g, which) for g in range(GROUPS)]) for at in slots])
            for which in (0, 1)
        ]
        found.append((halves[0], halves[1]))
    return found


@pytest.mark.parametrize("rows", [[(1, 99)], [(1, 99), (1, 7), (1, 0)], ROWS, [(2, 3), (1, 50), (33, 0), (1, 70)]])
@pytest.mark.parametrize(
    "more", [{}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=["plain", "softcap", "sinks"]
)
def test_a_choice_of_all_is_the_stock_kernel_s(rows: list[tuple[int, int]], more: dict[str, Any]) -> None:
    served = Served("cpu", WHOLE, **more)
    out, given = served.run(rows), [*served.impl.given]
    torch.testing.assert_close(out, served.expected(rows), atol=2e-5, rtol=1e-4)
    ones, others = sum(q == 1 for q, _ in rows), [q + past for q, past in rows if 1 < q < 32]
    assert counted(served, "sparse") == ones
    assert given == ([others] if others else [])
    assert served.total("gossamer_rows") == len(rows)


def test_a_choice_is_that_of_the_definition() -> None:
    served = Served("cpu", FEW)
    out, given = served.run(ROWS), [*served.impl.given]
    own = sequences(ROWS, served)
    _, query, *_ = filled(ROWS, served.impl)
    for row, place in ((0, 0), (4, 47)):
        wanted = chosen_by(Quest(24, 8), query[place], *own[row])
        torch.testing.assert_close(out[place], wanted, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(out[place], served.expected(ROWS)[place], atol=1e-3)
    # What is no longer than the budget is read whole by vLLM's kernel.
    assert served.total("gossamer_dense_rows", reason="short context") == 1
    assert given == [[21, 38]]
    pairs, computed = (served.total(f"gossamer_{name}", method="quest") for name in ("pairs", "computed_pairs"))
    assert pairs == 100 + 151
    assert 2 * 17 <= computed <= 2 * 24


def test_company_changes_no_bit() -> None:
    served = Served("cpu", FEW)
    together, parts = served.run(ROWS), []
    common, query, key, value, cache = filled(ROWS, served.impl)
    for row, place in ((0, 0), (4, 47)):
        alone = Served("cpu", FEW)
        alone.run([(1, 60)])
        one = SimpleNamespace(**vars(common))
        starts = torch.tensor([0, 1], dtype=torch.int32)
        one.query_start_loc = one.query_start_loc_cpu = starts
        one.seq_lens, one.block_table_tensor = common.seq_lens[row : row + 1], common.block_table_tensor[row : row + 1]
        one.slot_mapping, one.num_reqs, one.num_actual_tokens, one.max_query_len = common.slot_mapping[:1], 1, 1, 1
        meta = alone.builder.build(0, one)
        out = torch.full((1, HEADS, DIM), torch.nan)
        alone.impl.forward(None, query[place][None], key[:1], value[:1], cache, meta, out)
        parts.append(torch.equal(out[0], together[place]))
    assert parts == [True, True]


def test_nothing_is_copied_out_of_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Paged] = []
    rows = Paged.rows
    served = Served("cpu", FEW)
    served.run([(1, 50)])
    monkeypatch.setattr(Paged, "rows", lambda self: copied.append(self) or rows(self))
    served.run([(1, 300), (1, 90)])
    assert counted(served, "sparse") == 3
    assert not copied


def test_steps_that_decode_alone_make_no_metadata_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served("cpu", FEW)
    served.run([(1, 50)])
    built: list[Any] = []
    stock = type(served.builder).__mro__[2]
    build = stock.build
    monkeypatch.setattr(stock, "build", lambda self, *given: built.append(given) or build(self, *given))
    served.run([(1, 60), (1, 90)])
    assert len(built) == 1


class TestWhoReadsWhole:
    """Layers and rows that stay with vLLM's kernel, and why."""

    def check(self, served: Served, rows: list[tuple[int, int]], reason: str, many: int) -> None:
        torch.testing.assert_close(served.run(rows), served.expected(rows), atol=2e-5, rtol=1e-4)
        assert served.total("gossamer_dense_rows", reason=reason) == many
        assert counted(served, "sparse") == 0
        assert served.total("gossamer_rows") == len(rows)

    @pytest.mark.parametrize("rows", [[(1, 99), (1, 120)], [(1, 99), (40, 3), (1, 120)]])
    def test_a_layer_of_the_method_s(self, rows: list[tuple[int, int]]) -> None:
        served = Served("cpu", PROMPTS | {"decode": QUEST | {"dense_layers": 4}})
        self.check(served, rows, "decode", 2)
        # In a step that has other layers too, theirs are parted anew.
        engine = engine_of(served.config)
        assert engine is not None
        engine.decoders.join(7, HEADS, GROUPS, PAGE, True)
        out, given = served.run(rows), [*served.impl.given]
        torch.testing.assert_close(out, served.expected(rows), atol=2e-5, rtol=1e-4)
        assert served.total("gossamer_dense_rows", reason="whole layer") == 2
        assert given == [[100, 121]]

    def test_a_window(self) -> None:
        self.check(Served("cpu", FEW, window=60), [(1, 99), (1, 120)], "decode", 2)

    def test_one_whose_pages_the_method_s_do_not_divide(self) -> None:
        self.check(Served("cpu", PROMPTS | {"decode": QUEST | {"page": 12}}), [(1, 99)], "decode", 1)

    def test_short_sequences(self) -> None:
        self.check(Served("cpu", FEW | {"min_context": 100}), [(1, 98)], "short context", 1)
        served = Served("cpu", FEW | {"min_context": 100})
        served.run([(1, 99)])
        assert counted(served, "sparse") == 1

    def test_the_end_of_a_prompt(self) -> None:
        served = Served("cpu", FEW)
        rows = [(1, 99), (1, 120)]
        out = served.run(rows, is_prefilling=torch.tensor([True, False]))
        torch.testing.assert_close(out[0], served.expected(rows)[0], atol=2e-5, rtol=1e-4)
        assert served.total("gossamer_dense_rows", reason="end of a prompt") == 1
        assert counted(served, "sparse") == 1

    def test_a_connector_s_server(self) -> None:
        served = Served("cpu", FEW)
        served.config.kv_transfer_config = SimpleNamespace(
            kv_connector="OffloadingConnector", kv_connector_module_path=None, kv_connector_extra_config={}
        )
        self.check(served, [(1, 99)], "decode", 1)

    def test_prompts_without_a_method(self) -> None:
        served = Served("cpu", {"decode": QUEST, "min_queries": 32, "min_context": 0})
        rows = [(40, 30), (1, 99)]
        assert torch.equal(served.run(rows)[:40], served.expected(rows)[:40])
        assert served.total("gossamer_dense_rows", reason="no method for prompts") == 1
        assert counted(served, "sparse") == 1


def test_a_server_that_cannot_decode_by_a_method_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(current_platform, "device_type", "cuda")
    with pytest.raises(ValueError, match="decode: quest chooses what decoding reads on CPUs alone so far"):
        engine_of(Served("cpu", FEW).config)
    monkeypatch.undo()
    served = Served("cpu", PROMPTS | {"policies": {"x": {"decode": QUEST | {"page": 12}}}})
    vars(served.config)["cache_config"] = SimpleNamespace(block_size=PAGE)
    with pytest.raises(
        ValueError, match="quest has bounds of 12 tokens, which do not divide this server's pages of 16"
    ):
        engine_of(served.config)


def test_drafts_are_readers_of_their_own() -> None:
    """Each query of a row reads what it would read alone, and sees no draft behind it."""
    served = Served("cpu", FEW)
    vars(served.config)["speculative_config"] = SimpleNamespace(num_speculative_tokens=3)
    rows = [(4, 97), (5, 60), (1, 80)]
    out, own = served.run(rows), sequences(rows, served)
    _, query, *_ = filled(rows, served.impl)
    for place in range(4):
        keys, values = (x[: 98 + place] for x in own[0])
        torch.testing.assert_close(
            out[place], chosen_by(Quest(24, 8), query[place], keys, values), atol=2e-5, rtol=1e-4
        )
    assert counted(served, "sparse") == 2
    assert served.total("gossamer_dense_rows", reason="few queries") == 1


def test_a_method_that_fails_reads_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, call: Any) -> SparsePlan:
        raise RuntimeError("no")

    monkeypatch.setattr(Quest, "plan", fails)
    served = Served("cpu", FEW)
    rows = [(1, 99), (1, 150)]
    torch.testing.assert_close(served.run(rows), served.expected(rows), atol=2e-5, rtol=1e-4)
    assert served.total("gossamer_dense_rows", reason="method failed") == 2


@pytest.mark.parametrize("kind", [PageBounds(12), Labels(count=4)])
def test_what_the_pages_do_not_keep_is_read_whole(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that asks for what it did not say."""
    monkeypatch.setattr(Quest, "plan", lambda self, call: call.store.summary(kind))
    served = Served("cpu", FEW)
    torch.testing.assert_close(served.run([(1, 99)]), served.expected([(1, 99)]), atol=2e-5, rtol=1e-4)
    assert served.total("gossamer_dense_rows", reason="method failed") == 1


class Life:
    """A layer's cache over many steps, in which pages change hands."""

    def __init__(self, asked: dict[str, Any], pages: int = 24, **more: Any) -> None:
        self.served = Served("cpu", asked, **more)
        self.served.builder = self.served.make(SPEC, ["layers.3"], self.served.config, torch.device("cpu"))
        self.cache = torch.full((pages, GROUPS, PAGE, 2 * DIM), math.nan)
        self.free = list(range(pages))
        self.tables: dict[str, list[int]] = {}
        self.rows: dict[str, tuple[Tensor, Tensor]] = {}
        self.ids: list[str] = []
        runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=self.ids), requests={})
        self.served.builder.runner = lambda: runner

    def drawn(self, name: str, many: int, heads: int) -> Tensor:
        """``[many, heads, D]``, by the request and what it holds, whoever its company is."""
        past = len(self.rows[name][0]) if name in self.rows else 0
        return torch.randn(many, heads, DIM, generator=torch.Generator().manual_seed(1000 * ord(name) + past + heads))

    def write(self, name: str, tokens: int) -> Tensor:
        """New tokens of a request; slots behind them are NaN, whoever had the page before."""
        table, (k, v) = self.tables.setdefault(name, []), self.rows.get(name, (torch.empty(0, GROUPS, DIM),) * 2)
        past = len(k)
        new = [self.drawn(name, tokens, GROUPS), -self.drawn(name, tokens, GROUPS)]
        while len(table) * PAGE < past + tokens:
            table.append(self.free.pop(0))
            self.cache[table[-1]] = math.nan
        self.rows[name] = torch.cat([k, new[0]]), torch.cat([v, new[1]])
        slots = torch.tensor([table[t // PAGE] * PAGE + t % PAGE for t in range(past, past + tokens)])
        layer = SimpleNamespace(_k_scale_float=1, _v_scale_float=1, isa="vec")
        self.served.impl.do_kv_cache_update(layer, *new, self.cache, slots)
        return slots

    def end(self, name: str) -> None:
        self.free = self.tables.pop(name) + self.free  # the next one gets them
        del self.rows[name]

    def step(self, *names: str) -> tuple[Tensor, Tensor]:
        """A token of each request: queries and outputs ``[n, H, D]``."""
        slots = torch.cat([self.write(name, 1) for name in names])
        lengths = [len(self.rows[name][0]) for name in names]
        query = torch.cat([self.drawn(name, 1, HEADS) for name in names])
        tables = torch.zeros(len(names), max(map(len, self.tables.values())), dtype=torch.int32)
        for row, name in enumerate(names):
            tables[row, : len(self.tables[name])] = torch.tensor(self.tables[name])
        common, *_ = filled([(1, n - 1) for n in lengths], self.served.impl)
        common.block_table_tensor, common.slot_mapping = tables, slots
        self.ids[:] = names
        out = torch.full_like(query, torch.nan)
        meta = self.served.builder.build(0, common)
        given = (query[:, :GROUPS], query[:, :GROUPS])
        return query, self.served.impl.forward(None, query, *given, self.cache, meta, out)

    def check(self, method: Quest, *names: str) -> None:
        query, out = self.step(*names)
        for row, name in enumerate(names):
            wanted = chosen_by(method, query[row], *self.rows[name])
            torch.testing.assert_close(out[row], wanted, atol=2e-5, rtol=1e-4)


def test_pages_that_change_hands_have_no_bounds_of_their_former_owner() -> None:
    life, method = Life(FEW), Quest(24, 8)
    life.write("a", 100)
    life.write("b", 70)
    for _ in range(20):
        life.check(method, "a", "b")
    life.end("a")
    life.write("c", 90)
    assert set(life.tables["c"]) & set(range(8))
    for _ in range(18):
        life.check(method, "c", "b")
    life.end("b")
    life.end("c")
    life.write("d", 130)
    life.check(method, "d")
    # Preempted, and written anew elsewhere.
    life.end("d")
    life.write("e", 33)
    life.write("d", 131)
    assert life.tables["d"][0] != life.tables["e"][0]
    life.check(method, "d", "e")


def test_sequences_share_the_pages_of_a_prefix() -> None:
    life, method = Life(FEW), Quest(24, 8)
    life.write("a", 64)
    for name in ("b", "c"):
        life.tables[name], life.rows[name] = list(life.tables["a"]), life.rows["a"]
        life.write(name, 20)
    for _ in range(3):
        life.check(method, "a", "b", "c")


class TestMemory:
    LSERVE: ClassVar[dict[str, Any]] = {"method": "lserve", "page": 16, "logical": 8, "budget": 48, "interval": 3}

    def life(self) -> Life:
        return Life(PROMPTS | {"decode": self.LSERVE})

    def plans(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Of each call that chooses anew, its rows."""
        found: list[int] = []
        choose = LServe._choose
        monkeypatch.setattr(
            LServe, "_choose", lambda self, call, *a: found.append(call.batch) or choose(self, call, *a)
        )
        return found

    def test_requests_choose_in_every_third_step_of_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        life, found = self.life(), self.plans(monkeypatch)
        life.write("a", 100)
        for wanted in ([1], [], [], [1], []):
            found.clear()
            life.step("a")
            assert found == wanted
        life.write("b", 100)
        for wanted in ([1], [1], [], [1], [1], []):
            found.clear()
            life.step("a", "b")
            assert found == wanted
        assert counted(life.served, "sparse", "lserve") == 5 + 12

    def test_company_changes_no_bit(self) -> None:
        outs: list[list[Tensor]] = []
        for company in (False, True):
            life = self.life()
            life.write("a", 100)
            life.write("b", 110)
            names = [("a", "b") if company and n >= 2 else ("a",) for n in range(8)]
            outs.append([life.step(*together)[1][0] for together in names])
        assert all(torch.equal(alone, among) for alone, among in zip(*outs, strict=True))

    def test_a_prompt_makes_a_request_choose_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        life, found = self.life(), self.plans(monkeypatch)
        life.write("a", 100)
        life.step("a")
        life.ids[:] = ["a"]
        common, *_ = filled([(5, 100)], life.served.impl)
        life.served.builder.build(0, common)
        life.step("a")
        assert found == [1, 1]

    def test_finished_requests_are_forgotten_in_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        life = self.life()
        memory = life.served.builder.memory
        monkeypatch.setattr(type(memory), "_MOST", 2)
        for name in "abcd":
            life.write(name, 70)
            life.step(name)
        assert list(memory._of) == ["c", "d"]
