"""``gossamer eval`` on a tiny random Qwen3: results, table, resumption, and one clear line for every bad input."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.cli import main
from gossamer.cli.specs import parse_method, parse_task, split_specs

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

REFERENCE = Path(__file__).resolve().parents[2] / "models" / "reference"
SMALL = ("--lengths", "400", "--limit", "2", "--min-tokens", "0")
METHODS = "dense,a_shape(sink=4,window=64)"


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("qwen3")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=5120,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def evaluate(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["eval", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_end_to_end_with_a_table(capsys, qwen3, tmp_path):
    out_file = tmp_path / "deep" / "r.jsonl"
    tasks = "needle_single,mqar(turns=2),perplexity"
    code, out, err = evaluate(capsys, qwen3, "--methods", METHODS, "--tasks", tasks, *SMALL, "--out", out_file)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["method", "length", "n", "accuracy"]
    assert lines[1].startswith("dense ")
    assert lines[2].startswith("a_shape(sink=4,window=64) ")
    assert "accuracy by task" in out
    assert str(out_file) in err
    records = [json.loads(line) for line in out_file.read_text().splitlines()]
    kinds = [record["kind"] for record in records]
    assert kinds.count("sample") == 8
    assert kinds.count("perplexity") == 4
    assert kinds.count("fidelity") == 1
    assert records[0]["model"]["architecture"] == "Qwen3ForCausalLM"
    assert any(0 < record.get("density", 1) < 0.9 for record in records)


def test_a_second_run_repeats_nothing_and_can_add(capsys, qwen3, tmp_path):
    out_file = tmp_path / "r.jsonl"
    call = (qwen3, "--tasks", "needle_single", *SMALL, "--fidelity", "0", "--out", out_file, "--json")
    _, first, _ = evaluate(capsys, *call, "--methods", METHODS)
    before = out_file.read_text()
    _, again, _ = evaluate(capsys, *call, "--methods", METHODS)
    assert out_file.read_text() == before
    assert json.loads(again) == json.loads(first)
    _, more, _ = evaluate(capsys, *call, "--methods", METHODS + ",tri_shape")
    assert out_file.read_text().startswith(before)
    assert [row["method"] for row in json.loads(more)["rows"]] == ["dense", "a_shape(sink=4,window=64)", "tri_shape"]
    _, less, _ = evaluate(capsys, *call, "--methods", "dense")
    assert [row["method"] for row in json.loads(less)["rows"]] == ["dense"]


def test_turns_apply_to_all_tasks_that_do_not_say_otherwise(capsys, qwen3, tmp_path):
    out_file = tmp_path / "r.jsonl"
    tasks = "needle_multikey,passkey(turns=1)"
    call = (qwen3, "--methods", "dense", "--tasks", tasks, "--turns", 2, *SMALL, "--fidelity", 0, "--out", out_file)
    assert evaluate(capsys, *call)[0] == 0
    records = [json.loads(line) for line in out_file.read_text().splitlines()[1:]]
    assert {(record["task"], len(record["turns"])) for record in records} == {
        ("needle_multikey(turns=2)", 2),
        ("passkey", 1),
    }


def test_list_of_tasks(capsys, qwen3):
    code, out, _ = evaluate(capsys, qwen3, "--tasks", "list")
    assert code == 0
    assert out.split()[:2] == ["needle_single", "needle_multikey"]
    assert out.split()[-1] == "perplexity"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--methods", "magic"), "unknown method 'magic'; known: dense"),
        (("--methods", "a_shape(size=3)"), "has no field 'size'; its fields are: sink, window"),
        (("--methods", "a_shape(window=x)"), "a_shape.window takes int, got 'x'"),
        (("--methods", "dense,,a_shape"), "an empty name"),
        (("--methods", "a_shape(window=3"), "parentheses do not match"),
        (("--tasks", "needles"), "unknown task 'needles'; known: needle_single"),
        (("--tasks", "mqar(turns=none)"), "mqar.turns takes int, got 'none'"),
        (("--lengths", "long"), "4k,16k,32k or in tokens, got 'long'"),
        (("--lengths", "4k"), "takes 2048 tokens, got a length of 4096"),
        (("--limit", "0"), "samples must be at least 1"),
        (("--haystack", "/none"), "cannot read the haystack /none"),
        (("--profile", "/none"), "cannot read the profile"),
        (("--device", "warp"), "--device warp"),
        (("--lm-eval", "ruler"), "lm-evaluation-harness"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, qwen3, tmp_path, argv, message):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.chdir(tmp_path)
    code, out, err = evaluate(capsys, qwen3, *SMALL, *argv)
    assert code == 2
    assert out == ""
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "results.jsonl").exists()


def test_results_of_another_model_are_refused(capsys, qwen3, tmp_path):
    out_file = tmp_path / "r.jsonl"
    call = (qwen3, "--methods", "dense", "--tasks", "needle_single", *SMALL, "--out", out_file)
    assert evaluate(capsys, *call)[0] == 0
    code, _, err = evaluate(capsys, *call, "--seed", 5)
    assert code == 2
    assert "another seed" in err.splitlines()[-1]


def test_lm_eval_runs_through_the_enabled_model(capsys, monkeypatch, qwen3, tmp_path):
    """With a stand-in for the harness: what it is given, that the method is on while it runs, what is kept."""
    seen: list[dict[str, Any]] = []

    class HFLM:
        def __init__(self, pretrained: Any, **more: Any) -> None:
            self.model = pretrained

    def simple_evaluate(model: Any, tasks: list[str], limit: int, metadata: dict, **more: Any) -> dict[str, Any]:
        seen.append({"tasks": tasks, "limit": limit, **metadata})
        with torch.inference_mode():
            model.model(torch.arange(3, 403)[None])
        return {"results": {tasks[0]: {"400,none": 0.5, "800,none": -1}}, "versions": {tasks[0]: 1}}

    package = types.ModuleType("lm_eval.evaluator")
    package.simple_evaluate = simple_evaluate  # pyright: ignore[reportAttributeAccessIssue]
    module = types.ModuleType("lm_eval.models.huggingface")
    module.HFLM = HFLM  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models", types.ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", module)
    out_file = tmp_path / "r.jsonl"
    call = (qwen3, "--methods", METHODS, "--tasks", "needle_single", *SMALL, "--fidelity", 0, "--out", out_file)
    for _ in range(2):
        code, out, _ = evaluate(capsys, *call, "--lm-eval", "ruler_vt,ruler_cwe")
        assert code == 0
        assert out.splitlines()[-2].split() == ["dense", "ruler_vt", "400", "0.500"]
    assert len(seen) == 2  # one a method, none repeated
    assert seen[0]["tasks"] == ["ruler_vt", "ruler_cwe"]
    assert seen[0]["max_seq_lengths"] == [400]
    kept = [r for r in map(json.loads, out_file.read_text().splitlines()) if r["kind"] == "lm_eval"]
    assert [record["scores"] for record in kept] == [{"ruler_vt": {"400,none": 0.5}}] * 2
    assert kept[0]["density"] == 1.0
    assert kept[1]["density"] < 0.5

    def failing(**more: Any) -> None:
        raise ConnectionError("no route to host")

    package.simple_evaluate = failing  # pyright: ignore[reportAttributeAccessIssue]
    code, _, err = evaluate(capsys, *call, "--lm-eval", "squad")
    assert code == 2
    assert "no route to host" in err
    assert "network" in err


class TestSpecs:
    def test_lists(self):
        assert split_specs("a, b(x=1,y=2) ,c:z=3") == ["a", "b(x=1,y=2)", "c:z=3"]

    def test_both_forms_give_the_same(self):
        assert parse_method("a_shape(sink=4, window=64)") == parse_method("a_shape:sink=4:window=64")
        assert parse_task("needle_multikey(turns=2,keys=8)") == parse_task("needle_multikey:keys=8", turns=2)

    def test_what_is_no_name_is_refused(self):
        with pytest.raises(ValueError, match="neither name nor name"):
            parse_method("a-shape")
        with pytest.raises(ValueError, match="FIELD=VALUE"):
            parse_method("a_shape(4)")
