"""What a subject answers: alone and in batches, over turns, in a chat, from caches that keep less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from subjects_for_tests import DENSE, Chat, job, run, subject, without_circumstances  # noqa: E402
from tokenizers_for_tests import HAYSTACK, WordTokenizer  # noqa: E402

from gossamer import Policy, cache, methods  # noqa: E402
from gossamer.cli.specs import parse_method  # noqa: E402
from gossamer.evaluate import tasks  # noqa: E402
from gossamer.evaluate.perplexity import Windows  # noqa: E402
from gossamer.evaluate.subject import Subject  # noqa: E402
from gossamer.evaluate.summary import read_results, summary_rows  # noqa: E402


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


def test_questions_are_read_token_by_token_where_steps_choose(tmp_path: Path) -> None:
    """With a budget for everything, the answers are those of dense attention, in a batch and over turns too."""
    of = subject()
    whole = Policy(methods.create("dense"), decode=methods.create("quest", budget=4096))
    some = replace(whole, decode=methods.create("quest", budget=16, dense_layers=0))
    for turns in (1, 3):
        task = tasks.create("needle_multikey", turns=turns)
        samples = [job().sample(of, task, 160, index) for index in range(2)]
        for sample in samples:
            dense, same, chosen = (of.answer([sample], policy, 4)[0] for policy in (DENSE, whole, some))
            assert same.texts == dense.texts
            assert (dense.read, same.read) == (None, 1.0)
            assert chosen.read is not None
            assert 0 < chosen.read < 0.5
    both = of.answer([job().sample(of, tasks.create("needle_single"), 160, n) for n in (0, 1)], some, 4)
    assert len(both) == 2


DECODING = (
    "quest(budget=32,dense_layers=0)",
    "lserve(budget=64)",
    "infllm(local=32,init=16,block=16,blocks=1)",
    "oracle_topk(budget=16)",
)


@pytest.mark.parametrize("kept", [None, "int8"])
def test_policies_that_read_a_context_alike_read_it_once(kept: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And answer as each does alone; what wants the prompt's queries reads it for itself."""
    of = subject()
    store = None if kept is None else cache.create(kept)
    policies = [Policy(methods.create("dense"), decode=parse_method(decode), cache=store) for decode in DECODING]
    policies.append(replace(policies[0], method=parse_method("a_shape(sink=16,window=64)"), min_tokens=0))
    sample = job().sample(of, tasks.create("needle_multikey", turns=2), 200, 0)
    alone = [subject().answer([sample], policy, 4)[0] for policy in policies]
    reads = []
    forward = of.model.forward

    def counted(*args: Any, **given: Any) -> Any:
        reads.append(given["input_ids"].shape[1])
        return forward(*args, **given)

    monkeypatch.setattr(of.model, "forward", counted)
    together = [of.answer([sample], policy, 4)[0] for policy in policies]
    assert [answer.texts for answer in together] == [answer.texts for answer in alone]
    assert [answer.read for answer in together] == [answer.read for answer in alone]
    assert len({answer.texts for answer in alone}) > 1
    contexts = [tokens for tokens in reads if tokens > 100]
    assert len(contexts) == 4, reads  # quest and lserve share one
    assert together[0].cost == together[1].cost


def test_perplexity_is_the_loss_of_the_model(tmp_path: Path) -> None:
    of = subject()
    new = run(tmp_path / "r.jsonl", job(methods=(DENSE,), samples=1, lengths=(300,)), of=of)
    record = next(record for record in new if record["kind"] == "perplexity")
    tokens = Windows(of, HAYSTACK, 0).tokens(300, 0)
    with torch.inference_mode():
        expected = of.model(tokens, labels=tokens).loss
    assert record["tokens"] == 299
    assert record["nats"] == pytest.approx(float(expected), rel=1e-4)


def test_a_model_that_changes_its_logits_in_another_way_is_refused() -> None:
    of = subject()
    head = of.model.lm_head
    forward = head.forward
    calls = iter(range(100))
    head.forward = lambda x: forward(x) * (3 if next(calls) == 0 else 1)
    with pytest.raises(ValueError, match="does more to its logits"):
        of.hidden_states(torch.arange(3, 80)[None], DENSE)


