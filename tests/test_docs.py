"""The documentation is true: its code runs, its figures are those of the committed files, its lists are complete."""

import functools
import json
import os
import re
import sys
from pathlib import Path

import pytest

import gossamer

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; a missing folder must not be looked up

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def code_of(page: Path) -> str:
    """All python blocks of a page as one module, on the page's own lines."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


@pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page).strip()], ids=lambda page: page.name)
def test_code_blocks_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    # Dataclasses look their module up by name.
    name = f"page_{page.stem.replace('-', '_')}"
    module = type(sys)(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code_of(page), str(page), "exec"), module.__dict__)


@functools.cache
def script(path):
    """A file outside the package as a module."""
    import importlib.util

    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def demo():
    return script("examples/demo.py")


def test_readme_shows_the_committed_run_of_the_demo():
    figures = json.loads((ROOT / "examples" / "demo.json").read_text())
    assert demo().report(figures) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_repository_is_long_enough_for_the_demo():
    text = demo().repository_text()
    assert len(text) > 4 * demo().TOKENS


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_every_method_is_listed(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not [name for name in gossamer.methods.available() if f"| `{name}` |" not in text]


def test_the_table_of_methods_gives_intervals_and_samples_of_each_task():
    from gossamer.evaluate.summary import read_results, summary_rows

    rows = summary_rows(read_results(ROOT / "benchmarks" / "results" / "reference_eval.jsonl"))
    header, _, *lines = script("docs/tables.py").methods_table().split("\n\n")[1].splitlines()
    longest = [row for row in rows if row.length == rows[-1].length]
    assert len(lines) == len(longest)
    for row, line in zip(longest, lines, strict=True):
        for task, (mean, (low, high), samples) in row.tasks.items():
            assert f" {task}, n {samples} " in header
            assert f" {mean:.2f} [{low:.2f}, {high:.2f}] " in line


def test_changelog_has_this_version():
    assert f"\n## {gossamer.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_report_in_the_documentation_is_drawn_from_the_committed_results(tmp_path):
    from gossamer.evaluate.summary import read_results
    from gossamer.report import write_report

    results = ROOT / "benchmarks" / "results"
    records = [r for name in ("eval", "heads") for r in read_results(results / f"reference_{name}.jsonl")]
    page = tmp_path / "reference_eval.html"
    write_report(records, page, title="Methods on the reference model")
    committed = (ROOT / "docs" / "reports" / "reference_eval.html").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == committed, "run `gossamer report` again, see docs/benchmarks.md"
    assert len(committed) < 1_000_000
    for picture in ("needles", "density", "recall", "latency", "logits", "heads", "attention", "maps"):
        assert f"<section id='{picture}'>" in committed
        assert (ROOT / "docs" / "reports" / "reference_eval_csv" / f"{picture}.csv").stat().st_size > 0
