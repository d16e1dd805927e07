"""Makes the pages of the API when the documentation is built (an mkdocs hook): one a module, every public name.

Public is what stands in a module's ``__all__``. A name that a package takes over from one of its files has its entry on
the page of that file, and a link on the page of the package.
"""

from __future__ import annotations

import ast
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "gossamer"
OVERVIEW = "api.md"
# What a module's page says first; the entries of its names follow.
_ABOUT = "::: {module}\n    options:\n      show_root_heading: false\n      members: false\n"


@dataclass(frozen=True)
class Module:
    """What a file offers, read without running it.

    Fields:
        name: as it is imported.
        summary: the first sentence of its docstring.
        public: its ``__all__``.
        own: the names that it defines itself.
        taken: where other names come from, as module and name; the name is None for a module itself.
    """

    name: str
    summary: str
    public: tuple[str, ...]
    own: frozenset[str]
    taken: dict[str, tuple[str, str | None]]


def read(path: Path) -> Module:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public: tuple[str, ...] = ()
    own: set[str] = set()
    taken: dict[str, tuple[str, str | None]] = {}
    for node in ast.walk(tree):  # into `if` and `try` as well
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            taken |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            own.update(names)
            if names == ["__all__"] and node.value is not None:
                public = tuple(ast.literal_eval(node.value))
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, _sentence(ast.get_docstring(tree) or ""), public, frozenset(own), taken)


def _sentence(docstring: str) -> str:
    first = " ".join(docstring.partition("\n\n")[0].split())
    return first.replace("``", "`")


@cache
def modules() -> dict[str, Module]:
    """The modules with public names, by name; none whose own name begins with an underscore."""
    found = [read(path) for path in PACKAGE.rglob("*.py") if path.name != "__main__.py"]
    public = [module for module in found if module.public and "._" not in module.name]
    return {module.name: module for module in sorted(public, key=lambda module: module.name)}


def home(module: str, name: str) -> str:
    """Where a public name has its entry: the full name of what it stands for, or of the module that it is."""
    source = modules()[module]
    if name in source.own or name not in source.taken:
        return f"{module}.{name}"
    origin, original = source.taken[name]
    if original is None or f"{origin}.{original}" in modules():
        return f"{origin}.{original}" if original else origin
    return home(origin, original) if origin in modules() else f"{module}.{name}"


def entries(module: str) -> list[str]:
    """Full names of what stands on a module's page: its own public names, and those that no other page has."""
    found = []
    for name in modules()[module].public:
        target = home(module, name)
        origin, _, original = target.rpartition(".")
        elsewhere = origin != module and origin in modules() and original in modules()[origin].public
        if target not in modules() and not elsewhere:
            found.append(target)
    return found


def page(module: str) -> str:
    """A module's page in Markdown, for mkdocstrings."""
    here = set(entries(module))
    links = [
        f"- [`{name}`][{target}]" for name in modules()[module].public if (target := home(module, name)) not in here
    ]
    elsewhere = ["Taken over from other files:", "", *links, ""] if links else []
    about = ["# " + module, "", _ABOUT.format(module=module)]
    return "\n".join([*about, *elsewhere, *(f"::: {name}\n" for name in sorted(here))])


def overview() -> str:
    """All modules, with the first sentence of each."""
    rows = [f"| [`{m.name}`](api/{m.name}.md) | {m.summary} |" for m in modules().values()]
    return "\n".join(["| module | what it is |", "|---|---|", *rows])


def navigation() -> list[dict[str, Any]]:
    """The pages by room of the package: what stands in `gossamer` itself comes first."""
    rooms: dict[str, list[dict[str, str]]] = {}
    for name in modules():
        room = ".".join(name.split(".")[:2])
        rooms.setdefault(room, []).append({name: f"api/{name}.md"})
    return [pages[0] if len(pages) == 1 else {room: pages} for room, pages in rooms.items()]


def public_names() -> Iterator[str]:
    """The full name of every entry that the built pages must have."""
    for name in modules():
        yield name
        yield from entries(name)


def on_config(config: Any, **_: Any) -> None:
    """Put the pages below the overview in the navigation."""
    for section in config["nav"]:
        for pages in section.values() if isinstance(section, dict) else ():
            if isinstance(pages, list) and OVERVIEW in pages:
                pages[pages.index(OVERVIEW)] = {"API": [OVERVIEW, *navigation()]}


def on_files(files: Any, config: Any, **_: Any) -> None:
    from mkdocs.structure.files import File

    for name in modules():
        files.append(File.generated(config, f"api/{name}.md", content=page(name)))


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The list of modules goes below the overview."""
    return f"{markdown}\n{overview()}\n" if page.file.src_uri == OVERVIEW else markdown


def on_post_build(config: Any, **_: Any) -> None:
    """Compare what was built with what is public.

    Raises:
        mkdocs.exceptions.PluginError: a name has no entry.
    """
    from mkdocs.exceptions import PluginError

    inventory = (Path(config["site_dir"]) / "objects.inv").read_bytes()
    lines = zlib.decompress(inventory.split(b"\n", 4)[4]).decode()
    built = set(re.findall(r"^(\S+) py:", lines, re.MULTILINE))
    if missing := sorted(set(public_names()) - built):
        raise PluginError(f"the API pages lack {', '.join(missing)}: see docs/reference.py")
