"""``gossamer eval`` on a tiny random Qwen3: results, table, resumption, and one clear line for every bad input."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer import Profile
from gossamer.cli import main
from gossamer.methods import AShape, MaxRelative

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

REFERENCE = Path(__file__).resolve().parents[2] / "models" / "reference"
SMALL = ("--lengths", "400", "--limit", "2", "--min-tokens", "0")
METHODS = "dense,a_shape(sink=4,window=64)"
LABEL = "a_shape(sink=4,window=64,min_tokens=0)"


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
    assert lines[2].startswith(f"{LABEL} ")
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
    assert [row["method"] for row in json.loads(more)["rows"]] == ["dense", LABEL, "tri_shape(min_tokens=0)"]
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


def test_a_profile_goes_to_the_methods_per_head(capsys, qwen3, tmp_path):
    Profile.uniform(2, 4, AShape(4, 64)).save(tmp_path / "profile.json")
    call = (qwen3, "--tasks", "needle_single", *SMALL, "--fidelity", 0, "--out", tmp_path / "r.jsonl", "--json")
    code, out, _ = evaluate(capsys, *call, "--methods", f"{METHODS},per_head", "--profile", tmp_path / "profile.json")
    assert code == 0
    dense, same, per_head = json.loads(out)["rows"]
    assert (dense["method"], same["method"]) == ("dense", LABEL)
    assert re.fullmatch("profile[.]json[(]layers=[0-9a-f]{6},min_tokens=0[)]", per_head["method"])
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {line.get("profile") for line in lines if line.get("method") == per_head["method"]} == {"profile.json"}
    assert per_head["density"] == same["density"]


@pytest.mark.parametrize(
    ("layers", "chosen", "message"),
    [
        (2, "dense,a_shape", "--profile is for the methods minference, per_head"),
        (3, "dense,minference", "the profile is for 3 layers of 4 heads, but this model has 2 layers of 4"),
        (2, "minference(last=9)", "leave last of minference out"),
    ],
)
def test_a_profile_that_does_not_fit_is_one_line(capsys, qwen3, tmp_path, layers, chosen, message):
    Profile.uniform(layers, 4, MaxRelative()).save(tmp_path / "profile.json")
    call = ("--methods", chosen, "--profile", tmp_path / "profile.json", "--out", tmp_path / "r.jsonl")
    code, out, err = evaluate(capsys, qwen3, *SMALL, *call)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_list_of_tasks(capsys):
    code, out, _ = evaluate(capsys, "--tasks", "list")
    assert code == 0
    assert out.split()[:2] == ["needle_single", "needle_multikey"]
    assert out.split()[-1] == "perplexity"
    code, listed, _ = evaluate(capsys, "--tasks", "list", "--json")
    assert code == 0
    assert json.loads(listed) == {"tasks": out.split()}
    code, _, err = evaluate(capsys)
    assert code == 2
    assert "name a folder or a GGUF file: gossamer eval MODEL" in err


def test_perplexity_alone_needs_no_word_on_fidelity(capsys, qwen3, tmp_path):
    call = (qwen3, "--tasks", "perplexity", "--methods", METHODS, *SMALL, "--out", tmp_path / "r.jsonl")
    code, out, _ = evaluate(capsys, *call)
    assert code == 0
    header, dense, sparse = out.splitlines()
    assert "more nats" in header
    assert dense.startswith("dense ")
    assert sparse.split()[-5].startswith(("+", "-", "["))


def test_turns_are_those_of_the_task_unless_given(capsys, qwen3, tmp_path):
    out_file = tmp_path / "r.jsonl"
    call = (qwen3, "--methods", "dense", "--tasks", "mqar,needle_single", *SMALL, "--limit", 1, "--out", out_file)
    assert evaluate(capsys, *call)[0] == 0
    records = [json.loads(line) for line in out_file.read_text().splitlines()[1:]]
    assert {(record["task"], len(record["turns"])) for record in records} == {("mqar", 4), ("needle_single", 1)}


def test_thresholds_give_rows_of_their_own(capsys, qwen3, tmp_path):
    """The first run is dense, for its prompts are short, and says so; the second is sparse."""
    out_file = tmp_path / "r.jsonl"
    call = (qwen3, "--tasks", "needle_single", "--lengths", "400", "--limit", 2, "--out", out_file)
    _, out, _ = evaluate(capsys, *call, "--methods", METHODS)
    assert "a_shape(sink=4,window=64) at 400 tokens: 100% of the layers' prefills ran dense (short prompt)" in out
    assert "below min_tokens=2048" in out
    fidelity = [r for r in map(json.loads, out_file.read_text().splitlines()) if r["kind"] == "fidelity"]
    assert fidelity[0]["density"] == 1.0
    _, out, _ = evaluate(capsys, *call, "--methods", METHODS, "--min-tokens", 0)
    assert [line.split()[0] for line in out.splitlines()] == ["method", "dense", LABEL]
    assert sum('"method": "dense"' in line for line in out_file.read_text().splitlines()) == 2


def test_the_table_is_of_what_was_asked_for(capsys, qwen3, tmp_path):
    """Not of other tasks, lengths and samples that the file holds, and on samples that all methods have."""
    call = (qwen3, *SMALL, "--fidelity", 0, "--out", tmp_path / "r.jsonl", "--json")
    evaluate(capsys, *call, "--methods", "dense", "--tasks", "needle_single,passkey", "--limit", 4)
    evaluate(capsys, *call, "--methods", "dense", "--tasks", "needle_single", "--lengths", 500)
    _, out, _ = evaluate(capsys, *call, "--methods", METHODS, "--tasks", "needle_single")
    rows = json.loads(out)["rows"]
    assert [(row["method"], row["length"], row["samples"]) for row in rows] == [("dense", 400, 2), (LABEL, 400, 2)]
    assert [list(row["tasks"]) for row in rows] == [["needle_single"]] * 2


def test_what_fails_in_the_middle_leaves_a_table_of_the_rest(capsys, monkeypatch, qwen3, tmp_path):
    from gossamer.evaluate.runner import Job

    make = Job.sample

    def failing(job: Any, subject: Any, task: Any, length: int, index: int) -> Any:
        if index == 1:
            raise ValueError("needle_single at 400 tokens: no names are left")
        return make(job, subject, task, length, index)

    monkeypatch.setattr(Job, "sample", failing)
    call = (qwen3, "--methods", METHODS, "--tasks", "needle_single", *SMALL, "--out", tmp_path / "r.jsonl")
    code, out, err = evaluate(capsys, *call)
    assert code == 2
    assert [line.split()[:3] for line in out.splitlines()][1:] == [["dense", "400", "1"], [LABEL, "400", "1"]]
    assert err.splitlines()[-1].endswith("no names are left; the table is of what was done before")


def test_without_a_terminal_a_line_says_what_is_done(capsys, qwen3, tmp_path):
    call = (qwen3, "--methods", METHODS, "--tasks", "needle_single,perplexity", *SMALL, "--out", tmp_path / "r.jsonl")
    _, _, err = evaluate(capsys, *call)
    lines = [line for line in err.splitlines() if "is done" in line]
    assert [line.split(";")[0] for line in lines] == [
        "1/3: needle_single at 400 tokens is done",
        "2/3: perplexity at 400 tokens is done",
        "3/3: fidelity at 400 tokens is done",
    ]
    _, _, err = evaluate(capsys, *call)
    assert "is done" not in err


def test_an_out_that_cannot_be_used_is_said_before_the_model_is_loaded(capsys, monkeypatch, qwen3, tmp_path):
    from gossamer.cli import generation

    monkeypatch.setattr(generation, "load_tokenizer", lambda path: pytest.fail("loaded"))
    notes = tmp_path / "notes.txt"
    notes.write_text("notes")
    for out_file, message in ((notes, "is not a results file"), (notes / "r.jsonl", "is not a folder; choose")):
        code, _, err = evaluate(capsys, qwen3, *SMALL, "--out", out_file)
        assert code == 2
        assert message in err.splitlines()[-1]
    assert notes.read_text() == "notes"


def test_prompts_of_chat_models_are_wrapped(capsys, qwen3, tmp_path):
    from transformers import AutoTokenizer

    model = tmp_path / "chat"
    shutil.copytree(qwen3, model)
    tokenizer = AutoTokenizer.from_pretrained(qwen3)
    tokenizer.chat_template = "{% for message in messages %}User: {{ message.content }}\n{% endfor %}Answer:"
    tokenizer.save_pretrained(model)
    call = ("--methods", "dense", "--tasks", "needle_single", *SMALL, "--fidelity", 0)
    out_file = tmp_path / "r.jsonl"
    assert evaluate(capsys, model, *call, "--chat", "--out", out_file)[0] == 0
    header, *records = map(json.loads, out_file.read_text().splitlines())
    assert header["chat"] is True
    assert {record["prompt_tokens"] for record in records} == {376}
    code, _, err = evaluate(capsys, model, *call, "--out", out_file)
    assert code == 2
    assert "another setting of --chat" in err


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
        (("--tasks", "needles"), "math_find, repeat_passage, code_function, perplexity"),
        (("--tasks", "perplexity(turns=2)"), "perplexity takes no fields"),
        (("--tasks", "perplexity", "--fidelity", "1"), "fidelity needs a task"),
        (("--limit", "0"), "--limit must be at least 1, got 0"),
        (("--min-tokens", "-1"), "--min-tokens must be at least 0, got -1"),
        (("--turns", "0"), "--turns must be at least 1, got 0"),
        (("--fidelity", "-1"), "--fidelity must be at least 0, got -1"),
        (("--batch", "0"), "--batch must be at least 1, got 0"),
        (("--chat",), "this model's tokenizer has no chat template"),
        (("--tasks", "needle_single,common_words", "--lengths", "200,300"), "common_words at 200 tokens: "),
        (("--tasks", "needle_single,common_words", "--lengths", "200,300"), "ask for a longer length, or leave"),
        (("--out", "."), "it is a folder; name a file with --out"),
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
