"""The examples that train layers of `gossamer.modules`: that they run, and that their parts are what they say."""

from __future__ import annotations

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
    torch.testing.assert_close(x.mean(1), torch.zeros(6, tables.COLUMNS), atol=1e-5, rtol=0)
    assert bool((torch.nn.functional.one_hot(y).sum(1) == tables.ROWS // tables.CLASSES).all())
    assert torch.equal(tables.tables(6, torch.Generator().manual_seed(0))[1], y)


def test_models_that_are_fitted_to_a_table_find_what_is_plain(tables: Any) -> None:
    torch.manual_seed(0)
    y = torch.randint(0, tables.CLASSES, (tables.ROWS,))
    x = 0.1 * torch.randn(tables.ROWS, tables.COLUMNS)
    x[torch.arange(tables.ROWS), y] += 3.0
    for fit in (tables.logistic, tables.neighbours):
        assert torch.equal(fit(x, y), y[tables.LABELLED :])


@pytest.mark.parametrize("name", ["shapes", "tables"])
def test_an_example_of_a_layer_runs(
    name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = request.getfixturevalue(name)
    small = {"TEST": 8, "BATCH": 4} if name == "shapes" else {"TESTS": 2, "BATCH": 1, "ROWS": 36}
    for what, value in small.items():
        monkeypatch.setattr(example, what, value)
    example.main(["--steps", "2"])
    shown = capsys.readouterr().out
    rows = ["dense", *example.CHOICES] if name == "shapes" else [*example.VARIANTS, "logistic regression"]
    assert all(f"\n{row} " in shown for row in rows)
    assert "nan" not in shown
