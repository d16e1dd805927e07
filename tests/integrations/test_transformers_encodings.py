"""Caches that encode older tokens, in a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_transformers_evictions import LAYERS, PROMPT, STEPS, decoded, left_padded, tiny, tokens
from transformers import DynamicCache

from gossamer import cache, enable

POLICIES = {
    "kivi": cache.Kivi(bits=4, group=8, residual=8),
    "int8": cache.Int8(),
    "mustafar": cache.Mustafar(key_sparsity=0.25, value_sparsity=0.25, residual=4, pack=8),
}
small = pytest.mark.parametrize("name", POLICIES)


@small
def test_logits_stay_near_those_of_a_dense_cache_in_fewer_bytes(name: str) -> None:
    ids, mask = tokens(3), left_padded([7, 0, 25])
    plain, model = tiny(), tiny()
    chunks = [PROMPT, 1, 3, 1, 1]
    with enable(plain, "dense"), enable(model, "dense", cache=POLICIES[name]) as handle:
        past, dense = handle.new_cache(), DynamicCache(config=plain.config)
        logits, expected = decoded(model, past, ids, mask, *chunks), decoded(plain, dense, ids, mask, *chunks)
        assert past.get_seq_length() == PROMPT + STEPS
    assert torch.equal(logits[:, 0], expected[:, 0])
    error = (logits - expected).norm() / expected.norm()
    assert 0 < float(error) < {"kivi": 0.1, "int8": 0.01, "mustafar": 0.2}[name]
    assert cache.nbytes(dense) == 3 * LAYERS * 2 * (PROMPT + STEPS) * 2 * 8 * 4
    assert cache.nbytes(past) < {"kivi": 0.65, "int8": 0.55, "mustafar": 0.9}[name] * cache.nbytes(dense)


@small
def test_rows_generate_the_same_in_a_batch_in_beams_and_over_turns(name: str) -> None:
    ids, mask = tokens(2)[:, :PROMPT], left_padded([8, 0])[:, :PROMPT]  # whole groups of padding
    model = tiny()
    fields: Any = {"max_new_tokens": 5, "do_sample": False}
    with enable(model, "dense", cache=POLICIES[name]) as handle:
        both = model.generate(ids, attention_mask=mask, **fields)
        alone = model.generate(ids[:1, 8:], attention_mask=mask[:1, 8:], **fields)
        assert torch.equal(both[0, PROMPT:], alone[0, PROMPT - 8 :])
        beams = model.generate(ids, attention_mask=mask, num_beams=2, **fields)
        assert torch.equal(beams[1:], model.generate(ids[1:], attention_mask=mask[1:], num_beams=2, **fields))
        past = handle.new_cache()
        first = model.generate(ids[1:], past_key_values=past, **fields)
        again = torch.cat([first, ids[1:, :6]], dim=1)
        second = model.generate(again, past_key_values=past, **fields)
    assert second.shape[1] == PROMPT + 5 + 6 + 5
    assert past.get_seq_length() == second.shape[1] - 1


def test_assisted_decoding_goes_back_within_the_window_and_no_further() -> None:
    model, ids = tiny(), tokens()[:, :8].repeat(1, 5)
    fields: Any = {"max_new_tokens": 12, "do_sample": False}
    with enable(model, "dense", cache=cache.Mustafar(key_sparsity=0.25, value_sparsity=0.25, residual=24, pack=8)):
        drafted = model.generate(ids, prompt_lookup_num_tokens=2, **fields)
        assert drafted.shape[1] == 40 + 12
    with enable(model, "dense", cache="int8"), pytest.raises(ValueError, match="encoded all but"):
        model.generate(ids, prompt_lookup_num_tokens=2, **fields)


def test_dense_rows_of_a_decode_method_read_encoded_pages() -> None:
    """A method that chooses pages stands on what the store reads."""
    ids, mask = tokens(2), left_padded([7, 0])
    model = tiny()
    with enable(model, "dense", cache=POLICIES["int8"]) as handle:
        plain = decoded(model, handle.new_cache(), ids, mask, PROMPT, *[1] * STEPS)
    with enable(model, "dense", decode="quest", cache=POLICIES["int8"]) as handle:
        chosen = decoded(model, handle.new_cache(), ids, mask, PROMPT, *[1] * STEPS)
    torch.testing.assert_close(chosen, plain, atol=1e-4, rtol=1e-3)  # quest's budget holds all
