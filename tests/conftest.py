"""Shared by all tests: one thread a worker, since xdist runs one worker a core; Triton interpreted without a GPU."""

import os

import pytest
import torch

# Triton reads it once, when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# cuBLAS reads it once; `poisoned_memory` asks torch for determinism, and older ones then warn at every product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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
