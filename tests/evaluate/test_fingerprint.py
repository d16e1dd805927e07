"""A model's fingerprint is of what it is, not of where it lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from gossamer.evaluate.subject import Subject  # noqa: E402


def test_one_model_in_two_places_is_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "a")
    found = []
    for place in (tmp_path / "a", f"{tmp_path}/./a/"):
        found.append(transformers.AutoModelForCausalLM.from_pretrained(place))
    one, same = (Subject(model, None, "m").fingerprint() for model in found)
    assert one == same
    with torch.no_grad():
        found[0].model.norm.weight[0] = 2.0
    assert Subject(found[0], None, "m").fingerprint() != one
    found[1].config.rope_parameters = {"rope_type": "default", "rope_theta": 1.0}
    assert Subject(found[1], None, "m").fingerprint() != one
