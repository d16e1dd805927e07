"""Tasks of lm-evaluation-harness, RULER among them, through the model that is evaluated here.

The harness makes its own samples. Most of its tasks fetch data when they start, so they need a network or a filled
cache; of RULER, ``ruler_vt``, ``ruler_cwe`` and ``ruler_fwe`` do not. Its scores can be compared with other scores of
the same harness only.
"""

from __future__ import annotations

from typing import Any

import gossamer
from gossamer.evaluate.records import policy_fields
from gossamer.evaluate.subject import Subject
from gossamer.policy import Policy

__all__ = ["record_of", "require", "run"]

Record = dict[str, Any]


def require() -> None:
    """Raise ValueError unless lm-evaluation-harness is installed."""
    try:
        import lm_eval.evaluator  # pyright: ignore[reportMissingImports]
        import lm_eval.models.huggingface  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"--lm-eval needs lm-evaluation-harness ({error}): pip install 'lm_eval[hf,ruler]', and a network for the "
            "data of most tasks"
        ) from error


def record_of(policy: Policy, tasks: str, lengths: tuple[int, ...], limit: int) -> Record:
    """What identifies a run in the results file."""
    return {
        "kind": "lm_eval",
        **policy_fields(policy),
        "task": tasks,
        "index": limit,
        "lengths": list(lengths),
    }


def run(subject: Subject, policy: Policy, tasks: str, lengths: tuple[int, ...], limit: int) -> Record:
    """The harness's own results: ``scores`` of each task, with ``versions``.

    Args:
        tasks: names, separated by commas; groups such as ``ruler`` too.
        lengths: for tasks that take lengths.
        limit: samples of each task.

    Raises:
        ValueError: an unknown task, or its data cannot be had.
    """
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    path = subject.model.config._name_or_path
    try:
        model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, max_length=subject.max_length, batch_size=1)
        with gossamer.enable(subject.model, policy) as handle:
            out = simple_evaluate(
                model=model,
                tasks=[name.strip() for name in tasks.split(",")],
                limit=limit,
                metadata={"max_seq_lengths": list(lengths), "pretrained": path},
                bootstrap_iters=0,
                log_samples=False,
            )
            density = [layer.density for layer in handle.stats()]
    except Exception as error:  # the harness raises whatever its tasks, its data library and its network do
        raise ValueError(
            f"lm-evaluation-harness could not run {tasks}: {type(error).__name__}: {error}. Most of its tasks fetch "
            "their data: they need a network, or a cache that was filled before"
        ) from error
    assert out is not None
    return {
        "scores": _plain(out["results"]),
        "versions": _plain(out["versions"]),
        "density": sum(density) / len(density) if density else None,
    }


def _plain(value: Any) -> Any:
    """As JSON types; what the harness marks as not run (-1) or not known (N/A) is left out."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if item not in (-1, "N/A")}
    return value if isinstance(value, int | float | str | bool | None) else str(value)
