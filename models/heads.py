"""What each head of the reference model does on one prompt: `python models/heads.py models/reference`.

Writes heads.json (a `heads` record of gossamer's results format) into the model's folder; `card.py` draws it.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.evaluate import tasks
from gossamer.evaluate.haystack import load_haystack
from gossamer.evaluate.heads import heads_record, inspect_model
from gossamer.evaluate.subject import Subject

LENGTH = 4096


def main() -> None:
    """Draw a multi-key needle prompt, describe the heads, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    task = tasks.create("needle_multikey", keys=8)
    sample = task.make(load_haystack("package"), tokenizer, LENGTH, random.Random(arguments.seed))
    prompt = tokenizer(sample.prompt(), return_tensors="pt")["input_ids"]
    reports = inspect_model(model, prompt, map_size=64)
    described = Subject(model, tokenizer, "gossamer reference model").to_dict()
    record = heads_record(reports, model=described, task=task.label(), length=prompt.shape[1], index=0)
    target = arguments.model / "heads.json"
    target.with_suffix(".tmp").write_text(json.dumps(record) + "\n")
    os.replace(target.with_suffix(".tmp"), target)


if __name__ == "__main__":
    main()
