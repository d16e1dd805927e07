"""Servers whose rows all stay with vLLM's kernel, and the places of rows that will not, on stubs of vLLM's classes."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stub_server import Served, plain, refused, stubs
from stub_vllm import filled
from torch import Tensor

__all__ = ["plain", "stubs"]  # fixtures

both = pytest.mark.parametrize("kind", ["cpu", "gpu"])


@both
@pytest.mark.parametrize("parallel", [{"enable_dbo": True}, {"use_ubatching": True}])
def test_halves_of_a_step_stay(kind: str, parallel: dict[str, Any]) -> None:
    refused(Served(kind, parallel=parallel), "dual-batch overlap")


def transfer_of(name: str, module: str | None = None, children: tuple[str, ...] = ()) -> Any:
    """``KVTransferConfig``."""
    parts = [{"kv_connector": child} for child in children]
    return SimpleNamespace(
        kv_connector=name, kv_connector_module_path=module, kv_connector_extra_config={"connectors": parts}
    )


@both
@pytest.mark.parametrize(
    "transfer",
    [("OffloadingConnector",), ("NixlConnector",), ("MultiConnector", None, ("NixlConnector", "OffloadingConnector"))],
)
def test_pages_that_are_shared_by_policy_are_served(kind: str, transfer: tuple[Any, ...]) -> None:
    served = Served(kind)
    served.config.kv_transfer_config = transfer_of(*transfer)
    served.run([(33, 0)])
    assert served.total("gossamer_rows", path="dense") == 1


@both
@pytest.mark.parametrize(
    ("transfer", "named"),
    [
        (("ExampleConnector",), "ExampleConnector"),
        (("OffloadingConnector", "their.module"), "OffloadingConnector (not vLLM's own)"),
        (("MultiConnector", None, ("NixlConnector", "ExampleConnector")), "NixlConnector, ExampleConnector"),
    ],
)
def test_pages_that_are_shared_by_tokens_alone_stay_dense(
    kind: str, transfer: tuple[Any, ...], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(kind)
    served.config.kv_transfer_config = transfer_of(*transfer)
    refused(served, "KV connector")
    assert f"vLLM's own kernel runs all rows of this server: KV connector ({named})" in caplog.text


@both
def test_metadata_that_is_copied_by_its_fields_keeps_ours(kind: str) -> None:
    """As vLLM copies it for ``--kv-sharing-fast-prefill``, whose layers see the queries that make tokens alone."""
    served = Served(kind)
    rows = [(1, 20), (1, 70)]
    served.run(rows)
    common, query, key, value, cache = filled(rows, served.impl)
    made = served.builder.build(0, common)
    kept: Any = type("Kept", (type(made),), {"__init__": lambda self: None})()
    for one in fields(type(made)):
        setattr(kept, one.name, getattr(made, one.name))
    served.impl.forward(None, query, key, value, cache, kept, torch.empty_like(query))
    assert served.total("gossamer_dense_rows", layer="3", reason="decode") == 2 * len(rows)


@both
@pytest.mark.parametrize(
    ("rows", "apart"),
    [
        ([(1, 20), (5, 33), (40, 30)], False),
        ([(40, 30), (1, 20)], False),
        ([(33, 0), (3, 9), (33, 4)], False),
        ([(1, 2), (33, 0), (3, 9)], True),
    ],
)
def test_other_rows_are_copied_where_they_lie_apart(
    kind: str, rows: list[tuple[int, int]], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(kind)
    expected = served.expected(rows)
    seen: list[Tensor] = []
    stock = type(served.impl).__mro__[2]
    forward = stock.forward

    def noted(self: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, meta: Any, out: Tensor) -> Tensor:
        seen.append(out)
        return forward(self, layer, query, key, value, cache, meta, out)

    monkeypatch.setattr(stock, "forward", lambda self, *given: noted(self, *given[:7]))
    out = served.run(rows)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    (into,) = seen
    assert (into.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()) == apart
