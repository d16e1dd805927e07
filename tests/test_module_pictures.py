"""Pictures of the trainable layers' masks are drawn from their plans, and stand in the documentation."""

from pathlib import Path

import pytest
from repository import script

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(script("docs/module_pictures.py").DRAWN)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_drawn_from_the_plans_of_today(name: str) -> None:
    pictures = script("docs/module_pictures.py")
    committed = (pictures.PICTURES / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == pictures.draw(name), "run `python docs/module_pictures.py` again"
    assert f"(images/modules/{name}.svg)" in (ROOT / "docs" / "modules.md").read_text(encoding="utf-8")


def test_no_picture_is_left_over() -> None:
    pictures = script("docs/module_pictures.py")
    assert sorted(path.stem for path in pictures.PICTURES.glob("*")) == NAMES


def test_a_pair_has_the_colour_of_the_first_kind_that_has_it() -> None:
    import torch

    pictures = script("docs/module_pictures.py")
    first, second = torch.eye(3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool).tril()
    drawn = str(pictures.svg_file(pictures.picture([pictures.Map("two", {"a": first, "b": second})])))
    assert drawn.count(f'fill="{pictures.PALETTE[0]}"') == 3 + 1  # the diagonal, and its name
    assert drawn.count(f'fill="{pictures.PALETTE[1]}"') == 2 + 1  # what is below, each row as one
