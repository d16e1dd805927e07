"""The examples of `gossamer.training`: that they run, and that their parts are what they say."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from repository import script

from gossamer.training import RSC

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Sparse invariant checks")


@pytest.fixture(scope="module")
def blocks() -> Any:
    return script("examples/graph_blocks.py")


@pytest.fixture(scope="module")
def adapting() -> Any:
    pytest.importorskip("transformers")
    return script("examples/adapt_forward_only.py")


def test_a_graph_has_blocks_and_unequal_degrees(blocks: Any) -> None:
    graph = blocks.draw(blocks.Setting(nodes=600, degree=20.0), 1)
    dense = graph.adjacency.to_dense()
    assert torch.equal(dense, dense.T)
    assert bool((dense.diagonal() > 0).all())
    degrees = (dense > 0).sum(1)
    assert int(degrees.max()) > 4 * int(degrees.median())
    torch.testing.assert_close(dense, (dense > 0) * degrees[:, None] ** -0.5 * degrees[None] ** -0.5)
    same = graph.blocks[:, None] == graph.blocks[None]
    inside = float((dense[same] > 0).float().sum() / (dense > 0).float().sum())
    assert 0.35 < inside < 0.55
    assert torch.equal(blocks.draw(blocks.Setting(nodes=600, degree=20.0), 1).features, graph.features)


def test_the_network_is_exact_with_the_whole_budget_and_shares_are_kept(blocks: Any) -> None:
    setting = blocks.Setting(nodes=200, degree=10.0, epochs=4)
    graph = blocks.draw(setting, 0)
    model = blocks.network(setting, 0)
    rsc = RSC(steps=100, budget=1.0)
    torch.testing.assert_close(blocks.gradient(model, graph, rsc), blocks.gradient(model, graph))
    torch.testing.assert_close(blocks.gradient(model, graph, rsc), blocks.gradient(model, graph))
    rows = blocks.trainings(setting, graph, 0)
    assert len(rows) == 1 + 4 * len(blocks.TRAINED)
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert all(row["multiplied"] < 1 for row in rows[1:])


def test_the_example_of_graphs_runs(blocks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks.main(["--quick", "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert {row["budget"] for row in found["cosines"]} == set(blocks.BUDGETS)
    whole = [row for row in found["cosines"] if row["budget"] == 1.0]
    assert {row["fresh"] for row in whole} == {1.0}
    assert all(row["share"] <= row["budget"] for row in found["cosines"])
    assert "cosine to the exact gradient" in capsys.readouterr().out


def test_reviews_say_what_they_are(adapting: Any) -> None:
    for number in range(20):
        one = adapting.review(number, 6)
        assert sum(line in one.text for line in adapting.OPINIONS[one.good]) == 3
        assert not any(line in one.text for line in adapting.OPINIONS[not one.good])
    assert 20 < sum(adapting.review(number, 6).good for number in range(80)) < 60
    assert adapting.review(3, 6) == adapting.review(3, 6)


def test_answers_are_the_only_targets(adapting: Any) -> None:
    reviews = [adapting.review(number, size) for number, size in ((0, 3), (1, 6))]
    batch = adapting.encode(adapting.Bytes(), reviews)
    for n, one in enumerate(reviews):
        said = bytes(int(t) - 3 for t in batch["labels"][n] if t != -100).decode()
        read = bytes(int(t) - 3 for t in batch["input_ids"][n][batch["attention_mask"][n] > 0])
        assert said == adapting.ANSWERS[one.good]
        assert read.decode() == one.text + said


def test_the_example_of_adapting_runs(adapting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapting, "HELD_OUT", 4)
    arguments = ["--steps", "2", "--every", "1", "--sentences", "4", "--rank", "1", "--queries", "1"]
    adapting.main([*arguments, "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert [point["step"] for point in found["curve"]] == [0, 1, 2]
    assert found["sparse_calls"] > 0
    assert found["dense_calls"] == 0
    assert found["merged_dense"]["loss"] == pytest.approx(found["curve"][-1]["loss"], abs=0.1)


@pytest.mark.parametrize("kind", ["step", "reading", "backpropagation"])
def test_memory_is_measured_of_each_kind(adapting: Any, kind: str) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell a process the peak of its memory since a moment")
    given = argparse.Namespace(rank=1, queries=1, eps=0.01, seed=0, rows=1, sentences=4)
    assert adapting.grown(kind, adapting.tiny_model(), adapting.Bytes(), given) >= 0


def test_the_expected_cosine_is_that_of_drawn_numbers() -> None:
    example: Any = script("examples/estimated_gradients.py")
    z = torch.randn(4000, 3, 12, generator=torch.Generator().manual_seed(0))
    estimate = (z[:, :, :1] * z).sum(1)  # of a gradient along the first number
    cosines = estimate[:, 0] / estimate.norm(dim=1)
    assert float(cosines.mean()) == pytest.approx(example.expected(3, 12), rel=0.02)
    assert example.expected(1, 10**6) == pytest.approx(math.sqrt(2 / math.pi / 10**6), rel=1e-3)


def test_estimated_gradients_are_as_near_as_expected() -> None:
    pytest.importorskip("transformers")
    example: Any = script("examples/estimated_gradients.py")
    example.TRAINED = example.TRAINED[:1]
    (row,) = example.measure(seeds=4, queries=(8,))
    assert row["numbers"] == 6 * 128
    assert row["expected"] == pytest.approx(example.expected(8, 768), abs=1e-4)
    assert fmean(row["cosines"]) == pytest.approx(row["expected"], rel=0.5)
