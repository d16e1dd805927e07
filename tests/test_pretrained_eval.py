"""The evaluation of pretrained models asks every method for three budgets, and prompts of each kind in turns."""

from itertools import pairwise

import pytest

pytest.importorskip("transformers")

from gossamer.evaluate.runner import PERPLEXITY
from gossamer.methods.registry import available, class_of


def test_every_method_that_needs_no_profile_has_three_budgets(script):
    made = script("pretrained_eval").settings()
    assert len(set(made)) == len(made)
    names = {name for name in available() if class_of(name).settings} | {"minference"}
    assert {method.name for method in made} == names
    assert all(sum(method.name == name for method in made) == 3 for name in names)


def test_whatever_is_done_when_time_is_up_is_of_all_kinds_and_lengths(script):
    jobs = list(script("pretrained_eval").jobs((4096, 7680)))
    beside_dense = [job for job in jobs if job.fidelity]
    every = [job for job in beside_dense if len(job.methods) == len(script("pretrained_eval").settings())]
    assert beside_dense[-len(every) :] == every
    for first, second in pairwise(every):
        assert first.fidelity <= second.fidelity
    for prompts in (1, 8):
        here = [job for job in every if job.fidelity == prompts]
        texts = {job.perplexity.name for job in here if job.compared == (PERPLEXITY,)}
        assert len(texts) == 2
        assert {job.lengths for job in here} == {(4096,), (7680,)}
        assert len(here) == 2 * 3
    answers = jobs[len(beside_dense) :]
    assert [job.samples for job in answers][-1] == 30
    assert all(not job.fidelity and job.labels[0] == "dense" for job in answers)
