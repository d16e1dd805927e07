"""Which tokens of a cache an index is of: the middle of the prompt, and what came since in steps of some tokens."""

from __future__ import annotations

__all__ = ["middle"]


def middle(count: int, prompt: int, *, sinks: int, recent: int, first: int, step: int) -> tuple[int, int]:
    """Where an index of a row's tokens ends, by position: at first, and by now; ``(0, 0)`` where there is none.

    It begins at ``sinks``. At first it is of the prompt but for its last ``recent`` tokens, or of ``first`` tokens if
    the prompt has fewer. By now it is of so many whole steps more that at least ``recent`` tokens are not in it.

    Args:
        count: the row's tokens; prompt: those of its prompt.
    """
    base = max(prompt - recent, sinks + first)
    return (base, base + (count - recent - base) // step * step) if count - recent >= base else (0, 0)
