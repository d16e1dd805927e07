"""Memory and seconds of ``gossamer calibrate`` on layers of an 8B model's shape: `calibration_memory.py --layers 2`.

Weights are random: neither memory nor the number of candidates depends on them. The model, its prompt's activations and
what is measured are in one process, whose peak is printed with the seconds, as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

REFERENCE = Path(__file__).resolve().parent.parent / "models" / "reference"
RUN = """
import json, resource, sys
from gossamer.cli import main
code, used = main(sys.argv[1:]), resource.getrusage(resource.RUSAGE_SELF)
cpu = round(used.ru_utime + used.ru_stime, 1)
print(json.dumps({"code": code, "peak_gib": round(used.ru_maxrss / 2**20, 2), "cpu_seconds": cpu}))
"""


def make_model(folder: Path, layers: int, length: int) -> None:
    """32 query heads, 8 key/value heads of 128, a width of 4,096, as a folder with the reference model's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=json.loads((REFERENCE / "config.json").read_text())["vocab_size"],
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2 * length,
        dtype="bfloat16",
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in REFERENCE.glob("*token*"):
        shutil.copy(path, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_model(path / "model", given.layers, given.length)
        (path / "text.txt").write_text(" ".join(str(i * i % 9973) for i in range(2 * given.length * given.samples)))
        argv = ["calibrate", path / "model", "--prompts", path / "text.txt", "--lengths", given.length]
        argv += ["--samples", given.samples, "--held-out-samples", 0, "--dtype", "bfloat16", "-o", path / "p.json"]
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", RUN, *map(str, argv)], stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - started
    print(json.dumps(vars(given) | {"seconds": round(seconds, 1)} | json.loads(done.stdout.splitlines()[-1])))


if __name__ == "__main__":
    main()
