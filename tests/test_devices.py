"""Tensors are made where the call is, or on the CPU: never on whatever default device somebody has set."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gossamer

ROOT = Path(gossamer.__file__).parent
FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "zeros",
}  # fmt: skip
# What makes tensors of its own, and runs where its user runs.
OTHERS = {"cli", "evaluate", "report", "testing"}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] not in OTHERS]


def without_device(source: str) -> list[str]:
    return [
        f"line {call.lineno}: torch.{call.func.attr}"
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in FACTORIES
        and all(keyword.arg != "device" for keyword in call.keywords)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_factory_says_its_device(path: Path) -> None:
    assert without_device(path.read_text(encoding="utf-8")) == []


def test_the_search_finds_one() -> None:
    assert without_device("import torch\n\nx = torch.zeros(2)\ny = torch.zeros(2, device=x.device)") == [
        "line 3: torch.zeros"
    ]
