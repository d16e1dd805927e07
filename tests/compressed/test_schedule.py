"""Schedules of chunks on two processors: nothing overlaps or begins too early, and none is shorter than the best."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from repository import script

from gossamer.compressed.schedule import (
    POLICIES,
    ChunkGraph,
    Schedule,
    Stage,
    first_ready,
    greedy,
    in_order,
    optimum,
)

Node = tuple[int, int]
drawn = script("examples/chunk_schedule.py").drawn  # random graphs, of whole seconds: equal ones occur


def check(schedule: Schedule) -> None:
    """By the definition: from the stages themselves, not from what the graph says that a node needs."""
    graph, starts = schedule.graph, schedule.starts
    assert starts.keys() == {(i, j) for i in range(graph.chunks) for j in range(len(graph.stages))}
    ends = {}
    for (i, j), start in starts.items():
        assert start >= 0.0
        ends[i, j] = start + graph.stages[j].seconds + i * graph.stages[j].more
    for i, j in starts:
        if j:
            for chunk in range(0 if graph.stages[j].attends else i, i + 1):
                assert ends[chunk, j - 1] <= starts[i, j]
    for processor in ("npu", "cpu"):
        mine = sorted((starts[n], ends[n]) for n in starts if graph.stages[n[1]].processor == processor)
        assert all(before <= after for (_, before), (after, _) in pairwise(mine))
    assert schedule.makespan == max(ends.values())


def orders(graph: ChunkGraph, done: tuple[Node, ...] = ()) -> Iterator[tuple[Node, ...]]:
    """All orders in which nothing comes before what it needs."""
    left = [node for node in graph.nodes() if node not in done]
    if not left:
        yield done
    for node in left:
        if all(need in done for need in graph.needs(node)):
            yield from orders(graph, (*done, node))


def shortest(graph: ChunkGraph) -> float:
    """By trying every order, each stage as early as it can be behind those before it: one of them is the best."""
    best = float("inf")
    for order in orders(graph):
        free, ends = {"npu": 0.0, "cpu": 0.0}, {}
        for node in order:
            begin = max([free[graph.processor(node)], *(ends[need] for need in graph.needs(node))])
            free[graph.processor(node)] = ends[node] = begin + graph.seconds(node)
        best = min(best, max(ends.values()))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_schedules_are_possible_and_none_is_shorter_than_the_best(seed: int) -> None:
    graph = drawn(seed)
    made = {name: policy(graph) for name, policy in POLICIES.items()}
    best = optimum(graph)
    for schedule in (*made.values(), best):
        check(schedule)
        assert schedule.makespan >= graph.bound
        assert 0.0 <= schedule.bubbles < 1.0 or graph.work("npu") == 0.0
        assert best.makespan <= schedule.makespan
    again = drawn(seed)
    assert all(policy(again).starts == made[name].starts for name, policy in POLICIES.items())


@pytest.mark.parametrize("seed", range(12))
def test_the_best_is_that_of_all_orders(seed: int) -> None:
    graph = drawn(seed, stages=3, chunks=2 + seed % 2)
    assert optimum(graph).makespan == shortest(graph)


def test_bounds_are_the_longest_path_and_the_work_of_a_processor() -> None:
    stages = (Stage("npu", 2.0), Stage("cpu", 1.0, attends=True, more=0.5), Stage("npu", 3.0))
    graph = ChunkGraph(stages, 2)
    assert (graph.work("npu"), graph.work("cpu")) == (10.0, 2.5)
    assert graph.bound == 10.0
    assert graph.tails[0, 0] == 2.0 + 1.5 + 3.0  # its keys are for the attention of the second chunk, which is longer
    assert ChunkGraph(stages, 1).bound == 6.0


def test_in_order_a_chunk_waits_for_the_one_before() -> None:
    graph = ChunkGraph((Stage("npu", 1.0), Stage("cpu", 2.0), Stage("npu", 1.0)), 2)
    assert in_order(graph).starts == {(0, 0): 0, (0, 1): 1, (0, 2): 3, (1, 0): 4, (1, 1): 5, (1, 2): 7}
    assert in_order(graph).bubbles == 0.5
    assert first_ready(graph).starts == {(0, 0): 0, (1, 0): 1, (0, 1): 1, (0, 2): 3, (1, 1): 3, (1, 2): 5}
    assert in_order(graph).order("npu") == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert first_ready(graph).order("npu") == [(0, 0), (1, 0), (0, 2), (1, 2)]


def test_on_the_cpu_the_rule_takes_what_gives_the_npu_most_to_do() -> None:
    # While the CPU is at chunk 0, both others come to it; behind the last one the NPU has 9 s to do, not 5.
    graph = ChunkGraph((Stage("npu", 0.25), Stage("cpu", 3.0), Stage("npu", 1.0, more=4.0)), 3)
    assert greedy(graph).order("cpu") == [(0, 1), (2, 1), (1, 1)]
    assert first_ready(graph).order("cpu") == [(0, 1), (1, 1), (2, 1)]


def test_on_the_npu_the_rule_takes_what_gives_the_cpu_least_to_do() -> None:
    # The first stage of chunk 0 alone lets the CPU attend: the NPU does the others' before.
    graph = ChunkGraph((Stage("npu", 1.0), Stage("cpu", 1.0, attends=True)), 3)
    assert greedy(graph).order("npu") == [(1, 0), (2, 0), (0, 0)]
    assert greedy(graph).makespan == 6.0
    assert first_ready(graph).makespan == optimum(graph).makespan == 4.0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="'npu' or 'cpu', got 'gpu'"):
        Stage("gpu", 1.0)  # type: ignore[arg-type]
    for seconds, more in ((0.0, 0.0), (float("nan"), 0.0), (float("inf"), 0.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="takes seconds above 0"):
            Stage("npu", seconds, more=more)
    for stages, chunks in (((), 1), ((Stage("npu", 1.0),), 0)):
        with pytest.raises(ValueError, match="needs a stage and a chunk"):
            ChunkGraph(stages, chunks)
    with pytest.raises(ValueError, match="the first stage cannot attend"):
        ChunkGraph((Stage("cpu", 1.0, attends=True),), 2)
    with pytest.raises(ValueError, match="more than 3 branches"):
        optimum(drawn(7, stages=6, chunks=4), most=3)
