"""benchmarks/caches.py says what caches lose and save; gossamer eval --cache scores their answers."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer import Policy, methods
from gossamer.cache import Int8, Mustafar, SnapKV, StreamingLLM
from gossamer.cli.specs import parse_policies
from gossamer.evaluate.caches import compare_caches
from gossamer.evaluate.records import cell_of, label_of, policy_fields, relabel

REFERENCE = Path(__file__).resolve().parent.parent / "models" / "reference"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    size: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=96, num_key_value_heads=2, initializer_range=0.2, **size)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 96, (1, 150), generator=torch.Generator().manual_seed(0))


def test_what_caches_lose(model, tokens):
    caches = {"all": SnapKV(budget=500), "few": SnapKV(budget=24, window=8), "window": StreamingLLM(sinks=2, recent=20)}
    caches |= {"int8": Int8(), "half": Mustafar(key_sparsity=0.5, value_sparsity=0.5, residual=4, pack=8)}
    found = compare_caches(model, tokens, caches, steps=6)
    assert list(found) == ["keep", *caches]
    assert found["all"].kl == pytest.approx(0.0, abs=1e-6)
    assert found["keep"].cache_bytes == 2 * 2 * 2 * 150 * 8 * 4
    assert found["few"].share == pytest.approx(30 / 150)
    assert found["window"].share == pytest.approx(21 / 150)
    assert found["few"].kl > 100 * found["int8"].kl > 0
    assert found["half"].share < 0.65
    with torch.no_grad():
        logits = model(tokens).logits[0, -6:-1].log_softmax(-1)
    expected = -logits.gather(1, tokens[0, -5:, None]).mean()
    assert found["keep"].nats == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("steps", [0, 150])
def test_a_text_has_more_tokens_than_steps(model, tokens, steps):
    with pytest.raises(ValueError, match="need a longer text than 150 tokens"):
        compare_caches(model, tokens, {}, steps=steps)


def test_the_benchmark_writes_a_row_for_each_cache(script, monkeypatch, tmp_path):
    caches, out = script("caches"), tmp_path / "caches.json"
    given = ["caches.py", str(REFERENCE), "--lengths", "200", "--steps", "3", "--texts", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*given, "--caches", "int8,snapkv(budget=64)", "--out", str(out)])
    for _ in range(2):  # rows take the place of those before
        assert caches.main() == 0
    rows = {row["cache"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"keep", "int8", "snapkv(budget=64)"}
    assert rows["int8"]["share"] < 0.4
    assert rows["snapkv(budget=64)"]["share"] == pytest.approx(66 / 200 + 1 / 200, abs=1e-4)


def test_steps_of_caches_are_timed_beside_a_plain_one(script, monkeypatch, tmp_path):
    script("steps_of_caches")
    caches, out = script("caches"), tmp_path / "caches.json"
    given = ["caches.py", "steps", "--lengths", "320", "--rounds", "2", "--dtypes", "float32", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*given, "--caches", "int8,mustafar", "--out", str(out)])
    for _ in range(2):
        assert caches.main() == 0
    rows = {row["cache"]: row for row in json.loads(out.read_text())["steps"]}
    assert list(rows) == ["keep", "int8", "mustafar"]
    assert rows["keep"]["ratio"] == rows["keep"]["share"] == 1.0
    assert rows["int8"]["share"] == pytest.approx((128 + 8) / 512, abs=1e-3)
    assert all(len(row["each_s"]) == 2 and row["median_s"] > 0 for row in rows.values())


def test_policies_say_what_caches_keep():
    policy = Policy(methods.create("dense"), decode=methods.create("quest", budget=64), cache=SnapKV(budget=64))
    assert policy.name == "dense+quest+snapkv"
    assert label_of(policy) == "dense+quest(budget=64)+snapkv(budget=64)"
    line = policy_fields(policy) | {"kind": "sample"}
    assert relabel(line) == line
    others = [replace(policy, cache=None), replace(policy, cache=SnapKV(budget=48)), replace(policy, decode=None)]
    assert len({cell_of(policy_fields(one) | {"kind": "sample"}) for one in [policy, *others]}) == 4


def test_lists_of_caches_are_read_beside_lists_of_methods():
    found = parse_policies("dense,a_shape", "none,quest", None, None, "none,int8,snapkv(budget=64,window=8)")
    assert [label_of(policy) for policy in found[:6]] == [
        *("dense", "dense+int8", "dense+snapkv(budget=64,window=8)"),
        *("dense+quest", "dense+quest+int8", "dense+quest+snapkv(budget=64,window=8)"),
    ]
    assert len(found) == 12
    with pytest.raises(ValueError, match="unknown cache"):
        parse_policies("dense", None, None, None, "all")
