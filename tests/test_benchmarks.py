"""The benchmarks' contenders are right where they are installed, and are left out with a reason where they are not."""

import importlib
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest

from gossamer.ops import cpu as kernels
from gossamer.ops import triton

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="needs the C++ kernels")
needs_triton = pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}")


@pytest.fixture
def benchmark(monkeypatch):
    """benchmarks/cpu.py as a module, in a process where its neighbours can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("cpu")
    for name in ("cpu", "cpu_sections", "timing", "vllm_attention", "workloads"):
        sys.modules.pop(name, None)


@pytest.fixture
def without_vllm(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find_spec(name))


def run(benchmark, monkeypatch, out):
    monkeypatch.setattr(benchmark, "verify", lambda: None)
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--only", "vllm", "--quick", "--out", str(out)])
    assert benchmark.main() == 0
    return json.loads(out.read_text())["sections"]["vllm"]


def test_a_contender_that_is_not_installed_is_skipped_with_the_reason(benchmark, without_vllm, monkeypatch, tmp_path):
    section = run(benchmark, monkeypatch, tmp_path / "cpu.json")
    assert section["rows"] == []
    assert "not installed" in section["skipped"]


def test_a_skipped_section_does_not_replace_measured_rows(benchmark, without_vllm, monkeypatch, tmp_path):
    measured = {"rows": [{"what": "dense"}]}
    (tmp_path / "cpu.json").write_text(json.dumps({"sections": {"vllm": measured}}))
    assert run(benchmark, monkeypatch, tmp_path / "cpu.json") == measured


def test_an_installation_for_another_device_is_said_to_be_one(benchmark, monkeypatch, tmp_path):
    contender = importlib.import_module("vllm_attention")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(contender.Unavailable, match="not a build for CPUs"):
        contender.operators()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("queries", [None, 1])
def test_vllm_is_called_so_that_its_output_is_that_of_the_definition(benchmark, dtype, queries):
    shape = importlib.import_module("workloads").Shape(1000, 4, 2, 64, dtype, queries)
    importlib.import_module("vllm_attention").PagedAttention(shape).verify()


@pytest.fixture
def gpu_benchmark(monkeypatch):
    """benchmarks/gpu.py as a module, with few contenders."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("gpu")
    yield module
    folder = str(ROOT / "benchmarks")
    for name in [name for name, m in sys.modules.items() if (getattr(m, "__file__", None) or "").startswith(folder)]:
        sys.modules.pop(name)


@needs_triton
def test_nothing_is_timed_on_a_gpu_while_a_kernel_is_wrong(gpu_benchmark, monkeypatch, tmp_path, capsys):
    checks = importlib.import_module("gpu_verify")
    real = triton.execute

    def wrong(*arguments, **options):
        out, lse = real(*arguments, **options)
        return out * 1.02, lse

    monkeypatch.setattr(triton, "execute", wrong)
    every = checks._checks
    monkeypatch.setattr(checks, "_checks", lambda *arguments: itertools.islice(every(*arguments), 1))
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--out", str(out)])
    assert gpu_benchmark.main() == 1
    assert "WRONG  dense, torch.bfloat16" in capsys.readouterr().err
    assert not out.exists()


@needs_triton
def test_the_gpu_benchmark_writes_what_it_measured(gpu_benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_benchmark, "verified", lambda *_args, **_options: True)
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--only", "roofline,model", "--out", str(out)])
    assert gpu_benchmark.main() == 0
    report = json.loads(out.read_text())
    assert report["machine"]["commit"]
    assert [row["what"] for row in report["sections"]["roofline"]["rows"]] == ["bf16 product", "copy"]
    assert all(row["seconds_whole"] > 0 for row in report["sections"]["model"]["rows"])
