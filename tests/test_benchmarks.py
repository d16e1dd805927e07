"""The benchmarks' contenders are right where they are installed, and are left out with a reason where they are not."""

import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu as kernels
from gossamer.backends import torch as definition
from gossamer.backends import triton
from gossamer.blocks import Blocks
from gossamer.methods import MaxRelative
from gossamer.testing import make_call

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="needs the C++ kernels")
needs_triton = pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}")


@pytest.fixture
def benchmark(script):
    """benchmarks/cpu.py as a module."""
    return script("cpu")


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


def measured(name, **more):
    return {"what": name, "length": 64, "dtype": "bf16", "dim": 8, "isa": "portable", **more}


@pytest.fixture
def fake(benchmark, monkeypatch, tmp_path):
    """Runs benchmarks/cpu.py with one section of the rows "a" and "b" on a file, and returns what that then has."""

    def run(old, *options):
        def section(request):
            """Two rows."""
            for name in ("a", "b"):
                if request.lacks(what=name, dtype="bf16"):
                    yield measured(name, median_s=2)

        monkeypatch.setattr(benchmark, "verify", lambda: None)
        for owner in (benchmark, importlib.import_module("cpu_sections")):
            monkeypatch.setattr(owner, "SECTIONS", {"parts": section})
        out = tmp_path / "cpu.json"
        out.write_text(json.dumps({"sections": {"parts": old}}))
        monkeypatch.setattr(sys, "argv", ["cpu.py", "--only", "parts", "--out", str(out), *options])
        assert benchmark.main() == 0
        return json.loads(out.read_text())["sections"]["parts"]

    return run


def test_missing_rows_alone_are_measured_on_request(benchmark, fake):
    here = benchmark.machine() | benchmark.versions()
    old = {"machine": here, "date": "2020-01-01", "used_by_others": 0.5, "rows": [measured("a", median_s=1)]}
    section = fake(old, "--missing")
    assert {row["what"]: row["median_s"] for row in section["rows"]} == {"a": 1, "b": 2}
    assert section["rows"][0]["date"] == "2020-01-01" != section["rows"][1]["date"]
    assert section["used_by_others"] >= 0.5


def test_a_section_measured_anew_keeps_no_row_of_before(fake):
    section = fake({"machine": {}, "rows": [measured("a", median_s=1), measured("gone")]})
    assert {row["what"]: row["median_s"] for row in section["rows"]} == {"a": 2, "b": 2}


def test_rows_of_another_machine_are_not_completed(fake, capsys):
    with pytest.raises(SystemExit):
        fake({"machine": {"cpu": "another"}, "rows": [measured("a")]}, "--missing")
    assert "whose cpu is another" in capsys.readouterr().err


def test_a_call_that_got_fewer_cores_than_others_of_its_kind_is_repeated(script, monkeypatch):
    timing = script("timing")
    monkeypatch.setattr(timing, "wake_threads", lambda: 1)
    shares = iter([1.0, 0.5, 0.95, 1.0])  # the second call of three gets half of what the first got
    monkeypatch.setattr(timing, "timed", lambda call, *arguments: (2.0, 2.0 * next(shares)))
    series = timing.alternate({"one": lambda _: None}, lambda seed: seed, rounds=3, warm_up=False)["one"]
    assert series.cpu == [2.0, 1.9, 2.0]
    assert series.to_dict()["repeated"] == 1


def test_contenders_of_one_thread_are_not_repeated(script, monkeypatch):
    timing = script("timing")
    monkeypatch.setattr(timing, "wake_threads", lambda: 1)
    monkeypatch.setattr(timing, "timed", lambda call, *arguments: (2.0, 1.0))
    series = timing.alternate({"one": lambda _: None}, lambda seed: seed, rounds=3)["one"]
    assert series.repeated == 0
    assert len(series.wall) == 3


