"""What is read from a denoising model's call: patches, masks and steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
from gossamer.integrations.diffusers.layouts import grid_of, is_first
from gossamer.integrations.diffusers.masks import NotPlain, live_keys, ordered_by_life
from gossamer.integrations.steps import Steps

IDS = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))


def config(**fields: Any) -> Any:
    return SimpleNamespace(**fields)


@pytest.mark.parametrize(
    ("of", "arguments", "grid"),
    [
        (config(patch_size=(1, 2, 2), in_channels=16), {"hidden_states": torch.zeros(1, 16, 5, 8, 6)}, (5, 4, 3)),
        (
            config(patch_size=2, patch_size_t=None, in_channels=4),
            {"hidden_states": torch.zeros(1, 5, 4, 8, 6)},
            (5, 4, 3),
        ),
        (config(patch_size=2, patch_size_t=2, in_channels=4), {"hidden_states": torch.zeros(1, 4, 6, 8, 6)}, (3, 4, 3)),
        (config(patch_size=2, in_channels=4), {"hidden_states": torch.zeros(1, 4, 8, 6)}, (1, 4, 3)),
        (config(patch_size=[2, 3], in_channels=4), {"hidden_states": torch.zeros(1, 4, 8, 6)}, (1, 4, 2)),
        (config(), {"hidden_states": torch.zeros(1, 12, 4), "img_ids": IDS}, (1, 3, 4)),
        (config(), {"hidden_states": torch.zeros(1, 12, 4), "img_ids": IDS[None]}, (1, 3, 4)),
        (config(), {"hidden_states": torch.zeros(1, 12, 4), "img_ids": IDS.flip(0)}, None),
        (config(), {"hidden_states": torch.zeros(1, 24, 4), "img_ids": torch.cat([IDS, IDS])}, None),
        (config(), {"hidden_states": torch.zeros(2, 12, 4), "img_shapes": [[(1, 3, 4)]] * 2}, (1, 3, 4)),
        (config(), {"hidden_states": torch.zeros(2, 12, 4), "img_shapes": [(1, 3, 4)] * 2}, (1, 3, 4)),
        (config(), {"hidden_states": torch.zeros(1, 24, 4), "img_shapes": [[(1, 3, 4), (1, 3, 4)]]}, (2, 3, 4)),
        (config(), {"hidden_states": torch.zeros(1, 24, 4), "img_shapes": [[(1, 3, 4), (1, 4, 3)]]}, None),
        (config(), {"hidden_states": torch.zeros(1, 24, 4), "num_frames": 2, "height": 3, "width": 4}, (2, 3, 4)),
        (config(), {"hidden_states": torch.zeros(1, 23, 4), "num_frames": 2, "height": 3, "width": 4}, None),
        (config(), {"hidden_states": torch.zeros(1, 24, 4)}, None),
        (config(in_channels=4), {"hidden_states": torch.zeros(1, 4, 8, 6)}, None),
        (config(), {}, None),
    ],
)
def test_how_patches_lie(of: Any, arguments: dict[str, Any], grid: Any) -> None:
    assert grid_of(of, arguments) == grid


def test_where_text_stands_is_seen_from_its_values() -> None:
    module = SimpleNamespace(to_v=torch.nn.Linear(6, 8, bias=False))
    text = torch.randn(1, 3, 6)
    words = module.to_v(text).detach().view(1, 3, 2, 4).transpose(1, 2)
    patches = torch.randn(1, 2, 5, 4)
    assert is_first(module, text, torch.cat([words, patches], dim=2), 5) is True
    assert is_first(module, text, torch.cat([patches, words], dim=2), 5) is False
    assert is_first(module, text, torch.randn(1, 2, 8, 4), 5) is None
    assert is_first(SimpleNamespace(), text, torch.randn(1, 2, 8, 4), 5) is None
    added = SimpleNamespace(to_v=torch.nn.Linear(6, 8), add_v_proj=module.to_v)
    assert is_first(added, text, torch.cat([patches, words], dim=2), 5) is False


def test_masks_that_say_which_keys_are_live() -> None:
    live = torch.tensor([[True, False, True], [True, True, True]])
    assert live_keys(None, 2, 3) is None
    assert live_keys(torch.ones(2, 1, 1, 3, dtype=torch.bool), 2, 3) is None
    added = torch.zeros(2, 3).masked_fill(~live, float("-inf"))
    for mask in (live, live[:, None, None], added, added[:, None, None], added.clamp(min=-1e4)):
        found = live_keys(mask, 2, 3)
        assert found is not None
        assert torch.equal(found, live)
    found = live_keys(live[:1], 2, 3)
    assert found is not None
    assert torch.equal(found, live[:1].expand(2, 3))
    for mask in (live[None, None], torch.zeros(2, 1, 3, 3), added.clamp(min=-5.0), torch.zeros(3, 3), live[:, :2]):
        with pytest.raises(NotPlain):
            live_keys(mask, 2, 3)


def test_dead_tokens_come_last() -> None:
    extent, order = ordered_by_life(torch.tensor([[True, False, True], [False, False, True]]))
    assert extent.key_count.tolist() == [2, 1]
    assert extent.query_count.tolist() == [3, 3]
    assert order is not None
    assert order.tolist() == [[0, 2, 1], [2, 0, 1]]
    assert ordered_by_life(torch.tensor([[True, True, False]]))[1] is None


def steps_of(times: torch.Tensor) -> Steps:
    scheduler = SimpleNamespace(timesteps=times)
    return Steps(lambda: scheduler)


def numbers(steps: Steps, times: list[Any], latents: str = "") -> list[Any]:
    """The step and branch of each call; calls with one letter have the same latents."""
    found = []
    for n, time in enumerate(times):
        steps.begin(time, torch.full((1, 4), float(ord(latents[n]))) if latents else None)
        steps.done()
        found.append(None if steps.now is None else (steps.now.number, steps.now.branch))
    return found


def test_timesteps_are_counted() -> None:
    assert numbers(Steps(), [900, 500, 100]) == [(0, 0), (1, 0), (2, 0)]
    assert numbers(Steps(), [0.1, 0.5, 0.9]) == [(0, 0), (1, 0), (2, 0)]  # what is left, as some models get it
    assert numbers(Steps(), [900, 500, 500, 900, 500]) == [(0, 0), (1, 0), (1, 1), (0, 0), (1, 0)]
    assert numbers(Steps(), [torch.tensor([900.0, 900.0]), torch.tensor([[0.0, 500.0]])]) == [(0, 0), (1, 0)]
    assert numbers(Steps(), [None]) == [None]
    steps = Steps(total=7)
    steps.begin(900)
    assert steps.now is not None
    assert steps.now.total == 7


@pytest.mark.parametrize("scale", [lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000])
def test_a_scheduler_says_which_step_it_is(scale: Any) -> None:
    times = torch.tensor([999.0, 750.0, 500.0, 250.0])
    steps = steps_of(times)
    assert numbers(steps, scale(times)[[0, 0, 1, 3, 3, 0, 2]].tolist()) == [
        (0, 0), (0, 1), (1, 0), (3, 0), (3, 1), (0, 0), (2, 0)
    ]  # fmt: skip
    assert steps.now is not None
    assert steps.now.total == 4


def test_another_scheduler_or_new_timesteps_begin_a_sampling() -> None:
    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 600.0, 300.0]))
    now = scheduler
    steps = Steps(lambda: now)
    assert numbers(steps, [900.0, 600.0]) == [(0, 0), (1, 0)]
    rows = steps.state(0, (1, 8))
    scheduler.timesteps = scheduler.timesteps.clone()  # by set_timesteps, as each pipeline's call does
    assert numbers(steps, [600.0]) == [(1, 0)]  # a part of the way, as images are changed
    assert steps.state(0, (1, 8)) is not rows
    now = SimpleNamespace(timesteps=torch.tensor([0.5, 0.25]))
    assert numbers(steps, [0.5, 0.25]) == [(0, 0), (1, 0)]
    assert steps.now is not None
    assert steps.now.total == 2


def test_the_scale_of_timesteps_is_found_anew_in_each_sampling() -> None:
    steps = steps_of(torch.tensor([1000.0, 500.0, 1.0]))
    assert numbers(steps, [1000.0, 500.0, 1.0]) == [(0, 0), (1, 0), (2, 0)]
    steps.restart()
    assert numbers(steps, [1.0, 0.5, 0.001]) == [(0, 0), (1, 0), (2, 0)]


def test_timesteps_that_are_one_once_they_are_rounded_are_told_apart() -> None:
    """HunyuanVideo: 50 steps at shift 7, in bfloat16."""
    sigma = torch.linspace(1, 0, 51)[:-1]
    times = 1000 * 7 * sigma / (1 + 6 * sigma)
    rounded = times.bfloat16()
    assert len(rounded.unique()) < 50
    steps = steps_of(times)
    letters = "".join(chr(100 + n) for n in range(50))
    assert numbers(steps, list(rounded), letters) == [(n, 0) for n in range(50)]
    twice = numbers(steps, [time for time in rounded for _ in "ab"], "".join(2 * letter for letter in letters))
    assert twice == [(n, branch) for n in range(50) for branch in range(2)]
    over = steps_of(times)
    assert [n for n, _ in numbers(over, list(rounded / 1000), letters)] == list(range(50))


def test_steps_of_second_order_are_counted_once() -> None:
    """Heun's: the second stage of a step and the first of the next are called with one timestep and other latents."""
    steps = steps_of(torch.tensor([900.0, 600.0, 600.0, 300.0, 300.0]))
    times = [900.0, 900.0, 600.0, 600.0, 600.0, 600.0, 300.0, 300.0, 300.0, 300.0]
    found = numbers(steps, times, "aabbccddee")
    assert found == [(0, 0), (0, 1), *[(1, 0), (1, 1)] * 2, *[(2, 0), (2, 1)] * 2]
    assert steps.now is not None
    assert steps.now.total == 3
    assert numbers(steps, [900.0]) == [(0, 0)]


