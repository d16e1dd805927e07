"""Which heads of a tensor-parallel model a rank has."""

from __future__ import annotations

__all__ = ["heads_of_rank"]


def heads_of_rank(count: int, rank: int, ranks: int, heads: int, groups: int) -> slice:
    """Where a rank's heads stand among all, split as frameworks do it: by key/value head.

    Args:
        count: ``heads`` or ``groups``: which of both is asked for.
        rank: 0 to ``ranks - 1``.
        heads, groups: query heads and key/value heads of the whole model. With fewer key/value heads than ranks, each
            is on as many ranks as share it.

    Raises:
        ValueError: numbers that do not divide, or ``count`` is neither.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be 0 to {ranks - 1}, got {rank}")
    if count not in (heads, groups):
        raise ValueError(
            f"something is for {count} heads, but the model has {heads} query heads and {groups} key/value heads; use "
            "a file made for this model"
        )
    if groups < 1 or heads % groups or heads % ranks or (groups % ranks and ranks % groups):
        raise ValueError(f"{heads} heads with {groups} key/value heads cannot be split over {ranks} ranks")
    first = rank * count // ranks
    return slice(first, first + max(1, count // ranks))
