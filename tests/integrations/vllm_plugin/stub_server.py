"""A server of one layer, on stubs of vLLM's classes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stub_vllm import DIM, GROUPS, PAGE, Config, filled, installed
from torch import Tensor

from gossamer.integrations.vllm.counters import FOLDER
from gossamer.integrations.vllm.plugin import engine_of

DENSE = {"method": "dense", "kernel": "gossamer", "min_tokens": 0, "min_queries": 32}
ROWS = [(1, 20), (40, 30), (5, 33), (33, 0), (2, 0)]
MINE = [70, 33]  # lengths of those of them that run a plan
SPEC = SimpleNamespace(num_kv_heads=GROUPS, block_size=PAGE, head_size=DIM)


@pytest.fixture(autouse=True, scope="module")
def stubs() -> Iterator[None]:
    yield from installed()


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (FOLDER, "GOSSAMER_VLLM"):
        monkeypatch.delenv(name, raising=False)


class Served:
    """A server of one layer, on one of both backends."""

    def __init__(self, kind: str, asked: Any = DENSE, **more: Any) -> None:
        parallel = more.pop("parallel", {})
        module = importlib.import_module(f"gossamer.integrations.vllm.{kind}")
        name = {"cpu": "CPU", "gpu": "Triton"}[kind]
        self.impl = getattr(module, f"Sparse{name}Impl")(**more)
        self.config = Config({"gossamer": asked} if asked else {})
        vars(self.config.parallel_config).update(parallel)
        from vllm.model_executor.layers.attention import Attention  # pyright: ignore[reportMissingImports]

        self.config.layers["layers.3"] = Attention(self.impl)
        self.make = getattr(module, f"Sparse{name}Builder")
        self.builder: Any = None

    def run(self, rows: list[tuple[int, int]], *, nhd: bool = False, shared: bool = False, **changes: Any) -> Tensor:
        """The layer's output for one step."""
        if self.builder is None:
            self.builder = self.make(SPEC, ["layers.3"], self.config, torch.device("cpu"))
        common, query, key, value, cache = filled(rows, self.impl, nhd)
        vars(common).update(changes)
        self.impl.given.clear()
        meta = self.builder.build(0, common)
        out = torch.full_like(query, torch.nan)
        given = (None, None) if shared else (key, value)
        return self.impl.forward(None, query, *given, cache, meta, out)

    def expected(self, rows: list[tuple[int, int]], nhd: bool = False) -> Tensor:
        """By the stock kernel alone."""
        common, query, key, value, cache = filled(rows, self.impl, nhd)
        meta = SimpleNamespace(
            query_start_loc=common.query_start_loc, seq_lens=common.seq_lens, block_table=common.block_table_tensor
        )
        stock = type(self.impl).__mro__[2]
        return stock.forward(self.impl, None, query, key, value, cache, meta, torch.empty_like(query))

    def total(self, metric: str, **labels: str) -> float:
        engine = engine_of(self.config)
        assert engine is not None
        rows = engine.counters.rows()
        return sum(value for name, its, value in rows if name == metric and labels.items() <= its.items())


def refused(served: Served, reason: str) -> None:
    rows = [(1, 5), (33, 0)]
    assert torch.equal(served.run(rows), served.expected(rows))
    assert served.impl.reason == reason
    assert served.total("gossamer_dense_rows", reason=reason) == 2
    assert served.total("gossamer_rows") == 2
