"""Which block a node of a graph belongs to: a graph network whose backward products are sampled by RSC.

    python examples/graph_blocks.py                # some minutes on one core
    python examples/graph_blocks.py --quick        # a look at what it does
    python examples/graph_blocks.py --seeds 3 --out graph_blocks.json

A degree-corrected stochastic block model: nodes link more within their block, some far more than others, and have
noisy features. A graph network of three layers (what PyTorch Geometric's GCNConv computes, written out) learns the
blocks from a twentieth of the nodes. Three questions: how near sampled gradients are to exact ones by budget, with
rows allocated to layers greedily and alike, right after their scores were taken and nine steps later; what accuracy
is left, with and without the exact end; and how long the backward product takes. Budgets are shares of the
multiplications of exact gradients, and both kinds of allocation keep them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measured_on import measured_on
from torch import Tensor, nn

from gossamer.training import RSC
from gossamer.training.sampled import cut, pair_scores, row_norms, sample_rows, top_rows

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
TRAINED = (0.05, 0.1, 0.3)  # budgets of whole trainings
LATER = 9  # steps between scores and their last use
ROUNDS = 9  # of timing


@dataclass(frozen=True)
class Setting:
    nodes: int = 4000
    blocks: int = 8
    degree: float = 20.0
    inside: float = 0.35  # share of links that stay in a node's block whatever it is
    features: int = 32
    width: int = 64
    epochs: int = 120
    labelled: float = 0.05
    at: tuple[int, ...] = (10, 40, 80)  # epochs whose gradients are compared


@dataclass(frozen=True)
class Graph:
    """Normalised adjacency with self-loops, CSR ``[n, n]``; features ``[n, f]``; blocks; which nodes are labelled."""

    adjacency: Tensor
    features: Tensor
    blocks: Tensor
    labelled: Tensor


def draw(setting: Setting, seed: int) -> Graph:
    """Expected degrees fall off as a Pareto distribution; others than those inside link to any node."""
    generator = torch.Generator().manual_seed(seed)
    n = setting.nodes
    block = torch.randint(0, setting.blocks, (n,), generator=generator)
    weight = (torch.rand(n, generator=generator) + 0.02) ** -0.6
    ends = int(n * setting.degree / 2)
    first = torch.multinomial(weight, ends, replacement=True, generator=generator)
    second = torch.multinomial(weight, ends, replacement=True, generator=generator)
    for one in range(setting.blocks):
        kept = (block[first] == one) & (torch.rand(ends, generator=generator) < setting.inside)
        own = torch.where(block == one, weight, torch.zeros(()))
        second[kept] = torch.multinomial(own, int(kept.sum()), replacement=True, generator=generator)
    loops = torch.arange(n)
    pairs = torch.stack([torch.cat([first, second, loops]), torch.cat([second, first, loops])])
    once = torch.sparse_coo_tensor(pairs, torch.ones(pairs.shape[1]), (n, n)).coalesce()
    row, column = once.indices()
    norm = torch.bincount(row, minlength=n).float() ** -0.5
    adjacency = torch.sparse_coo_tensor(once.indices(), norm[row] * norm[column], (n, n)).to_sparse_csr()
    means = torch.randn(setting.blocks, setting.features, generator=generator)
    features = 0.3 * means[block] + torch.randn(n, setting.features, generator=generator)
    return Graph(adjacency, features, block, torch.rand(n, generator=generator) < setting.labelled)


class Network(nn.Module):
    """Three layers ``A (x W)``."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        widths = (setting.features, setting.width, setting.width, setting.blocks)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = torch.sparse.mm(adjacency, layer(x.relu() if number else x))
        return x


