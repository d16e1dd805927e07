"""The runner: a killed evaluation goes on and ends with the same lines; wrong files are refused."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokenizers_for_tests import HAYSTACK, WordTokenizer  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from gossamer import methods  # noqa: E402
from gossamer.attention import Policy  # noqa: E402
from gossamer.evaluate import runner, tasks  # noqa: E402
from gossamer.evaluate.runner import Job, ResultsFile, label_of, make_header  # noqa: E402
from gossamer.evaluate.subject import Subject  # noqa: E402

SPARSE = Policy(methods.create("a_shape", sink=4, window=64), min_tokens=0, max_density=2.0)
DENSE = Policy.of("dense")
TINY: dict[str, Any] = {
    "vocab_size": 3000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def subject(kind: str = "llama") -> Subject:
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    return Subject(model(config(**TINY)).eval(), WordTokenizer(), kind)


def job(**changes: Any) -> Job:
    settings: dict[str, Any] = {
        "methods": (DENSE, SPARSE),
        "tasks": (tasks.create("needle_single"), tasks.create("needle_multikey", turns=2)),
        "lengths": (300, 400),
        "samples": 3,
        "haystack": HAYSTACK,
        "perplexity": HAYSTACK,
        "fidelity": 1,
    }
    return Job(**settings | changes)


def run(path: Path, work: Job, stop_after: int | None = None, of: Subject | None = None) -> list[dict[str, Any]]:
    of = of or subject()
    new = []
    with ResultsFile(path, make_header(of, work)) as results:
        for record in runner.run(of, work, results):
            new.append(record)
            if stop_after is not None and len(new) == stop_after:
                break
    return new


def without_circumstances(path: Path) -> list[dict[str, Any]]:
    """What must not depend on when and how often a run was started: all but names, times and seconds."""
    kept = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] != "run":
            kept.append({k: v for k, v in record.items() if k != "run" and not k.endswith("_s")})
    return kept


def test_each_cell_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    new = run(path, job())
    kinds = [record["kind"] for record in new]
    assert kinds.count("sample") == 2 * 2 * 2 * 3
    assert kinds.count("perplexity") == 2 * 2 * 3
    assert kinds.count("fidelity") == 2  # dense is not compared with itself
    assert len({runner._cell(record) for record in new}) == len(new)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", *kinds]
    assert json.loads(json.dumps(new)) == lines[1:]


@pytest.mark.parametrize("stop_after", [1, 7, 20])
def test_an_interrupted_run_ends_with_the_same_lines(tmp_path: Path, stop_after: int) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    total = len(run(whole, job()))
    run(parts, job(), stop_after)
    with parts.open("a") as file:
        file.write('{"kind": "sample", "method": "cut o')
    assert len(run(parts, job())) == total - stop_after
    assert without_circumstances(parts) == without_circumstances(whole)
    assert run(parts, job()) == []


def test_batches_give_the_answers_of_single_prompts(tmp_path: Path) -> None:
    work = job(tasks=(tasks.create("needle_single"),), perplexity=None, fidelity=0)
    run(tmp_path / "one.jsonl", work)
    run(tmp_path / "two.jsonl", job(tasks=work.tasks, perplexity=None, fidelity=0, batch=2))
    key = lambda record: (record["method"], record["length"], record["index"])  # noqa: E731
    one, two = (sorted(without_circumstances(tmp_path / name), key=key) for name in ("one.jsonl", "two.jsonl"))
    assert [record["turns"] for record in one] == [record["turns"] for record in two]


def test_a_batch_of_unequal_lengths_is_padded() -> None:
    of = subject()
    work = job()
    samples = [work.sample(of, work.tasks[0], length, 0) for length in (300, 340)]
    alone = [of.answer([sample], DENSE, 6)[0].texts for sample in samples]
    assert [answer.texts for answer in of.answer(samples, DENSE, 6)] == alone


def test_turns_read_the_context_once_and_do_not_see_each_other() -> None:
    of = subject()
    task = tasks.create("needle_multikey", turns=3)
    sample = job().sample(of, task, 400, 0)
    together = of.answer([sample], DENSE, 8)[0]
    for i, turn in enumerate(sample.turns):
        single = tasks.Sample(sample.context, (turn,), sample.prompt_tokens)
        assert of.answer([single], DENSE, 8)[0].texts[0] == together.texts[i]
    with pytest.raises(ValueError, match="one by one"):
        of.answer([sample, sample], DENSE, 8)


def test_the_sparse_method_runs_and_is_recorded(tmp_path: Path) -> None:
    new = run(tmp_path / "r.jsonl", job(fidelity=0, perplexity=None))
    dense = [record for record in new if record["method"] == "dense"]
    sparse = [record for record in new if record["method"].startswith("a_shape")]
    assert all(record["density"] == 1.0 for record in dense)
    assert all(0.2 < record["density"] < 0.6 for record in sparse)
    assert any(a["turns"][0]["generated"] != b["turns"][0]["generated"] for a, b in zip(dense, sparse, strict=True))


def test_another_architecture_runs_end_to_end(tmp_path: Path) -> None:
    new = run(tmp_path / "r.jsonl", job(lengths=(300,), samples=1), of=subject("qwen3"))
    assert {record["kind"] for record in new} == {"sample", "perplexity", "fidelity"}


def test_files_of_other_models_haystacks_and_seeds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run(path, job(), 1)
    with pytest.raises(ValueError, match="another seed"):
        run(path, job(seed=5))
    with pytest.raises(ValueError, match="another model"):
        run(path, job(), of=subject("qwen3"))
    changed = subject()
    with torch.no_grad():
        next(changed.model.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="another model"):
        run(path, job(), of=changed)
    path.write_text("not json\n")
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        run(path, job())


def test_perplexity_is_the_loss_of_the_model(tmp_path: Path) -> None:
    of = subject()
    new = run(tmp_path / "r.jsonl", job(methods=(DENSE,), samples=1, lengths=(300,)), of=of)
    record = next(record for record in new if record["kind"] == "perplexity")
    tokens = runner.text_window(of, HAYSTACK, 300, __import__("random").Random("0/300/0"))
    with torch.inference_mode():
        expected = of.model(tokens, labels=tokens).loss
    assert record["tokens"] == 299
    assert record["nats"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "no method"),
        ({"methods": (DENSE, DENSE)}, "dense is given twice"),
        ({"tasks": (), "perplexity": None}, "no task"),
        ({"tasks": (), "fidelity": 1}, "fidelity needs a task"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"lengths": (10,)}, "at least 64"),
    ],
)
def test_bad_jobs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)


def test_labels_name_what_differs_from_the_defaults() -> None:
    assert label_of(DENSE) == "dense"
    assert label_of(SPARSE) == "a_shape(sink=4,window=64)"
    assert label_of(Policy(methods.create("max_relative", alpha=0.02))) == "max_relative(alpha=0.02)"


def test_lengths() -> None:
    assert runner.parse_lengths("16k,4k,500,4096") == (500, 4096, 16384)
    for bad in ("", "4q", "k", "-1", "0"):
        with pytest.raises(ValueError, match="4k,16k"):
            runner.parse_lengths(bad)


def test_a_model_that_changes_its_logits_in_another_way_is_refused() -> None:
    of = subject()
    head = of.model.lm_head
    forward = head.forward
    calls = iter(range(100))
    head.forward = lambda x: forward(x) * (3 if next(calls) == 0 else 1)
    with pytest.raises(ValueError, match="does more to its logits"):
        of.hidden_states(torch.arange(3, 80)[None], DENSE)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_a_file_that_goes_on(tmp_path: Path) -> None:
    """The real thing: kill -9 in the middle, start again, compare with one run."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "import torch, test_runner\n"
        "torch.set_num_threads(1)\n"
        "test_runner.run(Path(sys.argv[1]), test_runner.job())\n"
    )
    here = str(Path(__file__).parent)
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    process = subprocess.Popen([sys.executable, str(script), str(killed), here])
    deadline = time.time() + 60
    while time.time() < deadline and (not killed.exists() or killed.read_bytes().count(b"\n") < 6):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert killed.read_bytes().count(b"\n") >= 6
    run(killed, copy.deepcopy(job()))
    run(whole, job())
    assert without_circumstances(killed) == without_circumstances(whole)
