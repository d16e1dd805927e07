"""Rows of a step, parted into those that run a plan and the others. Needs no vLLM."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from gossamer import Policy
from gossamer.integrations.vllm.rows import Row, choose, put, taken
from gossamer.methods import AShape, Dense

LONG = Policy(AShape(), 500)


def starts_of(queries: list[int]) -> list[int]:
    return [sum(queries[:index]) for index in range(len(queries) + 1)]


def test_rows_are_chosen_in_any_order_and_the_others_keep_their_tokens() -> None:
    queries, lengths = [1, 600, 64, 3, 64, 1, 700], [900, 600, 64, 50, 2564, 1, 1000]
    step = choose(starts_of(queries), lengths, [LONG] * 7, 64)
    assert step.rows == (
        Row(1, 1, 601, 600, LONG),
        Row(4, 668, 732, 2564, LONG),
        Row(6, 733, 1433, 1000, LONG),
    )
    assert [(row.queries, row.past) for row in step.rows] == [(600, 0), (64, 2500), (700, 300)]
    assert step.others == ((0, 1), (601, 668), (732, 733))
    assert step.reasons == {"decode": 2, "short prompt": 1, "few queries": 1}
    assert step.count() == 7


def test_a_row_runs_a_plan_from_its_own_policy_s_length_on() -> None:
    policies = [LONG, Policy(Dense(), 300), Policy(AShape(), 0), LONG]
    step = choose([0, 400, 800, 1200, 1700], [400, 400, 400, 500], policies, 64)
    assert [row.index for row in step.rows] == [1, 2, 3]
    assert [row.policy for row in step.rows] == policies[1:]
    assert step.reasons == {"short prompt": 1}


@pytest.mark.parametrize(("queries", "reason"), [(1, "decode"), (0, "decode"), (2, "few queries"), (63, "few queries")])
def test_rows_of_few_queries_say_why(queries: int, reason: str) -> None:
    step = choose([0, queries], [5000], [LONG], 64)
    assert step.rows == ()
    assert step.reasons == {reason: 1}
    assert step.others == (((0, queries),) if queries else ())


@pytest.mark.parametrize(
    ("queries", "tokens", "runs"), [(500, 500, True), (499, 501, True), (64, 1989, True), (64, 1988, False)]
)
def test_a_chunk_has_as_many_pairs_as_the_shortest_prompt(queries: int, tokens: int, runs: bool) -> None:
    pairs = sum(tokens - queries + 1 + row for row in range(queries))
    assert (pairs >= 500 * 501 // 2) == runs
    step = choose([0, queries], [tokens], [LONG], 64)
    assert len(step.rows) == runs
    assert step.reasons == ({} if runs else {"short chunk": 1})


def test_where_all_run_plans_nothing_is_left() -> None:
    step = choose([0, 64, 128], [2500, 2600], [LONG] * 2, 64)
    assert len(step.rows) == 2
    assert step.others == ()
    assert not step.reasons


def test_a_step_without_rows_is_empty() -> None:
    assert choose([0], [], [], 64).count() == 0


def test_what_is_not_of_the_same_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        choose([0, 64, 128], [500, 600], [LONG], 64)
    with pytest.raises(ValueError, match="zip"):
        choose([0, 64, 128], [500], [LONG] * 2, 64)


@pytest.mark.parametrize("seed", range(20))
def test_each_token_is_in_one_row_or_among_the_others(seed: int) -> None:
    source = random.Random(seed)
    queries = [source.choice([1, 1, 5, 63, 64, 65, 300]) for _ in range(source.randint(1, 30))]
    lengths = [count + source.choice([0, 0, 400, 2000]) for count in queries]
    step = choose(starts_of(queries), lengths, [LONG] * len(queries), 64)
    mine = [token for row in step.rows for token in range(row.start, row.end)]
    spans = [token for start, end in step.others for token in range(start, end)]
    assert sorted(mine + spans) == list(range(sum(queries)))
    # Spans that touch are one.
    assert all(former[1] < later[0] for former, later in itertools.pairwise(step.others))
    assert step.count() == len(queries)
    for row in step.rows:
        assert row.queries == queries[row.index] >= 64
        assert row.tokens == lengths[row.index] >= 500


@pytest.mark.parametrize("spans", [((0, 4),), ((2, 5),), ((0, 1), (3, 7)), ((1, 2), (3, 4), (6, 9))])
def test_what_is_taken_is_put_back_where_it_was(spans: tuple[tuple[int, int], ...]) -> None:
    tokens = torch.arange(27.0).view(9, 3)
    some = taken(tokens, spans)
    assert torch.equal(some, tokens[[token for start, end in spans for token in range(start, end)]])
    assert (some.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()) == (len(spans) == 1)
    into = torch.zeros(9, 3)
    put(into, spans, some + 1)
    inside = torch.zeros(9, 1, dtype=torch.bool)
    for start, end in spans:
        inside[start:end] = True
    assert torch.equal(into, torch.where(inside, tokens + 1, 0.0))
