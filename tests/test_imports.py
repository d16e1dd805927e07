"""`import gossamer` is light, and imports point one way."""

import importlib.resources
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import gossamer

ROOT = Path(gossamer.__file__).parent
# The one pair of files that may know each other: a plan's pairs, counted by their definition; and its picture.
PAIRS = {("plan/plan.py", "gossamer.plan.count"), ("plan/plan.py", "gossamer.plan.flex_mask")}
FILES = sorted(ROOT.rglob("*.py"))
_spec = importlib.util.spec_from_file_location("layout", Path(__file__).parents[1] / "docs" / "layout.py")
assert _spec is not None
assert _spec.loader is not None
layout = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layout)
imported, module_of = layout.imported, layout.module_of


def level_of(module: str) -> int:
    room = layout.room_of(module)
    return next((level for level, rooms in enumerate(layout.LEVELS) if room in rooms), -1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_backwards(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    if name in ("__init__.py", "__main__.py"):
        return
    level = level_of(module_of(path))
    assert level >= 0, f"{name} stands in no room of docs/layout.py"
    wrong = {module for module in imported(path) if module != "gossamer" and level_of(module) > level}
    assert not wrong, f"{name} imports {sorted(wrong)}, which stand above it"


def test_nothing_of_ours_imports_testing() -> None:
    users = [p for p in FILES if any(m.startswith("gossamer.testing") for m in imported(p))]
    assert [p for p in users if "testing" not in p.parts] == []


def test_no_circle_of_files() -> None:
    """But for a plan and the definition that counts it."""
    graph = {}
    for path in FILES:
        name = str(path.relative_to(ROOT))
        targets = {m for m in imported(path) if m != "gossamer" and (name, m) not in PAIRS}
        graph[module_of(path)] = {m for m in targets if m != module_of(path)}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        # A package's own names come from its files: those do not import it back.
        assert module not in trail, f"a circle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module in done:
            return
        for target in graph.get(module, ()):
            visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_the_picture_shows_the_imports() -> None:
    assert layout.PICTURE.read_text(encoding="utf-8") == layout.draw(), "run `python docs/layout.py` again"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def new_modules() -> list[str]:
    return run(
        "import sys, torch; before = set(sys.modules); import gossamer; print(*(set(sys.modules) - before))"
    ).split()


def test_importing_needs_torch_alone() -> None:
    # What torch itself has not imported yet may only come from the standard library, torch or gossamer.
    packages = {name.partition(".")[0] for name in new_modules()}
    foreign = packages - set(sys.stdlib_module_names) - {"gossamer", "torch"}
    assert not {name for name in foreign if not name.startswith("_")}


def test_importing_leaves_the_heavy_parts_alone() -> None:
    heavy = ("gossamer.integrations", "gossamer.evaluate", "gossamer.cli", "gossamer.testing", "gossamer.oracle")
    assert not [name for name in new_modules() if name.startswith(heavy)]


def test_enable_is_found_when_it_is_used() -> None:
    assert "enable" in dir(gossamer)
    assert "enable" not in vars(gossamer)
    assert run("import gossamer; print(gossamer.enable.__module__)") == "gossamer.integrations.enabling"
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        gossamer.nonesuch  # noqa: B018


def test_at_most_ten_public_names() -> None:
    assert len({*gossamer.__all__, "enable"}) <= 10


def test_types_are_shipped() -> None:
    assert importlib.resources.files("gossamer").joinpath("py.typed").is_file()
