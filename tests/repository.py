"""Files of the repository that are no part of the package, as modules."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def script(path: str) -> ModuleType:
    """A file, by its path in the repository; it may import its neighbours, as mkdocs lets a hook do."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend((ROOT / path).parent)
        spec.loader.exec_module(module)
    return module
