"""Fidelity of long prompts needs little memory: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
resource = pytest.importorskip("resource")

REFERENCE = Path(__file__).resolve().parents[2] / "models" / "reference"
SCRIPT = """
import json, resource, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from gossamer.attention import Policy
from gossamer.evaluate.fidelity import compare
from gossamer.evaluate.haystack import load_haystack
from gossamer.evaluate.subject import Subject

torch.set_num_threads(1)
folder, length = sys.argv[1], int(sys.argv[2])
subject = Subject(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), "reference")
tokens = subject.tokens(load_haystack().text[: 12 * length])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
policies = [Policy.of("max_relative")]
compare(subject, torch.tensor([tokens[:2100]]), policies)
before = peak()
compare(subject, torch.tensor([tokens[:length]]), policies)
print(json.dumps({"before": before, "after": peak(), "heads": subject.config.num_attention_heads}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_no_layer_is_held_as_a_full_matrix():
    """6K tokens take far less than one layer's matrix of fp32 weights would by itself; 32K stay below 8 GiB easily."""
    length = 6144
    call = [sys.executable, "-c", SCRIPT, str(REFERENCE), str(length)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    matrix = found["heads"] * length * length * 4
    assert found["after"] - found["before"] < matrix / 3
