"""Chunks of a prompt through a model's stages on two processors: a simulator (llm.npu, 2407.05858, section 3.4).

A prompt is read in chunks of as many tokens, and each goes through the stages of the model in order. Stage j of chunk i
needs stage j - 1 of the same chunk; where it attends, it needs stage j - 1 of all earlier chunks as well, which made
their keys and values. A stage runs on one processor: an NPU, which multiplies in int8, or a CPU, which does what stays
in float (attention, norms, outliers). Both work at a time, each on one stage, and end what they began.

Only times are added up here; nothing of a model runs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

__all__ = ["POLICIES", "ChunkGraph", "Schedule", "Stage", "first_ready", "greedy", "in_order", "optimum"]

Processor = Literal["npu", "cpu"]
Node = tuple[int, int]  # chunk, stage
_PROCESSORS: tuple[Processor, ...] = get_args(Processor)


@dataclass(frozen=True)
class Stage:
    """What a model does to a chunk between two changes of the processor.

    Args:
        processor: ``"npu"`` or ``"cpu"``.
        seconds: that it takes for a chunk.
        attends: it needs the stage before of all earlier chunks.
        more: further seconds for each earlier chunk, whose keys are read.
        name: for tables.

    Raises:
        ValueError: another processor, or seconds that are not above 0 and finite.
    """

    processor: Processor
    seconds: float
    attends: bool = False
    more: float = 0.0
    name: str = ""

    def __post_init__(self) -> None:
        if self.processor not in _PROCESSORS:
            raise ValueError(f"a stage's processor is 'npu' or 'cpu', got {self.processor!r}")
        if not 0 < self.seconds < math.inf or not 0 <= self.more < math.inf:
            raise ValueError(
                f"a stage takes seconds above 0, and 0 or more for each chunk, got {self.seconds} and {self.more}"
            )


@dataclass(frozen=True)
class ChunkGraph:
    """Stages by chunks: what has to be run, and what needs what.

    Raises:
        ValueError: no stages, no chunks, or a first stage that attends: nothing made keys for it.
    """

    stages: tuple[Stage, ...]
    chunks: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages or self.chunks < 1:
            raise ValueError(f"a graph needs a stage and a chunk, got {len(self.stages)} and {self.chunks}")
        if self.stages[0].attends:
            raise ValueError("the first stage cannot attend: put one in front that makes keys")

    def nodes(self) -> Iterator[Node]:
        """Chunk by chunk."""
        return ((i, j) for i in range(self.chunks) for j in range(len(self.stages)))

    def processor(self, node: Node) -> Processor:
        return self.stages[node[1]].processor

    def seconds(self, node: Node) -> float:
        stage = self.stages[node[1]]
        return stage.seconds + stage.more * node[0]

    def needs(self, node: Node) -> list[Node]:
        """What has to be done before."""
        i, j = node
        first = 0 if self.stages[j].attends else i
        return [(chunk, j - 1) for chunk in range(first, i + 1)] if j else []

    def serves(self, node: Node) -> list[Node]:
        """What needs it."""
        i, j = node[0], node[1] + 1
        if j == len(self.stages):
            return []
        return [(chunk, j) for chunk in range(i, self.chunks if self.stages[j].attends else i + 1)]

    def work(self, processor: Processor) -> float:
        """Seconds of all its stages."""
        return sum(self.seconds(node) for node in self.nodes() if self.processor(node) == processor)

    @cached_property
    def tails(self) -> dict[Node, float]:
        """For each node the seconds of the longest path that begins with it."""
        found: dict[Node, float] = {}
        for j in reversed(range(len(self.stages))):
            for i in range(self.chunks):
                after = max((found[node] for node in self.serves((i, j))), default=0.0)
                found[i, j] = self.seconds((i, j)) + after
        return found

    @property
    def bound(self) -> float:
        """No schedule is shorter: the longest path, or the work of one processor."""
        return max(max(self.tails.values()), *(self.work(processor) for processor in _PROCESSORS))


@dataclass(frozen=True)
class Schedule:
    """When each stage of each chunk begins.

    Attributes:
        starts: seconds by chunk and stage.
    """

    graph: ChunkGraph
    starts: dict[Node, float]

    @property
    def makespan(self) -> float:
        """Seconds until everything is done."""
        return max(start + self.graph.seconds(node) for node, start in self.starts.items())

    @property
    def bubbles(self) -> float:
        """Share of the makespan in which the NPU stands still."""
        return 1.0 - self.graph.work("npu") / self.makespan

    def order(self, processor: Processor) -> list[Node]:
        """What a processor does, in order."""
        mine = [node for node in self.starts if self.graph.processor(node) == processor]
        return sorted(mine, key=lambda node: self.starts[node])


class _Running:
    """The state of a simulation: what is done, and what of others' needs is missing."""

    def __init__(self, graph: ChunkGraph) -> None:
        self.graph = graph
        self.missing = {node: len(graph.needs(node)) for node in graph.nodes()}
        self.ready: dict[Processor, list[Node]] = {processor: [] for processor in _PROCESSORS}
        for node, number in self.missing.items():
            if number == 0:
                self.ready[graph.processor(node)].append(node)

    def done(self, node: Node) -> None:
        for other in self.graph.serves(node):
            self.missing[other] -= 1
            if self.missing[other] == 0:
                self.ready[self.graph.processor(other)].append(other)

    def unlocked(self, node: Node) -> float:
        """Seconds of the stages that lack nothing else."""
        return sum(self.graph.seconds(other) for other in self.graph.serves(node) if self.missing[other] == 1)


