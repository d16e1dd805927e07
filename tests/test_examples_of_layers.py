"""The examples that train layers of `gossamer.modules`: that they run, and that their parts are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import script


@pytest.fixture(scope="module")
def shapes() -> Any:
    return script("examples/shapes.py")


@pytest.fixture(scope="module")
def tables() -> Any:
    return script("examples/learn_tables.py")


def test_images_show_the_pair_that_they_are_called(shapes: Any) -> None:
    images, labels = shapes.shapes(400, torch.Generator().manual_seed(0))
    assert images.shape == (400, 1, 32, 32)
    assert set(labels.tolist()) == set(range(len(shapes.PAIRS)))
    bright = images[:, 0].sum((1, 2))
    most = {label: float(bright[labels == label].mean()) for label in range(len(shapes.PAIRS))}
    squares, crosses = shapes.PAIRS.index((0, 0)), shapes.PAIRS.index((2, 2))
    assert most[squares] - most[crosses] == pytest.approx(2 * (81 - 45), abs=15)
    again, _ = shapes.shapes(400, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)


def test_choices_of_connections_keep_as_many_and_the_oracle_keeps_most(shapes: Any) -> None:
    torch.manual_seed(0)
    teacher = shapes.Vit()
    with torch.no_grad():
        for block in teacher.blocks:
            block.attention.projections.q_proj.weight.mul_(8)
    images, _ = shapes.shapes(4, torch.Generator().manual_seed(1))
    mass = {}
    for name, choice in shapes.CHOICES.items():
        model = shapes.masked(teacher, choice)
        with torch.no_grad():
            chosen, dense = model(images)[2][0].chosen, teacher(images)[2][0].attention
        assert bool((chosen[:, :, 1:].sum(-1) == 17).all()), name  # a quarter of 65, rounded up
        mass[name] = float((dense * chosen)[:, :, 1:].sum(-1).mean())
    assert max(mass, key=lambda name: mass[name]) == "oracle top-k"


def test_classes_of_a_table_come_from_its_columns(tables: Any) -> None:
    x, y = tables.tables(6, torch.Generator().manual_seed(0))
    seen = x[:, : tables.LABELLED], y[:, : tables.LABELLED]
    torch.testing.assert_close(seen[0].mean(1), torch.zeros(6, tables.COLUMNS), atol=1e-5, rtol=0)
    assert bool((torch.nn.functional.one_hot(seen[1]).sum(1) == tables.LABELLED // tables.CLASSES).all())
    assert torch.equal(tables.tables(6, torch.Generator().manual_seed(0))[1], y)


def test_variants_of_tables_are_other_functions_of_the_same_weights(tables: Any) -> None:
    x, y = tables.tables(2, torch.Generator().manual_seed(0))
    found = {}
    for name, options in tables.VARIANTS.items():
        torch.manual_seed(0)
        with torch.no_grad():
            found[name] = tables.made(**options)(x, y, tables.LABELLED)
    meant, released = found.values()
    assert not torch.allclose(meant, released)


def test_rows_without_a_label_change_nothing_of_those_with_one(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled or cut with all rows, the labelled ones would tell how many of each class the others have."""
    monkeypatch.setattr(tables, "tree", lambda used, generator: used[:, 0])
    monkeypatch.setattr(tables, "network", lambda used, generator: used[:, 0])
    drawn, outlier = torch.randn, {}

    def randn(*size: int, **given: Any) -> torch.Tensor:
        made = drawn(*size, **given)
        if size == (tables.ROWS, tables.COLUMNS):
            made[tables.LABELLED :] += outlier.get("by", 0.0)
        return made

    monkeypatch.setattr(torch, "randn", randn)
    x, y = tables.tables(3, torch.Generator().manual_seed(0))
    outlier["by"] = 100.0
    other, classes = tables.tables(3, torch.Generator().manual_seed(0))
    assert not torch.allclose(x[:, tables.LABELLED :], other[:, tables.LABELLED :])
    torch.testing.assert_close(x[:, : tables.LABELLED], other[:, : tables.LABELLED])
    assert torch.equal(y[:, : tables.LABELLED], classes[:, : tables.LABELLED])


