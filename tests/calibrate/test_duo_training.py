"""Training of DuoAttention's gates: gated attention pair by pair, prompts of passkeys, and what gates become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from definitions import allowed_pairs, attention, call_in, everywhere
from tiny import tiny_llama, tokens
from torch import Tensor

from gossamer.calibrate.duo import gated_attention, train_duo
from gossamer.calibrate.passkeys import Passkeys
from gossamer.calibrate.training import Schedule
from gossamer.integrations.transformers import enable


@everywhere
def test_heads_mix_full_and_streaming(situation: str) -> None:
    call = call_in(situation, length=20)
    allowed = allowed_pairs(call.extent, call.query_len, call.key_len)
    query = call.extent.query_positions(call.query_len)[:, :, None]
    key = call.extent.key_positions(call.key_len)[:, None]
    near = allowed & ((key < 2) | ((query - key).abs() < 4))
    gate = torch.tensor([0.25, 0.8])
    out = gated_attention(call, gate, sink=2, recent=4)
    full, _ = attention(call, allowed[:, None].expand(-1, 4, -1, -1))
    streaming, _ = attention(call, near[:, None].expand(-1, 4, -1, -1))
    share = gate[:, None].expand(2, 2).reshape(4, 1, 1)
    live = call.extent.live_queries(call.query_len)[:, None, :, None]
    expected = share * full + (1 - share) * streaming
    torch.testing.assert_close(out.double() * live, expected * live, atol=1e-4, rtol=1e-3)


ANSWERS = torch.arange(64) >= 56


def sample(step: int) -> tuple[Tensor, Tensor]:
    return tokens(64, seed=step % 2), ANSWERS


def test_a_gate_has_the_gradient_of_the_loss() -> None:
    """The first step of a training against the loss at other gates."""
    model = tiny_llama()

    def loss(gates: dict[int, Tensor]) -> float:
        with torch.no_grad(), enable(model, "dense") as handle:
            wanted = model.model(tokens(64, seed=0))[0][0][ANSWERS]
            handle.replace(lambda call: gated_attention(call, gates[call.layer or 0], 2, 8))
            got = model.model(tokens(64, seed=0))[0][0][ANSWERS]
            handle.replace(None)
            torch.testing.assert_close(model.model(tokens(64, seed=0))[0][0][ANSWERS], wanted)
        every = torch.cat(list(gates.values()))
        return float((got - wanted).double().square().mean() + 0.05 * every.abs().mean())

    start = {layer: torch.ones(2) for layer in range(2)}
    found = loss(start)
    assert found == pytest.approx(0.05)  # nothing is lost, and every gate is 1
    _, training = train_duo(model, sample, Schedule(1, 1e-6), sink=2, recent=8)
    assert training.losses == pytest.approx([found])
    assert all(weight.grad is None for weight in model.parameters())
    closed = loss({0: torch.tensor([0.0, 1.0]), 1: torch.ones(2)})
    assert abs(closed - (found - 0.05 / 4)) > 1e-3  # and something is lost where a head streams


def test_heads_that_lose_nothing_close_and_others_stay() -> None:
    model = tiny_llama()
    gates, _ = train_duo(model, sample, Schedule(12, 0.2, "trapezoid"), sink=0, recent=64)
    assert torch.tensor(gates).max() < 0.1  # a window of everything: streaming is full
    gates, _ = train_duo(model, sample, Schedule(12, 0.2, "trapezoid"), sink=1, recent=2, penalty=0.001)
    assert torch.tensor(gates).max() > 0.5
    assert all(0 <= gate <= 1 for layer in gates for gate in layer)
    assert model.config._attn_implementation == "sdpa"


def test_without_a_penalty_gates_stay_open() -> None:
    gates, training = train_duo(tiny_llama(), sample, Schedule(3, 0.1), sink=0, recent=64, penalty=0.0)
    assert training.losses == pytest.approx([0.0] * 3, abs=1e-6)
    torch.testing.assert_close(torch.tensor(gates), torch.ones(2, 2), atol=0.35, rtol=0)


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "partial"
    size: dict[str, Any] = {"sink": 1, "recent": 4}

    def stop(step: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    whole, _ = train_duo(model, sample, Schedule(4, 0.1), **size)
    with pytest.raises(KeyboardInterrupt):
        train_duo(model, sample, Schedule(4, 0.1), path=path, progress=stop, **size)
    with pytest.raises(ValueError, match="another recent"):
        train_duo(model, sample, Schedule(4, 0.1), path=path, sink=1, recent=5)
    gates, training = train_duo(model, sample, Schedule(4, 0.1), path=path, **size)
    assert gates == whole
    assert training.step == 4


def test_a_disabled_handle_replaces_nothing() -> None:
    handle = enable(tiny_llama(), "dense")
    handle.disable()
    with pytest.raises(ValueError, match="this handle is disabled"):
        handle.replace(None)


# Passkeys


class Words:
    """A tokenizer of words, with their own numbers."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        for word in text.split():
            if word not in self.known:
                self.known.append(word)
        return {"input_ids": [self.known.index(word) for word in text.split()]}

    def text(self, ids: list[int]) -> str:
        return " ".join(self.known[i] for i in ids)


