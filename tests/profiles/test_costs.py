"""Files of costs: round trips, files that are wrong, and which one is at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer import AttentionCall, backends
from gossamer.profiles import costs as module
from gossamer.profiles.costs import BreakEven, Costs, Kernel, KernelCost, Planning, at_hand, default_path
from gossamer.profiles.machine import Machine, cpu_model

MACHINE = Machine("a processor", 3, "0.1")
KERNEL = Kernel("cpu/avx512", "cpu", "float32", 64)
COST = KernelCost(KERNEL, {"calls": 1e-5, "pairs": 2e-10}, 0.05, 0.2, 40, (512, 4096))
POINT = BreakEven(KERNEL, {"method": "a_shape", "sink": 1, "window": 2}, 4, 1, 1234.5, 512, 4096)
PLANNING = Planning(KERNEL, {"method": "block_sparse", "blocks": 8}, 4, 2, (512, 2048), (0.01, 0.04))
COSTS = Costs(MACHINE, (COST, replace(COST, kernel=replace(KERNEL, head_dim=128))), (POINT,), (PLANNING,))


@pytest.fixture(autouse=True)
def nothing_read() -> Iterator[None]:
    module.forget()
    yield
    module.forget()


@pytest.mark.parametrize("costs", [COSTS, Costs(MACHINE), replace(COSTS, break_even=(replace(POINT, tokens=None),))])
def test_costs_survive_the_round_trip_through_a_file(costs: Costs, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "costs.json"
    costs.save(path)
    assert Costs.load(path) == costs
    assert [found.name for found in path.parent.iterdir()] == ["costs.json"]


def test_costs_are_plain_json() -> None:
    data = COSTS.to_dict()
    assert json.loads(json.dumps(data)) == data


def test_newer_entries_replace_older_ones_of_the_same_kernel_and_method() -> None:
    faster = replace(COST, error=0.01)
    other = replace(POINT, heads=8)
    slower = replace(PLANNING, seconds=(1.0, 2.0))
    both = COSTS.updated(Costs(MACHINE, (faster,), (replace(POINT, tokens=None), other), (slower,)))
    assert both.planning == (slower,)
    assert both.kernels == (faster, COSTS.kernels[1])
    assert both.break_even == (replace(POINT, tokens=None), other)


def test_planning_costs_its_heads_share_between_and_beyond_the_lengths() -> None:
    def seconds(length: int, heads: int = 4, groups: int = 2, **fields: Any) -> float | None:
        method = {"blocks": 8, "method": "block_sparse"} | fields
        return COSTS.planning_seconds(method, KERNEL, heads, groups, length)

    assert seconds(512) == pytest.approx(0.01)
    assert seconds(1024) == pytest.approx(0.02)
    assert seconds(2048) == pytest.approx(0.04)
    assert seconds(8192) == pytest.approx(0.16)
    assert seconds(100) == pytest.approx(0.01)
    assert seconds(1024, 2, 1) == pytest.approx(0.01)
    assert seconds(1024, blocks=9) is None
    assert COSTS.planning_seconds(PLANNING.method, replace(KERNEL, dtype="bfloat16"), 4, 2, 512) is None
    steep, falling = replace(PLANNING, seconds=(1e-6, 1.0)), replace(PLANNING, seconds=(0.02, 0.01))
    assert steep.seconds_of(4, 4096) == pytest.approx(4.0)
    assert falling.seconds_of(4, 4096) == pytest.approx(0.01)
    assert replace(PLANNING, lengths=(512,), seconds=(0.01,)).seconds_of(4, 1024) == pytest.approx(0.02)


def test_planning_of_as_many_heads_to_a_group_is_nearer() -> None:
    alike = replace(PLANNING, heads=8, groups=2, seconds=(0.5, 0.5))
    for order in ((PLANNING, alike), (alike, PLANNING)):
        costs = replace(COSTS, planning=order)
        assert costs.planning_seconds(PLANNING.method, KERNEL, 4, 1, 512) == pytest.approx(0.25)
        assert costs.planning_seconds(PLANNING.method, KERNEL, 2, 1, 512) == pytest.approx(0.005)


def test_nothing_is_kept_of_another_machine() -> None:
    newer = Costs(replace(MACHINE, threads=4), (COST,))
    assert COSTS.updated(newer) == newer


def changed(data: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(data))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 9, "schema 9 of costs is not supported; this version reads schema 1"),
        (("machine",), None, "machine must be an object, got null"),
        (("machine", "cpu"), 3, "machine.cpu must be text, got 3"),
        (("machine", "threads"), 0, "machine.threads must be an integer, 1 to 1,000,000, got 0"),
        (("machine", "threads"), True, "machine.threads must be an integer"),
        (("kernels",), {}, "kernels must be a list"),
        (("kernels",), [COSTS.to_dict()["kernels"][0]] * 2, "one entry for each kernel"),
        (("kernels", 0), "x", r"kernels\[0\] must be an object, got 'x'"),
        (("kernels", 1, "dtype"), None, r"kernels\[1\].dtype must be text, got null"),
        (("kernels", 0, "head_dim"), 64.0, r"kernels\[0\].head_dim must be an integer"),
        (("kernels", 0, "seconds"), [], r"kernels\[0\].seconds must be an object"),
        (("kernels", 0, "seconds", "pears"), 1, r"kernels\[0\].seconds has 'pears', which is none of calls, tokens"),
        (("kernels", 0, "seconds", "pairs"), -1e-9, r"kernels\[0\].seconds.pairs must be a number, 0 to 1e\+09"),
        (("kernels", 0, "error"), "small", r"kernels\[0\].error must be a number"),
        (("kernels", 0, "lengths"), 3, r"kernels\[0\].lengths must be a list"),
        (("kernels", 0, "lengths"), [3, 0], r"kernels\[0\].lengths.1 must be an integer"),
        (("break_even",), [COSTS.to_dict()["break_even"][0]] * 2, "one entry for each method"),
        (("break_even", 0, "method"), {"window": 3}, r"break_even\[0\].method must be an object that names a method"),
        (("break_even", 0, "tokens"), float("nan"), r"break_even\[0\].tokens must be a number"),
        (("break_even", 0, "longest"), 2**41, r"break_even\[0\].longest must be an integer"),
        (("planning",), [COSTS.to_dict()["planning"][0]] * 2, "planning must have one entry for each method"),
        (("planning", 0, "method"), "x", r"planning\[0\].method must be an object that names a method, got 'x'"),
        (("planning", 0, "heads"), 0, r"planning\[0\].heads must be an integer"),
        (("planning", 0, "seconds"), [], r"planning\[0\].seconds must be a list that is not empty"),
        (("planning", 0, "seconds"), [1.0, -1.0], r"planning\[0\].seconds.1 must be a number, 0 to"),
        (("planning", 0, "seconds"), [1.0], r"planning\[0\].lengths must ascend, and have as many entries as seconds"),
        (("planning", 0, "lengths"), [2048, 512], r"planning\[0\].lengths must ascend"),
        (("planning", 0, "lengths"), [512, 2.5], r"planning\[0\].lengths.1 must be an integer"),
    ],
)
def test_wrong_files_are_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Costs.from_dict(changed(COSTS.to_dict(), path, value))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"schema": 1}', "[" * 100_000, "\ud800"])
def test_other_files_are_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"costs\.json is no file of costs: "):
        Costs.load(path)


def test_files_that_are_too_large_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    COSTS.save(tmp_path / "costs.json")
    with pytest.raises(ValueError, match="more than 10 bytes"):
        Costs.load(tmp_path / "costs.json")


# Which one is at hand


def test_the_file_that_the_environment_names_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv(module.ENVIRONMENT, "mine.json")
    assert default_path() == Path("mine.json")
    monkeypatch.delenv(module.ENVIRONMENT)
    assert default_path() == Path("/cache/gossamer/costs.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # by its standard, to be ignored
    monkeypatch.setenv("HOME", "/home/me")
    assert default_path() == Path("/home/me/.cache/gossamer/costs.json")
    monkeypatch.setenv(module.ENVIRONMENT, "off")
    assert default_path() is None
    assert at_hand() == (None, "GOSSAMER_COST_MODEL=off")


def test_the_costs_of_this_machine_are_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    monkeypatch.setenv(module.ENVIRONMENT, str(path))
    here = replace(COSTS, machine=Machine.here())
    here.save(path)
    assert at_hand() == (here, str(path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cpu": "another"}, "measured on another, here it is "),
        ({"threads": 1000}, "measured with torch threads: 1000, here it is "),
        ({"library": "0.0"}, "measured by gossamer 0.0, here it is "),
    ],
)
def test_costs_of_other_circumstances_are_not(change, reason, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    monkeypatch.setenv(module.ENVIRONMENT, str(path))
    replace(COSTS, machine=replace(Machine.here(), **change)).save(path)
    costs, why = at_hand()
    assert costs is None
    assert f"{path} was {reason}" in why
    assert "gossamer bench --cost-model" in why


def test_no_file_and_broken_files_are_reasons_and_no_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    monkeypatch.setenv(module.ENVIRONMENT, str(path))
    assert at_hand() == (None, f"there is no {path}; `gossamer bench --cost-model` writes it")
    path.write_text("{")
    module.forget()
    assert "is no file of costs: not JSON" in at_hand()[1]
    monkeypatch.setenv(module.ENVIRONMENT, str(tmp_path))
    assert "cannot read" in at_hand()[1]


def test_a_file_is_read_once_until_it_is_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    monkeypatch.setenv(module.ENVIRONMENT, str(path))
    assert at_hand()[0] is None
    here = replace(COSTS, machine=Machine.here())
    here.save(path)
    assert at_hand()[0] is None
    module.forget()
    assert at_hand()[0] == here


# Machines and kernels


def test_this_machine_is_described() -> None:
    assert Machine.here() == Machine(cpu_model(), torch.get_num_threads(), gossamer.__version__)


def test_a_kernel_is_that_of_a_call() -> None:
    q = torch.zeros(1, 2, 5, 32, dtype=torch.bfloat16)
    call = AttentionCall(q, q, q)
    kernel = Kernel.of(call)
    assert kernel == Kernel(backends.name_of(call), "cpu", "bfloat16", 32)
    assert str(replace(kernel, backend="cpu/x")) == "cpu/x, bfloat16, head dimension 32"
    assert str(replace(kernel, backend="triton", device="a GPU")) == "triton on a GPU, bfloat16, head dimension 32"
