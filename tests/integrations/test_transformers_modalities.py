"""Models that read images and videos: which tokens are which, and MMInference at full and at a small budget."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_readers import FAMILIES, IMAGE_TOKEN, VIDEO_TOKEN, Prompt, build_reader, prompt_for
from torch import Tensor

from gossamer.integrations.transformers import Observation, enable
from gossamer.integrations.transformers.modalities import Modalities, tokens_of
from gossamer.layout import ModalityLayout
from gossamer.methods import AShape, GridLines, MMInference, VerticalSlash
from gossamer.plan import Extent

pytestmark = [
    pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ALWAYS: dict[str, Any] = {"min_tokens": 0, "max_density": 2.0}
FULL = {boundary: MMInference(boundary, (VerticalSlash(30, 10_000),)) for boundary in ("q", "2d")}
SMALL = MMInference("q", (AShape(1, 1),))
# Of Gemma 3, images are read in both directions: a mask that no plan is for.
SPARSE = [family for family in FAMILIES if family != "gemma3"]


def logits(model: Any, prompt: Prompt) -> Tensor:
    """Of live tokens, one row after the other."""
    with torch.no_grad():
        out = model(**prompt.inputs).logits
    return torch.cat([row[len(row) - length :] for row, length in zip(out, prompt.lengths, strict=True)])


@pytest.fixture(scope="module", params=FAMILIES)
def reader(request: pytest.FixtureRequest) -> tuple[str, Any, Prompt, Tensor]:
    """A family, its model (to be deep-copied), two prompts and what it makes of them."""
    model, prompt = build_reader(request.param), prompt_for(request.param)
    return request.param, model, prompt, logits(model, prompt)


@pytest.mark.parametrize("boundary", FULL)
def test_full_budget_is_dense_and_less_is_not(reader: Any, boundary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, stock, prompt, expected = reader
    model, planned = copy.deepcopy(stock), []
    plan = MMInference.plan
    monkeypatch.setattr(MMInference, "plan", lambda self, call: planned.append(call.layout) or plan(self, call))
    with enable(model, FULL[boundary], **ALWAYS) as handle:
        torch.testing.assert_close(logits(model, prompt), expected, atol=1e-4, rtol=1e-4)
        stats = handle.stats()
    layers = len(stats)
    assert layers >= 2
    if family not in SPARSE:
        assert not planned
        assert all(layer.fallbacks == {"mask is not plain": 1} for layer in stats)
        return
    assert len(planned) == layers
    assert all(isinstance(layout, ModalityLayout) for layout in planned)
    with enable(model, SMALL, **ALWAYS):
        assert float((logits(model, prompt) - expected).abs().max()) > 1e-2
    torch.testing.assert_close(logits(model, prompt), expected, atol=0, rtol=0)


def test_layouts_say_which_tokens_are_which(reader: Any) -> None:
    """By position: without the padding."""
    family, stock, prompt, _ = reader
    model, seen = copy.deepcopy(stock), []
    with enable(model, "dense") as handle:
        handle.observe(seen.append)
        logits(model, prompt)
    if family not in SPARSE:
        assert not seen
        return
    assert seen
    for observed in seen:
        assert isinstance(observed, Observation)
        layout = observed.call.layout
        assert isinstance(layout, ModalityLayout)
        for row, length in enumerate(prompt.lengths):
            own = prompt.kinds[row, -length:]
            assert layout.kinds[row, :length].tolist() == own.tolist()
            assert not layout.kinds[row, length:].any()
    strides = seen[0].call.layout.strides
    if family == "qwen3_vl":  # of a frame with the words before it, of its rows, and of the frames alone
        assert {12, 8, 4} <= set(strides[1])


def test_text_alone_is_read_sparsely_by_all(reader: Any) -> None:
    family, stock, _, _ = reader
    model = copy.deepcopy(stock)
    ids = torch.randint(10, 90, (2, 90), generator=torch.Generator().manual_seed(5))
    prompt = Prompt({"input_ids": ids}, torch.zeros(2, 90, dtype=torch.int8), [90, 90])
    expected = logits(model, prompt)
    with enable(model, FULL["q"], **ALWAYS) as handle:
        torch.testing.assert_close(logits(model, prompt), expected, atol=1e-4, rtol=1e-4)
        assert sum(layer.sparse_calls for layer in handle.stats()) > 0, family


def test_answers_are_the_same_at_full_budget() -> None:
    model, prompt = build_reader("qwen2_5_vl"), prompt_for("qwen2_5_vl")
    given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompt.inputs, **given)
    with enable(model, FULL["2d"], decode="quest", **ALWAYS) as handle:
        assert torch.equal(model.generate(**prompt.inputs, **given), expected)
        assert all(layer.sparse_calls for layer in handle.stats())


def test_a_second_chunk_runs_dense_since_its_modalities_are_known_alone() -> None:
    model = build_reader("llava")
    ids = torch.randint(10, 90, (1, 100), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 60:]
        with enable(model, SMALL, **ALWAYS) as handle:
            first = model(input_ids=ids[:, :60], use_cache=True)
            handle.reset()
            model(input_ids=ids[:, 60:], past_key_values=first.past_key_values)
            assert all(layer.fallbacks == {"mminference needs whole prompt": 1} for layer in handle.stats())
    assert expected.shape[1] == 40


def test_a_copy_of_an_enabled_model_has_no_part_in_it() -> None:
    model, prompt = build_reader("llava"), prompt_for("llava")
    with enable(model, FULL["q"], **ALWAYS) as handle:
        copied = copy.deepcopy(model)
        logits(model, prompt)
        before = len(handle.stats())
        logits(copied, prompt)
        assert len(handle.stats()) == before
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    assert not [hook for hook in hooks if type(hook).__module__.startswith("gossamer")]


def _read(inputs: dict[str, Any], rows: int, tokens: int) -> ModalityLayout | None:
    modalities = Modalities(build_reader("qwen2_5_vl"))
    modalities.enter(inputs)
    return modalities.layout(Extent.full(rows, tokens, tokens), tokens)


def test_what_is_asked_first() -> None:
    """Types that a processor counted, then tokens, then types of another kind; embeddings alone say nothing."""
    ids = torch.tensor([[20, IMAGE_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN, 21]])
    types = torch.tensor([[0, 2, 0, 1, 0]])
    embeds = torch.zeros(1, 5, 4)
    for given, expected in (
        ({"input_ids": ids, "mm_token_type_ids": types, "token_type_ids": types}, [0, 2, 0, 1, 0]),
        ({"input_ids": ids, "token_type_ids": types}, [0, 1, 1, 2, 0]),
        ({"inputs_embeds": embeds, "token_type_ids": types}, [0, 1, 0, 1, 0]),
    ):
        layout = _read(given, 1, 5)
        assert layout is not None
        assert layout.kinds.tolist() == [expected]
    assert _read({"inputs_embeds": embeds}, 1, 5) is None
    assert _read({"input_ids": ids}, 1, 4) is None


def test_tokens_are_those_that_the_config_names() -> None:
    assert tokens_of(build_reader("qwen3_vl").config) == {IMAGE_TOKEN: 1, VIDEO_TOKEN: 2}
    assert tokens_of(build_reader("llava").config.text_config) == {}


def test_strides_of_frames_reach_grid_heads() -> None:
    model, prompt = build_reader("qwen3_vl"), prompt_for("qwen3_vl")
    strides: set[int] = set()
    grid = GridLines(frames=True)
    with enable(model, "dense") as handle:
        handle.observe(lambda seen: strides.update(*(grid._strides(seen.call, row) for row in range(2))))
        logits(model, prompt)
    assert {12, 8, 4} <= strides
    assert len(strides) <= 8
