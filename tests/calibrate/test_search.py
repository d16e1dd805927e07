"""Planted heads are recognised, choices against every choice there is, and a search that goes on where it stopped."""

from __future__ import annotations

import itertools
import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import CANDIDATES, KNOWN_AS, PATTERNS, planted

pytest.importorskip("transformers")

from tiny import VOCAB, tiny_llama

from gossamer import AttentionCall, Profile, backends, enable, methods
from gossamer.calibrate.candidates import candidates
from gossamer.calibrate.choice import choose_cheapest, choose_fixed, choose_global, least_under
from gossamer.calibrate.cost import CostModel, count_terms, pairs_of_heads
from gossamer.calibrate.figures import FIGURES, LayerFigures, measure_layer
from gossamer.calibrate.prices import Measured, Modelled, Pairs
from gossamer.calibrate.samples import Samples
from gossamer.calibrate.search import Found, measure
from gossamer.calibrate.store import Store
from gossamer.calibrate.summary import held_out_words, summary_table
from gossamer.evaluate import tasks
from gossamer.evaluate.fidelity import relative_l2
from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.metrics import bootstrap_interval
from gossamer.evaluate.subject import Subject
from gossamer.methods import PerHead
from gossamer.methods.registry import class_of
from gossamer.plan import SparsePlan
from gossamer.policy import Policy
from gossamer.profiles.costs import Costs, Kernel, KernelCost, Planning
from gossamer.profiles.machine import Machine

TRIED = (
    methods.create("dense"),
    methods.create("a_shape", sink=4, window=20),
    methods.create("block_sparse", blocks=2),
)


def dense_out(call: AttentionCall) -> torch.Tensor:
    return backends.attend(call, SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent))[0]


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.4, 0.6])
def test_planted_heads_are_recognised(noise: float) -> None:
    """At least 95 of 100 of 200 heads: 50 at each noise."""
    names = [PATTERNS[head % len(PATTERNS)] for head in range(50)]
    call = planted(names, noise, seed=int(10 * noise))
    figures = measure_layer(call, dense_out(call), CANDIDATES, Pairs(), groups=10)
    chosen = choose_fixed(figures.error.T, figures.cost.T, 0.56)
    right = [CANDIDATES[index].name in KNOWN_AS[name] for name, index in zip(names, chosen.tolist(), strict=True)]
    assert sum(right) >= 0.95 * len(right), [name for name, fits in zip(names, right, strict=True) if not fits]
    assert {CANDIDATES[index].name for index in chosen.tolist()} == set().union(*KNOWN_AS.values()) & {
        method.name for method in CANDIDATES
    }


def gqa_call() -> AttentionCall:
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, heads, 150, 16, generator=g) for heads in (4, 2, 2))
    return AttentionCall(2 * q, 2 * k, v)


