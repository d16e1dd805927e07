"""Files of JSON that anyone may have written, read without trust; and files that are written whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import reprlib
import stat
import uuid
from pathlib import Path
from typing import Any

__all__ = ["MOST_BYTES", "file_name", "parse_json", "read_file", "read_text", "shown", "write_whole"]

# More than any profile, file of costs or table has: a profile of 200 layers of 200 heads has some 10 MB.
MOST_BYTES = 64 << 20
# Our own files have some ten levels. Python's limit is near 1,000, less what the callers use up.
MOST_NESTED = 64
_MOST_INTEGER = 2**63 - 1
_MOST_SHOWN = 100

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel = 3
_CONSTANTS = {None: "null", True: "true", False: "false"}


def read_file(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """All of a regular file or a pipe.

    Args:
        most: bytes that it may have; of a larger file nothing is read, of a pipe no more than one beyond.

    Raises:
        OSError: it cannot be read, or is a device, which may never end.
        ValueError: it has more than ``most`` bytes.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except ValueError as error:  # a null byte in the name
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    with file:
        status = os.fstat(file.fileno())
        mode = status.st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise OSError(errno.EINVAL, "it is a device, not a file", os.fspath(path))
        if most is None:
            return file.read()
        # A file may grow while it is read.
        content = file.read(most + 1) if status.st_size <= most else b""
        if max(status.st_size, len(content)) > most:
            raise ValueError(f"{os.fspath(path)} is too large: it has more than {most:,} bytes")
        return content


def read_text(path: str | os.PathLike[str]) -> str:
    """A file of UTF-8 text, its line ends as Python has them.

    Raises:
        OSError: as `read_file`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return io.TextIOWrapper(io.BytesIO(read_file(path)), encoding="utf-8").read()


def file_name(path: str | os.PathLike[str]) -> str:
    """The last part of a path, as it can be printed anywhere: what UTF-8 or a terminal lacks is spelt out."""
    name = Path(path).name.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text, to a temporary name first: a file is always whole, and nothing else stays behind.

    Raises:
        OSError: it cannot be written, or there is something else than a file, such as a device.
        ValueError: the text is none that UTF-8 can hold.
    """
    data, path = text.encode(), Path(path)
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        regular = True
    if not regular:
        raise OSError(errno.EINVAL, "there is something else than a file", str(path))
    # Not made from the file's own name, which may be as long as a name can be.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None  # nobody knows the temporary name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def parse_json(content: bytes | str, *, strict: bool = True) -> Any:
    """JSON of at most 64 levels.

    Args:
        strict: refuse numbers that only Python's JSON has or that others could not read back: NaN, infinite ones,
            integers beyond 64 bits.

    Raises:
        ValueError: it is none. The message follows the words "the file is".
    """
    try:
        data = json.loads(content.decode() if isinstance(content, bytes) else content)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"nested too deeply, more than {MOST_NESTED} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except ValueError:  # all else that `json` refuses
        raise ValueError("not usable: an integer in it has thousands of digits") from None
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > MOST_NESTED:
            raise ValueError(f"nested too deeply, more than {MOST_NESTED} levels")
        for value in level:
            _check_text(value)
            if strict:
                _check_number(value)
        level = [item for value in level if isinstance(value, dict | list) for item in _items(value)]
    return data


def _items(value: dict[str, Any] | list[Any]) -> list[Any]:
    return value if isinstance(value, list) else [*value, *value.values()]


def _check_number(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"not JSON: a number in it is {value}")
    if isinstance(value, int) and abs(value) > _MOST_INTEGER:
        raise ValueError("not usable: an integer in it does not fit into 64 bits")


def _check_text(value: Any) -> None:
    """Half a character can be printed nowhere, and by others is printed all the same."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("not JSON: a text in it is not Unicode") from None


def shown(value: Any) -> str:
    """A value of JSON for a message, on one line and not too long."""
    if value is None or isinstance(value, bool):
        return _CONSTANTS[value]
    text = _short.repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