def gradient(model: Network, graph: Graph, rsc: RSC | None = None) -> Tensor:
    """Of all weights, flat; leaves them in ``.grad``."""
    model.zero_grad()
    if rsc is None:
        logits = model(graph.features, graph.adjacency)
    else:
        with rsc:
            logits = model(graph.features, graph.adjacency)
    F.cross_entropy(logits[graph.labelled], graph.blocks[graph.labelled]).backward()
    if rsc is not None:
        rsc.step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def train(model: Network, graph: Graph, epochs: int, rsc: RSC | None = None) -> float:
    """Accuracy on the nodes without labels."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    for _ in range(epochs):
        gradient(model, graph, rsc)
        optimizer.step()
    return accuracy(model, graph)


@torch.no_grad()
def accuracy(model: Network, graph: Graph) -> float:
    right = model(graph.features, graph.adjacency).argmax(1) == graph.blocks
    return float(right[~graph.labelled].float().mean())


def network(setting: Setting, seed: int) -> Network:
    torch.manual_seed(seed)
    return Network(setting)


def cosines(setting: Setting, graph: Graph, seed: int) -> list[dict[str, Any]]:
    """Of sampled and exact gradients along an exact training, right after scores were taken and some steps later."""
    model, rows = network(setting, seed), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    waiting: list[tuple[int, dict[str, Any], RSC]] = []
    for epoch in range(max(setting.at) + LATER + 1):
        for due, row, rsc in waiting:
            if due == epoch:
                row["later"] = cosine(model, graph, rsc)
        if epoch in setting.at:
            for budget in BUDGETS:
                for how in ("greedy", "uniform"):
                    rsc = RSC(steps=10**6, budget=budget, refresh=10**6, allocation=how)
                    gradient(model, graph, rsc)
                    before = rsc.multiplied, rsc.whole
                    row = {"seed": seed, "epoch": epoch, "budget": budget, "allocation": how, "rows": rsc.rows}
                    row["fresh"] = cosine(model, graph, rsc)
                    row["share"] = round((rsc.multiplied - before[0]) / (rsc.whole - before[1]), 4)
                    rows.append(row)
                    waiting.append((epoch + LATER, row, rsc))
        gradient(model, graph)
        optimizer.step()
    return rows


def cosine(model: Network, graph: Graph, rsc: RSC) -> float:
    twin = copy.deepcopy(model)
    return round(float(F.cosine_similarity(gradient(twin, graph, rsc), gradient(twin, graph), dim=0)), 4)


def trainings(setting: Setting, graph: Graph, seed: int) -> list[dict[str, Any]]:
    rows = [{"seed": seed, "training": "exact", "accuracy": train(network(setting, seed), graph, setting.epochs)}]
    for budget in TRAINED:
        for how in ("greedy", "uniform"):
            for end in (0.8, 1.0):
                rsc = RSC(steps=setting.epochs, budget=budget, exact_from=end, allocation=how)
                found = train(network(setting, seed), graph, setting.epochs, rsc)
                row = {"seed": seed, "training": "rsc", "budget": budget, "allocation": how, "exact_from": end}
                rows.append(row | {"accuracy": found, "multiplied": round(rsc.multiplied / rsc.whole, 4)})
    return rows


def times(setting: Setting, graph: Graph) -> list[dict[str, Any]]:
    """Processor seconds of a layer's backward product: torch's own, and of samples that are there; in turns."""
    torch.manual_seed(0)
    a, grad = graph.adjacency, torch.randn(setting.nodes, setting.width)
    scores, whole = pair_scores(row_norms(a), grad), a.values().numel()
    h = torch.randn(setting.nodes, setting.width, requires_grad=True)
    out = torch.sparse.mm(a, h)
    count = a.crow_indices().diff()[scores.argsort(descending=True, stable=True)].cumsum(0)
    all_rows = sample_rows(a)
    samples = {b: sample_rows(a, top_rows(scores, int((count <= b * whole).sum()))) for b in (0.05, 0.1, 0.3, 1.0)}
    found: dict[Any, list[float]] = {name: [] for name in ("torch", "sorting", "cutting", *samples)}
    for _ in range(ROUNDS):
        for name, seconds in found.items():
            started = time.process_time()
            if name == "torch":
                torch.autograd.grad(out, h, grad, retain_graph=True)
            elif name == "sorting":
                sample_rows(a)
            elif name == "cutting":
                cut(all_rows, samples[0.1].rows)
            else:
                torch.sparse.mm(samples[name].transposed, grad[samples[name].rows])
            seconds.append(time.process_time() - started)
    entries = {budget: sample.transposed.values().numel() for budget, sample in samples.items()}
    return [
        {"what": name, "median_s": round(statistics.median(each[1:]), 6), "entries": entries.get(name, whole)}
        for name, each in found.items()
    ]


def report(found: dict[str, Any]) -> str:
    lines = [f"{'budget':>7} {'greedy':>8} {'later':>8} {'uniform':>8} {'later':>8}   cosine to the exact gradient"]
    for budget in BUDGETS:
        cells = []
        for how in ("greedy", "uniform"):
            mine = [r for r in found["cosines"] if (r["budget"], r["allocation"]) == (budget, how)]
            cells += [statistics.fmean(r[what] for r in mine) for what in ("fresh", "later")]
        lines.append(f"{budget:7.2f} " + " ".join(f"{cell:8.3f}" for cell in cells))
    lines += ["", f"{'training':36} {'accuracy':>9} {'multiplied':>11}"]
    for key in dict.fromkeys(training_of(row) for row in found["trainings"]):
        mine = [row for row in found["trainings"] if training_of(row) == key]
        share = statistics.fmean(row.get("multiplied", 1.0) for row in mine)
        lines.append(f"{key:36} {statistics.fmean(row['accuracy'] for row in mine):9.3f} {share:11.3f}")
    lines += ["", *(f"{row['what']!s:8} {1e3 * row['median_s']:8.2f} ms" for row in found["times"])]
    return "\n".join(lines)


def training_of(row: dict[str, Any]) -> str:
    if row["training"] == "exact":
        return "exact"
    return f"{row['budget']}, {row['allocation']}, exact from {row['exact_from']}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small graph, a few epochs")
    parser.add_argument("--out", type=Path, help="a JSON file of all rows")
    given = parser.parse_args(arguments)
    setting = replace(Setting(), nodes=300, degree=10.0, epochs=20, at=(4,)) if given.quick else Setting()
    started, found = time.monotonic(), {"cosines": [], "trainings": []}
    for seed in range(given.seeds):
        graph = draw(setting, seed)
        found["cosines"] += cosines(setting, graph, seed)
        found["trainings"] += trainings(setting, graph, seed)
    found["times"] = times(setting, graph)
    print(report(found))
    if given.out is not None:
        about = {"machine": measured_on(), "torch": torch.__version__, "setting": vars(setting), "later": LATER}
        about |= {"at": setting.at, "entries": graph.adjacency.values().numel(), "rounds": ROUNDS}
        about |= {"seconds": round(time.monotonic() - started, 1)}
        given.out.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
