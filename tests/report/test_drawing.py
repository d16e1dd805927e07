"""The report's own drawing: pixels, and text on colours."""

from __future__ import annotations

import base64
import struct
import zlib

import pytest

from gossamer.report.png import grey_png
from gossamer.report.svg import colour_of, text_on


def test_png_decodes_to_its_pixels() -> None:
    uri = grey_png(bytes(range(6)), 3, 2)
    data = base64.b64decode(uri.partition(",")[2])
    width, height = struct.unpack(">II", data[16:24])
    at = data.index(b"IDAT")
    size = struct.unpack(">I", data[at - 4 : at])[0]
    raw = zlib.decompress(data[at + 4 : at + 4 + size])
    assert (width, height) == (3, 2)
    assert raw == b"\0\0\1\2\0\3\4\5"
    with pytest.raises(ValueError, match="needs 6 numbers"):
        grey_png(b"12", 3, 2)


def test_text_is_readable_on_every_colour() -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lights = [luminance(colour_of(i / 100)) for i in range(101)]
    assert lights == sorted(lights)
    for i in range(101):
        front = 1.0 if text_on(i / 100) == "#fff" else 0.0
        light, dark = max(front, lights[i]), min(front, lights[i])
        assert (light + 0.05) / (dark + 0.05) > 3.5