def test_a_sampling_of_other_latents_begins_in_the_first_step() -> None:
    assert numbers(Steps(), [900] * 3, "aaa") == [(0, 0), (0, 1), (0, 2)]
    assert numbers(Steps(), [900] * 3 + [500] * 2, "abacd") == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    # One was cut off after its first branch, and both branches of another follow.
    steps = Steps()
    assert numbers(steps, [900], "a") == [(0, 0)]
    first = steps.state(0, (1, 8))
    assert numbers(steps, [900], "b") == [(0, 1)]
    second = steps.state(0, (1, 8))
    assert numbers(steps, [900], "b") == [(0, 1)]
    assert steps.state(0, (1, 8)) is not second
    assert numbers(steps, [500]) == [(1, 0)]
    assert steps.state(0, (1, 8)) is second
    assert second is not first
    assert numbers(Steps(), [900] * 5, "aabb" + "c") == [(0, 0), (0, 1), (0, 0), (0, 1), (0, 0)]


@pytest.mark.parametrize(("latents", "stays"), [("aa", True), ("ab", False)])
def test_what_two_calls_with_different_latents_found_is_not_kept(latents: str, stays: bool) -> None:
    """The second is a branch, or the only one of another sampling: the first was left before its second step."""
    steps = Steps()
    rows = []
    for letter in latents:
        numbers(steps, [900], letter)
        rows.append(steps.state(0, (1, 8)))
    assert numbers(steps, [500], "c") == [(1, 0)]
    assert (steps.state(0, (1, 8)) is rows[0]) == stays


