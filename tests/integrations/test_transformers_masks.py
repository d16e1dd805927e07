"""`compact_mask` says exactly what ``sdpa_mask`` says, in less."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    padding_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from gossamer.integrations.transformers.masks import (
    _window_in_graph,
    compact_mask,
    compact_mask_bidirectional,
    compact_of,
    extent_of,
    extent_of_one_query,
    is_compact,
    pairs_of,
    plain_window,
    read,
)
from gossamer.plan import Extent

BATCH = 3


def assert_means(mask: Tensor | None, expected: Tensor) -> None:
    """A compact mask gives the pairs that are expected of live queries; a query of padding has none."""
    q_length, kv_length = expected.shape[2:]
    attends = expected.any(dim=-1, keepdim=True)
    if mask is not None:
        assert is_compact(mask)
        pairs = pairs_of(mask, q_length, kv_length)
        assert torch.equal(pairs & attends, expected)
        assert bool((pairs | attends).all())
    extent, used = extent_of(mask, BATCH, q_length, kv_length)
    if extent is None:
        assert mask is not None
        live = read(mask, BATCH, kv_length).live
        assert bool((live[:, 1:] & ~live[:, :-1]).sum(dim=1).add(live[:, 0]).gt(1).any())
        return
    assert used <= kv_length
    pairs = extent.allowed(torch.arange(q_length), used)
    live = extent.live_queries(q_length)
    own = torch.arange(q_length) + extent.query_start[:, None]
    assert torch.equal(live, (own >= 0) & (own < extent.key_count[:, None]))
    assert torch.equal(pairs, expected[:, 0, :, :used] & live[:, :, None])
    assert not bool((expected[:, 0, :, used:] & live[:, :, None]).any())


def whole(**arguments: Any) -> Tensor:
    mask = sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert mask is not None
    return mask


def padded(seen: int, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(BATCH, seen, dtype=torch.bool)
    left, right = {"left": (3, 0), "right": (0, 2), "both": (2, 3), "every": (0, 1), "hole": (0, 0)}[kind]
    mask[1, :left] = False
    if right:
        mask[0 if kind == "every" else 1 :, -right:] = False
    if kind == "hole":
        mask[1, 4:6] = False
    return mask


def arguments_of(q_length: int, past: int, keys: int | None, kind: str, window: int | None) -> dict[str, Any]:
    """What transformers hands a mask function, for one of `SHAPES`."""
    return {
        "batch_size": BATCH,
        "q_length": q_length,
        "kv_length": keys or past + q_length,
        "q_offset": past,
        "mask_function": causal_mask_function if window is None else sliding_window_causal_mask_function(window),
        "attention_mask": padded(past + q_length, kind),
    }


# (queries, past tokens, keys or None for past + queries): one-shot, chunk, static prefill, static chunk.
SHAPES = [(12, 0, None), (5, 9, None), (12, 0, 20), (5, 9, 20), (2, 30, 32)]


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("kind", ["none", "left", "right", "both", "every", "hole"])
@pytest.mark.parametrize(("q_length", "past", "keys"), SHAPES)
def test_compact_mask_means_what_sdpa_mask_means(
    q_length: int, past: int, keys: int | None, kind: str, window: int | None
) -> None:
    arguments = arguments_of(q_length, past, keys, kind, window)
    mask = compact_mask(**arguments)
    # Layers that are not causal by themselves rely on a mask wherever sdpa gives them one.
    window_matters = window is not None and (keys or past + q_length) >= window
    assert (mask is None) == (kind == "none" and past == 0 and keys is None and not window_matters)
    assert_means(mask, whole(**arguments))


@pytest.mark.parametrize("again", [False, True], ids=["made once", "handed back by generate"])
@pytest.mark.parametrize("kind", ["none", "left"])
def test_rolling_caches_keep_their_offset(kind: str, again: bool) -> None:
    q_length, past, window = 6, 20, 8
    arguments: dict[str, Any] = {
        "batch_size": BATCH,
        "q_length": q_length,
        "kv_length": window - 1 + q_length,
        "q_offset": past,
        "kv_offset": past - window + 1,
        "mask_function": sliding_window_causal_mask_function(window),
        "attention_mask": padded(past + q_length, kind),
    }
    expected = whole(**arguments)
    mask = compact_mask(**arguments)
    if again and mask is not None:
        mask = compact_mask(**{**arguments, "attention_mask": mask.bool()})
    assert is_compact(mask)
    assert_means(mask, expected)


def test_nothing_to_say_is_none() -> None:
    assert compact_mask(2, 8, 8) is None
    assert compact_mask(2, 8, 8, attention_mask=torch.ones(2, 8, dtype=torch.bool)) is None
    assert is_compact(compact_mask(2, 8, 30, q_offset=22))
    assert is_compact(compact_mask(2, 8, 30, q_offset=torch.tensor(22)))


@pytest.mark.parametrize("keys", [12, 20])
@pytest.mark.parametrize("window", [None, 4])
def test_none_is_what_sdpa_makes_none(window: int | None, keys: int) -> None:
    """A layer that is not causal by itself takes None for every pair, so that it must not stand for anything else."""
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    arguments: dict[str, Any] = {
        "batch_size": 1,
        "q_length": 12,
        "kv_length": keys,
        "mask_function": function,
        "local_size": window,
    }
    ours = compact_mask(**arguments)
    assert (ours is None) == (window is None and keys == 12)
    if ours is None:
        assert sdpa_mask(**arguments) is None


@pytest.mark.parametrize("window", [None, 4])
def test_blocks_without_a_token_change_nothing(window: int | None) -> None:
    ids = torch.full((BATCH, 12), -1)
    overlay = blockwise_overlay(ids)
    function = or_masks(causal_mask_function, overlay)
    if window is not None:
        function = and_masks(function, sliding_window_overlay(window))
    assert plain_window(function) == (True, window)
    arguments: dict[str, Any] = {"batch_size": BATCH, "q_length": 12, "kv_length": 12, "mask_function": function}
    arguments["attention_mask"] = padded(12, "left")
    mask = compact_mask(**arguments, allow_is_causal_skip=False, use_vmap=True)
    assert is_compact(mask)
    assert_means(mask, whole(**arguments))
    ids[1, 3:6] = 0  # an image
    assert plain_window(function) == (False, None)
    mask = compact_mask(**arguments, allow_is_causal_skip=False, use_vmap=True)
    assert mask is not None
    assert torch.equal(mask, whole(**arguments, use_vmap=True))


def test_a_caller_that_wants_the_whole_mask_gets_it() -> None:
    mask = compact_mask(2, 8, 8, allow_is_causal_skip=False)
    assert mask is not None
    assert mask.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("q_offset", [0, 5])
def test_one_query_gets_what_sdpa_gets(q_offset: int) -> None:
    static = compact_mask(2, 1, 12, q_offset=torch.tensor(q_offset), allow_is_causal_skip=False)
    assert static is not None
    assert static.shape == (2, 1, 1, 12)
    assert compact_mask(2, 1, q_offset + 1, q_offset=q_offset) is None


def test_plain_masks_are_a_whitelist() -> None:
    window = sliding_window_overlay(5)
    assert plain_window(causal_mask_function) == (True, None)
    assert plain_window(sliding_window_causal_mask_function(5)) == (True, 5)
    assert plain_window(and_masks(causal_mask_function, window)) == (True, 5)
    padding = padding_mask_function(torch.ones(1, 4, dtype=torch.bool))
    others = [
        or_masks(window, causal_mask_function),
        and_masks(window, causal_mask_function, padding),
        and_masks(causal_mask_function, padding),
        and_masks(causal_mask_function),
        and_masks(window),
        and_masks(causal_mask_function, causal_mask_function),
        and_masks(window, window),
        window,
        chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)),
        sliding_window_bidirectional_mask_function(5),
        lambda batch, head, q, kv: kv <= q,
        max,
    ]
    assert [plain_window(function) for function in others] == [(False, None)] * len(others)


@pytest.mark.parametrize(("q_offset", "kv_offset"), [(0, 0), (4, 0)])
def test_queries_beyond_the_keys_are_not_described(q_offset: int, kv_offset: int) -> None:
    mask = compact_mask(2, 8, 6, q_offset=q_offset, kv_offset=kv_offset)
    assert mask is not None
    assert mask.shape == (2, 1, 8, 6)


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (3, 9)])
def test_an_overlay_falls_to_the_whole_mask(start: int, stop: int) -> None:
    """An image block that sees itself both ways is not causal."""

    def block(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return (q >= start) & (q < stop) & (kv >= start) & (kv < stop)

    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": 12,
        "kv_length": 12,
        "mask_function": or_masks(causal_mask_function, block),
    }
    mask = compact_mask(**arguments)
    assert mask is not None
    assert torch.equal(mask, whole(**arguments))


def test_a_mask_for_other_keys_is_an_error() -> None:
    mask = compact_mask(2, 4, 9, q_offset=5)
    for keys in (12, 8):
        with pytest.raises(ValueError, match=rf"\(2, 9\).*\(2, {keys}\)"):
            extent_of(mask, 2, 4, keys)


def test_one_query_with_a_hole_has_no_extent() -> None:
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1, 0, 0, :2] = False
    found = extent_of_one_query(mask, 2, 6)
    assert found is not None
    extent, used = found
    assert (extent.query_start.tolist(), extent.key_start.tolist(), extent.key_count.tolist()) == (
        [5, 3],
        [0, 2],
        [6, 4],
    )
    assert used == 6
    mask[0, 0, 0, 3] = False
    assert extent_of_one_query(mask, 2, 6) is None
    assert extent_of_one_query(mask.float(), 2, 6) is None


def test_one_query_without_keys_is_padding() -> None:
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[0] = False
    found = extent_of_one_query(mask, 2, 6)
    assert found is not None
    extent, used = found
    assert (extent.query_count.tolist(), extent.key_count.tolist(), used) == ([0, 1], [0, 6], 6)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("kind", ["none", "right"])
@pytest.mark.parametrize(("q_length", "kv_length"), [(12, 12), (5, 12)])
def test_bidirectional_masks_mean_what_sdpa_masks_mean(
    q_length: int, kv_length: int, kind: str, window: int | None
) -> None:
    function = bidirectional_mask_function
    if window is not None:
        function = sliding_window_bidirectional_mask_function(window)
    arguments: dict[str, Any] = {
        "batch_size": BATCH,
        "q_length": q_length,
        "kv_length": kv_length,
        "mask_function": function,
        "attention_mask": padded(kv_length, kind),
    }
    mask = compact_mask_bidirectional(**arguments, allow_is_causal_skip=False)
    assert is_compact(mask)
    extent, used = extent_of(mask, BATCH, q_length, kv_length)
    assert extent is not None
    assert not extent.causal
    assert used == kv_length
    assert torch.equal(extent.allowed(torch.arange(q_length), used), whole(**arguments)[:, 0])


def test_left_padding_without_causality_has_no_extent() -> None:
    mask = compact_mask_bidirectional(
        BATCH, 12, 12, mask_function=bidirectional_mask_function, attention_mask=padded(12, "left")
    )
    assert extent_of(mask, BATCH, 12, 12) == (None, 12)


def test_other_masks_are_the_same_under_both_names() -> None:
    causal = {"mask_function": causal_mask_function, "attention_mask": padded(12, "left")}
    ours, both = compact_mask(BATCH, 12, 12, **causal), compact_mask_bidirectional(BATCH, 12, 12, **causal)
    assert ours is not None
    assert both is not None
    assert torch.equal(ours, both)
    overlay = or_masks(bidirectional_mask_function, sliding_window_overlay(3))
    mask = compact_mask_bidirectional(BATCH, 12, 12, mask_function=overlay, allow_is_causal_skip=False)
    assert mask is not None
    assert mask.ndim == 4


def test_a_bidirectional_mask_that_is_joined_with_another_is_whole() -> None:
    """T5Gemma 2 joins it to the mask of its own keys."""
    arguments: dict[str, Any] = {"mask_function": bidirectional_mask_function, "allow_is_causal_skip": False}
    mask = compact_mask_bidirectional(BATCH, 12, 9, **arguments, allow_is_bidirectional_skip=False)
    assert mask is not None
    assert mask.dtype == torch.bool
    assert mask.shape == (BATCH, 1, 12, 9)
    assert is_compact(compact_mask_bidirectional(BATCH, 12, 9, **arguments, allow_is_bidirectional_skip=True))


def test_full_extents_are_those_without_a_mask() -> None:
    extent, used = extent_of(None, 2, 3, 9, window=4)
    assert extent is not None
    assert used == 9
    expected = Extent.full(2, 3, 9, limit=4)
    assert torch.equal(extent.allowed(torch.arange(3), 9), expected.allowed(torch.arange(3), 9))
    assert extent_of(None, 2, 3, 9, window=9)[0].limit is None  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("kind", ["none", "left", "right", "both", "every", "hole"])
@pytest.mark.parametrize(("q_length", "past", "keys"), SHAPES)
def test_a_plain_mask_is_recognized_pair_by_pair(
    q_length: int, past: int, keys: int | None, kind: str, window: int | None
) -> None:
    arguments = arguments_of(q_length, past, keys, kind, window)
    expected = whole(**arguments).contiguous()
    mask = compact_of(expected)
    assert mask is not None
    attends = expected.any(dim=-1, keepdim=True)
    assert torch.equal(pairs_of(mask, q_length, expected.shape[3]) & attends, expected)
    assert compact_of(expected) is mask
    for row, key in ((q_length - 1, past + q_length - 2), (1, past + 1)):
        other = expected.clone()
        other[2, 0, row, key] ^= True
        if (found := compact_of(other)) is not None:  # a window of other keys, or one key less
            assert torch.equal(pairs_of(found, q_length, other.shape[3]) & other.any(dim=-1, keepdim=True), other)


def test_other_masks_pair_by_pair_are_not_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.integrations.transformers.masks.COMPARED_BYTES", 1)
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    assert compact_of(causal) is not None
    prefix = causal.clone()
    prefix[..., :3] = True
    chunks = causal & (torch.arange(9)[:, None] // 4 == torch.arange(9) // 4)
    for mask in (prefix, chunks, causal.float(), causal.expand(1, 2, 9, 9), torch.zeros_like(causal), causal[..., :0]):
        assert compact_of(mask) is None


def test_windows_in_graphs_go_by_what_transformers_says() -> None:
    """Closures can't be looked into while a graph is made."""
    sliding, chunked = sliding_window_causal_mask_function(5), chunked_causal_mask_function(5, torch.zeros(1).long())
    assert _window_in_graph(causal_mask_function, {}) == (True, None)
    assert _window_in_graph(sliding, {"local_size": 5, "config": SimpleNamespace()}) == (True, 5)
    assert _window_in_graph(sliding, {"config": SimpleNamespace()}) == (False, None)
    assert _window_in_graph(chunked, {"local_size": 5, "config": SimpleNamespace(attention_chunk_size=5)}) == (
        False,
        None,
    )
    assert _window_in_graph(or_masks(causal_mask_function, sliding), {"local_size": 5}) == (False, None)