Choose = Callable[[Processor, Sequence[Node], _Running], Node | None]


def _simulated(graph: ChunkGraph, choose: Choose) -> Schedule:
    """Whenever a processor is free, it begins what ``choose`` says of the stages that could begin, or waits."""
    state, starts, now = _Running(graph), {}, 0.0
    running: list[tuple[float, Node]] = []
    busy: set[Processor] = set()
    while True:
        for processor in _PROCESSORS:
            ready = state.ready[processor]
            node = choose(processor, ready, state) if ready and processor not in busy else None
            if node is not None:
                ready.remove(node)
                busy.add(processor)
                starts[node] = now
                heapq.heappush(running, (now + graph.seconds(node), node))
        if not running:
            return Schedule(graph, starts)
        now = running[0][0]
        while running and running[0][0] == now:  # what ends at once is known at once
            _, node = heapq.heappop(running)
            busy.discard(graph.processor(node))
            state.done(node)


def in_order(graph: ChunkGraph) -> Schedule:
    """Chunk after chunk: no stage overtakes one of an earlier chunk on its processor."""
    left = {p: [node for node in graph.nodes() if graph.processor(node) == p][::-1] for p in _PROCESSORS}

    def choose(processor: Processor, ready: Sequence[Node], _: _Running) -> Node | None:
        return left[processor].pop() if left[processor][-1] in ready else None

    return _simulated(graph, choose)


def first_ready(graph: ChunkGraph) -> Schedule:
    """A free processor never waits: of the stages that could begin, the earliest chunk's, and of it the first."""
    return _simulated(graph, lambda processor, ready, state: min(ready))


def greedy(graph: ChunkGraph) -> Schedule:
    """A free processor begins the stage g with the largest C(g) (llm.npu, 2407.05858, section 3.4).

    C(g) is the sum of the run times of the stages that g unlocks, with a plus where g is on the CPU and a minus where
    it is on the NPU. The paper's sentence leaves open, and this takes, that *unlocks* means the stages all of whose
    other needs are done when the choice is made; that their run times count whichever processor they are for; and that
    of equal ones the earliest chunk's begins. In a model's graph what a stage unlocks is mostly for the other
    processor: so the CPU does first what gives the NPU most to do, and the NPU last what gives the CPU most.
    """

    def choose(processor: Processor, ready: Sequence[Node], state: _Running) -> Node:
        sign = 1.0 if processor == "cpu" else -1.0
        return min(ready, key=lambda node: (-sign * state.unlocked(node), node))

    return _simulated(graph, choose)


POLICIES: dict[str, Callable[[ChunkGraph], Schedule]] = {
    "in order": in_order,
    "first ready": first_ready,
    "greedy": greedy,
}


