"""The example that extends a context: what it asks, how it scores, and that a training which is stopped goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from repository import script

import gossamer


@pytest.fixture(scope="module")
def extending() -> Any:
    return script("examples/extending.py")


@pytest.fixture(scope="module")
def text(extending: Any) -> Any:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(extending.MODEL)
    words = script("examples/reading.py").repository_text()[:60_000]
    tokens = np.array(tokenizer(words, add_special_tokens=False)["input_ids"], dtype=np.uint16)
    return extending.Text(tokenizer, tokens, tokens)


def test_answers_are_right_when_all_their_tokens_are(extending: Any) -> None:
    tokens = torch.tensor([0, 5, 6, 7, 8, 9, 5, 6])
    choice, answer, plain = extending.CHOICE, extending.ANSWER, extending.TEXT
    weights = torch.tensor([0, plain, choice, answer, plain, choice, answer, plain])
    logits = torch.full((7, 10), 0.0)
    logits[torch.arange(7), tokens[1:]] = 4.0
    whole = extending.score(logits, tokens, weights)
    assert (whole["right"], whole["asked"]) == (2, 2)
    assert whole["loss"] == pytest.approx(float(-logits[0].log_softmax(-1)[5]), abs=1e-5)
    logits[2] = 0.0  # the second token of the first answer
    logits[2, 1] = 9.0
    part = extending.score(logits, tokens, weights)
    assert (part["right"], part["asked"]) == (1, 2)
    assert part["answer_loss"] > whole["answer_loss"]
    assert part["loss"] == whole["loss"]


def test_a_text_holds_what_is_asked_for(extending: Any, text: Any) -> None:
    tokens, weights = extending.questions(text, 600, 0)
    assert len(tokens) == len(weights) == 600
    shown = text.tokenizer.decode(tokens)
    assert shown.count("What is the number for") == extending.QUESTIONS
    for part in shown.split("What is the number for")[1:]:
        key, answer = part.split("? The number for")[0].strip(), part.split(" is ")[-1].split(".")[0]
        assert f"The number for {key} is {answer}." in shown.split("What is")[0]
    again, _ = extending.questions(text, 600, 0)
    other, _ = extending.questions(text, 600, 1)
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)


def test_policies_are_what_they_are_called(extending: Any) -> None:
    model = extending.new_model()
    assert model.config.rope_parameters["rope_theta"] == extending.THETA
    dense = {"dense": list(range(6)), "top_p": [], "longgen": [2, 3], "longgen_early": [1, 2], "window": []}
    for name, policy in extending.policies().items():
        with gossamer.enable(model, policy) as handle, torch.no_grad():
            model(input_ids=torch.arange(3, 603)[None], use_cache=False)
        assert [layer.layer for layer in handle.stats() if layer.dense_calls] == dense[name], name


def test_a_training_that_was_stopped_goes_on(extending: Any, text: Any) -> None:
    stage = extending.Stage(256, 1, 3, 0.2)
    whole = extending.Trainer(extending.new_model(), text, stage, 1)
    for _ in range(3):
        whole.step()
    first = extending.Trainer(extending.new_model(), text, stage, 1)
    first.step()
    second = extending.Trainer(extending.new_model(), text, stage, 1)
    second.resume(first.state())
    second.step()
    second.step()
    assert second.losses == whole.losses
    other = extending.Trainer(extending.new_model(), text, stage, 2)
    other.step()
    assert other.losses != whole.losses[:1]


def test_others_take_the_steps_that_fit_into_the_time_of_dense_training(tmp_path: Any) -> None:
    example = script("examples/extend_context.py")
    parts = example.Parts(tmp_path, (example.BASE, example.Stage(2048, 1, 10, 0.2)), 1)
    seconds = {"dense": 2.0, "top_p": 1.6, "window": 0.1}
    assert example.equal_time(parts, seconds) == {"dense": 10, "top_p": 12, "window": 20}


def test_a_part_that_is_done_is_left_alone(tmp_path: Any) -> None:
    example = script("examples/extend_context.py")
    parts = example.Parts(tmp_path, (example.BASE, example.LONG), 1)
    first = parts.done("one", lambda: {"figure": 1})
    assert parts.done("one", lambda: {"figure": 2}) == first
    assert first["figure"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]
