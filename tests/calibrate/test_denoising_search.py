"""Planted heads are recognised: modes of Sparse-vDiT, and orders of axes for PAROAttention."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import AttentionCall, Extent, Profile, sparse_attention
from gossamer.calibrate.denoising import ModeSearch, OrderSearch, TileSearch, order_figures, order_scores
from gossamer.integrations.stats import Observation
from gossamer.layout import DenoisingStep, TokenLayout
from gossamer.methods.denoising import ORDERS

FRAMES, HEIGHT, WIDTH, BLOCK = 6, 4, 8, 16
PATCHES, PLACES = FRAMES * HEIGHT * WIDTH, HEIGHT * WIDTH
SIZES = {"F": FRAMES, "H": HEIGHT, "W": WIDTH}
PATCH = torch.arange(PATCHES)
AXES = {"F": PATCH // PLACES, "H": PATCH // WIDTH % HEIGHT, "W": PATCH % WIDTH}
CUBE_BLOCK = 8
MODES = ["dense", "dense", "diagonal", "multi_diagonal", "stripe"]


def codes(number: Tensor, width: int = 64, seed: int = 0) -> Tensor:
    """Nearly orthogonal vectors of unit length, one a number."""
    table = torch.randn(int(number.max()) + 1, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(table, dim=-1)[number]


def near(place: Tensor, reach: float) -> Tensor:
    """Vectors whose product falls with the distance of places, of unit length."""
    centres = torch.arange(64) * (int(place.max()) / 63)
    return torch.nn.functional.normalize(torch.exp(-((place[:, None] - centres) ** 2) / (2 * reach**2)), dim=-1)


def planted(noise: float = 0.05, seed: int = 0) -> AttentionCall:
    """Two heads that attend evenly, and one of each other mode, with 4 tokens of text before the patches."""
    generator = torch.Generator().manual_seed(seed)
    across = (AXES["H"] * WIDTH + AXES["W"]) * FRAMES + AXES["F"]
    uniform = torch.zeros(PATCHES, 64)
    lines = torch.zeros(PATCHES, 64)
    lines[torch.arange(7, PATCHES, 24), 0] = 12.0
    shared = torch.zeros(PATCHES, 64)
    shared[:, 0] = 12.0
    q = [uniform, uniform, 25 * near(PATCH, 3.0), 25 * near(across, 3.0), shared]
    k = [uniform, uniform, 12 * near(PATCH, 3.0), 12 * near(across, 3.0), lines]
    q, k = (torch.nn.functional.pad(torch.stack(x), (0, 0, 4, 0))[None] for x in (q, k))
    q, k = (x + noise * torch.randn(x.shape, generator=generator) for x in (q, k))
    v = torch.randn(1, 5, PATCHES + 4, 8, generator=generator)
    extent = Extent.full(1, PATCHES + 4, PATCHES + 4, causal=False)
    layout = TokenLayout((4,), FRAMES, HEIGHT, WIDTH)
    return AttentionCall(q, k, v, extent, scale=0.3, layer=0, layout=layout, step=DenoisingStep(0, 4), state=[{}])


def observed(call: AttentionCall) -> Observation:
    out = sparse_attention(call.q, call.k, call.values, "dense", causal=False, scale=call.scale)
    return Observation(call, out)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_each_head_gets_the_mode_that_was_planted(noise: float) -> None:
    call = planted(noise)
    search = ModeSearch(limit=0.2, block=BLOCK, every=1)
    search(observed(call))
    profile = search.profile()
    found = [method.to_dict()["mode"] for method in profile.layers[0]]
    assert found == MODES
    assert profile.errors is not None
    assert profile.costs is not None
    assert profile.costs[0][0] == 1.0
    assert profile.errors[0][0] == 0.0
    again = Profile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert again.layers == profile.layers
    plan = profile.method.plan(replace(call, state=[{}]))
    assert plan.density() < 0.6
    pairs = plan.count_pairs()[0].double() / (PATCHES + 4) ** 2
    assert profile.costs[0] == pytest.approx(pairs.tolist())  # counted, and no constants of the modes


def test_a_head_that_is_nothing_is_skipped() -> None:
    call = planted()
    silent = replace(call, v=call.values * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])[None, :, None, None])
    search = ModeSearch(block=BLOCK)
    search(observed(silent))
    assert search.profile().layers[0][1].to_dict()["mode"] == "skip"


def test_more_is_left_out_as_the_limit_rises() -> None:
    seen = observed(planted())
    costs = []
    for limit in (0.0, 0.1, 0.2, 0.5, 2.0):
        search = ModeSearch(limit=limit, block=BLOCK)
        search(seen)
        of_layer = search.profile().costs
        assert of_layer is not None
        costs.append(sum(float(x or 0.0) for x in of_layer[0]))
    assert costs[0] == 5.0
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 2.0


def test_errors_are_relative_to_the_output() -> None:
    """The paper's are absolute: whether a head stays dense would depend on the scale of its values."""
    found = []
    for factor in (1.0, 100.0):
        call = planted()
        search = ModeSearch(block=BLOCK)
        search(observed(replace(call, v=call.values * factor)))
        found.append(search.profile().layers)
    assert found[0] == found[1]


