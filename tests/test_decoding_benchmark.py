"""benchmarks/decoding.py times steps and says what they lose."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu
from gossamer.evaluate.steps import compare_steps, mass_read
from gossamer.methods import OracleTopK, Quest

REFERENCE = Path(__file__).resolve().parent.parent / "models" / "reference"


@pytest.mark.skipif(not cpu.is_available(), reason="needs the C++ kernels")
def test_steps_are_timed_beside_dense_ones(script, monkeypatch, tmp_path):
    decoding, out = script("decoding"), tmp_path / "decoding.json"
    monkeypatch.setattr(decoding, "HEADS", 4)
    monkeypatch.setattr(decoding, "GROUPS", 2)
    monkeypatch.setattr(decoding, "DIM", 16)
    methods = "quest(budget=64),lserve(budget=192)"
    given = ["decoding.py", "attention", "--lengths", "1024", "--dtypes", "float32", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*given, "--methods", methods, "--out", str(out)])
    for _ in range(2):  # rows take the place of those before
        assert decoding.main() == 0
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"quest(budget=64)", "lserve(budget=192)", "dense", "sdpa"}
    whole = 2 * 16 * 2 * 4 * 1024
    assert rows["dense"]["bytes"] == rows["sdpa"]["bytes"] == whole
    assert rows["quest(budget=64)"]["density"] < 0.07
    assert whole / 16 < rows["quest(budget=64)"]["bytes"] < whole / 7
    assert 0 < rows["lserve(budget=192)"]["planning_share"] < 1


def test_the_mass_that_a_step_reads():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 1, 8, generator=generator), torch.randn(1, 2, 20, 8, generator=generator)
    call = AttentionCall(q, k, k, scale=0.9)
    chosen = [[1, 5, 19], [0, 19]]
    plan = SparsePlan(
        heads=2,
        query_len=1,
        key_len=20,
        extent=call.extent,
        column_indptr=torch.tensor([0, 3, 5]),
        column_indices=torch.tensor(chosen[0] + chosen[1], dtype=torch.int32),
    )
    weights = (q.view(2, 2, 8) @ k[0].mT * 0.9).softmax(-1)
    own = [float(weights[head // 2, head % 2, chosen[head // 2]].sum()) for head in range(4)]
    best = [weights[g].sum(0).topk(len(chosen[g])).indices for g in range(2)]
    bound = [float(weights[head // 2, head % 2, best[head // 2]].sum()) for head in range(4)]
    read = mass_read(call, plan)
    assert (read.chosen, read.best) == pytest.approx((sum(own) / 4, sum(bound) / 4), rel=1e-5)
    shares = [len({*map(int, best[g])} & {*chosen[g]}) / len(chosen[g]) for g in range(2)]
    assert 0 < sum(shares) < 2
    assert (read.found, read.key_len) == (pytest.approx(sum(shares) / 2), 20)


@pytest.fixture(scope="module")
def text():
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(REFERENCE)("The cat sat on the mat. " * 60, return_tensors="pt")
    return model, tokens["input_ids"][:, :300]


def test_what_steps_lose(text):
    model, tokens = text
    methods = {"all": Quest(budget=4096), "quest": Quest(budget=32), "bound": OracleTopK(budget=32)}
    found = compare_steps(model, tokens, methods, steps=6)
    assert list(found) == ["dense", *methods]
    assert found["all"].kl == pytest.approx(0.0, abs=1e-6)
    assert (found["all"].read, found["all"].top1) == (1.0, 1.0)
    assert found["all"].recall is None  # there was nothing to choose
    assert found["quest"].kl > 0
    mass = {name: (steps.recall or 0.0, steps.oracle_recall or 0.0) for name, steps in found.items()}
    # The newest token is always read.
    assert 0.99 * mass["bound"][1] < mass["bound"][0] <= mass["bound"][1]
    assert 0.2 < mass["quest"][0] < mass["quest"][1] < 1
    assert found["quest"].read < 0.7
    assert [len(found[name].found) for name in found] == [0, 0, 6, 6]  # one of each step that chose
    assert all(0.1 < share < 0.9 for share in found["quest"].found)
    assert all(share > 0.95 for share in found["bound"].found)
    with torch.no_grad():
        logits = model(tokens).logits[0, -6:-1].log_softmax(-1)
    expected = -logits.gather(1, tokens[0, -5:, None]).mean()
    assert found["dense"].nats == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("steps", [0, 300])
def test_a_text_has_more_tokens_than_steps(text, steps):
    model, tokens = text
    with pytest.raises(ValueError, match="need a longer text than 300 tokens"):
        compare_steps(model, tokens, {}, steps=steps)


def test_one_step_has_no_token_to_lose(text):
    model, tokens = text
    assert math.isnan(compare_steps(model, tokens, {}, steps=1)["dense"].nats)


@pytest.mark.skipif(not cpu.is_available(), reason="needs the C++ kernels")
def test_tokens_are_timed_beside_those_of_transformers(script, monkeypatch, tmp_path):
    decoding, out = script("decoding"), tmp_path / "decoding.json"
    given = ["decoding.py", "tokens", str(REFERENCE), "--lengths", "600", "--steps", "3", "--rounds", "1"]
    more = ["--threads", "1", "--methods", "quest(budget=64)", "--dtype", "float32", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*given, *more])
    assert decoding.main() == 0
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["sdpa", "dense", "quest(budget=64)"]
    assert rows["sdpa"]["ratio"] == 1.0
    assert rows["dense"]["read"] == 1.0
    assert rows["quest(budget=64)"]["read"] < 0.5
    assert rows["dense"]["tokens_per_s"] == pytest.approx(1 / rows["dense"]["median_s"], rel=1e-2)


def test_losses_are_written_for_methods_with_plans_and_without(script, monkeypatch, tmp_path):
    decoding, out = script("decoding"), tmp_path / "decoding.json"
    given = ["decoding.py", "model", str(REFERENCE), "--lengths", "300", "--steps", "3", "--texts", "1"]
    more = ["--methods", "quest(budget=64),retro_infer(least=64)", "--dtype", "float32", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*given, *more])
    assert decoding.main() == 0
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["dense", "quest(budget=64)", "retro_infer(least=64)"]
    assert 0 < rows["quest(budget=64)"]["recall"] <= rows["quest(budget=64)"]["oracle_recall"]
    assert "recall" not in rows["retro_infer(least=64)"]
    assert rows["retro_infer(least=64)"]["kl"] > 0
