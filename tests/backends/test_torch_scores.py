"""How much memory the definitions of scores hold. That they are right is in `tests/test_scores.py`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer import AttentionCall, scores
from gossamer.plan import Grid

SCORES: dict[str, Callable[[AttentionCall, Grid], Iterator[tuple[range, Tensor]]]] = {
    "pooled": scores.pooled_scores,
    "energy": scores.row_block_energy,
    "antidiagonal": lambda call, grid: scores.antidiagonal_scores(call, grid, 2),
}


@pytest.fixture(autouse=True)
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_PLANNER", "torch")


class Storages(TorchDispatchMode):
    """The most bytes that an operator returned, of storages that are not the inputs'."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self._given = {x.untyped_storage().data_ptr() for x in inputs}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._given:
                self.most = max(self.most, x.untyped_storage().nbytes())
        return out


def plain_call(length: int) -> AttentionCall:
    q, k = torch.ones(1, 4, length, 4), torch.ones(1, 2, length, 4)
    return AttentionCall(q, k, k)


@pytest.mark.usefixtures("smallest_constants")
@pytest.mark.parametrize("name", ["last_query_probe", "pool_keys", "pool_queries"])
def test_what_streams_holds_nothing_larger_than_it_returns(name: str) -> None:
    call = plain_call(2048)
    with Storages(call.q, call.k) as held:
        second: Any = 8 if name == "last_query_probe" else Grid(call.extent, 16, 16)
        returned = getattr(scores, name)(call, second)
    largest = returned[0] if isinstance(returned, tuple) else returned
    assert held.most == largest.numel() * largest.element_size()


@pytest.mark.parametrize("name", SCORES)
def test_nothing_grows_with_queries_times_keys(name: str) -> None:
    most = []
    for length in (256, 1024):
        call = plain_call(length)
        with Storages(call.q, call.k) as held:
            for _ in SCORES[name](call, Grid(call.extent, 64, 64)):
                pass
        most.append(held.most)
    assert most[1] <= 4 * most[0]
