"""Tasks that are generated offline: one file each, `create` by name.

Definitions follow the cited papers in words of our own. Scores are called after the paper's task only as
"RULER-style" and so on: for scores under the papers' names run their own harness (``gossamer eval --lm-eval``).
"""

from __future__ import annotations

from typing import Any

from gossamer.evaluate.tasks.base import Sample, Task, Turn
from gossamer.evaluate.tasks.common_words import CommonWords
from gossamer.evaluate.tasks.excerpts import CodeFunction, RepeatPassage
from gossamer.evaluate.tasks.frequent_words import FrequentWords
from gossamer.evaluate.tasks.json_kv import JsonKeyValue
from gossamer.evaluate.tasks.math_find import MathFind
from gossamer.evaluate.tasks.mqar import MultiQueryRecall
from gossamer.evaluate.tasks.needle import MultiKey, MultiQuery, MultiValue, SingleNeedle
from gossamer.evaluate.tasks.passkey import NumberString, PassKey
from gossamer.evaluate.tasks.variable_tracking import VariableTracking

__all__ = ["Sample", "Task", "Turn", "available", "create"]

_TASKS: tuple[type[Task], ...] = (
    SingleNeedle,
    MultiKey,
    MultiValue,
    MultiQuery,
    VariableTracking,
    CommonWords,
    FrequentWords,
    JsonKeyValue,
    MultiQueryRecall,
    PassKey,
    NumberString,
    MathFind,
    RepeatPassage,
    CodeFunction,
)


def available() -> list[str]:
    """Names that `create` accepts."""
    return [task.name for task in _TASKS]


def create(name: str, **fields: Any) -> Task:
    """A task by name, with any of its fields.

    Raises:
        ValueError: an unknown name or field (the message lists the known ones), or a value out of range.
    """
    for task in _TASKS:
        if task.name == name:
            return task.from_fields(fields)
    raise ValueError(f"unknown task {name!r}; known: {', '.join(available())}")
