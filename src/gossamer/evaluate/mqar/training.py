"""One cell of a sweep: a model trained until it recalls, or until its epochs are over.

After each epoch what training needs to go on, the model, AdamW's averages and the state of chance, is written to a file
under a temporary name, which then takes its place: a training that was killed goes on there, to the same numbers.
"""

from __future__ import annotations

import io
import math
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gossamer.evaluate.mqar.data import IGNORED, Examples
from gossamer.evaluate.mqar.network import RecallModel
from gossamer.evaluate.mqar.routers import TEST_BATCH, activated
from gossamer.evaluate.mqar.settings import Cell, Setting

__all__ = ["Outcome", "evaluate", "sequences", "train"]

_TEST_SEED = 1 << 40
_EPOCH_SEED = 1 << 20


@dataclass
class Outcome:
    """What a test found.

    Fields:
        accuracy: share of right answers, over all that is asked.
        loss: nats; None where training came to none.
        by_distance: [up to, right, asked] for distances to the answer of 1, 2, 3 to 4, 5 to 8 and so on.
    """

    accuracy: float
    loss: float | None
    by_distance: list[list[int]] = field(default_factory=list)


def sequences(cell: Cell, setting: Setting, epoch: int | None) -> Examples:
    """Of an epoch, or, for None, of the test, which no epoch shares a seed with.

    Mixers, widths and rates see the same ones.
    """
    if epoch is None:
        return cell.task.make(setting.test_examples, _TEST_SEED + cell.seed)
    return cell.task.make(setting.examples, _EPOCH_SEED * (cell.seed + 1) + (epoch if setting.fresh else 0))


@torch.no_grad()
def evaluate(model: RecallModel, examples: Examples) -> Outcome:
    """Answers of a model that is in ``eval()`` from here on."""
    model.eval()
    loss, right = 0.0, []
    for inputs, labels in zip(examples.inputs.split(TEST_BATCH), examples.labels.split(TEST_BATCH), strict=True):
        where = labels != IGNORED
        logits = model(inputs, where)
        loss += float(F.cross_entropy(logits, labels[where], reduction="sum"))
        right.append(logits.argmax(-1) == labels[where])
    found, far = torch.cat(right), examples.distances[examples.labels != IGNORED]
    bucket = torch.tensor([(int(d) - 1).bit_length() for d in far], device="cpu")
    counts = [[1 << int(b), int(found[bucket == b].sum()), int((bucket == b).sum())] for b in bucket.unique().tolist()]
    return Outcome(float(found.double().mean()), loss / len(found), counts)


def train(
    cell: Cell,
    setting: Setting,
    *,
    kept: Path | None = None,
    progress: Callable[[int, int, Outcome], None] = lambda epoch, epochs, outcome: None,
) -> dict[str, Any]:
    """The fields of the cell's result. torch's own state of chance is as before afterwards.

    Args:
        kept: the file to go on with; it is left behind, for whoever has written the result to remove.
        progress: called after each epoch, with how many there are at most, and its test.

    A loss that is not finite ends the training: the result has ``diverged``, the step, and an accuracy of 0.

    Raises:
        ValueError: ``kept`` is there and is no such file.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        return _Run(cell, setting, kept).go(progress)


class _Run:
    def __init__(self, cell: Cell, setting: Setting, kept: Path | None) -> None:
        self.cell, self.setting, self.kept = cell, setting, kept
        given = {"layers": setting.layers, "mlp": setting.mlp, "dropout": setting.dropout, "spread": setting.spread}
        self.model = RecallModel(cell.task, cell.mixer, cell.width, **given)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cell.rate, weight_decay=setting.decay)
        self.about = {"cell": cell.to_dict(), "training": setting.training(), "batch": self.batch}
        self.curve: list[float] = []
        self.seconds, self.steps = 0.0, 0

    @property
    def batch(self) -> int:
        return self.setting.batch_of(self.cell.task.length)

    def go(self, progress: Callable[[int, int, Outcome], None]) -> dict[str, Any]:
        self._load()
        test = sequences(self.cell, self.setting, None)
        same = None if self.setting.fresh else sequences(self.cell, self.setting, 0)
        outcome = evaluate(self.model, test) if self._over() else None
        while not self._over():
            begun, epoch = time.perf_counter(), len(self.curve)
            if not self._epoch(epoch, sequences(self.cell, self.setting, epoch) if same is None else same):
                self.curve.append(0.0)
                return self._result(Outcome(0.0, None)) | {"diverged": self.steps}
            outcome = evaluate(self.model, test)
            self.seconds += time.perf_counter() - begun
            self.curve.append(outcome.accuracy)
            progress(epoch + 1, self.setting.epochs, outcome)
            self._save()
        if outcome is None:
            raise ValueError("a setting needs an epoch or more")
        active = activated(self.model, self.cell.task, test)
        return self._result(outcome) | ({"active": active} if active else {})

    def _over(self) -> bool:
        return len(self.curve) >= self.setting.epochs or bool(self.curve and self.curve[-1] >= self.setting.enough)

    def _epoch(self, epoch: int, examples: Examples) -> bool:
        """Whether every loss was finite."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.cell.rate * 0.5 * (1 + math.cos(math.pi * epoch / self.setting.epochs))
        for inputs, labels in zip(examples.inputs.split(self.batch), examples.labels.split(self.batch), strict=True):
            where = labels != IGNORED
            loss = F.cross_entropy(self.model(inputs, where), labels[where])
            if not bool(loss.isfinite()):
                return False
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
        return True

    def _result(self, outcome: Outcome) -> dict[str, Any]:
        mixer, width, tokens, layers = self.cell.mixer, self.cell.width, self.cell.task.length, self.setting.layers
        return {
            "accuracy": round(outcome.accuracy, 6),
            "loss": None if outcome.loss is None else round(outcome.loss, 6),
            "by_distance": outcome.by_distance,
            "curve": [round(value, 6) for value in self.curve],
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "state": mixer.state(layers, width, tokens),
            "reads": round(mixer.reads(layers, width, tokens), 4),
            "batch": self.batch,
        }

    def _save(self) -> None:
        if self.kept is None:
            return
        state = {"about": self.about, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"curve": self.curve, "seconds": self.seconds, "steps": self.steps, "chance": torch.get_rng_state()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        temporary = self.kept.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(buffer.getbuffer())
            os.replace(temporary, self.kept)
        finally:
            temporary.unlink(missing_ok=True)

    def _load(self) -> None:
        """Nothing where the file is of another cell, or none: then training begins anew."""
        if self.kept is None or not self.kept.exists():
            return
        try:
            state = torch.load(self.kept, weights_only=True)
            if state["about"] != self.about:
                return
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["chance"])
        except Exception:  # torch raises what pickle, zip files and its own checks raise
            raise ValueError(
                f"{self.kept} is no file of a training to go on with; remove it, or give another --out"
            ) from None
        self.curve, self.seconds, self.steps = state["curve"], state["seconds"], state["steps"]
