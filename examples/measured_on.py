"""What is written of the machine beside results: what names their folder is among it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from gossamer.profiles.machine import cpu_model

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def measured_on() -> dict[str, Any]:
    """Processor, instruction sets, threads and versions."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        found = importlib.import_module("machines").machine()
    finally:
        sys.path.remove(str(BENCHMARKS))
    return {"processor": cpu_model(), "threads": torch.get_num_threads(), **found}
