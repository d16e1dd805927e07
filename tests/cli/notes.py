"""What commands say beside their result."""


def without_notes(err: str) -> str:
    """Standard error without the line on the dtype that a model was loaded in, and without notes."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith(("dtype ", "note: ")))
