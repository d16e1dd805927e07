"""What tests of the plug-in inside vLLM share: jobs for `engine_run`, and prompts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT / "models" / "reference"
RUN = Path(__file__).with_name("engine_run.py")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm")

# A plan for every row that may have one, with all pairs in it.
FULL = {"method": "a_shape", "sink": 1, "window": 1 << 20, "min_tokens": 0, "max_density": 2}
SPARSE = {"method": "a_shape", "sink": 1, "window": 64, "min_tokens": 0}


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(10, 5000, (length,), generator=generator).tolist()


def environment(**more: str) -> dict[str, str]:
    fixed = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "GOSSAMER_COST_MODEL": "off",
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOSSAMER", "TRITON"))}
    return kept | fixed | more


def run(job: dict[str, Any], **more: str) -> dict[str, Any]:
    """The result of a job.

    Raises:
        RuntimeError: vLLM ended with an error, which the message has.
    """
    job = {"model": str(REFERENCE), "max_tokens": 8} | job
    job["args"] = {"enforce_eager": True, "dtype": "float32", "max_model_len": 8192} | job.get("args", {})
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, str(RUN), str(result)],
            input=json.dumps(job),
            env=environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-8000:])
        return json.loads(result.read_text())


def tokens(result: dict[str, Any]) -> list[list[int]]:
    return [answer["tokens"] for answer in result["answers"]]


def counted(result: dict[str, Any], metric: str = "gossamer_rows", **labels: str) -> float:
    """The sum of a metric over all rows with these labels."""
    rows = result["rows"]
    return sum(value for name, of, value in rows if name == metric and labels.items() <= of.items())
