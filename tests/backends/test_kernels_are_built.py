"""The development set-up has a C++ compiler: without kernels most of the executor's tests would skip in silence."""

from gossamer.backends import cpu


def test_kernels_are_built() -> None:
    assert cpu.is_available(), cpu.why_unavailable()
