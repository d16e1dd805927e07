"""The API pages have every public name, once, and name nothing that is not there."""

import importlib
import pkgutil
import re
from collections import Counter

import pytest
from repository import script

import gossamer

reference = script("docs/reference.py")
ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)
LINK = re.compile(r"^- \[`(\w+)`\]\[(\S+)\]$", re.MULTILINE)


def walked():
    """Names of all modules that Python finds in the package, but for private ones and the command's."""
    found = (module.name for module in pkgutil.walk_packages(gossamer.__path__, "gossamer."))
    return ["gossamer", *(name for name in found if not any(part.startswith("_") for part in name.split(".")))]


def imported(name):
    """A module; the kernels of Triton cannot be imported everywhere."""
    if "triton" in name:
        pytest.importorskip("triton")
    if name.startswith("gossamer.integrations.vllm."):
        pytest.importorskip("vllm")
    if name.startswith("gossamer.integrations.diffusers"):
        pytest.importorskip("diffusers")
    return importlib.import_module(name)


def resolved(path):
    """What a full name stands for."""
    module, _, name = path.rpartition(".")
    return imported(path) if path in reference.modules() else getattr(imported(module), name)


@pytest.mark.parametrize("name", walked())
def test_every_public_name_of_a_module_has_an_entry_or_a_link_to_it(name):
    module = imported(name)
    public = list(getattr(module, "__all__", ()))
    if not public:
        assert name not in reference.modules()
        return
    page = reference.page(name)
    here = {path.rpartition(".")[2]: path for path in ENTRY.findall(page) if path != name}
    shown = here | dict(LINK.findall(page))
    assert sorted(shown) == sorted(public)
    for public_name, path in shown.items():
        assert resolved(path) is getattr(module, public_name), f"{path} is not what {name} calls {public_name}"


def test_public_names_are_defined_one_at_a_time():
    """mkdocstrings finds no name that an assignment to several defines."""
    found = [module for module in map(reference.read, sorted(reference.PACKAGE.rglob("*.py"))) if module.public]
    lost = {f"{module.name}.{name}" for module in found for name in set(module.public) - module.own - set(module.taken)}
    assert {path for path in lost if path not in reference.modules()} == set()


def test_links_lead_to_entries():
    entries = {path for name in reference.modules() for path in ENTRY.findall(reference.page(name))}
    links = {path for name in reference.modules() for _, path in LINK.findall(reference.page(name))}
    assert links
    assert links <= entries


def test_no_name_has_two_entries():
    counts = Counter(path for name in reference.modules() for path in ENTRY.findall(reference.page(name)))
    assert [path for path, count in counts.items() if count > 1] == []


def test_every_module_says_what_it_is():
    assert [m.name for m in reference.modules().values() if not m.summary.endswith(".")] == []
    assert all(f"(api/{name}.md)" in reference.overview() for name in reference.modules())


def test_the_navigation_has_every_page():
    config = {"nav": ["index.md", {"Reference": ["methods.md", "api.md"]}]}
    reference.on_config(config)
    pages = re.findall(r"'api/([\w.]+)\.md'", str(config["nav"]))
    assert sorted(pages) == sorted(reference.modules())
    assert "'methods.md', {'API': ['api.md', " in str(config["nav"])


def test_a_build_that_lacks_an_entry_fails(tmp_path):
    exceptions = pytest.importorskip("mkdocs.exceptions")
    import zlib

    names = [*reference.public_names()]
    for built, complete in ((names, True), (names[1:], False)):
        lines = "".join(f"{name} py:class 1 api/#$ -\n" for name in built)
        head = b"# Sphinx inventory version 2\n# Project: a\n# Version: 0\n# The remainder is compressed.\n"
        (tmp_path / "objects.inv").write_bytes(head + zlib.compress(lines.encode()))
        if complete:
            reference.on_post_build({"site_dir": str(tmp_path)})
        else:
            with pytest.raises(exceptions.PluginError, match=f"lack {names[0]}"):
                reference.on_post_build({"site_dir": str(tmp_path)})
