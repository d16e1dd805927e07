"""Small pictures as PNG, and as data URIs."""

from __future__ import annotations

import base64
import struct
import zlib

__all__ = ["grey_png", "png"]


def png(pixels: bytes, width: int, height: int, channels: int = 1) -> bytes:
    """A file of an 8-bit picture, row by row: grey, or with three ``channels`` red, green and blue.

    Raises:
        ValueError: as many numbers as width times height times channels are needed.
    """
    if len(pixels) != width * height * channels or channels not in (1, 3):
        raise ValueError(
            f"a picture of {width} by {height} in {channels} channels (1 or 3) needs {width * height * channels} "
            f"numbers, got {len(pixels)}"
        )
    step = width * channels
    rows = b"".join(b"\0" + pixels[at : at + step] for at in range(0, len(pixels), step))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows, 9)), _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def grey_png(pixels: bytes, width: int, height: int) -> str:
    """A ``data:`` URI of a grey picture.

    Raises:
        ValueError: as `png`.
    """
    return "data:image/png;base64," + base64.b64encode(png(pixels, width, height)).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
