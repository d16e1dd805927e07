"""Small grey pictures as data URIs."""

from __future__ import annotations

import base64
import struct
import zlib

__all__ = ["grey_png"]


def grey_png(pixels: bytes, width: int, height: int) -> str:
    """A ``data:`` URI of an 8-bit grey PNG, row by row.

    Raises:
        ValueError: as many pixels as width times height are needed.
    """
    if len(pixels) != width * height:
        raise ValueError(f"a picture of {width} by {height} needs {width * height} pixels, got {len(pixels)}")
    rows = b"".join(b"\0" + pixels[at : at + width] for at in range(0, len(pixels), width))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
