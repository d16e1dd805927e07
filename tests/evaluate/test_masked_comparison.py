"""Fills by methods beside dense ones, variants of SparseD, overlaps, and their summaries."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import EuroBertConfig, EuroBertForMaskedLM

from gossamer import AttentionCall, Extent
from gossamer.evaluate.masked.comparison import Fills, fields_of, fill_lines, weighed
from gossamer.evaluate.masked.overlap import Overlaps, by_chance, jaccard
from gossamer.evaluate.masked.passages import draw
from gossamer.evaluate.masked.subject import MaskedSubject
from gossamer.evaluate.masked.summary import (
    fill_rows,
    fill_table,
    overlap_rows,
    overlap_table,
    paired,
    same_seeds,
    step_costs,
)
from gossamer.evaluate.masked.variants import CHOICES, Variant
from gossamer.evaluate.schema import checked
from gossamer.layout import DenoisingStep, TokenLayout
from gossamer.methods import SparseD
from gossamer.methods.denoising import mass_of_blocks
from gossamer.plan import Grid
from gossamer.policy import Policy
from gossamer.report.masked import fills as picture_of_fills
from gossamer.report.masked import kind_of, styles_of

BLOCK, PROMPT, LENGTH = 16, 101, 150


def call(step: int = 5, total: int = 20, state: Any = None, seed: int = 0) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(1, 4, LENGTH, 16, generator=generator)
    k, v = (torch.randn(1, 2, LENGTH, 16, generator=generator) for _ in "kv")
    extent = Extent([0], [LENGTH], [0], [LENGTH], causal=False)
    of = {"layout": TokenLayout((PROMPT,)), "step": DenoisingStep(step, total), "layer": 1}
    return AttentionCall(q, k, v, extent, state=[{}] if state is None else state, **of)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_variant_has_as_many_blocks_in_each_row(choice: str) -> None:
    own, other = SparseD(0.2, block=BLOCK).mask(call()), Variant(0.2, block=BLOCK, choice=choice).mask(call())
    assert torch.equal(own.sum(dim=-1), other.sum(dim=-1))
    assert torch.equal(own, other) == (choice in ("isolated", "fresh"))


def test_what_each_variant_takes() -> None:
    masks = {choice: Variant(0.2, block=BLOCK, choice=choice).mask(call()) for choice in CHOICES}
    mass = mass_of_blocks(call(), Grid(call().extent, BLOCK, BLOCK))
    kept = {choice: float((mass * mask).sum()) for choice, mask in masks.items()}
    assert kept["best"] == kept["joint"] > kept["isolated"] > max(kept["window"], kept["random"])
    rows = torch.arange(masks["window"].shape[2])
    for choice in ("window", "random"):
        assert masks[choice][0, :, rows, rows].all()
    near = masks["window"][0, 0, 5].nonzero().flatten().tolist()
    assert near == sorted([5, 0, 4, 6][: len(near)])
    assert not torch.equal(masks["random"][0, 0], masks["random"][0, 1])
    other = Variant(0.2, block=BLOCK, choice="random").mask(call(seed=3), masks["random"].sum(dim=-1))
    assert torch.equal(masks["random"], other)  # it looks at no query


def sparse_steps(method: Variant, total: int) -> list[int]:
    state: list[Any] = [{}]
    policy = Policy(method, min_tokens=0)
    return [step for step in range(total) if not policy.decide(call(step, total, state)).is_dense]


def test_spans_have_equally_many_sparse_steps() -> None:
    assert sparse_steps(Variant(0.2, block=BLOCK), 10) == [4, 5, 6, 7, 8, 9]
    assert sparse_steps(Variant(0.2, block=BLOCK, span="first", part=0.3), 10) == [1, 2, 3]
    assert sparse_steps(Variant(0.2, block=BLOCK, span="last", part=0.3), 10) == [7, 8, 9]


@pytest.mark.parametrize(("choice", "stays"), [("isolated", True), ("joint", True), ("fresh", False), ("best", False)])
def test_some_variants_choose_once_and_others_anew(choice: str, stays: bool) -> None:
    method, state = Variant(0.2, block=BLOCK, choice=choice), [{}]
    first = method.plan(call(5, state=state, seed=1)).density()
    assert first == 1.0
    later = [method.plan(call(step, state=state, seed=step)).block_mask() for step in (6, 7)]
    assert torch.equal(*later) == stays
    assert torch.equal(later[0].sum(dim=-1), later[1].sum(dim=-1)) == (choice != "fresh")


def test_variants_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"choice must be one of isolated, .*, got 'nearest'"):
        Variant(choice="nearest")
    with pytest.raises(ValueError, match=r"span must be one of after, first, last, got 'middle'"):
        Variant(span="middle")
    with pytest.raises(ValueError, match="part must be between 0 and 1, got 1"):
        Variant(part=1)


@pytest.fixture(scope="module")
def subject() -> MaskedSubject:
    torch.manual_seed(0)
    config = EuroBertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, mask_token_id=96,
    )  # fmt: skip
    model: Any = EuroBertForMaskedLM(config)
    for layer in model.model.layers:  # so that attention is not alike everywhere
        layer.self_attn.q_proj.weight.data *= 8
        layer.self_attn.v_proj.weight.data *= 30
    return MaskedSubject(model, None, "tiny")


METHODS = (SparseD(0.2, block=BLOCK), Variant(0.2, block=BLOCK, choice="random"), SparseD(1.0, block=BLOCK))
POLICIES = [Policy(method, min_tokens=0, max_density=1.0) for method in METHODS]


@pytest.fixture(scope="module")
def lines(subject: MaskedSubject) -> list[dict[str, Any]]:
    text = torch.randint(6, 96, (400,), generator=torch.Generator().manual_seed(0))
    fills, found = Fills(6, compared=2), []
    overlaps = Overlaps([SparseD(0.2, block=BLOCK)], fills)
    for seed, index in ((0, 0), (0, 1), (1, 0)):
        passage = draw(text, 128, index, seed, 0.5)
        found += fill_lines(subject, POLICIES, [passage], fills, observe=overlaps.observe)
        found += overlaps.lines(passage)
    return found


def of(lines: list[dict[str, Any]], policy: Policy) -> list[dict[str, Any]]:
    label = fields_of(policy)["method"]
    return [line for line in lines if line["kind"] == "fill" and line["method"] == label]


def test_lines_are_of_the_format(lines: list[dict[str, Any]]) -> None:
    assert [line["kind"] for line in lines] == (["fill"] * 4 + ["overlap"]) * 3
    for line in lines:
        assert checked(line) == line


def test_all_blocks_are_as_dense(lines: list[dict[str, Any]]) -> None:
    for line in of(lines, POLICIES[2]):
        assert line["agreement"] == line["top1"] == line["density"] == 1.0
        assert line["kl"] < 1e-6


def test_fewer_blocks_show(lines: list[dict[str, Any]]) -> None:
    for policy in POLICIES[:2]:
        for line in of(lines, policy):
            steps = [step["density"] for step in line["by_step"]]
            assert steps[:3] == [1.0] * 3
            assert max(steps[3:]) < 0.7
            assert line["density"] == pytest.approx(sum(steps) / 6, abs=1e-5)
            assert [one["step"] for one in line["compared"]] == [2, 5]
            assert line["compared"][0]["kl"] < 1e-6  # dense still
            assert line["compared"][1]["kl"] > 1e-5
            assert line["dense_because"] == {f"{policy.method.name} needs step 2 or later": 4}


def test_what_is_there_is_not_made_again(subject: MaskedSubject) -> None:
    text = torch.arange(6, 86).repeat(3)
    policies = [Policy(METHODS[0], min_tokens=0)]
    made = list(fill_lines(subject, policies, [draw(text, 64, 0, 0, 0.5)], Fills(2), has=lambda head: True))
    assert made == []
    heads: list[Any] = []
    made = list(fill_lines(subject, policies, [draw(text, 64, 0, 0, 0.5)], Fills(2), has=heads.append))  # type: ignore[arg-type]
    assert [line["method"] for line in made] == ["dense(kernel=gossamer)", "sparsed(share=0.2,block=16,min_tokens=0)"]
    assert all(head.items() <= line.items() for head in heads for line in made if line["method"] == head["method"])


def test_overlaps_of_masks() -> None:
    one = torch.tensor([[True, True, False, False]])
    other = torch.tensor([[True, False, True, False]])
    assert float(jaccard(one, other)) == pytest.approx(1 / 3)
    assert float(jaccard(one, one)) == 1.0
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(64, 64, generator=generator) < 0.3 for _ in "ab")
    assert float(by_chance(a, b)) == pytest.approx(float(jaccard(a, b)), abs=0.02)


def test_overlaps_over_steps_masks_and_texts(lines: list[dict[str, Any]]) -> None:
    found = [line for line in lines if line["kind"] == "overlap"]
    assert [(line["index"], line["seed"]) for line in found] == [(0, 0), (1, 0), (0, 1)]
    for line in found:
        assert line["chosen"] == 2
        assert line["by_step"][2] == 1.0
        assert max(line["by_step"][3:]) < 1.0
        later = sum(line["by_step"][3:]) / 3
        assert sum(map(sum, line["by_head"])) / 8 == pytest.approx(later, abs=1e-3)
    assert [(len(line["seeds"]), len(line["texts"])) for line in found] == [(0, 0), (0, 1), (1, 0)]


def test_the_summary_is_by_text(lines: list[dict[str, Any]]) -> None:
    rows = {row.method: row for row in fill_rows(lines)}
    row = rows[fields_of(POLICIES[0])["method"]]
    own = of(lines, POLICIES[0])
    assert (row.texts, row.fills) == (2, 3)
    agreement = [line["agreement"] for line in own]
    expected = ((agreement[0] + agreement[2]) / 2 + agreement[1]) / 2
    assert row.figures["agreement"].mean == pytest.approx(expected)
    assert row.figures["agreement"].low <= expected <= row.figures["agreement"].high
    assert row.density < 1
    dense = rows["dense(kernel=gossamer)"]
    assert dense.lost == {}
    difference = dense.figures["accuracy"].mean - row.figures["accuracy"].mean
    assert row.lost["accuracy"].mean == pytest.approx(difference)
    assert len(fill_table([*rows.values()])) == 5
    (alike,) = overlap_rows(lines)
    assert (alike.texts, alike.fills, alike.chosen) == (2, 3, 2)
    assert alike.seeds is not None
    assert alike.others is not None
    assert alike.chance < alike.by_step[2] == 1.0
    assert len(overlap_table([alike])) == 2


def test_differences_are_paired_by_text(lines: list[dict[str, Any]]) -> None:
    one, other = (fields_of(policy)["method"] for policy in POLICIES[:2])
    found = paired(lines, one, other, 128, "agreement")
    assert found is not None
    difference, texts = found
    assert texts == 2
    a, b = ([line["agreement"] for line in of(lines, policy)] for policy in POLICIES[:2])
    by_text = ((a[0] - b[0] + a[2] - b[2]) / 2, a[1] - b[1])
    assert difference.mean == pytest.approx(sum(by_text) / 2)
    assert difference.low <= difference.mean <= difference.high
    assert paired(lines, one, "nothing", 128, "agreement") is None


def test_seconds_are_without_what_observes(subject: MaskedSubject) -> None:
    text, waited = torch.arange(6, 86).repeat(3), list[int]()

    def wait(passage: Any, step: int, seen: Any) -> None:
        waited.append(step)
        time.sleep(0.2)

    (line,) = fill_lines(subject, [], [draw(text, 64, 0, 0, 0.5)], Fills(2), observe=wait)
    assert waited == [0, 0, 1, 1]
    assert line["seconds"] < 0.4
    assert line["seconds"] == pytest.approx(sum(step["seconds"] for step in line["by_step"]), abs=1e-5)


def test_steps_without_a_mask_are_not_compared(subject: MaskedSubject) -> None:
    """With 3 masks and 8 steps, one of the 4 steps that are compared has any left, and with 1 mask none has."""
    text = torch.arange(6, 86).repeat(3)
    for share, steps in ((3 / 16, [2]), (1 / 16, [])):
        _, line = fill_lines(subject, [POLICIES[0]], [draw(text, 64, 0, 0, share)], Fills(8))
        assert [one["step"] for one in line["compared"]] == steps
        assert (line["kl"] is None) == (line["top1"] is None) == (not steps)
        assert checked(line) == line
        assert len(fill_table(fill_rows([line]))) == 2


def test_figures_are_means_over_masked_tokens_of_sparse_steps() -> None:
    by_step = [{"density": density} for density in (1.0, 0.5, 0.5)]
    near = [{"step": step, "masks": masks, "kl": kl} for step, masks, kl in ((0, 90, 0.0), (1, 30, 0.1), (2, 10, 0.5))]
    assert weighed(near, by_step, "kl", 6) == 0.2
    assert weighed(near[:1], by_step, "kl", 6) == 0.0
    assert weighed([], by_step, "kl", 6) is None


def line_of(method: str, index: int, seed: int, steps: list[tuple[float, float]], run: str = "r") -> dict[str, Any]:
    by_step = [{"density": density, "cpu_s": cpu} for density, cpu in steps]
    of = {"kind": "fill", "run": run, "task": "fill", "length": 64, "index": index, "seed": seed, "by_step": by_step}
    return of | {"method": method, "method_fields": {"method": method.partition("(")[0]}}


def test_costs_are_beside_dense_steps_of_the_same_run() -> None:
    """Not beside a method's own dense steps, which run on another kernel; and the step that chooses is by itself."""
    steps = [(1.0, 9.0), (1.0, 5.0), (0.5, 1.0), (0.25, 2.0)]
    lines = [line_of("dense", 0, 0, [(1.0, 3.0), (1.0, 5.0)]), line_of("sparsed", 0, 0, steps)]
    lines += [line_of("sparsed", 1, 0, steps), line_of("sparsed", 0, 0, steps, "another")]
    (cost,) = step_costs(lines)
    assert (cost.texts, cost.density, cost.dense, cost.chooses, cost.sparse) == (1, 0.375, 4.0, 5.0, 1.5)
    untimed = [{**lines[0], "by_step": [{"density": 1.0}]}, lines[1]]
    assert step_costs(untimed) == []


def test_rows_are_of_the_seeds_that_all_methods_have() -> None:
    lines = [line_of("dense", 0, seed, []) for seed in (0, 1)] + [line_of("sparsed", index, 0, []) for index in (0, 1)]
    assert same_seeds(lines) == [lines[0], *lines[2:]]


def test_pictures_tell_settings_and_tasks_apart(lines: list[dict[str, Any]]) -> None:
    labels = ("sparsed(share=0.2,block=16,min_tokens=0)", "sparsed(share=0.4,block=16,min_tokens=0)")
    assert [kind_of(label) for label in labels] == ["sparsed(block=16)"] * 2
    assert kind_of("sparsed(share=0.2,isolated=false,min_tokens=0)") == "sparsed(isolated=false)"
    assert kind_of("dense") == "dense"
    other = [{**line, "task": "fill(steps=12,share=0.5)"} for line in lines]
    one, both = (picture_of_fills(some).panels for some in (lines, [*lines, *other]))
    assert len(both) == 2 * len(one)
    assert len({title for title, _ in both}) == len(both)
    dense = [style.marker for kind, style in styles_of(fill_rows(lines)).items() if kind.startswith("dense")]
    assert dense == [""]
