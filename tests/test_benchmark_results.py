"""Results stand in a folder of the machine that they are of, and the documentation's pictures are drawn from them."""

import json
import sys
from pathlib import Path

import pytest

from gossamer.backends import cpu

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
MACHINES = sorted(path.parent.name for path in RESULTS.glob("*/cpu.json"))
needs_kernels = pytest.mark.skipif(not cpu.is_available(), reason="needs the C++ kernels")


def described(path):
    """The machines that a file of results says it is of."""
    found = json.loads(path.read_text())
    parts = [found, *found.get("sections", found).values()]
    return [part["machine"] for part in parts if isinstance(part, dict) and "machine" in part]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_results_stand_in_the_folder_of_the_machine_that_they_are_of(script, path):
    names = {script("machines").folder_name(about) for about in described(path)}
    assert names == {path.parent.name}


@pytest.mark.parametrize(
    ("about", "name"),
    [
        (
            {"cpu": "AMD EPYC", "generation": "Zen 5", "cores": 2, "isas": ["avx2", "avx512_bf16", "amx_emulated"]},
            "amd-epyc-zen5-2-cores-avx512-bf16",
        ),
        (
            {"cpu": "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "cores": 8, "isas": ["portable", "amx", "avx2"]},
            "intel-xeon-platinum-8488c-8-cores-amx",
        ),
        ({"cpu": "AMD EPYC 9R14 96-Core Processor", "cores": 96, "isas": ["avx2"]}, "amd-epyc-9r14-96-cores-avx2"),
        ({"cpu": "aarch64", "generation": None, "cores": 4, "isas": ["portable"]}, "aarch64-4-cores-portable"),
        ({"device": "NVIDIA H200", "capability": "9.0"}, "nvidia-h200"),
    ],
)
def test_a_machines_folder_is_named_after_it(script, about, name):
    assert script("machines").folder_name(about) == name


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ({"vendor_id": "AuthenticAMD", "cpu family": "26", "model": "2"}, "Zen 5"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "17"}, "Zen 4"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "1"}, "Zen 3"),
        ({"vendor_id": "GenuineIntel", "cpu family": "6", "model": "143"}, "Sapphire Rapids"),
        ({"vendor_id": "GenuineIntel", "cpu family": "6", "model": "1"}, None),
        ({}, None),
    ],
)
def test_processors_whose_names_hide_it_are_told_apart_by_generation(script, info, name):
    assert script("machines").generation(info) == name


@needs_kernels
@pytest.mark.parametrize("name", ["cpu", "planning", "end_to_end"])
def test_a_benchmark_writes_into_the_folder_of_this_machine(script, monkeypatch, tmp_path, name):
    """And leaves what other machines measured where it is."""
    machines, benchmark = script("machines"), script(name)
    monkeypatch.setattr(machines, "RESULTS", tmp_path)
    other = tmp_path / "another-machine" / f"{name}.json"
    other.parent.mkdir()
    other.write_text("{}")
    row = {"method": "dense", "length": 64, "layers": 1, "what": "a"}

    def section(request):
        """A row."""
        yield {"what": "a", "length": 64, "dtype": "bf16", "dim": 8, "isa": "portable"}

    patches = {
        "cpu": {"verify": lambda: None, "SECTIONS": {"parts": section}},
        "planning": {"verify": lambda names: None, "measure": lambda *_: row, "print_row": lambda row: None},
        "end_to_end": {"PARTS": {"layers": lambda arguments: iter([row])}},
    }
    for attribute, value in patches[name].items():
        monkeypatch.setattr(benchmark, attribute, value)
    options = {"cpu": ["--only", "parts"], "planning": ["--lengths", "64", "--methods", "minference"]}
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options.get(name, ["--only", "layers"])])
    assert benchmark.main() == 0
    here = tmp_path / machines.folder_name(machines.machine())
    assert machines.measured(f"{name}.json") == sorted([other, here / f"{name}.json"])
    assert other.read_text() == "{}"


@needs_kernels
@pytest.mark.parametrize("name", MACHINES)
def test_rows_that_are_committed_are_held(script, name):
    """Older rows are found again under the names that the sections give them now."""
    request = script("comparison").Request
    shape = script("workloads").Shape
    rows = json.loads((RESULTS / name / "cpu.json").read_text())["sections"].get("prefill", {"rows": []})["rows"]
    for length in {row["length"] for row in rows}:
        assert not request(held=tuple(rows)).lacks(what="dense", length=length, dtype="bf16", dim=128)
    assert request(held=tuple(rows)).lacks_of(shape(512, 4, 1, 128, "bf16"), "dense")


def test_the_roof_is_what_registers_can_do_where_that_was_measured(script):
    pictures = script("pictures")
    every = [json.loads(path.read_text())["sections"] for path in sorted(RESULTS.glob("*/cpu.json"))]
    sections = next(sections for sections in every if {"gemm", "prefill", "decode"} <= sections.keys())
    rows = [row for row in sections["gemm"]["rows"] if row["what"] != "peak"]
    sections["gemm"]["rows"] = rows
    before = pictures.roofline(sections).render()
    isa = next(row["isa"] for row in sections["prefill"]["rows"] if row["dtype"] == "bf16")
    sections["gemm"]["rows"] = [{"what": "peak", "isa": isa, "gflops": 4321.0}, *rows]
    assert "4321 GFLOP/s" in pictures.roofline(sections).render()
    assert "4321 GFLOP/s" not in before


def test_the_pictures_in_the_documentation_are_drawn_from_the_committed_results(script, monkeypatch, tmp_path):
    pictures = script("pictures")
    drawn = [
        path for path in pictures.IMAGES.glob("*/*.svg") if path.parent.name != "modules"
    ]  # of layers, not machines
    committed = {path.relative_to(pictures.IMAGES): path.read_text() for path in drawn}
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    pictures.main()
    assert {path.relative_to(tmp_path): path.read_text() for path in tmp_path.glob("*/*.svg")} == committed
    assert {path.parent.name for path in committed} <= set(MACHINES)