def test_cpu_time_counts_all_threads(script):
    """Of threads that are there: one that has ended takes its clock with it."""
    timing, worked, leave = script("timing"), threading.Event(), threading.Event()

    def work():
        sum(range(1_000_000))
        worked.set()
        leave.wait()

    began, wall = timing.cpu_seconds(), time.process_time()
    thread = threading.Thread(target=work)
    thread.start()
    worked.wait()
    used, expected = timing.cpu_seconds() - began, time.process_time() - wall
    leave.set()
    thread.join()
    assert used == pytest.approx(expected, abs=0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's list of processes")
def test_children_are_no_bystanders(script):
    timing = script("timing")
    began = timing._own_seconds() - time.process_time()
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    running = timing._own_seconds() - time.process_time()
    child.communicate(b"\n")
    ended = timing._own_seconds() - time.process_time()
    assert running - began > 0.4
    assert ended - began > 0.4


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_arithmetic_on_registers_is_measured_for_each_instruction_set(script, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    peak = script("peak")
    rates = {isa: peak.peak_flops(isa, 1, 0.001) for isa in kernels.supported_isas()}
    assert rates.pop("amx_emulated") is None
    assert all(rate > 0 for rate in rates.values())
    assert peak.peak_flops("sse9", 1, 0.001) is None


def test_without_a_compiler_arithmetic_on_registers_is_not_measured(script, monkeypatch):
    peak = script("peak")
    monkeypatch.setenv("PATH", "")
    assert peak.peak_flops("portable", 1, 0.001) is None


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of memory")
def test_memory_that_was_free_before_the_call_is_counted():
    """The call would take what making the plan has left, and seem to need nothing."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import children
from comparison import Request
from workloads import random_blocks

kept = []

def untidy(shape):
    torch.ones(7 << 20)  # from now on malloc keeps pieces of that size
    left = [torch.ones(16000) for _ in range(3000)]
    kept.append(torch.ones(16000))
    return random_blocks(shape, 0.02, 128)

children.MEMORY_PLANS["untidy"] = untidy
print(next(children.peak_memory(Request(quick=True), "untidy"))["beyond_packed_mib"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "benchmarks")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) > -8


def test_methods_take_turns_in_another_order_each_round(script):
    turns = script("end_to_end").turns(["a", "b", "c"], 3)
    assert "".join(name for _, name in turns) == "abcbcacab"


def test_whole_layers_are_timed_in_rounds_beside_what_the_file_has(script, monkeypatch, tmp_path):
    end_to_end = script("end_to_end")
    out = tmp_path / "end_to_end.json"
    old = {"method": "max_relative", "length": 2048, "layers": 1, "total_s": 1.0}
    out.write_text(json.dumps({"layers": {"rows": [old]}}))
    arguments = ["--quick", "--only", "layers", "--methods", "max_relative", "--inputs", "drifting", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *arguments, "--out", str(out)])
    assert end_to_end.main() == 0
    kept = {row.get("inputs"): row for row in json.loads(out.read_text())["layers"]["rows"]}
    assert kept[None] == old
    assert len(kept["drifting"]["rest_each_s"]) == 2


def test_drifting_inputs_make_attention_sparse(script):
    decoder, end_to_end = script("decoder"), script("end_to_end")
    density = {}
    for kind in end_to_end.INPUTS:
        torch.manual_seed(0)
        layer = decoder.Layer(decoder.Width(256, 4, 2, 64, 512), akin=kind == "drifting")
        x = end_to_end.hidden_states(kind, 8192, 256, seed=0)
        _, _, records = end_to_end.prefill([layer], MaxRelative(), x)
        density[kind] = records[0].density
    assert density["drifting"] < 0.5 < density["random"]


def test_planning_keeps_the_rows_of_other_methods_and_topics(script, monkeypatch, tmp_path):
    planning = script("planning")
    monkeypatch.setattr(planning, "verify", lambda names: None)
    out = tmp_path / "planning.json"
    old = [{"method": name, "length": 2048} for name in ("minference", "max_relative")]
    out.write_text(json.dumps({"rows": old}))
    arguments = ["--quick", "--no-torch", "--methods", "max_relative", "--rounds", "1", "--out", str(out)]
    for topics in ([], ["--topics", "2"]):
        monkeypatch.setattr(sys, "argv", ["planning.py", *arguments, *topics])
        assert planning.main() == 0
    report = json.loads(out.read_text())
    kept = [("minference", None), ("max_relative", None), ("max_relative", 2)]
    assert [(row["method"], row.get("topics")) for row in report["rows"]] == kept
    assert report["date"]
    assert len(report["rows"][1]["cpp_each_s"]) == 1


def test_topics_recur_in_turn(script):
    planning = script("planning")
    call = planning.inputs(2048, 0, topics=2)
    means = call.k.float().unflatten(2, (4, 512)).mean(dim=3)
    near, far = ((means[:, :, 0] * means[:, :, n]).sum() / means[:, :, 0].square().sum() for n in (2, 1))
    assert near > 0.8
    assert far < 0.5


def test_attributes_are_measured_on_the_same_plans(script):
    attributes = script("attributes")
    call = make_call("no padding", length=700, heads=4, groups=2, dim=32)
    base = "max_relative(alpha={alpha},sink_blocks=0,window_blocks=1,last_rows=0,block_k=64)"
    rows = list(attributes.sweep(call, base, [0.95, 0.0], [0.5], rounds=1))
    assert [row["attributes"] for row in rows] == 2 * ["plain", "means", "skip 0.5", "means, skip 0.5"]
    assert len({row["density"] for row in rows[:4]}) == 1
    assert len({row["error"] for row in rows[:4]}) == 4
    assert [row["density"] for row in rows[4:]] == 4 * [1.0]
    assert rows[4]["error"] < 1e-3 < rows[6]["error"]
    kept = attributes.frontier(rows)
    assert [row["error"] for row in kept] == sorted((row["error"] for row in kept), reverse=True)


@pytest.fixture
def gpu_benchmark(script):
    """benchmarks/gpu.py as a module."""
    return script("gpu")


def test_training_is_measured_on_steps_that_compute_the_same(script):
    training = script("training")
    shape = training.SHAPES["sparse"][1]
    given = training.inputs(torch.float32, 128, shape, 0)
    by_torch, by_plan = training.by_torch(*given[:3]), training.by_plan(training.dense_plan(shape, 128), *given[:3])
    torch.testing.assert_close(by_plan, by_torch, atol=1e-5, rtol=1e-4)
    rows = [*training.dense(128, 1), *training.sparse(512, 1)]
    assert [row["section"] for row in rows] == ["dense"] * 4 + ["sparse"] * 4
    assert all(len(row["dense"]["wall_s"]) == 1 for row in rows)
    assert all(row["ratio"] > 0 for row in rows)
    assert 0.1 < rows[-1]["density"] < 1


@needs_triton
def test_nothing_is_timed_on_a_gpu_while_a_kernel_is_wrong(gpu_benchmark, monkeypatch, tmp_path, capsys):
    checks = importlib.import_module("gpu_verify")
    real = triton.attend

    def wrong(call, plan):
        out, lse = real(call, plan)
        return out * 1.02, lse

    monkeypatch.setattr(triton, "attend", wrong)
    every = checks._checks
    monkeypatch.setattr(checks, "_checks", lambda *arguments: itertools.islice(every(*arguments), 1))
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--out", str(out)])
    assert gpu_benchmark.main() == 1
    assert "WRONG  dense, torch.bfloat16" in capsys.readouterr().err
    assert not out.exists()


@needs_triton
def test_the_gpu_benchmark_writes_what_it_measured(gpu_benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_benchmark, "verified", lambda *_args, **_options: {"checks": 1, "left_out": []})
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--only", "roofline", "--out", str(out)])
    assert gpu_benchmark.main() == 0
    report = json.loads(out.read_text())
    assert report["machine"]["commit"]
    assert [row["what"] for row in report["sections"]["roofline"]["rows"]] == ["bf16 product", "copy"]


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

        call = AttentionCall(q, k, v)
        blocks = Blocks(call, 64, 64)
        rows = range(blocks.grid.query_blocks)
        lists = definition.exact_slashes(chosen(vertical), chosen(slash), blocks.grid, rows)
        blocks.lists(iter([(rows, *lists)]))
        return definition.attend(call, blocks.plan())[0]

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
        return definition.attend(AttentionCall(q, k, v), plan)[0].transpose(1, 2)

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
