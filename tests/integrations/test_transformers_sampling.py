"""SparseD in a diffusion language model: one that attends in both directions, and is read step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import EuroBertConfig, EuroBertForMaskedLM

from gossamer.integrations.transformers import Handle, enable
from gossamer.layout import DenoisingStep, TokenLayout

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

STEPS, PROMPT, LENGTH, BLANK = 10, 40, 72, 5
ALWAYS: dict[str, Any] = {"bidirectional": True, "min_tokens": 0, "max_density": 2.0}


def tiny() -> Any:
    torch.manual_seed(0)
    kind: Any = EuroBertConfig
    config = kind(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return EuroBertForMaskedLM(config).eval()


def fill(model: Any, handle: Handle | None, batch: int = 2, padding: int = 0) -> list[Tensor]:
    """Logits of each step of a sampling that fills in the most certain blanks, as LLaDA does."""
    tokens = torch.randint(6, 96, (batch, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens[:, PROMPT:] = BLANK
    live = torch.ones_like(tokens)
    live[0, :padding] = 0
    logits = []
    prompt = [PROMPT - padding, *[PROMPT] * (batch - 1)]
    sampling = None
    if handle is not None:
        manager = handle.sampling(prompt, STEPS)
        sampling = manager.__enter__()
    for step in range(STEPS):
        if sampling is not None:
            sampling.begin(step)
        with torch.no_grad():
            logits.append(model(input_ids=tokens, attention_mask=live).logits)
        best = logits[-1].softmax(-1).max(-1)
        certain = best.values.masked_fill(tokens != BLANK, -1.0)
        taken = certain.topk(LENGTH // STEPS // 2, dim=1).indices
        tokens = tokens.scatter(1, taken, best.indices.gather(1, taken).clamp(min=6))
    if handle is not None:
        manager.__exit__(None, None, None)
    return logits


@pytest.mark.parametrize("padding", [0, 9])
def test_full_budget_is_dense(padding: int) -> None:
    model = tiny()
    expected = fill(model, None, padding=padding)
    with enable(model, "sparsed", share=1.0, block=16, **ALWAYS) as handle:
        got = fill(model, handle, padding=padding)
        assert [row.sparse_calls for row in handle.stats()] == [STEPS - 3] * 2
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours[:, padding:], theirs[:, padding:], atol=1e-4, rtol=1e-4)


def test_early_steps_are_dense_and_one_plan_serves_the_others() -> None:
    model, seen = tiny(), []
    expected = fill(model, None)
    with enable(model, "sparsed", share=0.1, block=16, **ALWAYS) as handle:
        handle.observe(lambda observed: seen.append(observed.call))
        got = fill(model, handle)
        stats = handle.stats()
        assert stats.fallbacks() == {"sparsed needs step 3 or later": 2 * 3}
    assert [call.step for call in seen] == [DenoisingStep(step, STEPS) for step in range(STEPS) for _ in range(2)]
    assert all(call.layout == TokenLayout((PROMPT, PROMPT)) for call in seen)
    first = [call.state for call in seen[:2]]
    assert all(call.state is first[number % 2] for number, call in enumerate(seen))
    for step in range(4):  # the fourth chooses, and is dense
        torch.testing.assert_close(got[step], expected[step], atol=1e-4, rtol=1e-4)
    assert (got[4] - expected[4]).abs().max() > 1e-2
    assert all(row.density < 1 for row in stats)


def test_outside_of_a_sampling_there_is_no_step() -> None:
    model = tiny()
    with enable(model, "sparsed", **ALWAYS) as handle:
        fill_once = {"input_ids": torch.randint(6, 96, (1, LENGTH))}
        with torch.no_grad():
            model(**fill_once)
        assert handle.stats().fallbacks() == {"sparsed needs layout": 2}
        with handle.sampling(PROMPT, 4) as sampling:
            for step, branch, message in ((4, 0, "step must be 0 to 3, got 4"), (-1, 0, "got -1")):
                with pytest.raises(ValueError, match=message):
                    sampling.begin(step, branch)
        with pytest.raises(ValueError, match="at least 1 step"), handle.sampling(PROMPT, 0):
            pass
        with pytest.raises(ValueError, match="numbers of tokens from 0 on"), handle.sampling(-1, 3):
            pass
        handle.reset()
        with torch.no_grad():
            model(**fill_once)
        assert handle.stats().fallbacks() == {"sparsed needs layout": 2}
    with pytest.raises(ValueError, match="disabled"), handle.sampling(PROMPT, 4):
        pass


def test_branches_and_samplings_keep_plans_of_their_own() -> None:
    model, seen = tiny(), []
    tokens = torch.randint(6, 96, (1, LENGTH))
    with enable(model, "sparsed", share=0.1, block=16, **ALWAYS) as handle, torch.no_grad():
        handle.observe(lambda observed: seen.append(observed.call.state))
        with handle.sampling(PROMPT, 2) as sampling:
            for step, branch in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0)):
                sampling.begin(step, branch)
                model(input_ids=tokens)
    of_layer = seen[::2]
    assert of_layer[0] is of_layer[2]
    assert of_layer[1] is of_layer[3]
    assert len({id(state) for state in of_layer}) == 3