TEXT = " ".join(f"w{i * i % 61}" for i in range(800))


@pytest.mark.parametrize("step", range(6))
def test_prompts_hide_passkeys_and_ask_for_them(step: int) -> None:
    words = Words()
    prompts = Passkeys(words, [TEXT], longest=300, shortest=200, keys=3, words=5, intervals=4)
    ids, answers = prompts.sample(step)
    assert ids.shape[1] == len(answers)
    assert ids.shape[1] in (200, 225, 250, 275, 300)
    text = words.text(ids[0].tolist())
    given = words.text(ids[0][answers].tolist()).split()
    assert len(given) == 15
    where = []
    for n, which in enumerate(("first", "second", "third")):
        passkey = " ".join(given[5 * n : 5 * n + 5])
        assert text.count(f"Remember the {which} passkey: {passkey} ") == 1
        assert text.count(f"The {which} passkey is: {passkey}") == 1
        where.append(text.index(f"Remember the {which}"))
    assert max(where) < text.index("The first passkey is:")
    again = Passkeys(words, [TEXT], longest=300, shortest=200, keys=3, words=5, intervals=4).sample(step)
    assert torch.equal(ids, again[0])
    assert torch.equal(answers, again[1])


def test_prompts_differ_by_step_and_seed() -> None:
    words = Words()
    size: dict[str, Any] = {"longest": 300, "shortest": 200, "keys": 3, "words": 5}
    prompts = Passkeys(words, [TEXT], **size)
    texts = {words.text(prompts.sample(step)[0][0].tolist()) for step in range(8)}
    texts |= {words.text(Passkeys(words, [TEXT], **size, seed=1).sample(0)[0][0].tolist())}
    assert len(texts) == 9
    assert len({prompts.sample(step)[0].shape[1] for step in range(8)}) > 1
    orders = {tuple(sorted(("first", "second", "third"), key=lambda w: t.index(f"Remember the {w}"))) for t in texts}
    assert len(orders) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": 11}, "1 to 10 passkeys, got 11"),
        ({"keys": 0}, "1 to 10 passkeys, got 0"),
        ({"longest": 100}, "must not be longer than the longest, 100 tokens"),
        ({"longest": 801}, "the texts have 800 tokens, fewer than 801"),
    ],
)
def test_prompts_that_cannot_be_made_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Passkeys(Words(), [TEXT], **{"longest": 300, "shortest": 200} | change)


def test_a_prompt_too_short_for_its_passkeys_is_named() -> None:
    with pytest.raises(ValueError, match="10 passkeys of 32 words take 720 tokens, but a prompt has 300"):
        Passkeys(Words(), [TEXT], longest=300, shortest=300).sample(0)
