"""What `import gossamer` costs and shows."""

import importlib.resources
import json
import subprocess
import sys

import gossamer

PROBE = """
import json, sys
import torch
before = set(sys.modules)
import gossamer
print(json.dumps({"new": sorted(set(sys.modules) - before), "public": gossamer.__all__}))
"""


def probe() -> dict[str, list[str]]:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def test_import_needs_torch_alone():
    # What torch itself has not imported yet may only come from the standard library, torch or gossamer.
    packages = {name.partition(".")[0] for name in probe()["new"]}
    foreign = packages - set(sys.stdlib_module_names) - {"gossamer", "torch"}
    assert not {name for name in foreign if not name.startswith("_")}


def test_import_leaves_the_heavy_parts_alone():
    heavy = ("gossamer.integrations", "gossamer.evaluate", "gossamer.cli", "gossamer.testing")
    assert not [name for name in probe()["new"] if name.startswith(heavy)]


def test_at_most_ten_public_names():
    assert len(gossamer.__all__) <= 10
    assert all(hasattr(gossamer, name) for name in gossamer.__all__)


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(gossamer, "enabled")


def test_types_are_shipped():
    assert importlib.resources.files("gossamer").joinpath("py.typed").is_file()
