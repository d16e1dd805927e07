"""A prompt in chunks is the prompt: for every recipe, ragged, padded, on a cache, and under `gossamer.enable`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from test_model import samples, tiny
from torch import Tensor

import gossamer
from gossamer.compressed.chunks import prefill
from gossamer.compressed.int8 import Int8Linear
from gossamer.compressed.model import compress
from gossamer.compressed.recipes import RECIPES

LENGTH = 37  # of no chunk a multiple
EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
# Attention adds up in another order, so that an input may be rounded the other way: by a step, one part in 127 of a
# layer's largest inputs.
ROUNDED: dict[str, Any] = {"rtol": 0.0, "atol": 0.05}  # of logits that are some 1 apart


def model_of(recipe: str | None = None) -> Any:
    """With norms as a model begins with, so that logits are of order 1."""
    model = tiny()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
    return model if recipe is None else compress(model, recipe, samples())


@pytest.fixture(scope="module", params=sorted(RECIPES))
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


def near(model: Any) -> dict[str, Any]:
    return ROUNDED if any(isinstance(module, Int8Linear) for module in model.modules()) else EXACT


def prompts(rows: int = 2) -> Tensor:
    return torch.randint(60, (rows, LENGTH), generator=torch.Generator().manual_seed(3))


def padded(left: int, right: int) -> Tensor:
    """The first row is whole, the other padded."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :left] = 0
    mask[1, LENGTH - right :] = 0
    return mask


@torch.no_grad()
def whole(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits after each row's last token, without chunks."""
    out = model(input_ids=ids, attention_mask=mask).logits
    last = [LENGTH - 1] * len(ids) if mask is None else [int(row.nonzero()[-1]) for row in mask]
    return torch.stack([out[row, place] for row, place in enumerate(last)])


@pytest.mark.parametrize(("left", "right"), [(0, 0), (9, 0), (0, 5), (3, 20)])
def test_chunked_equals_whole(model: Any, left: int, right: int) -> None:
    mask = padded(left, right)
    ids = prompts()
    with torch.no_grad():
        found, cache = prefill(model, ids, mask, chunk=16)
    torch.testing.assert_close(found, whole(model, ids, mask), **near(model))
    assert cache.get_seq_length() == LENGTH


def test_an_int8_layer_multiplies_a_token_alike_whatever_stands_beside_it() -> None:
    """Its scale is fixed: no token changes how another is rounded, not even one with outliers."""
    torch.manual_seed(0)
    layer = Int8Linear.of(torch.randn(24, 32), torch.randn(24), scale=1.5 / 127)
    x = torch.randn(40, 32)
    x[7, 3] = 60.0
    chunked = torch.cat([layer(part) for part in x.split(16)])
    torch.testing.assert_close(chunked, layer(x), rtol=0, atol=1e-5)  # overflow is added in float
    quiet = torch.randn(40, 32).clamp(-1.5, 1.5)
    assert torch.equal(torch.cat([layer(part) for part in quiet.split(16)]), layer(quiet))


@pytest.mark.parametrize("chunk", [1, 8, LENGTH, 100])
def test_chunks_of_any_size(chunk: int) -> None:
    model, ids = model_of("sparsegpt"), prompts()
    with torch.no_grad():
        torch.testing.assert_close(prefill(model, ids, chunk=chunk)[0], whole(model, ids), **near(model))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("left", "right"), [(9, 0), (0, 9), (14, 14)])
def test_chunks_that_are_padding_alone(sparse: bool, left: int, right: int) -> None:
    model, ids, mask = model_of("int8"), prompts(), padded(left, right)
    with torch.no_grad(), ExitStack() as stack:
        if sparse:
            stack.enter_context(gossamer.enable(model, "a_shape", sink=2, window=8, min_tokens=0, max_density=1.0))
        torch.testing.assert_close(prefill(model, ids, mask, chunk=5)[0], whole(model, ids, mask), **ROUNDED)


def test_no_more_than_a_chunk_enters_a_layer_and_no_more_rows_than_end_leave_the_head() -> None:
    model, seen, rows = model_of(), [], []
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    prefill(model, prompts(), padded(0, 20), chunk=16)
    assert seen == [16, 16, 5]
    assert rows == [1, 1, 1]  # the short row ends in the second chunk, the other in the third


def test_a_cache_goes_on() -> None:
    model, ids, mask = model_of("int8"), prompts(), padded(9, 0)
    with torch.no_grad():
        _, cache = prefill(model, ids[:, :20], mask[:, :20], chunk=8)
        found, cache = prefill(model, ids[:, 20:], mask, chunk=8, past_key_values=cache)
    torch.testing.assert_close(found, whole(model, ids, mask), **near(model))
    assert cache.get_seq_length() == LENGTH


def test_positions_are_cut_as_the_tokens_are() -> None:
    model, ids, mask = model_of(), prompts(), padded(9, 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found, _ = prefill(model, ids, mask, chunk=10, position_ids=positions)
        alone, _ = prefill(model, ids[1:, 9:], chunk=10)
    torch.testing.assert_close(found[1:], alone, **EXACT)


@pytest.mark.parametrize("recipe", ["int8", "sparsegpt"])
@pytest.mark.parametrize("mask", [None, padded(9, 0), padded(0, 5)], ids=["whole", "left", "right"])
def test_chunks_run_sparse(recipe: str, mask: Tensor | None) -> None:
    """A-shape is exact to the token: chunks attend what the whole prompt does."""
    model, ids = model_of(recipe), prompts()
    dense = whole(model, ids, mask)
    with torch.no_grad(), gossamer.enable(model, "a_shape", sink=2, window=8, min_tokens=0, max_density=1.0) as handle:
        expected = whole(model, ids, mask)
        handle.reset()
        found, _ = prefill(model, ids, mask, chunk=16)
        assert all(layer.sparse_calls == 3 for layer in handle.stats())
    torch.testing.assert_close(found, expected, **near(model))
    assert float((found - dense).std()) > 0.2


def test_a_last_chunk_of_one_token_is_a_decode_step() -> None:
    model, ids = model_of(), prompts()
    with torch.no_grad(), gossamer.enable(model, "a_shape", sink=2, window=8, min_tokens=0, max_density=1.0) as handle:
        prefill(model, ids, chunk=6)
        assert handle.stats().fallbacks() == {"decode": 2}


@pytest.mark.parametrize("left", [0, 9])
def test_transformers_own_chunks_generate_the_same(left: int) -> None:
    model, ids, mask = model_of("int8"), prompts(), padded(left, 0)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    at_once = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=16, **options), at_once)


def test_bad_input() -> None:
    model, ids = model_of(), prompts()
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="chunk must be an integer of at least 1"):
            prefill(model, ids, chunk=wrong)  # type: ignore[arg-type]
    for wrong in (ids[0], ids[:, :0]):
        with pytest.raises(ValueError, match=r"must be \[B, T\]"):
            prefill(model, wrong)
    with pytest.raises(ValueError, match=r"together, \[2, 37\], got \[2, 36\]"):
        prefill(model, ids, padded(0, 0)[:, 1:])
    with pytest.raises(ValueError, match="a row without tokens"):
        prefill(model, ids, padded(0, LENGTH))
