"""Methods of other packages, by their entry points."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import ClassVar

import pytest

from gossamer import AttentionCall, SparsePlan, methods
from gossamer.blocks import Blocks
from gossamer.methods import Method, registry


@dataclass(frozen=True)
class Theirs(Method):
    """A method of another package."""

    name: ClassVar[str] = "theirs"
    window: int = 3

    def plan(self, call: AttentionCall) -> SparsePlan:
        return Blocks(call, per="kv_head").plan(window=self.window)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """A package that offers a method, and three that offer it wrongly."""
    package = ModuleType("another_package")
    vars(package).update(Theirs=Theirs, other=object())
    monkeypatch.setitem(sys.modules, "another_package", package)
    offered = {
        "theirs": "another_package:Theirs",
        "misnamed": "another_package:Theirs",
        "no_method": "another_package:other",
        "missing": "another_package:nothing",
        "a_shape": "another_package:Theirs",
    }
    entries = {name: EntryPoint(name, value, registry.GROUP) for name, value in offered.items()}
    monkeypatch.setattr(registry, "_installed", lambda: entries)


def test_a_method_of_another_package_is_like_ours() -> None:
    assert methods.available()[-4:] == ["misnamed", "missing", "no_method", "theirs"]
    method = methods.create("theirs", window=7)
    assert isinstance(method, Theirs)
    assert methods.from_dict(method.to_dict()) == method


def test_our_names_are_ours() -> None:
    assert type(methods.create("a_shape")) is methods.AShape
    assert methods.available().count("a_shape") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("misnamed", "whose name is 'misnamed'"),
        ("no_method", "must name a class of gossamer.methods.Method"),
        ("missing", "does not load"),
        ("nonesuch", "unknown method 'nonesuch'; known: dense, .*theirs"),
    ],
)
def test_what_is_wrong_is_said(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.create(name)


def test_entry_points_are_read_from_the_installation(monkeypatch) -> None:
    monkeypatch.undo()
    registry._installed.cache_clear()
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or [])
    assert registry._installed() == {}
    assert asked == ["gossamer.methods"]
    registry._installed.cache_clear()
