"""Training of SeerAttention's gates: the loss by its formula, and a training that is stopped and goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama, tokens
from torch import Tensor, nn

from gossamer.calibrate.seer import gate_loss, teacher, train_seer
from gossamer.calibrate.texts import windows
from gossamer.calibrate.training import Schedule, Training
from gossamer.methods.seer_gates import LayerGate, gate_inputs, gate_scores, save_tensors
from gossamer.plan import Grid
from gossamer.testing import make_call


def test_the_teacher_is_the_largest_mass_of_each_block() -> None:
    call = make_call("no padding", length=40, heads=4, groups=2, dim=8)
    got = teacher(call, Grid(call.extent, 16, 16))
    k = call.k.double().repeat_interleave(2, dim=1)
    logits = call.q.double() @ k.transpose(-1, -2) * call.scale
    mass = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf).softmax(-1)
    for h in range(4):
        for m in range(3):
            peaks = [float(mass[0, h, 16 * m : 16 * m + 16, 16 * n : 16 * n + 16].max()) for n in range(3)]
            expected = torch.tensor([peak / sum(peaks) for peak in peaks])
            torch.testing.assert_close(got[0, h, m], expected, atol=1e-5, rtol=1e-4)


def test_the_loss_is_a_divergence_of_the_later_rows() -> None:
    call = make_call("no padding", length=130, heads=2, groups=1, dim=8)
    gate = LayerGate(torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0)))
    grid = Grid(call.extent, 16, 16)
    wanted = teacher(call, grid).double()
    ((_, given),) = gate_scores(call, grid, gate, *gate_inputs(call, grid))
    rows = [(h, m) for h in range(2) for m in range(2, 9)]  # of 9 rows a quarter, rounded down, is dropped
    expected = sum(
        float(wanted[0, h, m, n] * (wanted[0, h, m, n].log() - given[0, h, m, n].double().log()))
        for h, m in rows
        for n in range(m + 1)
    )
    assert float(gate_loss(call, gate, 16)) == pytest.approx(expected / len(rows), rel=1e-4)


def test_a_gate_that_is_the_teacher_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call("no padding", length=130, heads=2, groups=1, dim=8)
    gate = LayerGate.untrained(1, 8)
    assert float(gate_loss(call, gate, 16)) > 0.01
    grid = Grid(call.extent, 16, 16)
    ((_, given),) = gate_scores(call, grid, gate, *gate_inputs(call, grid))
    monkeypatch.setattr("gossamer.calibrate.seer.teacher", lambda call, grid: given)
    assert float(gate_loss(call, gate, 16)) == pytest.approx(0.0, abs=1e-6)


def sample(step: int) -> Tensor:
    return tokens(96, seed=step % 3)


def test_training_lowers_the_loss_and_leaves_the_model_alone() -> None:
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    gates, training = train_seer(model, sample, Schedule(12, 0.02), block=16)
    assert sum(training.losses[-3:]) < 0.7 * sum(training.losses[:3])
    assert len(gates.layers) == 2
    assert gates.block == 16
    for layer in gates.layers:
        assert layer.keys.shape == (4, 24, 8)
        assert not torch.equal(layer.keys, LayerGate.untrained(4, 8).keys)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    assert not model.model.rotary_emb._forward_pre_hooks


class Stopped(Exception):
    pass


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "partial"

    def stop(step: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    whole, training = train_seer(model, sample, Schedule(6, 0.01), block=16)
    with pytest.raises(KeyboardInterrupt):
        train_seer(model, sample, Schedule(6, 0.01), block=16, path=path, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["partial"]
    steps: list[int] = []
    gates, again = train_seer(
        model, sample, Schedule(6, 0.01), block=16, path=path, progress=lambda step, loss: steps.append(step)
    )
    assert steps == [5, 6]
    assert again.losses == training.losses
    for one, other in zip(whole.layers, gates.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
    again.done()
    assert not list(tmp_path.iterdir())


def parabola(path: Path | None, start: float = 3.0, **changes: Any) -> tuple[nn.Parameter, Training]:
    x = nn.Parameter(torch.tensor([start]))

    def backward(step: int) -> float:
        loss = (x**2).sum()
        loss.backward()
        return float(loss.detach())

    about = {"model": "a", "seed": 0} | changes
    return x, Training({"x": x}, backward, Schedule(8, 0.1), about=about, path=path)


def test_the_file_is_written_every_so_many_steps(tmp_path: Path) -> None:
    seen: list[bool] = []
    _, training = parabola(tmp_path / "p")
    training.run(lambda step, loss: seen.append((tmp_path / "p").exists()), save_every=3)
    assert seen == [False] * 3 + [True] * 5
    assert parabola(tmp_path / "p")[1].step == 6


def test_a_file_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    parabola(path)[1].run(save_every=3)
    with pytest.raises(ValueError, match="is of a training with another model, seed; remove it"):
        parabola(path, model="b", seed=1)
    with pytest.raises(ValueError, match="another more"):
        parabola(path, more=1)
    save_tensors(path, {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="is no file of a training to go on with"):
        parabola(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        parabola(path)
    x, training = parabola(path.with_name("q"))
    training.run(save_every=3)
    with pytest.raises(ValueError, match=r"lacks y in its shape \(1,\)"):
        Training(
            {"y": x}, lambda step: 0.0, Schedule(8, 0.1), about={"model": "a", "seed": 0}, path=path.with_name("q")
        )


def test_parameters_that_few_steps_reach_are_kept_too(tmp_path: Path) -> None:
    def begun(path: Path | None) -> tuple[dict[str, nn.Parameter], Training]:
        given = {name: nn.Parameter(torch.tensor([3.0])) for name in ("each", "late", "never")}

        def backward(step: int) -> float:
            loss = given["each"].square().sum() + (given["late"].square().sum() if step >= 2 else 0.0)
            loss.backward()
            return float(loss.detach())

        return given, Training(given, backward, Schedule(8, 0.1), about={}, path=path)

    def stop(step: int, loss: float) -> None:
        if step == stops:
            raise KeyboardInterrupt

    whole, training = begun(None)
    training.run()
    for stops in (1, 5):
        path = tmp_path / str(stops)
        with pytest.raises(KeyboardInterrupt):
            begun(path)[1].run(stop)
        again, training = begun(path)
        assert training.step == stops
        training.run()
        assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    x = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="the loss of step 0 is nan; lower the rate"):
        Training({"x": x}, lambda step: math.nan, Schedule(8, 0.1), about={}).run()


def test_what_comes_after_a_step() -> None:
    x = nn.Parameter(torch.ones(1))

    def backward(step: int) -> float:
        x.grad = -torch.ones(1)
        return 0.0

    def clamp() -> None:
        x.clamp_(0, 1)

    Training({"x": x}, backward, Schedule(3, 0.1), about={}, after=clamp).run()
    assert float(x.detach()) == 1.0


def test_rates() -> None:
    cosine = [Schedule(4, 2.0).at(step) for step in range(4)]
    assert cosine == pytest.approx([1 + math.cos(math.pi * x) for x in (0.125, 0.375, 0.625, 0.875)])
    edges = [Schedule(10, 1.0, "trapezoid").at(step) for step in range(10)]
    assert edges == pytest.approx([0.25, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.25])


def split(text: str) -> dict[str, list[int]]:
    return {"input_ids": [int(word) for word in text.split()]}


def test_windows_are_made_from_their_number() -> None:
    texts = [" ".join(map(str, range(50))), " ".join(map(str, range(50, 90)))]
    draw = windows(split, texts, 20, seed=3)
    for step in range(5):
        (row,) = draw(step).tolist()
        assert row == list(range(row[0], row[0] + 20))
        assert torch.equal(windows(split, texts, 20, seed=3)(step), draw(step))
    assert len({int(draw(step)[0, 0]) for step in range(20)}) > 5
    assert not torch.equal(windows(split, texts, 20, seed=4)(0), draw(0))
    assert windows(split, texts, 90)(0).tolist() == [list(range(90))]
    with pytest.raises(ValueError, match="the texts have 90 tokens, fewer than 91"):
        windows(split, texts, 91)