def test_logistic_regression_is_newtons_method_with_a_penalty_of_one(tables: Any) -> None:
    for x, y in zip(*tables.tables(4, torch.Generator().manual_seed(2)), strict=True):
        rows = torch.cat([x, torch.ones(len(x), 1)], 1)[: tables.LABELLED].double()
        weights, penalty = rows.new_zeros(tables.COLUMNS + 1), torch.eye(tables.COLUMNS + 1, dtype=torch.float64)
        penalty[-1, -1] = 0.0
        for _ in range(30):
            chance = (rows @ weights).sigmoid()
            slope = rows.T @ (chance - y[: tables.LABELLED]) + penalty @ weights
            weights = weights - torch.linalg.solve(rows.T @ (rows * (chance * (1 - chance))[:, None]) + penalty, slope)
        torch.testing.assert_close(tables.regression(x, y).double(), weights, atol=1e-3, rtol=1e-3)
        there = [float(row @ weights[:-1] + weights[-1]) > 0 for row in x[tables.LABELLED :].double()]
        assert tables.logistic(x, y).tolist() == [int(one) for one in there]


def test_neighbours_are_those_of_a_sorted_list(tables: Any) -> None:
    (x,), (y,) = tables.tables(1, torch.Generator().manual_seed(3))
    known = list(zip(x.tolist(), y.tolist(), strict=True))[: tables.LABELLED]
    expected = []
    for row in x[tables.LABELLED :].tolist():
        near = sorted(known, key=lambda one: sum((a - b) ** 2 for a, b in zip(one[0], row, strict=True)))[:5]
        expected.append(int(sum(label for _, label in near) > 2))
    assert tables.neighbours(x, y).tolist() == expected


def test_fitted_models_are_scikit_learns(tables: Any) -> None:
    """Runs where it is installed."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="the baselines need torch alone")
    nearest = pytest.importorskip("sklearn.neighbors", reason="the baselines need torch alone")
    for x, y in zip(*tables.tables(8, torch.Generator().manual_seed(2)), strict=True):
        theirs = linear_model.LogisticRegression(max_iter=500, tol=1e-8).fit(
            *(z[: tables.LABELLED].numpy() for z in (x, y))
        )
        assert tables.logistic(x, y).tolist() == theirs.predict(x[tables.LABELLED :].numpy()).tolist()
        five = nearest.KNeighborsClassifier(5).fit(*(z[: tables.LABELLED].numpy() for z in (x, y)))
        assert tables.neighbours(x, y).tolist() == five.predict(x[tables.LABELLED :].numpy()).tolist()


def test_variants_of_orion_differ_as_their_names_say(tables: Any) -> None:
    assert [bool(options.get("mixing")) for options in tables.VARIANTS.values()] == [False, True]
    assert tables.VARIANTS["Orion-MSP, as released"] == {"window": None, "random": 1, "seed": None, "mixing": True}


def test_models_that_are_fitted_to_a_table_find_what_is_plain(tables: Any) -> None:
    torch.manual_seed(0)
    y = torch.randint(0, tables.CLASSES, (tables.ROWS,))
    x = 0.1 * torch.randn(tables.ROWS, tables.COLUMNS)
    x[torch.arange(tables.ROWS), y] += 3.0
    for fit in (tables.logistic, tables.neighbours):
        assert torch.equal(fit(x, y), y[tables.LABELLED :])


@pytest.mark.parametrize("name", ["shapes", "tables"])
def test_an_example_of_a_layer_runs(
    name: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    example, out = request.getfixturevalue(name), tmp_path / "found.json"
    small = {"TEST": 8, "BATCH": 4} if name == "shapes" else {"TESTS": 2, "BATCH": 1, "ROWS": 36}
    for what, value in small.items():
        monkeypatch.setattr(example, what, value)
    example.main(["--steps", "4", "--seeds", "2", "--out", str(out)])
    shown = capsys.readouterr().out
    rows = ["dense", *example.CHOICES] if name == "shapes" else [*example.VARIANTS, "logistic regression"]
    assert all(f"\n{row} " in shown for row in rows)
    assert "nan" not in shown
    found = json.loads(out.read_text())
    assert found["steps"] == 4
    if name == "shapes":
        assert [(row["seed"], row["connections"]) for row in found["rows"]] == [
            (n, row) for n in (0, 1) for row in rows
        ]
        assert all(0 < row["mass"] <= 1 for row in found["rows"])
    else:
        assert {row["model"]: len(row["seeds"]) for row in found["rows"]} == {
            "logistic regression": 1,
            "5 nearest neighbours": 1,
            **dict.fromkeys(example.VARIANTS, 2),
        }
        assert found["rows"][0]["difference"] == [0.0, 0.0]