def test_figures_are_those_of_the_heads_in_a_merged_plan_and_of_attention_written_out() -> None:
    call = gqa_call()
    out = dense_out(call)
    by_one, by_all = (measure_layer(call, out, TRIED, Pairs(), groups=groups) for groups in (1, 2))
    for name in FIGURES:
        torch.testing.assert_close(getattr(by_one, name), getattr(by_all, name), atol=1e-6, rtol=1e-6)
    chosen = (1, 2, 0, 2)
    plan = PerHead(((*(TRIED[index] for index in chosen),),)).plan(AttentionCall(call.q, call.k, call.v, layer=0))
    mask = plan.to_mask()[0]
    k, v = (x[0].repeat_interleave(2, dim=0).double() for x in (call.k, call.values))
    logits = call.q[0].double() @ k.mT * call.scale
    seen = torch.ones(150, 150, dtype=torch.bool).tril()
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    inside = weights * mask
    expected, got = weights @ v, inside / inside.sum(-1, keepdim=True) @ v
    error = (got - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    last, of_last = (x[:, -64:] for x in (got, expected))
    last_error = (last - of_last).norm(dim=(1, 2)) / of_last.norm(dim=(1, 2))
    assert not torch.allclose(error, last_error, rtol=1e-2)
    for head, index in enumerate(chosen):
        assert float(by_one.error[index, head]) == pytest.approx(float(error[head]), abs=1e-5)
        assert float(by_one.last_error[index, head]) == pytest.approx(float(last_error[head]), abs=1e-5)
        assert float(by_one.recall[index, head]) == pytest.approx(float(inside[head].sum(-1).mean()), abs=1e-5)
        assert float(by_one.cost[index, head]) == pytest.approx(int(mask[head].sum()) / int(seen.sum()))


def test_sinks_go_with_their_heads() -> None:
    call = gqa_call()
    with_sinks = AttentionCall(call.q, call.k, call.v, sinks=torch.tensor([0.0, 5.0, 2.0, -1.0]))
    out = dense_out(with_sinks)
    part = with_sinks.of_groups([1])
    torch.testing.assert_close(dense_out(part), out[:, 2:4])


def test_measured_costs_are_positive_and_dense_costs_one() -> None:
    call = gqa_call()
    cost = measure_layer(call, dense_out(call), TRIED, Measured(rounds=1)).cost
    assert bool((cost > 0).all())
    assert cost[0].tolist() == [1.0] * 4


def test_the_cost_of_a_model_is_its_seconds_of_the_head_and_of_planning_as_timed() -> None:
    call = gqa_call()
    seconds = {"calls": 7.0, "pairs": 1e-4, "columns": 2e-4}
    kernel = Kernel.of(call)
    costs = Costs(Machine.here(), (KernelCost(kernel, seconds, 0.0, 0.0, 1, (150,)),))
    ticks = itertools.count()
    price = Modelled(clock=lambda: float(next(ticks)), model=CostModel(costs))  # planning takes a second
    found = measure_layer(call, dense_out(call), TRIED, price, groups=2).cost
    pairs = measure_layer(call, dense_out(call), TRIED, Pairs()).cost
    dense = 1e-4 * 150 * 151 / 2
    torch.testing.assert_close(found[1:], pairs[1:] + 0.25 / dense)
    assert found[0].tolist() == [1.0] * 4
    stripes = methods.create("vertical_slash", vertical_size=8, slash_size=4)
    counts = {name: count[0] for name, count in count_terms(call, stripes.plan(call)).items()}
    cost = measure_layer(call, dense_out(call), [stripes], price, groups=2).cost[0, 0]
    assert counts["columns"] > 0
    known = Planning(kernel, stripes.to_dict(), 8, 4, (150,), (40.0,))  # five seconds a head
    knows = Modelled(clock=lambda: float("nan"), model=CostModel(replace(costs, planning=(known,))))
    with_planning = measure_layer(call, dense_out(call), [stripes], knows).cost[0, 0]
    assert float(with_planning * dense) == pytest.approx(float(cost * dense) + 5 - 0.25)
    assert float(cost * dense) == pytest.approx(float(1e-4 * counts["pairs"] + 2e-4 * counts["columns"]) + 0.25)


def some_figures(heads: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    costs = torch.rand(heads, count, generator=g, dtype=torch.float64)
    losses = (1 - costs) * torch.rand(heads, count, generator=g, dtype=torch.float64)
    costs[:, 0], losses[:, 0] = 1.0, 0.0
    return losses, costs


@pytest.mark.parametrize("seed", range(4))
def test_shared_budgets_are_the_best_of_all_choices(seed: int) -> None:
    pytest.importorskip("scipy")
    losses, costs = some_figures(5, 4, seed)
    every = [torch.tensor(choice) for choice in itertools.product(range(4), repeat=5)]
    rows = torch.arange(5)
    totals = [(float(losses[rows, c].mean()), float(costs[rows, c].mean())) for c in every]
    budget = 0.6
    found = choose_global(losses, costs, budget)
    best = min(loss for loss, cost in totals if cost <= budget)
    assert float(losses[rows, found].mean()) == pytest.approx(best, abs=1e-9)
    assert float(costs[rows, found].mean()) <= budget + 1e-9
    found = choose_cheapest(losses, costs, 0.1)
    cheapest = min(cost for loss, cost in totals if loss <= 0.1)
    assert float(costs[rows, found].mean()) == pytest.approx(cheapest, abs=1e-9)
    with pytest.raises(ValueError, match="more than 0"):
        choose_global(losses, costs, 0.0)
    # Sharing can only do better than as much for each head.
    fixed = choose_fixed(losses, costs, budget, nearly=0.0, dense_above=9.0)
    spent = float(costs[rows, fixed].mean())
    assert float(losses[rows, choose_global(losses, costs, spent)].mean()) <= float(losses[rows, fixed].mean()) + 1e-9


def test_a_fixed_budget_takes_the_simpler_of_two_that_are_nearly_as_good_and_dense_where_nothing_fits() -> None:
    costs = torch.tensor([[1.0, 0.2, 0.3, 0.6]] * 4, dtype=torch.float64)
    losses = torch.tensor(
        [[0.0, 0.11, 0.10, 0.01], [0.0, 0.2, 0.10, 0.01], [0.0, 0.9, 0.8, 0.01], [0.0, 0.1, 0.1, 0.1]],
        dtype=torch.float64,
    )
    assert choose_fixed(losses, costs, 0.3).tolist() == [1, 2, 0, 1]
    assert choose_fixed(losses, costs, 0.3, nearly=0.0).tolist() == [2, 2, 0, 1]
    assert choose_fixed(losses, costs, 0.3, dense_above=1.0).tolist() == [1, 2, 2, 1]
    assert choose_fixed(losses, costs, 0.1).tolist() == [0, 0, 0, 0]


def test_bisection() -> None:
    asked: list[float] = []

    def value(budget: float) -> float:
        asked.append(budget)
        return 1 - budget

    assert least_under(value, 0.25, 0.0, 1.0, steps=6) == pytest.approx(0.75, abs=1 / 64)
    assert len(asked) == 7
    assert least_under(value, 2.0, 0.1, 1.0) == 0.1


def test_candidates_are_what_methods_declare() -> None:
    found = candidates()
    assert found[0] == methods.create("dense")
    assert len(found) == 59  # as the page of the methods says
    assert len(set(found)) == len(found)
    assert {method.name for method in found[1:]} == {
        "a_shape",
        "vertical_slash",
        "block_sparse",
        "xattention",
        "max_relative",
    }
    one = methods.create("a_shape", sink=1, window=2)
    assert candidates([one, "dense", one]) == [methods.create("dense"), one]
    assert len(candidates(["flexprefill"])) == 1 + len(methods.FlexPrefill.settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("per_head", "made of methods for each head"),
        ("duo_attention", "belong to heads by their place"),
        ("seer_attention", "belong to heads by their place"),
        ("pbs", "cannot be one of several methods of a layer .*without an order of keys alone"),
        ("flash_prefill", "cannot be one of several methods of a layer .*must share pruned_mean"),
        ("corrected", "must share pruned_mean"),
    ],
)
def test_methods_that_cannot_stand_beside_others_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        candidates([name])


APART = [
    *("a_shape", "tri_shape", "triangle_mix", "vertical_slash", "block_sparse", "flexprefill", "xattention"),
    *(
        "anchor_attention",
        "vec_attention",
        "max_relative",
        "sparge",
        "prism",
        "stem",
        "cosa",
        "auto",
        "mtraining",
        "longgen",
        "grid",
        "mminference",
    ),
]


def test_every_other_method_declares_candidates_whose_mixture_runs_as_it_was_measured() -> None:
    """One of each method in one layer, in a model that is enabled, at the errors and costs of the search."""
    chosen = [candidates([name])[1] for name in APART] + [methods.create("flash_prefill", version=1)]
    assert {*APART, "flash_prefill", "pbs", "corrected", "dense", "minference", "per_head"} >= {
        name for name in methods.available() if class_of(name).apart
    }
    model = tiny_llama(num_attention_heads=20, num_key_value_heads=10, hidden_size=160, num_hidden_layers=1)
    of = Subject(model, Words(), "tiny")
    calls: list[Any] = []
    tokens = torch.arange(2, 302)[None] % VOCAB
    of.hidden_states(tokens, Policy.of("dense"), calls.append)
    call, out = calls[0].call, calls[0].out
    figures = measure_layer(call, out, [methods.create("dense"), *chosen], Pairs(), groups=1)
    profile = Profile((chosen,))
    seen: list[Any] = []
    of.hidden_states(tokens, Policy(profile.method, min_tokens=0, max_density=1.0), seen.append)
    plan = profile.method.plan(call)
    error = relative_l2(backends.attend(call, plan)[0][0], out[0])
    of_heads = torch.arange(20)
    torch.testing.assert_close(error.double(), figures.error[of_heads + 1, of_heads], atol=1e-5, rtol=1e-3)
    share = pairs_of_heads(call, plan) / (300 * 301 / 2)
    torch.testing.assert_close(share, figures.cost[of_heads + 1, of_heads])
    with enable(model, profile=profile, min_tokens=0, max_density=1.0) as handle, torch.no_grad():
        model(input_ids=tokens)
        (layer,) = handle.stats()
    assert layer.density == pytest.approx(float(share.mean()))


class Words:
    """A tokenizer of numbers."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": [2 + int(word) % (VOCAB - 2) for word in text.split()]}


TEXT = Haystack("numbers.txt", " ".join(str(i * i % 59) for i in range(400)))
OTHER = Haystack("others.txt", " ".join(str(i * 7 % 61) for i in range(400)))


def subject() -> Subject:
    return Subject(tiny_llama(), Words(), "tiny")


def searched(path: Path | None, stop_after: int | None = None, **changes: Any) -> Found:
    of = subject()
    given: dict[str, Any] = {"count": 2, "held_out": 1, "haystack": TEXT, "others": [OTHER]}
    samples = Samples(of, [TEXT], [100, 120], **given | changes)
    seen = 0

    def progress(sample: Any, layer: int) -> None:
        nonlocal seen
        seen += 1
        if seen == stop_after:
            raise KeyboardInterrupt

    store = Store(path, {"model": of.fingerprint(), "samples": samples.to_dict()})
    return measure(of, samples, TRIED, Pairs(), store, progress=progress)


def test_an_interrupted_search_ends_with_the_same_figures(tmp_path: Path) -> None:
    whole, path = searched(None), tmp_path / "figures"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            searched(path, stop_after=4)
        with path.open("ab") as file:
            file.write(b'{"prompt": "cut')
    cut = searched(path)
    assert whole.layers == cut.layers == [0, 1]
    assert whole.held_out is not None
    assert cut.held_out is not None
    for name in ("error", "recall", "cost"):
        assert torch.equal(whole.calibration[name], cut.calibration[name])
        assert torch.equal(whole.held_out[name], cut.held_out[name])
    assert whole.calibration["error"].shape == (2, 4, 3)
    lines = path.read_bytes()
    searched(path)
    assert path.read_bytes() == lines
    with pytest.raises(ValueError, match="another samples"):
        searched(path, seed=1)
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="another kind"):
        searched(path)


def test_figures_changed_at_random_are_read_or_refused(tmp_path: Path) -> None:
    path, about = tmp_path / "figures", {"model": "m"}
    store = Store(path, about)
    for layer in range(3):
        store.add("a prompt", layer, LayerFigures(*(torch.rand(2, 3, dtype=torch.float64) for _ in FIGURES)))
    good, draw, refused = path.read_bytes(), random.Random(0), []
    pieces = (b"", b"9" * 30, b"[", b"]", b"}", b"null", b"-1", b"\xff", b"1e999", b'"x"', b"NaN", b"\n", b",")
    for _ in range(300):
        spoilt = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(spoilt))
            spoilt[at : at + draw.choice((0, 1, 9))] = draw.choice(pieces)
        path.write_bytes(spoilt)
        try:
            Store(path, about)
        except ValueError as error:
            refused.append(str(error))
    assert 100 < len(refused) < 300
    assert all("holds no figures to go on with" in one or "holds figures of another" in one for one in refused)


def test_held_out_samples_are_others_of_the_same_text_or_another_text() -> None:
    of = subject()
    same = Samples(of, [TEXT], [100], count=2, held_out=1, haystack=TEXT)
    assert [(s.source, s.index, s.held_out) for s in same.listed] == [(0, 0, False), (0, 1, False), (0, 2, True)]
    other = Samples(of, [TEXT], [100], count=2, held_out=1, others=[OTHER], haystack=TEXT)
    assert [(s.source, s.index, s.held_out) for s in other.listed] == [(0, 0, False), (0, 1, False), (1, 0, True)]
    tokens = [same.tokens(sample) for sample in same.listed]
    assert all(t.shape == (1, 100) for t in tokens)
    assert not torch.equal(tokens[0], tokens[2])
    assert same.to_dict()["sources"] == ["numbers.txt"]
    assert same.to_dict()["held_out_sha256"] != other.to_dict()["held_out_sha256"]


class AnyWords(Words):
    def __call__(self, text: str) -> dict[str, Any]:
        return super().__call__(" ".join(str(zlib.crc32(word.encode())) for word in text.split()))


def test_samples_of_tasks_are_their_prompts() -> None:
    of, task = Subject(tiny_llama(), AnyWords(), "tiny"), tasks.create("mqar", turns=1)
    samples = Samples(of, [task], [150], count=1, held_out=1, haystack=TEXT)
    tokens = [samples.tokens(sample) for sample in samples.listed]
    assert all(t.shape[1] <= 150 - task.max_new_tokens for t in tokens)
    assert not torch.equal(*tokens)


def test_weights_and_objectives_change_what_is_chosen() -> None:
    pytest.importorskip("scipy")
    figures = {
        "error": torch.tensor([[[0.0, 0.4], [0.0, 0.3]]], dtype=torch.float64),
        "last_error": torch.tensor([[[0.0, 0.4], [0.0, 0.7]]], dtype=torch.float64),
        "recall": torch.tensor([[[1.0, 0.9], [1.0, 0.5]]], dtype=torch.float64),
        "cost": torch.tensor([[[1.0, 0.2], [1.0, 0.2]]], dtype=torch.float64),
    }
    figures = {name: table[None] for name, table in figures.items()}  # of one prompt
    kinds = TRIED[:2]
    assert Found(kinds, [0], figures).choose("global", 0.6).tolist() == [[1, 0]]  # it loses what is asked for
    assert Found(kinds, [0], figures, objective="output").choose("global", 0.6).tolist() == [[0, 1]]
    assert Found(kinds, [0], figures, objective="mass").choose("global", 0.6).tolist() == [[1, 0]]
    weights = torch.tensor([[1.0, 9.0]])
    found = Found(kinds, [1], figures, figures, objective="output")
    assert replace(found, weights=weights).choose("global", 0.6).tolist() == [[1, 0]]
    chosen = found.choose("cheapest", 0.15)
    assert chosen.tolist() == [[0, 1]]
    assert [[m.name for m in layer] for layer in found.methods(chosen)] == [["dense", "dense"], ["dense", "a_shape"]]
    names = [[m.name for m in layer] for layer in replace(found, depth=4).methods(chosen)]
    assert names == [["dense", "dense"], ["dense", "a_shape"], ["dense", "dense"], ["dense", "dense"]]
    summary = found.summary(chosen)
    assert summary["held_out"] == summary["calibration"]
    assert summary["calibration"]["cost"] == pytest.approx(0.6)


def test_a_summary_has_intervals_over_the_prompts_of_each_kind() -> None:
    g = torch.Generator().manual_seed(0)
    chosen_by, others = ({n: torch.rand(p, 3, 4, 2, generator=g, dtype=torch.float64) for n in FIGURES} for p in (1, 5))
    found = Found(TRIED[:2], [0, 1, 2], chosen_by, others)
    chosen = torch.randint(2, (3, 4), generator=g)
    summary = found.summary(chosen)
    assert (summary["calibration"]["prompts"], summary["calibration"]["intervals"]) == (1, {})
    held_out = summary["held_out"]
    assert held_out["prompts"] == 5
    for name in FIGURES:
        each = [
            sum(float(others[name][p, i, j, chosen[i, j]]) for i in range(3) for j in range(4)) / 12 for p in range(5)
        ]
        assert held_out[name] == pytest.approx(sum(each) / 5)
        assert held_out["intervals"][name] == pytest.approx(list(bootstrap_interval(each)))
        assert min(each) <= held_out["intervals"][name][0] < held_out[name] < held_out["intervals"][name][1]
    assert held_out["loss"] == pytest.approx((held_out["error"] + held_out["last_error"]) / 2)
    header, *rows = summary_table(summary)
    assert header == ["on", "prompts", "cost", "error", "of the last queries", "recall"]
    assert [row[:2] for row in rows] == [["calibration", "1"], ["held out", "5"]]
    assert [" [" in row[3] for row in rows] == [False, True]
    low, high = held_out["intervals"]["error"]
    assert held_out_words(summary) == (
        f"error {held_out['error']:.4f} [{low:.4f}, {high:.4f}] on 5 held-out prompts, "
        f"{summary['calibration']['error']:.4f} on the 1 that chose"
    )
    assert held_out_words({"calibration": held_out}) == "no prompts were held out"


def test_figures_survive_the_way_through_json() -> None:
    g = torch.Generator().manual_seed(0)
    figures = LayerFigures(*(torch.rand(2, 3, generator=g, dtype=torch.float64) for _ in FIGURES))
    assert torch.equal(LayerFigures.from_dict(figures.to_dict()).error, figures.error)
