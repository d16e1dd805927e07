"""The documentation is true: its code runs, its figures are those of the committed files, its lists are complete."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from repository import script

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
    if "import diffusers" in code_of(page):
        pytest.importorskip("diffusers")
    # Dataclasses look their module up by name.
    name = f"page_{page.stem.replace('-', '_')}"
    module = type(sys)(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code_of(page), str(page), "exec"), module.__dict__)


PRETRAINED = sorted((ROOT / "benchmarks" / "results").glob("*/demo_pretrained.json"))


@pytest.mark.parametrize("path", [ROOT / "examples" / "demo.json", *PRETRAINED], ids=lambda path: path.name)
def test_readme_shows_the_committed_runs_of_the_demos(path):
    figures = json.loads(path.read_text())
    assert script("examples/reading.py").report(figures) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_of_training_shows_the_committed_figures():
    (path,) = (ROOT / "benchmarks" / "results").glob("*/training.json")
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for row in json.loads(path.read_text())["rows"]:
        if row["section"] == "memory":
            assert f"{row['beside_mib']} MiB in {row['dtype']}" in text
            continue
        seconds = row["dense" if row["section"] == "dense" else "sparse"]["median_s"]
        start = f"| {row['dtype']} | {row['length']} | {row['heads']} / {row['groups']} | {row['dim']} |"
        lines = [line for line in text.splitlines() if line.startswith(start)]
        assert any(f"| {seconds:.2f} | {row['ratio']:.1f} times" in line for line in lines), start


def test_the_repository_is_long_enough_for_the_demo():
    assert len(script("examples/reading.py").repository_text()) > 4 * script("examples/demo.py").TOKENS


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_every_method_is_listed(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = [*gossamer.methods.available(), *gossamer.methods.denoising()]
    assert not [name for name in names if f"| `{name}` |" not in text]


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


@pytest.fixture
def two_machines(monkeypatch, tmp_path):
    """The hook that fills pages in, on the committed results and the same ones of a second machine."""
    hook = script("docs/tables.py")
    results, images = tmp_path / "results", tmp_path / "images"
    committed = hook.RESULTS / sorted(hook.IMAGES.glob("*/cpu_latency.svg"))[0].parent.name
    for name in (committed.name, "other-machine"):
        shutil.copytree(committed, results / name)
        shutil.copytree(hook.IMAGES / committed.name, images / name)
    for path in (results / "other-machine").glob("*.json"):
        found = json.loads(path.read_text())
        for part in (found, *found.get("sections", found).values()):
            if isinstance(part, dict) and "machine" in part:
                part["machine"] |= {"cpu": "Other", "generation": None, "cores": 64}
        path.write_text(json.dumps(found))
    monkeypatch.setattr(hook, "RESULTS", results)
    monkeypatch.setattr(hook, "IMAGES", images)
    return hook


@pytest.mark.parametrize("name", ["cpu", "parts", "vllm", "end_to_end", "targets"])
def test_every_machine_has_a_table_of_its_own(two_machines, name):
    made = two_machines.TABLES[name]()
    assert made.count("\n|---|") == 2
    assert made.count("**Other, 64 cores** (`other-machine`)") == 1
    first, second = (part.split("|", 1)[1] for part in made.split("**Other, 64 cores**"))
    assert first.strip() == second.strip()


def test_every_machine_has_its_pictures(two_machines):
    made = two_machines.on_page_markdown("a <!-- picture: cpu_latency --> b")
    assert made.count("![Seconds against length, ") == 2
    assert "](images/other-machine/cpu_latency.svg)" in made


def test_a_machine_that_has_measured_one_section_alone_has_no_empty_tables(two_machines):
    path = two_machines.RESULTS / "other-machine" / "cpu.json"
    sections = json.loads(path.read_text())["sections"]
    path.write_text(json.dumps({"sections": {"decode": sections["decode"]}}))
    (path.parent / "planning.json").unlink()
    assert "other-machine" not in two_machines.cpu_table() + two_machines.vllm_table()
    assert "decode, dense" in two_machines.parts_table().split("other-machine")[1]
    assert "| dense over SDPA, bf16, 32K, head dimension 128 | 2.0 | - |" in two_machines.targets_table()


def test_figures_of_a_gpu_are_shown_under_its_name(two_machines):
    assert two_machines.gpu_table() == "Not measured yet."
    row = {"cell": "131072", "what": "minference", "length": 131072, "density": 0.0123, "median_s": 0.0123}
    about = {"device": "NVIDIA H200", "torch": "2.13.0", "triton": "3.9.0"}
    sections = {"whole": {"done": [], "rows": [row, {"cell": "1048576", "what": "sdpa", "skipped": "no time"}]}}
    path = two_machines.RESULTS / "nvidia-h200" / "gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"machine": about, "rounds": 7, "sections": sections}))
    name, above, table = two_machines.gpu_table().split("\n\n")
    assert name == "**NVIDIA H200** (`nvidia-h200`)"
    assert "Triton 3.9.0" in above
    assert table.splitlines()[2:] == ["| whole | `minference` | 131,072 | 0.0123 | 12.30 |  |  |  |  |"]


def test_the_pages_have_every_table_and_picture():
    hook = script("docs/tables.py")
    page = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))
    assert not [name for name in hook.TABLES if f"<!-- table: {name} -->" not in page]
    assert not [name for name in hook.PICTURES if f"<!-- picture: {name} -->" not in page]
    filled = hook.on_page_markdown(page)
    assert "<!--" not in filled
    for machine in sorted(hook.RESULTS.glob("*/cpu.json")):
        assert filled.count(f"(`{machine.parent.name}`)") >= 2


def test_every_reason_of_a_model_family_has_words():
    tables = script("docs/family_tables.py")
    _, families = tables.read()
    reasons = {why for found in families.values() for layer in found.get("dense_layers", {}).values() for why in layer}
    assert reasons <= set(tables.REASONS)
    refused = [found["why"] for found in families.values() if found["outcome"] in ("refused", "unsupported")]
    assert refused
    assert not [why for why in refused if tables.worded(why) == why]


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
        assert f'<section id="{picture}">' in committed
        assert (ROOT / "docs" / "reports" / "reference_eval_csv" / f"{picture}.csv").stat().st_size > 0
