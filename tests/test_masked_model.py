"""The small masked language model that this repository ships: it loads, fills in what it did, and its card is of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from repository import ROOT, script

pytest.importorskip("transformers")

from gossamer.evaluate.masked.sampler import fill
from gossamer.evaluate.masked.subject import MaskedSubject, load_masked_model

FOLDER = ROOT / "models" / "masked"
RESULTS = ROOT / "benchmarks" / "results" / "masked_model.json"


@pytest.fixture(scope="module")
def subject() -> MaskedSubject:
    return load_masked_model(FOLDER)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


def test_it_fills_in_a_few_words_as_it_did(subject: MaskedSubject) -> None:
    """Of a sentence that the prompt has said, every third token. It was sure: by 0.9 nats at least, at each step."""
    said = "The window has a width of seven. The colour of the door is green.\n"
    tokens = subject.text_tokens(said * 2)[None]
    masked = tokens == -1
    masked[0, tokens.shape[1] // 2 + 1 :: 3] = True
    filled = fill(subject.predict, tokens, masked, subject.mask_token, 3)
    assert subject.tokenizer.decode(filled[0]) == said + said.replace("seven", "sequences")


def test_the_weights_are_those_that_were_measured(measured: dict[str, Any]) -> None:
    weights = FOLDER / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == measured["weights_sha256"]


def test_the_small_models_are_below_20_megabytes_together() -> None:
    """With the video model: what this repository was to grow by at most."""
    folders = (FOLDER, ROOT / "models" / "video")
    sizes = [sum(path.stat().st_size for path in folder.rglob("*.safetensors")) for folder in folders]
    assert min(sizes) > 0
    assert sum(sizes) < 20e6


def test_the_card_says_what_was_measured(measured: dict[str, Any]) -> None:
    card, training = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "training_log.json").read_text())
    made = script("models/card_masked.py")
    assert made.table(measured["cells"]) in card
    assert made.verdict(measured["cells"]) in card
    assert f"{training['steps']:,} steps" in card
    assert f"{training['parameters'] / 1e6:.1f} million parameters" in card
    assert f"{measured['unigram']['accuracy']:.1%}" in card


def test_it_is_better_than_frequencies(measured: dict[str, Any]) -> None:
    for cell in measured["cells"]:
        assert cell["said_once"][1] > measured["unigram"]["accuracy"]
        assert cell["nats"][2] < measured["unigram"]["nats"]
