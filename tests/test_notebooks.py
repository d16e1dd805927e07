"""The notebooks run from the first cell to the last, and are committed without what they printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository import script

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells_of(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code_of(notebook):
    """The cells of code as one program."""
    return "\n\n".join("".join(cell["source"]) for cell in cells_of(notebook) if cell["cell_type"] == "code")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    program = tmp_path / f"{notebook.stem.replace('-', '_')}.py"
    program.write_text(code_of(notebook), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:gossamer", str(program)],
        cwd=notebook.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs(notebook):
    code = [cell for cell in cells_of(notebook) if cell["cell_type"] == "code"]
    assert code
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    assert len({cell["id"] for cell in cells_of(notebook)}) == len(cells_of(notebook))


def test_the_documentation_lists_every_notebook():
    listed = re.findall(r"^ +- notebooks/(\S+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [notebook.stem for notebook in NOTEBOOKS]
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_page_with_its_code(notebook):
    page = script("docs/notebook_pages.py").page(notebook)
    assert page.startswith("# ")
    assert f"({notebook.name})" in page
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert "\n\n".join(block.rstrip("\n") for block in blocks) == code_of(notebook)
