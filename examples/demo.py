"""A model reads this repository's own files with needles hidden in them, and is asked for each: dense, then sparse.

    python examples/demo.py [--json figures.json]

Every question is a prompt of its own: the whole text, then the question, in one prefill. The methods take turns on each
prompt, so that a machine that speeds up or slows down does so for all of them; seconds are medians over the prompts.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import gossamer
from gossamer.cli.common import table
from gossamer.cli.machine import examine_cpu, fast_dtype
from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.metrics import first_number_matches
from gossamer.evaluate.tasks import Sample
from gossamer.evaluate.tasks.needle import MultiKey

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "reference"
TOKENS = 16_384
NEEDLES = 8
ANSWER_TOKENS = 8

# Name of the row, method, fields. Fields that are not given have their published values. The second row computes every
# pair on gossamer's kernel (a window over the whole prompt): it tells the kernel's gain from that of leaving pairs out.
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("dense", "dense", {}),
    ("dense, gossamer's kernel", "dense", {"kernel": "gossamer"}),
    ("minference", "minference", {}),
    ("minference, small budget", "minference", {"vertical_size": 256, "slash_size": 1024}),
    ("max_relative", "max_relative", {}),
)


@dataclass
class Row:
    """What was measured for one method, an entry a prompt."""

    prefill_seconds: list[float] = field(default_factory=list)
    attention_seconds: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    top1_agreement: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    executors: set[str] = field(default_factory=set)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prefill_seconds": statistics.median(self.prefill_seconds),
            "attention_seconds": statistics.median(self.attention_seconds),
            "density": statistics.fmean(self.density),
            "right": sum(self.right),
            "asked": len(self.right),
            "top1_agreement": statistics.fmean(self.top1_agreement),
            "executors": sorted(self.executors),
            "each": {"prefill_seconds": self.prefill_seconds, "attention_seconds": self.attention_seconds},
        }


def repository_text() -> str:
    """The repository's source and documentation, in a fixed order."""
    files = [*sorted(ROOT.glob("src/gossamer/**/*.py")), *sorted(ROOT.glob("docs/**/*.md"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def hide_needles(tokenizer: Any) -> Sample:
    task = MultiKey(keys=NEEDLES, turns=NEEDLES)
    # A little above the size aimed at: the length is that of the longest prompt.
    length = TOKENS + 128 + task.max_new_tokens
    return task.make(Haystack("repository", repository_text()), tokenizer, length, random.Random(0))


@torch.inference_mode()
def read_and_answer(
    model: Any, tokenizer: Any, prompt: torch.Tensor, answer: str, row: Row, **method: Any
) -> torch.Tensor:
    """Prefill ``prompt [1, S]``, answer, and note the figures. Returns the model's choice at each position ``[S]``."""
    hidden: list[torch.Tensor] = []
    with gossamer.enable(model, **method) as handle:
        keep = model.model.register_forward_hook(lambda *call: hidden.append(call[-1][0]))
        started = time.perf_counter()
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        row.prefill_seconds.append(time.perf_counter() - started)
        keep.remove()
        layers = handle.stats()
        row.attention_seconds.append(sum(layer.plan_seconds + layer.attention_seconds for layer in layers))
        row.density.append(statistics.fmean(layer.density for layer in layers))
        row.executors |= {executor for layer in layers for executor in layer.executors}

        tokens = [int(out.logits[0, -1].argmax())]
        while len(tokens) < ANSWER_TOKENS:
            out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
    row.right.append(first_number_matches(tokenizer.decode(tokens, skip_special_tokens=True), [answer]) == 1.0)
    return torch.cat([model.lm_head(rows).argmax(-1) for rows in hidden[0][0].split(1024)])


def run(model_path: Path, dtype: str) -> dict[str, Any]:
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype)).eval()
    sample = hide_needles(tokenizer)
    prompts = [tokenizer(sample.prompt(i), return_tensors="pt")["input_ids"] for i in range(NEEDLES)]
    shortest = min(prompt.shape[1] for prompt in prompts)
    if shortest < TOKENS:
        raise RuntimeError(f"a prompt has {shortest} tokens, fewer than {TOKENS}")

    rows = {name: Row() for name, _, _ in ROWS}
    work = tqdm(total=NEEDLES * len(ROWS), unit="prompt", leave=False, disable=not sys.stderr.isatty(), file=sys.stderr)
    for _, method, fields in ROWS:  # the first call of anything is slower
        read_and_answer(model, tokenizer, prompts[0][:, :2560], "", Row(), method=method, **fields)
    for prompt, turn in zip(prompts, sample.turns, strict=True):
        answer, dense = turn.references[0], None
        for name, method, fields in ROWS:
            work.set_description(name)
            top1 = read_and_answer(model, tokenizer, prompt, answer, rows[name], method=method, **fields)
            dense = top1 if dense is None else dense
            rows[name].top1_agreement.append(float((top1 == dense).float().mean()))
            work.update()
    work.close()
    return {
        "prompt_tokens": [prompt.shape[1] for prompt in prompts],
        "needle_depths": [turn.depth for turn in sample.turns],
        "dtype": dtype,
        "machine": machine(),
        "rows": {name: {"method": method, "fields": fields} | rows[name].to_dict() for name, method, fields in ROWS},
    }


def machine() -> dict[str, Any]:
    return {
        **examine_cpu(),
        "python": platform.python_version(),
        "gossamer": gossamer.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(figures: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [("method", "prefill s", "attention s", "density", "right", "top-1 as dense")]
    for name, row in figures["rows"].items():
        lines.append(
            (
                name,
                f"{row['prefill_seconds']:.2f}",
                f"{row['attention_seconds']:.2f}",
                f"{row['density']:.3f}",
                f"{row['right']}/{row['asked']}",
                "-" if name == "dense" else f"{row['top1_agreement']:.1%}",
            )
        )
    where, tokens = figures["machine"], figures["prompt_tokens"]
    executors = {executor for row in figures["rows"].values() for executor in row["executors"]}
    return "\n".join(
        (
            f"{len(tokens)} prompts of {min(tokens)} to {max(tokens)} tokens, {figures['dtype']}, on {where['model']}, "
            f"{where['usable_cores']} cores",
            f"torch {where['torch']}, transformers {where['transformers']}; executors: {', '.join(sorted(executors))}",
            "",
            table(lines),
            "",
            "Seconds are medians over the prompts; attention includes planning. Density is the computed share of what",
            "dense attention computes. The first row is torch's scaled_dot_product_attention.",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--model", type=Path, default=MODEL, help="another model of the reference model's form")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=str(fast_dtype()[0]).removeprefix("torch."))
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} is not a model: it has no config.json")
    print(
        f"reading {TOKENS} tokens of this repository {NEEDLES * len(ROWS)} times; this takes a few minutes", flush=True
    )
    figures = run(arguments.model, arguments.dtype)
    print(report(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
