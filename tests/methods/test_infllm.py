"""InfLLM's choice, from its formula; and a model on it, with the cache in a file and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decode_steps import step

import gossamer
from gossamer import Policy
from gossamer.cache import Tiers
from gossamer.methods import Dense, InfLLM
from gossamer.plan import SparsePlan

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

SMALL = {"blocks": 3, "block": 8, "count": 2, "init": 10, "local": 20, "every": 1}


@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("blocks", [0, 3, 100])
def test_a_step_reads_sinks_the_window_and_the_best_blocks(share: int, blocks: int) -> None:
    method = InfLLM(**SMALL | {"blocks": blocks})
    call = step(150, share=share)
    plan = method.plan(call)
    assert isinstance(plan, SparsePlan)
    assert call.store is not None
    means = call.store.summary(method.represents)
    mask = plan.to_mask()[:, :, 0]
    for row, start in enumerate((0, 21)):
        count = 150 - start
        back = (count - 20) // 8
        scores = {
            block: sum(float(call.q[row, h, 0] @ means[row, h // share, block]) for h in range(call.heads))
            for block in range(2, back)
        }
        chosen = sorted(scores, key=lambda block: -scores[block])[:blocks]
        tokens = {t for b in [0, 1, *chosen] for t in range(8 * b, 8 * b + 8)} | set(range(8 * back, count))
        for head in range(mask.shape[1]):
            assert {int(t) - start for t in mask[row, head].nonzero()[:, 0]} == tokens
        assert plan.count_pairs()[row].tolist() == [len(tokens)] * plan.heads


def test_what_holds_everything_is_dense() -> None:
    call = step(150)
    out = gossamer.attention.attend(
        call, Policy(Dense("gossamer"), decode=InfLLM(**SMALL | {"blocks": 100}), max_density=2)
    )
    expected = gossamer.attention.attend(call, Policy(Dense("gossamer")))
    assert torch.equal(out, expected)  # type: ignore[arg-type]
    assert InfLLM(**SMALL).least_density(step(40)) == 1.0
    assert InfLLM(**SMALL).least_density(call) == pytest.approx((54 + 54) / (150 + 129))


@pytest.mark.parametrize("field", ["block", "count", "local", "every"])
def test_bad_fields_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"infllm\.{field} must be at least 1, got 0"):
        InfLLM(**{field: 0})


@pytest.fixture
def planted() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, initializer_range=0.2, **size)).eval()


@torch.inference_mode()
def test_a_model_votes_while_it_reads_and_then_steps_on_blocks(planted: Any, tmp_path: Path) -> None:
    ids = torch.randint(3, 96, (2, 130), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    found = []
    for kept in ("keep", Tiers(block=8, hot=24, resident=24, folder=str(tmp_path))):
        with gossamer.enable(planted, "dense", decode=InfLLM(**SMALL), cache=kept) as handle:
            cache = handle.new_cache()
            for part in (slice(0, 60), slice(60, 120)):  # a prompt in chunks
                planted(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache)
            votes = cache.layers[0].begin(InfLLM(**SMALL).represents)._votes
            assert votes is not None
            # Each query of the prompt gives one vote in all.
            torch.testing.assert_close(votes.sum(dim=2)[:, 0], torch.tensor([120.0, 107.0]), rtol=1e-4, atol=1e-4)
            logits = [
                planted(ids[:, n : n + 1], attention_mask=mask[:, : n + 1], past_key_values=cache).logits
                for n in range(120, 130)
            ]
            assert all(layer.sparse_steps == 10 for layer in handle.stats())
            found.append(torch.cat(logits))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
