"""The tables of training that computes less, and what the page says of the committed files."""

from __future__ import annotations

import json
import math
from statistics import fmean
from typing import Any

import pytest
from repository import ROOT, script

PAGE = ROOT / "docs" / "training.md"
FOLDER = ROOT / "benchmarks" / "results" / "amd-epyc-zen5-2-cores-avx512-bf16"


@pytest.fixture(scope="module")
def tables() -> Any:
    return script("docs/less_training_tables.py")


def committed(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def said() -> str:
    return " ".join(PAGE.read_text(encoding="utf-8").split())


def graph() -> dict[str, Any]:
    cosines = [
        {"seed": seed, "epoch": 10, "budget": 0.1, "allocation": how, "fresh": fresh, "later": 0.5, "share": 0.09}
        for seed in range(2)
        for how, fresh in (("greedy", 0.8 + 0.1 * seed), ("uniform", 0.7))
    ]
    row = {"training": "rsc", "budget": 0.1, "allocation": "greedy", "accuracy": 0.9, "multiplied": 0.3}
    trainings: list[dict[str, Any]] = [{"seed": 0, "training": "exact", "accuracy": 0.95}]
    trainings += [{"seed": 0, "exact_from": end} | row for end in (0.8, 1.0)]
    times: list[dict[str, Any]] = [
        {"what": "torch", "median_s": 0.002, "entries": 1000},
        {"what": "cutting", "median_s": 0.004, "entries": 1000},
        {"what": 0.1, "median_s": 0.0005, "entries": 90},
    ]
    about = {"machine": {"processor": "a processor"}, "setting": {"nodes": 4000, "epochs": 120}, "at": [10], "later": 9}
    return about | {"cosines": cosines, "trainings": trainings, "times": times}


def test_the_tables_of_sampled_products(tables: Any) -> None:
    above, _, rows = tables.cosines_of(graph(), "machine")
    assert "a processor (`machine`); 4,000 nodes" in above
    assert "2 seeds and epochs 10." in above
    assert rows == [(0.1, "0.850 (0.800 to 0.900)", "0.500", "0.090", "0.700", "0.500", "0.090")]
    _, _, rows = tables.trainings_of(graph(), "machine")
    assert rows == [
        ("exact", "", "", "0.950", "1.000"),
        (0.1, "greedy", "from 80% of the epochs", "0.900", "0.300"),
        (0.1, "greedy", "never", "0.900", "0.300"),
    ]
    _, _, rows = tables.times_of(graph(), "machine")
    assert rows == [
        ("torch's own", "1.000", "1.00"),
        ("sampled, budget 0.1", "0.090", "4.00"),
        ("cutting a sample of budget 0.1", "1.000", "0.50"),
    ]


def test_the_tables_of_forward_passes(tables: Any) -> None:
    found = {
        "machine": {"processor": "a processor"}, "model": "a model", "dtype": "bfloat16", "trained_numbers": 92160,
        "rows": 2, "tokens": 200, "queries": 3, "density": 0.8, "merged_dense": {"loss": 1.0, "accuracy": 0.75},
        "curve": [{"step": 0, "loss": 2.0, "accuracy": 0.5}],
        "memory_bytes": {kind: (n + 1) << 20 for n, kind in enumerate(tables.GROWN)},
    }  # fmt: skip
    above, _, rows = tables.adapted_of(found, "machine")
    assert "so 12 rows; attention computes 80% of the pairs" in above
    assert rows == [(0, "2.000", "0.50"), ("merged, dense attention", "1.000", "0.75")]
    _, _, rows = tables.memory_of(found, "machine")
    assert [row[1:] for row in rows] == [(12, "1"), (12, "2"), (2, "3"), (2, "4"), (12, "5")]
    estimates = {"seeds": 2, "rows": [{"numbers": 768, "queries": 1, "cosines": [0.03, 0.05], "expected": 0.036}]}
    assert tables.estimates_of(estimates, "machine")[1:] == (("trained numbers", "1 query"), [("768", "0.040 (0.036)")])


def test_kinds_of_memory_are_those_of_the_example(tables: Any) -> None:
    pytest.importorskip("transformers")
    assert tuple(tables.GROWN) == script("examples/adapt_forward_only.py").KINDS


def test_every_table_of_the_page_is_measured(tables: Any) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, make in tables.TABLES.items():
        assert f"<!-- table: {name} -->" in text
        assert make() != tables.NOT_MEASURED


def test_what_the_page_says_of_sampled_products() -> None:
    found, text = committed("graph_blocks.json"), said()
    below = [row for row in found["cosines"] if row["budget"] < 1.0]
    by = {(row["seed"], row["epoch"], row["budget"], row["allocation"]): row for row in below}
    pairs = [(by[(*key[:3], "greedy")], by[key]) for key in by if key[3] == "uniform"]
    nearer = sum(greedy["fresh"] > uniform["fresh"] for greedy, uniform in pairs)
    assert f"nearer in {nearer} of {len(pairs)} pairs of gradients" in text
    assert all(row["share"] <= row["budget"] for row in found["cosines"])

    def cosine(budget: float, what: str, how: str = "greedy") -> float:
        return fmean(row[what] for row in below if (row["budget"], row["allocation"]) == (budget, how))

    assert f"a cosine of {cosine(0.5, 'fresh'):.2f} fresh and {cosine(0.5, 'later'):.2f} nine steps later" in text
    assert f"With a tenth it is {cosine(0.1, 'fresh'):.2f} and {cosine(0.1, 'later'):.2f}" in text
    assert [b for b in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7) if cosine(b, "fresh") > cosine(b, "fresh", "uniform")] == [0.05]
    assert min(row["later"] for row in below if row["budget"] == 0.1) < 0.15

    def accuracy(budget: float | None, end: float | None) -> str:
        rows = [row for row in found["trainings"] if row.get("allocation", "greedy") == "greedy"]
        mine = [row["accuracy"] for row in rows if (row.get("budget"), row.get("exact_from")) == (budget, end)]
        assert len(mine) == 3
        return f"{fmean(mine):.3f}"

    ends = [accuracy(budget, end) for budget in (0.1, 0.3) for end in (1.0, 0.8)]
    whole = accuracy(None, None)
    assert "{} to {} at a tenth, {} to {} at three tenths, of {} with exact".format(*ends, whole) in text
    assert f"{accuracy(0.05, 1.0)}, and an exact end brings half of it back, {accuracy(0.05, 0.8)}" in text
    times = {row["what"]: row["median_s"] for row in found["times"]}
    assert f"by itself is {times['torch'] / times[1.0]:.1f} times as fast" in text
    assert f"is {times[1.0] / times[0.1]:.1f} times as fast as that" in text
    assert times["cutting"] / times[1.0] == pytest.approx(1.0, abs=0.15)
    assert f"{found['times'][0]['entries']:,} entries" in text


