"""The most memory that ``gossamer calibrate`` takes on a layer of an 8B model's shape, and its CPU seconds.

    python benchmarks/calibration_memory.py [--length 32768] [--layers 1] [--methods LIST] [--out FILE]

A model of Llama 3's 8B shape but for its number of layers and its vocabulary, in bfloat16, reads one prompt; its
weights are random, on which no size depends. The command runs as a user's does, in a process of its own, whose peak it
is: weights, the prompt's activations, and what is measured of the layer, a key/value head at a time. Layers come by
one after the other and leave some numbers behind, so that more of them add their weights alone; a model of all layers
is taken to need as much besides its weights as this one (``whole_gib``).

Candidates are planned and attended one after the other, so that more of them take more time and no more memory: of each
method the one that computes most is tried, by default. So it ends within some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machines import machine, results
from timing import write
from transformers import LlamaConfig, LlamaForCausalLM

REFERENCE = Path(__file__).resolve().parent.parent / "models" / "reference"
# Of each method that is tried without --methods, the candidate that computes most.
LARGEST = (
    "a_shape(sink=64,window=4096)",
    "vertical_slash(vertical_size=3500,slash_size=4096)",
    "block_sparse(blocks=100)",
    "xattention(threshold=0.95)",
    "max_relative(alpha=0.02)",
)
# Of the model whose shape it is: layers and tokens of its vocabulary.
LAYERS, VOCABULARY = 32, 128_256
GIB = 1 << 30
RUN = """
import json, resource, sys
from gossamer.cli import main
code, used = main(sys.argv[1:]), resource.getrusage(resource.RUSAGE_SELF)
with open("/proc/self/status") as status:
    (peak,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
print(json.dumps({"code": code, "peak": peak << 10, "cpu_s": round(used.ru_utime + used.ru_stime, 1)}))
"""


def config(layers: int, vocabulary: int, length: int) -> LlamaConfig:
    """32 query heads, 8 key/value heads of 128, a width of 4,096."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2 * length,
        dtype="bfloat16",
    )


def weights(of: LlamaConfig) -> int:
    """Bytes of a model's parameters, two each."""
    with torch.device("meta"):
        return 2 * sum(parameter.numel() for parameter in LlamaForCausalLM(of).parameters())


def make_model(folder: Path, of: LlamaConfig) -> None:
    """As a folder, with the reference model's tokenizer."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(of)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in REFERENCE.glob("*token*"):
        shutil.copy(path, folder)


def command(folder: Path, given: argparse.Namespace) -> list[str]:
    """Of a calibration that holds nothing out."""
    text = folder / "text.txt"
    text.write_text(" ".join(str(i * i % 9973) for i in range(2 * given.length)))
    argv = ["calibrate", folder / "model", "--prompts", text, "--lengths", given.length, "--methods", given.methods]
    argv += ["--samples", 1, "--held-out-samples", 0, "--dtype", "bfloat16", "--cost", "pairs", "-o", folder / "p.json"]
    return list(map(str, argv))


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """What a calibration took.

    Raises:
        RuntimeError: it failed.
    """
    vocabulary = json.loads((REFERENCE / "config.json").read_text())["vocab_size"]
    of = config(given.layers, vocabulary, given.length)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", of)
        argv = [sys.executable, "-c", RUN, *command(Path(folder), given)]
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"code": done.returncode}
    if found["code"]:
        raise RuntimeError(f"gossamer calibrate ended with {found['code']}")
    besides = found["peak"] - weights(of)
    whole = weights(config(LAYERS, VOCABULARY, given.length))
    return {
        "peak_gib": round(found["peak"] / GIB, 2),
        "besides_weights_gib": round(besides / GIB, 2),
        "whole_gib": round((besides + whole) / GIB, 2),
        "cpu_s": found["cpu_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--methods", default=",".join(LARGEST))
    parser.add_argument("--out", type=Path, default=results("calibrate_memory.json"))
    given = parser.parse_args()
    asked = {name: getattr(given, name) for name in ("length", "layers", "methods")}
    about = {
        "machine": machine(),
        "date": date.today().isoformat(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)),
    }
    found = about | asked | measured(given)
    write(given.out, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