def optimum(graph: ChunkGraph, most: int = 200_000) -> Schedule:
    """The shortest schedule, by branch and bound, for small graphs.

    Only active schedules are tried, among which a shortest one always is (Giffler and Thompson, Operations Research
    8:487, 1960): of the stages that could be next, take the one that would end first, and branch on those of its
    processor that could begin before that. A branch is left where the bound of what remains, or another branch that
    has done the same no later, shows that it cannot win.

    Args:
        most: branches to try.

    Raises:
        ValueError: the graph takes more of them.
    """
    best = min((policy(graph) for policy in POLICIES.values()), key=lambda schedule: schedule.makespan)
    return _Search(graph, best, most).run()


class _Search:
    def __init__(self, graph: ChunkGraph, best: Schedule, most: int) -> None:
        self.graph, self.best, self.shortest, self.left = graph, best, best.makespan, most
        self.most = most
        self.starts: dict[Node, float] = {}
        self.ends: dict[Node, float] = {}
        self.free: dict[Processor, float] = dict.fromkeys(_PROCESSORS, 0.0)
        self.work: dict[Processor, float] = {processor: graph.work(processor) for processor in _PROCESSORS}
        self.next = [0] * graph.chunks
        self.seen: dict[tuple[int, ...], list[tuple[float, ...]]] = {}

    def run(self) -> Schedule:
        self._branch()
        return self.best

    def _ready(self) -> Iterator[Node]:
        for i, j in enumerate(self.next):
            if j < len(self.graph.stages) and all(node in self.ends for node in self.graph.needs((i, j))):
                yield i, j

    def _earliest(self, node: Node) -> float:
        made = max((self.ends[need] for need in self.graph.needs(node)), default=0.0)
        return max(self.free[self.graph.processor(node)], made)

    def _hopeless(self) -> bool:
        """No end of this branch is shorter than the best; or one that was tried has done the same no later."""
        bound = max(self.free[processor] + self.work[processor] for processor in _PROCESSORS)
        times = [self.free[processor] for processor in _PROCESSORS]
        for i, done in enumerate(self.next):
            for j in range(done, len(self.graph.stages)):
                needs = self.graph.needs((i, j))
                made = max((self.ends[need] for need in needs if need in self.ends), default=0.0)
                begin = max(made, self.free[self.graph.processor((i, j))])
                bound = max(bound, begin + self.graph.tails[i, j])
                times.append(made)
        if bound >= self.shortest * (1 - 1e-12):
            return True
        known = self.seen.setdefault(tuple(self.next), [])
        if any(all(a <= b for a, b in zip(other, times, strict=True)) for other in known):
            return True
        known.append(tuple(times))
        return False

    def _branch(self) -> None:
        if self.left == 0:
            raise ValueError(f"the graph is too large to search: more than {self.most:,} branches; give a smaller one")
        self.left -= 1
        if len(self.starts) == self.graph.chunks * len(self.graph.stages):
            made = Schedule(self.graph, dict(self.starts))
            if made.makespan < self.shortest:
                self.best, self.shortest = made, made.makespan
            return
        if self._hopeless():
            return
        ready = {node: self._earliest(node) for node in self._ready()}
        first = min(ready, key=lambda node: ready[node] + self.graph.seconds(node))
        end, processor = ready[first] + self.graph.seconds(first), self.graph.processor(first)
        rivals = [node for node in ready if self.graph.processor(node) == processor and ready[node] < end]
        for node in sorted(rivals, key=lambda node: (ready[node], -self.graph.tails[node])):
            self._with(node, ready[node])

    def _with(self, node: Node, start: float) -> None:
        processor, seconds = self.graph.processor(node), self.graph.seconds(node)
        before = self.free[processor], self.work[processor]
        self.starts[node], self.ends[node] = start, start + seconds
        self.free[processor], self.work[processor] = start + seconds, before[1] - seconds
        self.next[node[0]] += 1
        self._branch()
        self.next[node[0]] -= 1
        self.free[processor], self.work[processor] = before
        del self.starts[node], self.ends[node]
