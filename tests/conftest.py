"""Shared by all tests: one thread a worker, as xdist runs one a core; Triton interpreted without a GPU; no costs."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = str(Path(__file__).resolve().parent.parent / "benchmarks")

# Triton reads it once, when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# No test depends on what was measured on the machine that it runs on.
os.environ["GOSSAMER_COST_MODEL"] = "off"
# cuBLAS reads it once; `poisoned_memory` asks torch for determinism, and older ones then warn at every product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Every budget by which the code cuts its work into pieces, at the value that makes the most pieces of it.
_SMALLEST = {
    "gossamer.plan.count": {"_ROW_BUDGET": 1, "_MASK_BUDGET": 1},
    "gossamer.plan.count_permuted": {"_BUDGET": 1},
    "gossamer.blocks": {"MASK_BYTES": 1},
    "gossamer.methods.slashes": {"PART_ENTRIES": 1},
    "gossamer.methods.flagged": {"HELD_BYTES": 1},
    "gossamer.backends.torch.tiles": {"TILE_BYTES": 1, "MOST_QUERIES": 1, "MOST_KEYS": 1},
    "gossamer.backends.torch": {"PART_BYTES": 1},
    "gossamer.backends.torch.attend": {"_LOGITS": 1},
    "gossamer.backends.torch.backward": {"_LOGITS": 1},
    "gossamer.backends.torch.gates": {"CHUNK_BYTES": 1},
    "gossamer.rotary": {"_ROWS": 1},
    "gossamer.backends.torch.scores": {"CHUNK_BYTES": 1, "PART_BYTES": 1},
    "gossamer.backends.cpu": {"PART_BYTES": 1},
    "gossamer.backends.cpu.scores": {"PART_BYTES": 1},
    "gossamer.backends.triton": {"PART_BYTES": 1},
    "gossamer.backends.triton.scores": {"PART_BYTES": 1, "_SPLIT_KEYS": 64, "_SPAN_TILES": 1, "_MERGE_TILE": 32},
    "gossamer.backends.triton.choose": {"_ROW_TILE": 32, "_WIDEST_ROW": 32},
    "gossamer.backends.triton.pairs": {"_BITMAP_BYTES": 1},
    "gossamer.backends.triton.transpose": {"MOST_ENTRIES": 1},
    "gossamer.backends.triton.launch": {"_MOST_BITMAP_BYTES": 1},
    "gossamer.integrations.transformers.masks": {"COMPARED_BYTES": 1},
    "gossamer.evaluate._attention_map": {"_BYTES": 1},
}


def pytest_configure(config: pytest.Config) -> None:
    """What torch warns of under `poisoned_memory` is no fault of ours, and no error."""
    config.addinivalue_line("filterwarnings", "ignore:.* does not have a deterministic implementation:UserWarning")


@pytest.fixture(autouse=True, scope="session")
def one_thread_a_worker() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN: what a kernel fails to write shows. Torch does so only in its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def smallest_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """All work is cut into as many pieces as it can be. What is not there is passed over."""
    for name, smallest in _SMALLEST.items():
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for constant, value in smallest.items():
            if hasattr(module, constant):
                monkeypatch.setattr(module, constant, value)


@pytest.fixture(params=["usual constants", "smallest constants"])
def constants(request: pytest.FixtureRequest) -> None:
    """Runs a test twice: as things are, and under `smallest_constants`."""
    if request.param == "smallest constants":
        request.getfixturevalue("smallest_constants")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of benchmarks/, where its neighbours can be imported; all of them are forgotten afterwards."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in [n for n, m in sys.modules.items() if (getattr(m, "__file__", None) or "").startswith(BENCHMARKS)]:
        sys.modules.pop(name)