def of_order(axes: str, seed: int = 0) -> AttentionCall:
    """Attention inside blocks of patches that follow each other in a hidden order of axes, of a cube of 4 a side."""
    patch = torch.arange(64)
    place = {"F": patch // 16, "H": patch // 4 % 4, "W": patch % 4}
    rank = torch.zeros(64, dtype=torch.int64)
    for axis in axes:
        rank = rank * 4 + place[axis]
    own = codes(rank // CUBE_BLOCK, seed=seed)
    q, k = 12 * own[None, None], 4 * own[None, None]
    generator = torch.Generator().manual_seed(seed)
    q = q + 0.05 * torch.randn(q.shape, generator=generator)
    extent, layout = Extent.full(1, 64, 64, causal=False), TokenLayout((0,), 4, 4, 4)
    return AttentionCall(q, k, k, extent, scale=0.3, layer=0, layout=layout, step=DenoisingStep(0, 4), state=[{}])


@pytest.mark.parametrize("axes", ORDERS)
def test_the_hidden_order_of_axes_is_found_and_the_papers_sign_misses_it(axes: str) -> None:
    empty, uneven = order_figures(of_order(axes), CUBE_BLOCK)
    own = ORDERS.index(axes)
    assert int(empty[0, 0].argmax()) == own
    for alpha in (0.0, 0.5, 1.0):
        assert ORDERS[int(order_scores(empty, uneven, alpha=alpha)[0, 0].argmin())] == axes
    literal = empty / empty.sum(dim=-1, keepdim=True)
    assert int(literal[0, 0].argmin()) != own
    search = OrderSearch(block=CUBE_BLOCK, density=0.2)
    search(observed(of_order(axes)))
    profile = search.profile()
    assert profile.layers[0][0].to_dict()["order"] == axes
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))).layers == profile.layers


def test_figures_are_those_of_the_map() -> None:
    call = replace(planted(noise=0.5), scale=0.03)  # no weight is too small for float32
    empty, uneven = order_figures(call, 20, small=4e-3, share=0.7)
    weight = (call.q.double() @ call.k.double().transpose(-1, -2) * call.scale).softmax(dim=-1)[0, :, 4:, 4:]
    for number, axes in enumerate(ORDERS):
        key = torch.zeros(PATCHES, dtype=torch.int64)
        for axis in axes:
            key = key * SIZES[axis] + AXES[axis]
        order = key.argsort()
        permuted = weight[:, order][:, :, order]
        tiles = [
            permuted[:, m : m + 20, n : n + 20].flatten(1) for m in range(0, PATCHES, 20) for n in range(0, PATCHES, 20)
        ]
        skipped = torch.stack([(tile < 4e-3).double().mean(dim=1) >= 0.7 for tile in tiles]).double().mean(dim=0)
        peaks = torch.stack([tile.amax(dim=1) / tile.mean(dim=1) for tile in tiles]).mean(dim=0)
        torch.testing.assert_close(empty[0, :, number], skipped, atol=1e-9, rtol=0)
        torch.testing.assert_close(uneven[0, :, number], peaks, atol=1e-3, rtol=1e-4)


def of_tiles(references: tuple[int, ...], layer: int) -> AttentionCall:
    """Each frame attends itself and some frames that attend all; all frames evenly where none is a reference."""
    frame = AXES["F"]
    codes = torch.nn.functional.one_hot(frame, 8).float()
    chosen = torch.zeros(PATCHES, dtype=torch.bool)
    chosen[(frame[:, None] == torch.tensor(references, dtype=torch.int64)).any(dim=1)] = True
    k = codes.clone()
    k[chosen] = 1.0  # which every query matches as well as its own frame
    q = 12 * codes
    if not references:
        q, k = q * 0, k * 0
    v = torch.randn(1, 1, PATCHES, 8, generator=torch.Generator().manual_seed(layer))
    extent, layout = Extent.full(1, PATCHES, PATCHES, causal=False), TokenLayout((0,), FRAMES, HEIGHT, WIDTH)
    return AttentionCall(q[None, None], k[None, None], v, extent, layer=layer, layout=layout, scale=1.0)


def test_each_layer_gets_the_fewest_frames_that_do() -> None:
    search = TileSearch(limit=0.01, frames=(1, 2, 3), block=BLOCK)
    for layer, references in enumerate([(0,), (0, 3), (0, 2, 4), ()]):
        search(observed(of_tiles(references, layer)))
    method = search.method()
    assert method.layers == (1, 2, 3, FRAMES)
    assert method.plan(of_tiles((), 3)).density() == 1.0
    with pytest.raises(ValueError, match=r"got \[\]"):
        TileSearch().method()


@pytest.mark.parametrize("make", [ModeSearch, OrderSearch])
def test_what_a_search_needs(make: Any) -> None:
    search = make(block=BLOCK)
    with pytest.raises(ValueError, match=r"a search needs calls of every layer from 0 on, got \[\]"):
        search.profile()
    call = planted()
    search(observed(replace(call, layout=None)))
    with pytest.raises(ValueError, match=r"got \[\]"):
        search.profile()
    search(observed(replace(call, layer=1)))
    with pytest.raises(ValueError, match=r"got \[1\]"):
        search.profile()
    with pytest.raises(ValueError, match="every must be at least 1"):
        make(every=0)
    seldom = make(block=BLOCK, every=2)
    seldom(observed(replace(call, step=DenoisingStep(1, 4))))
    with pytest.raises(ValueError, match=r"got \[\]"):
        seldom.profile()
