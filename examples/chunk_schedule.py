"""How long an NPU stands still while a prompt is read in chunks, by the order in which stages are begun; simulated.

    python examples/chunk_schedule.py [--graphs 100] [--out FILE]

*Model*: six stages of each decoder layer of Qwen1.5-1.8B in chunks of 256 tokens, as llm.npu (2407.05858) cuts it:
linear layers on the NPU, attention and norms on the CPU. Seconds come from counted multiplications and two speeds that
are assumed, not measured: the NPU's is such that it would read 569 tokens a second if it never stood still, the speed
that the paper reports; the CPU's is such that in order, four chunks leave the NPU idle for about 37% of the time, as in
the paper. What the simulator adds is what other orders then give.

*Random*: small random graphs, on which the optimum is found by search; how far each order is from it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

from measured_on import measured_on

from gossamer.compressed.schedule import POLICIES, ChunkGraph, Stage, optimum

LAYERS, WIDTH, INNER, CHUNK = 24, 2048, 5504, 256  # of Qwen1.5-1.8B; the paper's chunk
TOKENS_A_SECOND = 569  # of the paper's Qwen1.5-1.8B with everything on
NORM = 0.001  # seconds of a norm and of rounding its output, assumed
CPU_SPEED = 75e9  # multiplications a second in attention
LINEAR = {"qkv": 3 * WIDTH * WIDTH, "output": WIDTH * WIDTH, "mlp": 3 * WIDTH * INNER}  # multiplications a token
NPU_SPEED = TOKENS_A_SECOND * LAYERS * sum(LINEAR.values())
CHUNKS = (2, 4, 8)
SPEEDS = (0.5, 1.0, 2.0)  # of the CPU, beside what was assumed


def decoder(chunks: int, speed: float = 1.0) -> ChunkGraph:
    """The stages of all layers; ``speed`` is that of the CPU beside `CPU_SPEED`."""
    attention = 2 * WIDTH * CHUNK * CHUNK / (CPU_SPEED * speed)  # a chunk's queries on as many keys: q k and p v
    norm = Stage("cpu", NORM / speed, name="norm")
    qkv, output, mlp = (Stage("npu", CHUNK * LINEAR[name] / NPU_SPEED, name=name) for name in LINEAR)
    attend = Stage("cpu", attention, attends=True, more=attention, name="attention")
    return ChunkGraph((norm, qkv, attend, output, norm, mlp) * LAYERS, chunks)


def drawn(seed: int, stages: int = 4, chunks: int = 3) -> ChunkGraph:
    """A random graph whose stages take 1 to 5 seconds; attention, two in five, is on the CPU."""
    rng = random.Random(seed)
    made = [Stage("npu" if rng.random() < 0.5 else "cpu", float(rng.randint(1, 5)))]
    while len(made) < stages:
        attends = rng.random() < 0.4
        processor = "cpu" if attends or rng.random() < 0.4 else "npu"
        made.append(Stage(processor, float(rng.randint(1, 5)), attends, float(rng.randint(0, 2)) if attends else 0.0))
    return ChunkGraph(tuple(made), chunks)


def model_rows() -> list[dict[str, Any]]:
    """For each number of chunks and speed of the CPU: seconds and share of them in which the NPU stands still."""
    rows = []
    for chunks in CHUNKS:
        for speed in SPEEDS:
            graph = decoder(chunks, speed)
            npu, cpu = graph.work("npu"), graph.work("cpu")
            row: dict[str, Any] = {"chunks": chunks, "cpu_speed": speed, "cpu_work": cpu / npu}
            row["least"] = 1.0 - npu / graph.bound  # the share that no order can avoid
            for name, policy in POLICIES.items():
                schedule = policy(graph)
                row[name] = {"seconds": schedule.makespan, "bubbles": schedule.bubbles}
            rows.append(row)
    return rows


def random_row(graphs: int) -> dict[str, Any]:
    """How many times the optimum each order takes: on the mean, at worst, and how often it is one."""
    ratios: dict[str, list[float]] = {name: [] for name in POLICIES}
    for seed in range(graphs):
        graph = drawn(seed)
        best = optimum(graph).makespan
        for name, policy in POLICIES.items():
            ratios[name].append(policy(graph).makespan / best)
    found = {
        name: {"mean": fmean(own), "worst": max(own), "optimal": fmean(ratio < 1 + 1e-9 for ratio in own)}
        for name, own in ratios.items()
    }
    return {"graphs": graphs, "stages": 4, "chunks": 3} | found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--graphs", type=int, default=100, help="random ones")
    parser.add_argument("--out", type=Path, help="a JSON file of all rows")
    given = parser.parse_args(arguments)
    rows, beside = model_rows(), random_row(given.graphs)
    print(f"{'chunks':>6} {'CPU work':>9}" + "".join(f"{name:>14}" for name in (*POLICIES, "at least")))
    for row in rows:
        cells = "".join(f"{row[name]['bubbles']:>14.1%}" for name in POLICIES) + f"{row['least']:>14.1%}"
        print(f"{row['chunks']:6} {row['cpu_work']:9.2f}{cells}")
    for name in POLICIES:
        found = beside[name]
        print(
            f"{name}: {found['mean']:.3f} times the optimum on {given.graphs} graphs, at worst {found['worst']:.3f}, "
            f"optimal on {found['optimal']:.0%}"
        )
    if given.out is not None:
        about = {"machine": measured_on(), "chunk": CHUNK, "tokens_a_second": TOKENS_A_SECOND}
        given.out.write_text(json.dumps(about | {"rows": rows, "random": beside}, indent=1) + "\n")


if __name__ == "__main__":
    main()
