"""``gossamer find-channels`` on a tiny random model: a file that a method takes, and one clear line for bad input."""

from __future__ import annotations

import json

from gossamer.cli import main
from gossamer.profiles import read_channels


def test_channels_are_found_and_read_by(capsys, model_path, prompt_file, text, tmp_path) -> None:
    out = tmp_path / "channels.json"
    argv = ["find-channels", model_path, "--texts", text, "-o", out, "--samples", 3, "--length", 64, "--json"]
    assert main([str(part) for part in argv]) == 0
    data = json.loads(capsys.readouterr().out)
    channels = read_channels(out, "k")
    assert (data["by"], data["samples"], data["layers"]) == ("k", 3, len(channels))
    assert (data["heads"], data["channels"]) == (len(channels[0]), len(channels[0][0]))

    decode = f"double_sparsity(budget=8,dense_layers=0,group_factor=2,channels=@{out})"
    argv = ["run", model_path, prompt_file, "--decode", decode, "--max-new-tokens", 3, "--json"]
    assert main([str(part) for part in argv]) == 0
    assert json.loads(capsys.readouterr().out)["decode"]["channels"] == [
        [list(row) for row in rows] for rows in channels
    ]


def test_bad_input_is_one_line(refused, model_path, text, tmp_path) -> None:
    out = tmp_path / "channels.json"
    argv = ["find-channels", model_path, "--texts", text, "-o", out]
    assert "--samples must be at least 1, got 0" in refused(*argv, "--samples", 0)
    assert "--length must be at least 2, got 1" in refused(*argv, "--length", 1)
    assert "fewer than 1000" in refused(*argv, "--length", 1000)
    assert "--seed must fit" in refused(*argv, "--seed", 2**63)
    assert "is there already" in refused("find-channels", model_path, "--texts", text, "-o", text)
    assert "cannot read" in refused("find-channels", model_path, "--texts", tmp_path / "none", "-o", out)
    assert not out.exists()
