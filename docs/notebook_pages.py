"""Makes a page of each notebook when the documentation is built (an mkdocs hook): its text and its code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "notebooks"


def page(notebook: Path) -> str:
    """A notebook's cells as Markdown, and where the notebook itself is."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    title, *rest = parts
    return "\n\n".join([title, f"[This page as a notebook]({notebook.name}), to run it and to change it.", *rest, ""])


def on_files(files: Any, config: Any, **_: Any) -> None:
    from mkdocs.structure.files import File

    for notebook in sorted(FOLDER.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=page(notebook)))
