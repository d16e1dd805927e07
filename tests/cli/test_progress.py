"""What is said of how far a command is where no terminal is."""

from __future__ import annotations

import pytest
from torch import nn

pytest.importorskip("tqdm")

from gossamer.cli import eval_progress
from gossamer.cli.eval_progress import Progress
from gossamer.cli.generation import _decoder_layers


def test_a_line_comes_for_each_group_that_is_done_and_each_minute(capsys, monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(eval_progress.time, "monotonic", lambda: now)
    with Progress([(100, "needle", 1.0)] * 4 + [(200, "needle", 4.0)] * 2) as progress:
        for length in (100, 100, 100, 100, 200, 200):
            now += 40 if length == 100 else 160
            progress.advance(length, "needle")
    assert capsys.readouterr().err.splitlines() == [
        "17%: needle at 100 tokens goes on; 80 s so far, about 400 s left",
        "1/2: needle at 100 tokens is done; 160 s so far, about 320 s left",
        "67%: needle at 200 tokens goes on; 320 s so far, about 160 s left",
        "2/2: needle at 200 tokens is done; 480 s so far, about 0 s left",
    ]


class Tower(nn.Module):
    """Layers, each with more experts than there are layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.ModuleList([nn.Identity()] * 9)) for _ in range(layers))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = Tower(4), Tower(3)

    def get_decoder(self) -> nn.Module:
        return self.text


def test_the_bar_is_over_the_layers_that_read_text() -> None:
    model = TwoTowers()
    assert _decoder_layers(model) is model.text.layers
    assert _decoder_layers(model.vision) is model.vision.layers
    assert _decoder_layers(nn.Linear(1, 1)) is None


def test_nothing_to_do_is_nothing_to_say(capsys) -> None:
    with Progress([]):
        pass
    assert capsys.readouterr().err == ""