def test_what_the_page_says_of_estimates() -> None:
    rows = committed("estimated_gradients.json")["rows"]
    most = max(rows, key=lambda row: (row["numbers"], row["queries"]))
    assert f"{most['numbers']:,} numbers have a cosine of {fmean(most['cosines']):.3f}" in said()
    assert all(fmean(row["cosines"]) == pytest.approx(row["expected"], rel=0.1) for row in rows if row["queries"] >= 16)


def test_what_the_page_says_of_memory() -> None:
    found = committed("forward_only_memory.json")
    grown = {kind: f"{size / 2**20:.0f} MiB" for kind, size in found["memory_bytes"].items()}
    text = said()
    assert f"{grown['step']} for a step and {grown['reading']} for reading as many rows" in text
    assert f"Reading the review once takes {grown['reading one copy']}" in text
    assert f"through the same `B` {grown['backpropagation']}, without" in text


def test_what_the_page_says_of_adapting() -> None:
    found, text = committed("adapt_forward_only.json"), said()
    assert found["sparse_calls"] > 0
    assert found["dense_calls"] == 0
    first, last = found["curve"][0], found["curve"][-1]
    assert f"from {first['loss']:.2f} to {last['loss']:.2f} nats in {last['step']} steps" in text
    assert f"from {first['accuracy']:.2f} to {last['accuracy']:.2f}" in text
    low, high = wilson(round(32 * last["accuracy"]), 32)
    assert f"which is {round(32 * last['accuracy'])} (95% interval {low:.2f} to {high:.2f})" in text
    assert found["merged_dense"]["accuracy"] == last["accuracy"]
    assert last["loss"] > math.log(2)


def wilson(right: int, asked: int) -> tuple[float, float]:
    """A 95% interval of a share."""
    z, share = 1.96, right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked**2))
    return middle - half, middle + half
