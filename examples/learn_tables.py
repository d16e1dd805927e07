"""Tables learned in context: a small Orion-MSP, trained on made-up tables, beside models that are fitted to each table.

    python examples/learn_tables.py                # some minutes on one core
    python examples/learn_tables.py --steps 4      # a look at what it does
    python examples/learn_tables.py --seeds 3 --out tables.json

Every table has columns from random numbers, some mixed from others, and classes from a random network or a random tree
of some of its columns: a small prior of the kind that such models are trained on. Two variants of Orion-MSP see the
same tables: as its paper means it, and as its release has it (links drawn anew at each call, and rows that reach each
other where they read the memory). Each scale has one block, as the class in the release has; with one, which columns
attend each other changes nothing (`gossamer.modules.orion_msp`), so that dense rows are the same model, and the two
variants differ in `mixing` alone. The one seed that was tried with two blocks learnt nothing in as many steps.

Then, on tables that none has seen, their accuracy on the unlabelled rows stands beside logistic regression and the
nearest neighbours, fitted to the labelled rows of each; both are written out below, since they are a few lines and the
library needs torch alone. A test holds them to the same models written in another way, and, where scikit-learn is
installed, to its own. Columns are scaled and classes cut by labelled rows alone: how the labelled rows fall says
nothing about the others. A variant sees 32 thousand tables here, and the published model saw 51 million in its first
stage: do not expect it to come near. Groups of columns are means, since learned ones lose the order of columns.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measured_on import measured_on
from torch import Tensor

from gossamer.modules import OrionMSP
from gossamer.modules.tabular import Block

CLASSES, LABELLED, ROWS, COLUMNS = 2, 32, 48, 4
BATCH, TESTS, RATE = 32, 256, 2e-3
SMALL = {"points": 8, "column_depth": 1, "row_heads": 4, "blocks": 3, "scales": (1, 2, 4), "classes": 2, "globals_": 2}
SMALL |= {"group": "mean", "latents": 8, "memory_depth": 1, "heads": 4, "depth": 3}
VARIANTS = {
    "Orion-MSP, as meant": {"window": 1, "random": 1},
    "Orion-MSP, as released": {"window": None, "random": 1, "seed": None, "mixing": True},
}


def network(x: Tensor, generator: torch.Generator) -> Tensor:
    """A score of each row, from two random layers."""
    first = torch.randn(x.shape[1], 4, generator=generator) * x.shape[1] ** -0.5
    return torch.tanh(x @ first) @ torch.randn(4, generator=generator)


def tree(x: Tensor, generator: torch.Generator) -> Tensor:
    """A score of each row, from the leaf of a random tree of depth two that it falls into."""
    leaf = torch.zeros(len(x), dtype=torch.int64)
    for _ in range(2):
        column = torch.randint(0, x.shape[1], (4,), generator=generator)[leaf]
        cut = 0.5 * torch.randn(4, generator=generator)[leaf]
        leaf = 2 * leaf % 4 + (x.gather(1, column[:, None])[:, 0] > cut)
    return torch.randn(4, generator=generator)[leaf] + 0.01 * torch.randn(len(x), generator=generator)


def tables(count: int, generator: torch.Generator, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """``[count, ROWS, columns]`` and classes ``[count, ROWS]``.

    Over the labelled rows, the first ones, each column has a mean of 0 and a deviation of 1, and each class as many.
    """
    made = []
    for _ in range(count):
        x = torch.randn(ROWS, columns, generator=generator)
        mixed = int(torch.randint(1, columns + 1, (1,), generator=generator))
        x[:, mixed:] += x @ torch.randn(columns, columns - mixed, generator=generator) * 0.3
        power = torch.rand(columns, generator=generator) + 0.5  # a column is known by how its numbers lie
        x = x.sign() * x.abs() ** power + torch.rand(columns, generator=generator) * x.square()
        x = (x - x[:LABELLED].mean(0)) / x[:LABELLED].std(0)
        used = x[:, torch.randperm(columns, generator=generator)[: int(torch.randint(1, 4, (1,), generator=generator))]]
        score = (network if torch.rand(1, generator=generator) < 0.5 else tree)(used, generator)
        cuts = score[:LABELLED].sort().values[[n * LABELLED // CLASSES for n in range(1, CLASSES)]]
        label = (score[:, None] >= cuts).sum(1)
        order = torch.randperm(CLASSES, generator=generator)  # a class says nothing by its number
        made.append((x, order[label]))
    return torch.stack([x for x, _ in made]), torch.stack([y for _, y in made])


def made(**options: Any) -> OrionMSP:
    """A small model. What each block adds begins at zero in the release; so short a training would not leave that."""
    model = OrionMSP(32, CLASSES, **{**SMALL, **options})
    for block in model.modules():
        if isinstance(block, Block):
            block.o_proj.reset_parameters()
            block.down.reset_parameters()
    return model


def loss_of(model: OrionMSP, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x, y, LABELLED).flatten(0, 1), y[:, LABELLED:].flatten())


def train(model: OrionMSP, steps: int, seed: int) -> None:
    """On tables of one column first, then of one more after each tenth of the steps, as many as fit.

    With all columns from the start nothing is learnt for thousands of steps: what a label has to do with a row like it
    is found where rows are one number (Garg et al., 2208.01066, begin with few dimensions, too).
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    stage = max(1, steps // 10)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))
        optimizer.zero_grad()
        loss_of(model, *tables(BATCH, generator, min(COLUMNS, 1 + step // stage))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def logistic(x: Tensor, y: Tensor) -> Tensor:
    """Which of two classes one table's unlabelled rows have, by logistic regression."""
    return (F.pad(x[LABELLED:], (0, 1), value=1.0) @ regression(x, y) > 0).long()


def regression(x: Tensor, y: Tensor) -> Tensor:
    """Weights ``[COLUMNS + 1]`` of the labelled rows' columns, and what is added; scikit-learn's penalty, C = 1."""
    weights = torch.zeros(COLUMNS + 1, requires_grad=True)
    wide, wanted = F.pad(x[:LABELLED], (0, 1), value=1.0), y[:LABELLED].float()
    optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = F.binary_cross_entropy_with_logits(wide @ weights, wanted, reduction="sum")
        total = total + 0.5 * weights[:-1].square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return weights.detach()


def neighbours(x: Tensor, y: Tensor, count: int = 5) -> Tensor:
    """Classes of one table's unlabelled rows: what most of the nearest labelled rows have."""
    near = torch.cdist(x[LABELLED:], x[:LABELLED]).topk(count, largest=False).indices
    return F.one_hot(y[near], CLASSES).sum(1).argmax(-1)


def held_out() -> tuple[Tensor, Tensor]:
    """Tables and classes that no training sees."""
    return tables(TESTS, torch.Generator().manual_seed(10**6))


@torch.no_grad()
def fitted() -> dict[str, Tensor]:
    """Accuracy on each of the test tables of what is fitted to it, by model."""
    x, y = held_out()
    return {
        name: torch.stack([(fit(*one) == one[1][LABELLED:]).float().mean() for one in zip(x, y, strict=True)])
        for name, fit in {"logistic regression": logistic, "5 nearest neighbours": neighbours}.items()
    }


def trained(name: str, steps: int, seed: int) -> Tensor:
    """Accuracy on each of the test tables of a variant."""
    x, y = held_out()
    torch.manual_seed(seed)
    model = made(**VARIANTS[name])
    train(model, steps, seed)
    with torch.no_grad():
        return (model(x, y, LABELLED).argmax(-1) == y[:, LABELLED:]).float().mean(1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1000, help=f"of training, {BATCH} tables each")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file of all accuracies")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    found = {name: [accuracy] for name, accuracy in fitted().items()}
    found |= {name: [trained(name, given.steps, seed) for seed in range(given.seeds)] for name in VARIANTS}
    seconds = time.monotonic() - start
    print(f"{'model':24} {'accuracy':>8}   (95% interval over {TESTS} tables, mean of {given.seeds} seeds)")
    rows = []
    for name, seeds in found.items():
        each = torch.stack(seeds).mean(0)
        interval = 1.96 * float(each.std()) / TESTS**0.5
        print(f"{name:24} {float(each.mean()):8.3f}   +- {interval:.3f}")
        accuracies = [round(float(one.mean()), 4) for one in seeds]
        # Against logistic regression, table by table: the tables differ more than the models do.
        apart = each - found["logistic regression"][0]
        difference = [round(float(apart.mean()), 4), round(1.96 * float(apart.std()) / TESTS**0.5, 4)]
        rows.append({"model": name, "seeds": accuracies, "interval": round(interval, 4), "difference": difference})
    print(f"{seconds:.0f} s; a guess is right in {1 / CLASSES:.3f}")
    if given.out is not None:
        about: dict[str, Any] = {"machine": measured_on(), "torch": torch.__version__}
        about |= {"steps": given.steps, "batch": BATCH, "tables": TESTS, "labelled": LABELLED, "rows_of_a_table": ROWS}
        about |= {"columns": COLUMNS, "classes": CLASSES, "seconds": round(seconds, 1), "rows": rows}
        given.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
