"""Tables as Markdown has them."""

from typing import Any


def markdown(above: str, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A table below a line of text."""
    lines = [above, ""] if above else []
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])
