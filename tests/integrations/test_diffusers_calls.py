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


def numbers(steps: Steps, times: list[Any]) -> list[Any]:
    found = []
    for time in times:
        steps.begin(time)
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
    steps = Steps(SimpleNamespace(timesteps=times))
    assert numbers(steps, scale(times)[[0, 0, 1, 3, 3, 0, 2]].tolist()) == [
        (0, 0), (0, 1), (1, 0), (3, 0), (3, 1), (0, 0), (2, 0)
    ]  # fmt: skip
    assert steps.now is not None
    assert steps.now.total == 4


def test_a_sampling_may_begin_in_the_middle() -> None:
    steps = Steps(SimpleNamespace(timesteps=torch.tensor([999.0, 750.0, 500.0, 250.0])))
    assert numbers(steps, [500.0, 250.0, 7.0]) == [(2, 0), (3, 0), (4, 0)]  # 7 is none of them, and is counted
    assert steps.now is not None
    assert steps.now.total is None


def test_what_is_kept_ends_with_the_sampling_and_with_other_sizes() -> None:
    steps = Steps()
    steps.begin(900)
    rows = steps.state(0, (2, 64))
    assert steps.state(0, (2, 64)) is rows
    assert steps.state(1, (2, 64)) is not rows
    steps.begin(900)
    assert steps.state(0, (2, 64)) is not rows  # the other branch
    steps.begin(500)
    assert steps.state(0, (2, 64)) is rows
    assert steps.state(0, (2, 65)) is not rows
    rows = steps.state(0, (2, 65))
    steps.restart()
    steps.begin(900)
    assert steps.state(0, (2, 65)) is not rows
