"""The demonstrations' questions and table, with a tiny model in place of a real one."""

import pytest
import torch
from repository import ROOT, script

transformers = pytest.importorskip("transformers")

from subjects_for_tests import Chat  # noqa: E402
from subjects_for_tests import subject as tiny  # noqa: E402

from gossamer.evaluate.subject import Subject  # noqa: E402


@pytest.fixture(scope="module")
def figures():
    """Of two texts, read dense and sparse; the first has two questions."""
    reading = script("examples/reading.py")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 2900, (3, 300), generator=generator).tolist()
    asked = (prompts[0], prompts[0][:280] + [7] * 9)
    texts = [
        reading.Text("one", asked, (lambda answer: 1.0, lambda answer: 0.5), 4, (0.5, 0.6)),
        reading.Text("other", (prompts[2],), (lambda answer: 1.0,), 4, (None,)),
    ]
    rows = [
        reading.Row("dense", "dense"),
        reading.Row("window", "a_shape", {"sink": 4, "window": 32, "min_tokens": 0, "max_density": 2.0}),
    ]
    return reading.run(tiny(), texts, rows, every=2)


def test_the_first_row_is_what_others_are_compared_with(figures):
    dense, sparse = figures["rows"].values()
    assert (dense["kl"], dense["top1_agreement"], dense["density"]) == (0.0, 1.0, 1.0)
    assert sparse["kl"] > 0
    assert sparse["density"] < 0.3
    assert (sparse["right"], sparse["asked"]) == (2, 3)
    assert len(sparse["each"]["prefill_seconds"]) == len(sparse["each"]["kl"]) == 2
    assert (figures["kinds"], figures["prompt_tokens"]) == (["one", "other"], [300, 300])


def test_the_table_has_a_line_for_each_row(figures):
    lines = script("examples/reading.py").report(figures).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method"))
    assert lines[start].split()[-1] == "KL"
    assert [line.split()[0] for line in lines[start + 1 : start + 3]] == ["dense", "window"]
    assert lines[start + 1].split()[-2:] == ["-", "-"]


def test_a_question_that_is_asked_of_the_cache_has_the_answer_of_its_own_prompt():
    reading = script("examples/reading.py")
    of, row = tiny(), reading.Row("dense", "dense")
    prompts = torch.randint(3, 2900, (2, 300), generator=torch.Generator().manual_seed(1)).tolist()
    other = prompts[0][:280] + prompts[1][:15]
    both = reading.Text("both", (prompts[0], other), (lambda answer: 1.0,) * 2, 6, (None, None))
    assert both.shared == 280
    together, alone = reading.Figures(), reading.Figures()
    reading.read_and_answer(of, both, row, together)
    reading.read_and_answer(of, reading.Text("one", (other,), (lambda answer: 1.0,), 6, (None,)), row, alone)
    assert together.answers[1:] == alone.answers
    assert together.answers[0] != alone.answers[0]


def test_texts_of_the_pretrained_demo_have_their_length_and_their_questions(monkeypatch):
    demo = script("examples/demo_pretrained.py")
    monkeypatch.setattr(demo, "LENGTH", 8000)
    of = Subject(tiny().model, Chat(), "chat", chat=True)
    texts = demo.ask(of)
    assert [text.kind for text in texts] == ["needle_multikey", "repeat_passage"]
    for text in texts:
        assert len(text.prompts) == len(text.scores) == demo.QUESTIONS
        assert max(map(len, text.prompts)) == 8000 - text.answer_tokens
        assert 7500 < text.shared < min(map(len, text.prompts))
        assert all(score("none of that") < 1.0 for score in text.scores)


def test_the_demos_share_what_they_measure_with():
    for name in ("demo", "demo_pretrained"):
        assert "perf_counter" not in (ROOT / "examples" / f"{name}.py").read_text()