@pytest.mark.parametrize("latents", ["abcdefghijklmnopqrst", "a" * 20, ""])
def test_what_is_kept_is_bounded_where_all_calls_have_one_timestep(latents: str) -> None:
    steps = Steps()
    for n in range(20):
        numbers(steps, [900], latents[n : n + 1])
        steps.state(0, (1, 8))
        assert len(steps._kept) <= (2 if latents.startswith("ab") else 8)


@pytest.mark.parametrize("said", [True, False])
def test_a_call_that_failed_comes_again_or_another_sampling_begins(said: bool) -> None:
    """An interrupt is no error that a hook is told of."""
    steps = Steps()

    def fails(time: float) -> None:
        steps.begin(time)
        if said:
            steps.failed()

    fails(900)
    rows = steps.state(0, (1, 8))
    assert numbers(steps, [900]) == [(0, 0)]
    assert steps.state(0, (1, 8)) is not rows
    rows = steps.state(0, (1, 8))
    assert numbers(steps, [500]) == [(1, 0)]
    fails(500)
    assert numbers(steps, [500]) == [(1, 1)]
    fails(300)
    assert numbers(steps, [300]) == [(2, 0)]
    assert steps.state(0, (1, 8)) is rows


def test_a_sampling_may_begin_in_the_middle() -> None:
    steps = steps_of(torch.tensor([999.0, 750.0, 500.0, 250.0]))
    assert numbers(steps, [500.0, 250.0, 7.0]) == [(2, 0), (3, 0), (4, 0)]  # 7 is none of them, and is counted
    assert steps.now is not None
    assert steps.now.total is None


def test_what_is_kept_ends_with_the_sampling_and_with_other_sizes() -> None:
    steps = Steps()
    numbers(steps, [900])
    rows = steps.state(0, (2, 64))
    assert steps.state(0, (2, 64)) is rows
    assert steps.state(1, (2, 64)) is not rows
    numbers(steps, [900])
    assert steps.state(0, (2, 64)) is not rows  # the other branch
    numbers(steps, [500])
    assert steps.state(0, (2, 64)) is rows
    assert steps.state(0, (2, 65)) is not rows
    rows = steps.state(0, (2, 65))
    steps.restart()
    numbers(steps, [900])
    assert steps.state(0, (2, 65)) is not rows
