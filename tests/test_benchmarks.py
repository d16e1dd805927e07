"""The benchmarks' contenders are right where they are installed, and are left out with a reason where they are not."""

import importlib
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gossamer import Extent, SparsePlan
from gossamer.methods._exact_slash import exact_slash_blocks
from gossamer.ops import cpu as kernels
from gossamer.ops import reference, triton

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


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are slow at full size")
def test_the_script_for_peers_gives_both_sides_the_same_pairs(gpu_benchmark, monkeypatch, capsys):
    """benchmarks/peers.md with stand-ins that compute, from what they are given, what the peers are said to compute."""
    monkeypatch.chdir(ROOT)

    def vertical_slash_sparse_attention(q, k, v, vertical, slash):
        assert q.shape == k.shape == v.shape
        assert vertical.dtype == slash.dtype == torch.int32
        length = q.shape[2]

        def chosen(index):
            return torch.zeros(1, q.shape[1], length, dtype=torch.bool).scatter_(2, index.long(), True)

        plan = exact_slash_blocks(chosen(vertical), chosen(slash), Extent.full(1, length, length), length)
        return reference.execute(q, k, v, plan, scale=q.shape[-1] ** -0.5)[0]

    def get_active_blocks(q, k, v, block, gamma, least, most, tau, interleave):
        rows = -(-q.shape[1] // block)
        lower = torch.ones(rows, rows).tril().flatten().nonzero()[:, 0]
        return [[lower[: len(lower) - head] for head in range(q.shape[2])]]

    def triton_block_wise_attention(q, k, v, index, block, gqa_interleave):
        rows = -(-q.shape[1] // block)
        mask = torch.zeros(1, q.shape[2], rows * rows, dtype=torch.bool)
        for head, ids in enumerate(index[0]):
            mask[0, head, ids] = True
        plan = SparsePlan.from_block_mask(
            mask.view(1, -1, rows, rows), q.shape[1], q.shape[1], block_q=block, block_k=block
        )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return reference.execute(q, k, v, plan, scale=q.shape[-1] ** -0.5)[0].transpose(1, 2)

    def flex_prefill_attention(q, k, v, gamma, tau, min_budget):
        index = get_active_blocks(q, k, v, 128, gamma, 8, 1 << 24, tau, False)
        return triton_block_wise_attention(q, k, v, index, 128, False)

    stand_ins = {
        "minference": [vertical_slash_sparse_attention],
        "flex_prefill.ops.flex_prefill_attention": [
            flex_prefill_attention,
            get_active_blocks,
            triton_block_wise_attention,
        ],
    }
    for name, functions in stand_ins.items():
        for at in range(1, name.count(".") + 2):
            parent = ".".join(name.split(".")[:at])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        for function in functions:
            setattr(sys.modules[name], function.__name__, function)
    page = (ROOT / "benchmarks" / "peers.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    with torch.inference_mode():
        exec(compile(code, "peers.md", "exec"), {})
    printed = capsys.readouterr().out
    differences = [float(number) for number in re.findall(r"differs by (\S+) at most", printed)]
    assert len(differences) == 5
    assert max(differences) < 0.03
    assert printed.count(" ms") == 5