class LineEnds(WordTokenizer):
    """Every token is a word and a line end."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(f"w{i}\n" for i in ids)


def test_only_answers_of_one_line_end_at_a_line_end() -> None:
    of = subject()
    of.tokenizer = LineEnds()
    sample = job().sample(of, tasks.create("needle_single"), 300, 0)
    for one_line, lines in ((True, 1), (False, 6)):
        answer = of.answer([sample], DENSE, 6, one_line=one_line)[0]
        assert answer.texts[0].count("\n") == lines


def test_in_a_chat_the_assistant_begins_the_answer() -> None:
    of = Subject(subject().model, Chat(), "chat", chat=True)
    for name, cue in (
        ("needle_single", "The number for"),
        ("json_kv", '"'),
        ("passkey", "The pass key is the number"),
        ("mqar", "The pair of"),
    ):
        sample = job().sample(of, tasks.create(name), 800, 0)
        turn = sample.turns[0]
        assert turn.cue.startswith(cue)
        assert f"{turn.asked} {turn.cue}" == (turn.for_chat or turn.question)
        asked = of.tokens(sample.context + turn.asked)[2:]  # the first word has a line end before it
        end = [7, 8, 9, *Chat()(turn.cue, add_special_tokens=False)["input_ids"]]
        assert of.prompt_tokens(sample)[-len(asked) - len(end) :] == [*asked, *end]


def test_chat_wraps_prompts_and_keeps_their_length(tmp_path: Path) -> None:
    of = Subject(subject().model, Chat(), "chat", chat=True)
    work = job(tasks=(tasks.create("needle_single"), tasks.create("needle_multikey", turns=2)), samples=1)
    for task in (*work.tasks, tasks.create("passkey")):
        sample = work.sample(of, task, 300, 0)
        longest = max(len(of.prompt_tokens(sample, i)) for i in range(task.turns))
        assert longest == sample.prompt_tokens == 300 - task.max_new_tokens
    path = tmp_path / "r.jsonl"
    assert {record["kind"] for record in run(path, work, of=of)} == {"sample", "perplexity", "fidelity"}
    with pytest.raises(ValueError, match="another setting of --chat"):
        run(path, work, of=Subject(of.model, Chat(), "chat"))
    with pytest.raises(ValueError, match="no chat template"):
        Subject(of.model, WordTokenizer(), "chat", chat=True)


@pytest.mark.parametrize("turns", [1, 2])
def test_answers_come_from_what_caches_keep(tmp_path: Path, turns: int) -> None:
    of = subject()
    fields: dict[str, dict[str, Any]] = {"snapkv": {"budget": 64, "window": 8}, "int8": {}}
    policies = [replace(DENSE, cache=cache.create(name, **given)) for name, given in fields.items()]
    whole = replace(DENSE, cache=cache.create("snapkv", budget=1000))
    task = tasks.create("needle_multikey", turns=turns)
    work = job(methods=(DENSE, whole, *policies), tasks=(task,), lengths=(300,), samples=1, perplexity=None, fidelity=0)
    new = {record["method"]: record for record in run(tmp_path / "r.jsonl", work, of=of)}
    dense, same, few, small = new.values()
    assert same["turns"] == dense["turns"]
    assert "cache_bytes" not in dense
    assert few["cache_bytes"] < 0.4 * same["cache_bytes"]
    assert small["cache_bytes"] < 0.4 * same["cache_bytes"]
    assert same["cache_peak_bytes"] == same["cache_bytes"]
    layers = of.model.config.num_hidden_layers
    # One layer holds the prompt as it came, the others what is left.
    prompt = few["cache_bytes"] * (layers - 1) / layers + same["cache_bytes"] / layers
    assert few["cache_peak_bytes"] == pytest.approx(prompt, rel=0.1)
    rows = {row.method: row for row in summary_rows(read_results(tmp_path / "r.jsonl"))}
    assert rows["dense+int8"].cache_bytes == rows["dense+int8"].step_bytes == small["cache_bytes"]
    assert rows["dense+int8"].cache_peak_bytes == small["cache_peak_bytes"] > small["cache_bytes"]
