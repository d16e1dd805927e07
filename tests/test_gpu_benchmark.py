"""benchmarks/gpu.py keeps to its time, loses nothing that it measured, and times sparse kernels, not dense ones."""

import json
import sys

import pytest
import torch

from gossamer.backends import triton

pytestmark = [
    pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="sizes and clocks here are those of the interpreter"),
]


class Clock:
    """Seconds that pass only when somebody takes them."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds, result=None):
        def call(_):
            self.now += seconds
            return result

        return call


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def timed(script, clock):
    """`alternate` on a made-up clock: budget seconds, contenders, length."""
    timing = script("gpu_timing")

    def timer(call):
        before = clock.now
        call()
        return clock.now - before

    def run(budget, contenders, length, **options):
        return timing.alternate(timer, contenders, lambda seed: seed, budget=budget, length=length, **options)

    return run


def test_a_call_that_would_not_fit_is_skipped_with_the_reason(script, clock, timed):
    budget = script("gpu_timing").Budget(100, clock)
    quadratic = timed(budget, {"dense": clock.takes(1.0)}, 1000, rounds=3)
    assert quadratic["dense"].median == 1.0
    assert clock.now == 4.0
    longer = timed(budget, {"dense": clock.takes(64.0)}, 8000, rounds=3)
    assert clock.now == 4.0 + 64.0  # 64 s for one call fit into 96 s, once and without a warm-up
    assert longer["dense"].seconds == [64.0]
    longest = timed(budget, {"dense": clock.takes(64.0)}, 8000, rounds=3)
    assert clock.now == 68.0
    assert longest["dense"].skipped == "64 s expected, 32 s left"


def test_calls_whose_cost_is_linear_are_expected_to_be_so(script, clock, timed):
    budget = script("gpu_timing").Budget(100, clock)
    timed(budget, {"minference": clock.takes(0.1)}, 1000, powers={"minference": 1})
    series = timed(budget, {"minference": clock.takes(1.0)}, 10_000, powers={"minference": 1})
    assert series["minference"].skipped is None
    assert budget.expected("minference", 100_000, 1) == pytest.approx(10.0)


def test_the_cheap_contenders_are_timed_where_not_all_of_them_fit(script, clock, timed):
    budget = script("gpu_timing").Budget(60, clock)
    both = {"dense": clock.takes(1.0), "sparse": clock.takes(0.1)}
    timed(budget, both, 1000, rounds=2, powers={"sparse": 1})
    slow = {"dense": clock.takes(100.0), "sparse": clock.takes(1.0)}
    series = timed(budget, slow, 10_000, rounds=2, powers={"sparse": 1})
    assert series["sparse"].median == 1.0
    assert series["dense"].skipped is not None


def test_rounds_end_with_the_time(script, clock, timed):
    budget = script("gpu_timing").Budget(10, clock)
    series = timed(budget, {"new": clock.takes(1.5)}, 1000, rounds=7)
    assert len(series["new"].seconds) == 5
    assert clock.now <= 10


def test_a_contender_without_memory_is_a_row_with_the_reason(timed):
    def hungry(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

    series = timed(None, {"hungry": hungry, "modest": lambda _: None}, 1000, rounds=2)
    assert "out of memory" in series["hungry"].failure
    assert len(series["modest"].seconds) == 2


@pytest.fixture
def report_of(script, tmp_path):
    about = {"machine": {"device": "H", "source": "a"}, "quick": False}

    def make(**changes):
        return script("gpu_report").Report(tmp_path / "gpu.json", about | changes)

    return make


def test_every_row_is_in_the_file_as_soon_as_it_is_measured(report_of, tmp_path):
    report = report_of()
    report.add("whole", "32768", {"what": "minference", "median_s": 1.0})
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["what"] for row in kept["sections"]["whole"]["rows"]] == ["minference"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_second_command_adds_its_rows_and_measures_none_again(report_of):
    first = report_of()
    first.add("dense", "8192", {"what": "dense"})
    first.finish("dense", "8192")
    first.add("whole", "32768", {"what": "minference"})  # killed before the cell was done
    second = report_of()
    assert second.has("dense", "8192")
    assert not second.has("whole", "32768")
    second.add("whole", "32768", {"what": "minference", "median_s": 2.0})
    second.finish("whole", "32768")
    assert second.rows("dense") == first.rows("dense")
    assert [row["median_s"] for row in second.rows("whole")] == [2.0]


def test_a_row_that_is_skipped_now_does_not_replace_a_measured_one(report_of):
    report = report_of()
    report.add("whole", "32768", {"what": "minference", "median_s": 2.0})
    report.add("whole", "32768", {"what": "minference", "skipped": "no time"})
    assert report.rows("whole")[0]["median_s"] == 2.0


def test_a_cell_with_a_row_that_was_skipped_is_tried_again(report_of):
    report = report_of()
    report.add("whole", "1048576", {"what": "sdpa", "skipped": "no time"})
    report.finish("whole", "1048576")
    assert not report_of().has("whole", "1048576")


@pytest.mark.parametrize("change", [{"machine": {"device": "H", "source": "b"}}, {"quick": True}])
def test_figures_of_other_code_or_another_request_are_not_mixed_in(report_of, change):
    report_of().add("dense", "8192", {"what": "dense"})
    assert report_of(**change).rows("dense") == []


@pytest.fixture
def run_quick(script, monkeypatch, tmp_path):
    """benchmarks/gpu.py --quick for some sections, unverified: the exit status and the report."""

    def run(*sections, **checks):
        benchmark = script("gpu")
        monkeypatch.setattr(benchmark, "verified", lambda *_args, **_options: {"checks": 1, "left_out": []})
        out = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--only", ",".join(sections), "--out", str(out)])
        with torch.inference_mode():
            status = benchmark.main()
        return status, json.loads(out.read_text())["sections"]

    return run


@pytest.fixture
def launches(monkeypatch):
    """Densities of the plans that the Triton kernel was given."""
    densities, attend = [], triton.attend

    def spy(call, plan):
        densities.append(plan.density())
        return attend(call, plan)

    monkeypatch.setattr(triton, "attend", spy)
    return densities


@pytest.mark.slow
def test_whole_calls_are_timed_on_sparse_plans(run_quick, launches):
    status, sections = run_quick("whole")
    base, *rows = sections["whole"]["rows"]
    assert status == 0
    assert base["best_sdpa"] == "sdpa"
    assert len(rows) == 2
    assert all(row["density"] < 0.8 for row in rows)
    assert all(row["speedup_over_sdpa"] is not None and row["planning_share"] > 0 for row in rows)
    assert max(launches) < 0.8


@pytest.mark.slow
def test_the_model_enters_the_triton_kernel_with_sparse_plans(run_quick, launches):
    status, sections = run_quick("model")
    full, sparse = sections["model"]["rows"]
    assert status == 0
    assert full["density"] == 1
    assert sparse["density"] < 0.8
    assert sparse["executor"] == ["triton"]
    assert launches
    assert max(launches) < 0.8


@pytest.mark.slow
def test_block_plans_of_several_densities_are_timed_beside_flex(run_quick):
    status, sections = run_quick("blocks")
    rows = sections["blocks"]["rows"]
    assert status == 0
    assert [row["what"].split()[0] for row in rows] == ["dense", "50%", "20%", "10%", "5%", "2%"]
    assert len({row["density"] for row in rows}) >= 4
    assert all(row["speedup_over_flex"] > 0 for row in rows[1:])


@pytest.mark.slow
def test_dense_plans_are_timed_beside_others(run_quick):
    status, sections = run_quick("dense")
    (row,) = sections["dense"]["rows"]
    assert status == 0
    assert set(row["series"]) == {"gossamer", "sdpa", "flex"}
    assert row["best_sdpa"] == "sdpa"
    assert not [name for name, one in row["series"].items() if "failure" in one]


@pytest.mark.slow
def test_tuning_runs_the_very_plans_that_are_timed_and_leaves_the_table_in_place(run_quick, script):
    status, sections = run_quick("tune")
    rows = sections["tune"]["rows"]
    assert status == 0
    assert all(row["tried"] == 2 and row["median_s"] > 0 for row in rows)
    assert "tune minference(vertical_size=50,slash_size=192)" in [row["what"] for row in rows]
    assert not script("gossamer.backends.triton.config")._tuned


SERIES = {"median_s": 12.34567891, "seconds": [0.1] * 7, "peak_gib": 121.34}
FIGURES = {
    "roofline": {"tflops": 612.34},
    "whole": {
        "density": 0.01234,
        "speedup_over_sdpa": 21.234,
        "planning_share": 0.1712,
        "plan_mib": 1812.3,
        "backends": {"sdpa flash": SERIES},
        **SERIES,
    },
    "dense": {
        "dim": 128,
        "rates": {n: 612.34 for n in ("gossamer", "sdpa flash", "sdpa cudnn", "flash-attn 3", "flex")},
        "share_of_best_sdpa": 0.912,
        "best_sdpa": "sdpa cudnn",
        "series": {"sdpa flash": SERIES},
    },
    "blocks": {"density": 0.01234, "tflops": 612.34, "efficiency": 0.812, "speedup_over_flex": 1.234, **SERIES},
    "training": {
        "density": 0.01234,
        "efficiency": 0.812,
        "speedup_over_sdpa": 21.234,
        "speedup_over_flex": 1.234,
        "rivals": {"sdpa flash": SERIES},
        **SERIES,
    },
    "model": {"seconds_whole": 123.456, "density": 0.01234, "speedup_over_dense": 12.345},
}


def made_up_rows(script):
    """As many rows as a full run has, with all figures of their kind."""
    setting = script("gpu_setting")
    names = {
        "roofline": ["bf16 product", "copy"],
        "whole": ["sdpa", *setting.SPARSE],
        "dense": ["dense"],
        "blocks": ["dense in 128x128", *(f"{share:.0%} in 128x128" for share in script("gpu_sections").DENSITIES)],
        "training": ["step, dense", *(f"step, {share:.0%}" for share in script("gpu_training").DENSITIES)],
        "model": ["dense", "minference"],
    }
    full = setting.Setting(torch.device("meta"), False, None, None)
    for section, cells in script("gpu_sections").SECTIONS.items():
        for cell in cells(full) if section in names else ():
            for what in names[section]:
                row = {"what": what, "length": 1048576, **FIGURES[section]}
                yield section, cell.name, row


def test_a_full_run_prints_at_most_sixty_lines_that_do_not_wrap(script, monkeypatch, tmp_path, capsys):
    benchmark, gpu_setting = script("gpu"), script("gpu_setting")
    rows = list(made_up_rows(script))
    sections = dict.fromkeys(section for section, _, _ in rows)
    for section in sections:

        def cells(_setting, section=section):
            for cell in dict.fromkeys(cell for at, cell, _ in rows if at == section):
                mine = [row for at, where, row in rows if (at, where) == (section, cell)]
                yield gpu_setting.Cell(cell, lambda mine=mine: iter(mine))

        cells.__doc__ = benchmark.SECTIONS[section].__doc__
        monkeypatch.setitem(benchmark.SECTIONS, section, cells)
    monkeypatch.setattr(benchmark, "verify", lambda *_args, **_options: (100, [], []))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--out", str(tmp_path / "gpu.json")])
    assert benchmark.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(sections) == set(benchmark.SECTIONS) - {"tune"}
    assert 50 < len(lines) <= 60
    assert max(len(line) for line in lines) <= 120
    assert not [line for line in lines if "{" in line or line.endswith("...")]


@pytest.mark.slow
def test_steps_of_training_are_timed_on_sparse_plans(run_quick, launches):
    status, sections = run_quick("training")
    full, *sparse = sections["training"]["rows"]
    assert status == 0
    assert [row["what"] for row in (full, *sparse)] == ["step, dense", "step, 10%"]
    assert all(row["efficiency"] > 0 and row["speedup_over_sdpa"] > 0 for row in (full, *sparse))
    assert not [row for row in (full, *sparse) if "failure" in row]
    assert min(launches) < 0.4


def test_a_second_command_does_not_verify_the_same_code_again(run_quick, script, monkeypatch):
    run_quick("roofline")
    verified = []
    monkeypatch.setattr(script("gpu"), "verified", lambda *_args, **_options: verified.append(1))
    assert script("gpu").main() == 0
    assert verified == []


@pytest.mark.parametrize("found", [None, {"checks": 9, "left_out": ["dense at 1048576 tokens"]}])
def test_what_was_not_verified_whole_is_verified_again(report_of, found):
    report_of().note(**({} if found is None else {"verified": found}))
    assert not report_of().verified


def test_tuning_comes_after_the_figures_of_the_table(script):
    assert list(script("gpu_sections").SECTIONS)[-1] == "tune"


def test_a_section_without_memory_leaves_the_others_their_rows(script, monkeypatch, tmp_path):
    benchmark, setting, timing = script("gpu"), script("gpu_setting"), script("gpu_timing")

    def hungry():
        yield {"what": "small"}
        raise torch.OutOfMemoryError("CUDA out of memory")

    def cells(_setting):
        """Two cells."""
        return iter([setting.Cell("1M", hungry), setting.Cell("2M", lambda: iter([{"what": "row"}]))])

    monkeypatch.setitem(benchmark.SECTIONS, "whole", cells)
    device = torch.device("cpu")
    report = script("gpu_report").Report(tmp_path / "gpu.json", {})
    where = setting.Setting(device, True, timing.Timer(device), timing.Budget(60))
    assert benchmark.measure(where, ["whole"], report) == []
    rows = report.rows("whole")
    assert [row["what"] for row in rows] == ["small", "whole 1M", "row"]
    assert "out of memory" in rows[1]["failure"]
    assert report.has("whole", "1M")


def test_no_cell_begins_when_the_time_is_over(script, clock, tmp_path):
    setting, timing = script("gpu_setting"), script("gpu_timing")
    report = script("gpu_report").Report(tmp_path / "gpu.json", {})
    device = torch.device("cpu")
    where = setting.Setting(device, True, timing.Timer(device), timing.Budget(1, clock))
    script("gpu").measure(where, ["roofline"], report)
    assert "left" in report.rows("roofline")[0]["skipped"]
    assert not report.has("roofline", "device")
