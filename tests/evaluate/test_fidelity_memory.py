"""Fidelity of long prompts needs little memory: measured in a process of its own, from the moment before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.backends import cpu

pytest.importorskip("transformers")

REFERENCE = Path(__file__).resolve().parents[2] / "models" / "reference"
LENGTH = 6144
SCRIPT = """
import ctypes, gc, json, sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from gossamer import Policy
from gossamer.evaluate.fidelity import compare
from gossamer.evaluate.haystack import load_haystack
from gossamer.evaluate.subject import Subject

torch.set_num_threads(1)
folder, length = sys.argv[1], int(sys.argv[2])
subject = Subject(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), "reference")
tokens = subject.tokens(load_haystack().text[: 12 * length])
heads = subject.config.num_attention_heads

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def growth(call):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed pages that stay resident would hide what the call takes
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    call()
    return resident("VmHWM") - before

def measure(length):
    compare(subject, torch.tensor([tokens[:length]]), [Policy.of("max_relative")])

measure(2100)  # threads, libraries and kernels are ready
print(json.dumps({
    "matrix": growth(lambda: torch.ones(heads, length, length).sum()),
    "fidelity": growth(lambda: measure(length)),
    "heads": heads,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not cpu.is_available(), reason="the torch backend holds more than that by itself")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak since a moment is not told here")
def test_no_layer_is_held_as_a_full_matrix():
    """A third of one layer's fp32 weights suffices at 6K tokens; a matrix that is really made is seen as such."""
    call = [sys.executable, "-c", SCRIPT, str(REFERENCE), str(LENGTH)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    matrix = found["heads"] * LENGTH * LENGTH * 4
    assert found["matrix"] > 0.9 * matrix
    assert found["fidelity"] < matrix / 3
