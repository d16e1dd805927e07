"""What the page on diffusers says of the small video model is what was measured."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, script

from gossamer.evaluate.clips import ClipRow, clip_rows
from gossamer.evaluate.summary import read_results

FOLDER = ROOT / "benchmarks" / "results" / "amd-epyc-zen5-2-cores-avx512-bf16"


@cache
def page() -> str:
    return (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
