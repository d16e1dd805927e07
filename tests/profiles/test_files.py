"""Files from anywhere: what is read of them, what is refused, and that nothing but the file itself is left."""

import errno
import json
import os
from pathlib import Path

import pytest
from every_line import UNREADABLE

from gossamer.profiles.files import parse_json, read_file, read_text, shown, write_whole


@pytest.mark.parametrize("value", [None, True, -1, 0.5, "ä\u2028", [], {"a": [1, {"b": None}]}, 2**63 - 1])
def test_plain_json_is_read(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON: Expecting"),
        (b"\xff", "not UTF-8 text"),
        ("", "not JSON"),
        (UNREADABLE["deep lists"], "nested too deeply, more than 64 levels"),
        (UNREADABLE["deep objects"], "nested too deeply, more than 64 levels"),
        (UNREADABLE["an integer of many digits"], "an integer in it has thousands of digits"),
        ('{"a": NaN}', "a number in it is nan"),
        ("[1e999]", "a number in it is inf"),
        ("[-Infinity]", "a number in it is -inf"),
        (UNREADABLE["an integer beyond floats"], "does not fit into 64 bits"),
        ('["\\ud800"]', "a text in it is not Unicode"),
        ('{"\\ud800": 1}', "a text in it is not Unicode"),
    ],
)
def test_what_is_no_plain_json_is_refused(content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(content)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 200


def test_numbers_as_python_has_them_are_read_where_they_may_be() -> None:
    assert parse_json("[Infinity, 1e999]", strict=False) == [float("inf")] * 2
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 65 + "]" * 65, strict=False)
    assert parse_json("[" * 63 + "1" + "]" * 63) is not None


def test_values_in_messages_are_short() -> None:
    assert [shown(None), shown(True), shown([1, "a"])] == ["null", "true", "[1, 'a']"]
    for long in ("x" * 1000, [[["x" * 100] * 100] * 100], 10**300, {str(i): [i] * 9 for i in range(99)}):
        assert len(shown(long)) < 110
        assert "\n" not in shown(long)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
def test_devices_are_not_read_and_not_replaced() -> None:
    for device in ("/dev/full", "/dev/zero"):
        with pytest.raises(OSError, match="it is a device, not a file"):
            read_file(device)
        with pytest.raises(OSError, match="something else than a file"):
            write_whole(device, "text")


def test_a_pipe_is_read() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a\r\nb")
    os.close(writer)
    try:
        assert read_text(f"/dev/fd/{reader}") == "a\nb"
    finally:
        os.close(reader)


def test_a_name_with_a_null_byte_is_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match="null byte"):
        read_file("a\0b")


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_whole(path, "one")
    write_whole(path, "two ä")
    assert path.read_text(encoding="utf-8") == "two ä"
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="something else than a file"):
        write_whole(tmp_path / "folder", "text")
    with pytest.raises(OSError, match="File name too long"):
        write_whole(tmp_path / ("x" * 256), "text")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "new", "\ud800")
    assert [found.name for found in tmp_path.iterdir()] == ["folder"]


def test_what_fails_in_the_middle_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", "old")

    def full(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, "disk full", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full") as caught:
        write_whole(tmp_path / "file", "new")
    assert caught.value.filename == str(tmp_path / "file")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "old")]


def test_of_a_pipe_no_more_is_read_than_may_be(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writing = os.open(path, os.O_RDWR)
    try:
        os.write(writing, b"0123456789")  # its end never comes
        with pytest.raises(ValueError, match="pipe is too large: it has more than 9 bytes"):
            read_file(path, 9)
    finally:
        os.close(writing)
