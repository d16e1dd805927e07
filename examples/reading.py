"""What the demonstrations share: a model reads prompts dense and sparse, answers, and its figures become a table.

A text is read with its question at the end, in one prefill; further questions about the same text are asked of what the
cache then holds. The methods take turns on each text, so that a machine that speeds up or slows down does so for all of
them; seconds are medians over the texts.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import gossamer
from gossamer.cli.common import table
from gossamer.cli.machine import examine_cpu
from gossamer.evaluate.fidelity import compare_logits
from gossamer.evaluate.subject import Subject

ROOT = Path(__file__).resolve().parent.parent
_WARM_UP = 2560


@dataclass(frozen=True)
class Row:
    """A row of the table: its name, and a method with the fields that differ from their published values."""

    name: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """A text with questions: for each the whole prompt ``[S]``, and what an answer is worth (1: right).

    Fields:
        answer_tokens: of an answer, at most.
        depths: where in the text each answer lies.
    """

    kind: str
    prompts: tuple[list[int], ...]
    scores: tuple[Callable[[str], float], ...]
    answer_tokens: int
    depths: tuple[float | None, ...]

    @property
    def shared(self) -> int:
        """Tokens that all prompts begin with."""
        least = min(map(len, self.prompts)) - 1
        return next((n for n in range(least) if len({prompt[n] for prompt in self.prompts}) > 1), least)


@dataclass
class Figures:
    """What was measured for one row, an entry a text; answers an entry a question."""

    prefill_seconds: list[float] = field(default_factory=list)
    attention_seconds: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    top1_agreement: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    executors: set[str] = field(default_factory=set)

    def to_dict(self) -> dict[str, Any]:
        each = ("prefill_seconds", "attention_seconds", "density", "top1_agreement", "kl", "right", "answers")
        return {
            "prefill_seconds": statistics.median(self.prefill_seconds),
            "attention_seconds": statistics.median(self.attention_seconds),
            "density": statistics.fmean(self.density),
            "right": sum(self.right),
            "asked": len(self.right),
            "top1_agreement": statistics.fmean(self.top1_agreement),
            "kl": statistics.fmean(self.kl),
            "executors": sorted(self.executors),
            "each": {name: getattr(self, name) for name in each},
        }


def repository_text() -> str:
    """The repository's source and documentation, in a fixed order."""
    files = [*sorted(ROOT.glob("src/gossamer/**/*.py")), *sorted(ROOT.glob("docs/**/*.md"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@torch.inference_mode()
def read_and_answer(subject: Subject, text: Text, row: Row, figures: Figures) -> torch.Tensor:
    """Read a text, answer, and note the figures. Returns what the head reads at each position, ``[S, width]``."""
    model, hidden = subject.model, []
    with gossamer.enable(model, method=row.method, **row.fields) as handle:
        keep = model.base_model.register_forward_hook(lambda *call: hidden.append(call[-1][0]))
        started = time.perf_counter()
        out = model(input_ids=torch.tensor([text.prompts[0]]), use_cache=True, logits_to_keep=1)
        figures.prefill_seconds.append(time.perf_counter() - started)
        keep.remove()
        layers = handle.stats()
        figures.attention_seconds.append(sum(layer.plan_seconds + layer.attention_seconds for layer in layers))
        figures.density.append(statistics.fmean(layer.density for layer in layers))
        figures.executors |= {executor for layer in layers for executor in layer.executors}

        cache = out.past_key_values
        for prompt, score in zip(text.prompts, text.scores, strict=True):
            if prompt is not text.prompts[0]:
                cache.crop(text.shared - cache.get_seq_length())  # as many tokens less
                asked = torch.tensor([prompt[text.shared :]])
                out = model(input_ids=asked, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = [int(out.logits[0, -1].argmax())]
            while len(tokens) < text.answer_tokens and tokens[-1] != subject.tokenizer.eos_token_id:
                out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
                tokens.append(int(out.logits[0, -1].argmax()))
            figures.answers.append(subject.text(tokens))
            figures.right.append(score(figures.answers[-1]) == 1.0)
    return hidden[0][0]


def run(subject: Subject, texts: Sequence[Text], rows: Sequence[Row], every: int = 1) -> dict[str, Any]:
    """Every row on every text; the first row is what the others' predictions are compared with.

    Args:
        every: compare the predictions at each so-manieth position.
    """
    figures = {row.name: Figures() for row in rows}
    bar = tqdm(total=len(texts) * len(rows), unit="text", leave=False, disable=not sys.stderr.isatty())
    short = Text("", (texts[0].prompts[0][:_WARM_UP],), (lambda answer: 0.0,), 2, (None,))
    for row in rows:  # the first call of anything is slower
        read_and_answer(subject, short, row, Figures())
    for text in texts:
        read = []
        for row in rows:
            bar.set_description(row.name)
            read.append(read_and_answer(subject, text, row, figures[row.name])[::every])
            bar.update()
        for row, compared in zip(rows, compare_logits(subject, read[0], read), strict=True):
            figures[row.name].top1_agreement.append(compared["mean_top1"])
            figures[row.name].kl.append(compared["mean_kl"])
    bar.close()
    return {
        "prompt_tokens": [len(text.prompts[0]) for text in texts],
        "kinds": [text.kind for text in texts],
        "depths": [depth for text in texts for depth in text.depths],
        "compared_every": every,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "machine": machine(),
        "rows": {row.name: {"method": row.method, "fields": row.fields} | figures[row.name].to_dict() for row in rows},
    }


def load(folder: Path, dtype: str, *, chat: bool = False) -> Subject:
    """A model and its tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = sys.maxsize  # texts are cut to their length here
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return Subject(model, tokenizer, folder.name, chat=chat)


def machine() -> dict[str, Any]:
    """Processor and versions; what names the folder of this machine's results is among them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return {
        **examine_cpu(),
        **importlib.import_module("machines").machine(),
        "gossamer": gossamer.__version__,
        "transformers": transformers.__version__,
    }


def report(figures: dict[str, Any]) -> str:
    """The figures as text."""
    rows, first = figures["rows"], next(iter(figures["rows"]))
    with_kl = all("kl" in row for row in rows.values())
    lines = [("method", "prefill s", "attention s", "density", "right", "top-1 as dense", "KL")]
    for name, row in rows.items():
        lines.append(
            (
                name,
                f"{row['prefill_seconds']:.2f}",
                f"{row['attention_seconds']:.2f}",
                f"{row['density']:.3f}",
                f"{row['right']}/{row['asked']}",
                "-" if name == first else f"{row['top1_agreement']:.1%}",
                "-" if name == first or not with_kl else f"{row['kl']:.3f}",
            )
        )
    where, tokens = figures["machine"], figures["prompt_tokens"]
    executors = {executor for row in rows.values() for executor in row["executors"]}
    return "\n".join(
        (
            f"{len(tokens)} prompts of {min(tokens)} to {max(tokens)} tokens, {figures['dtype']}, on {where['model']}, "
            f"{where['usable_cores']} cores",
            f"torch {where['torch']}, transformers {where['transformers']}; executors: {', '.join(sorted(executors))}",
            "",
            table([line if with_kl else line[:-1] for line in lines]),
            "",
            "Seconds are medians over the prompts; attention includes planning. Density is the computed share of what",
            "dense attention computes. The first row is torch's scaled_dot_product_attention.",
        )
    )
