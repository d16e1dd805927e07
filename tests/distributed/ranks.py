"""Processes that share a sequence: started from one that has imported all, with gloo."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_preloaded = ["pytest", "gossamer.distributed", "gossamer.testing"]
_context.set_forkserver_preload(_preloaded)
TIME_OUT = 60.0  # of a message, in seconds; more than a busy machine needs


def preload(*modules: str) -> None:
    """Have them imported once for all processes; when a test module is imported, before any process is started."""
    _preloaded.extend(modules)
    _context.set_forkserver_preload(_preloaded)


def run(job: Callable[..., Any], ranks: int, folder: Path, *given: Any) -> list[Any]:
    """``job(rank, *given)`` in so many processes; what each returned.

    Raises:
        AssertionError: one failed, with what it raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answers = _context.SimpleQueue()
    started = [
        _context.Process(target=_one, args=(job, rank, ranks, str(folder), answers, given), daemon=True)
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    found: dict[int, Any] = {}
    for process in started:
        process.join(2 * TIME_OUT)
    hanging = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
    while not answers.empty():
        rank, failure, answer = answers.get()
        found[rank] = answer
        assert failure is None, f"rank {rank}: {failure}"
    assert not hanging, f"ranks {hanging} hang"
    return [found.get(rank) for rank in range(ranks)]


def _one(job: Callable[..., Any], rank: int, ranks: int, folder: str, answers: Any, given: tuple) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    path = Path(folder) / f"{rank}.pt"
    try:
        where = f"file://{folder}/store"
        dist.init_process_group(
            "gloo", init_method=where, rank=rank, world_size=ranks, timeout=timedelta(seconds=TIME_OUT)
        )
        answer = job(rank, *given)
        torch.save(answer, path)
        answers.put((rank, None, str(path)))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
