"""How near a gradient by forward passes comes to the real one: P-RGE on the reference model, by queries and numbers.

    python examples/estimated_gradients.py [--seeds 20] [--out estimated_gradients.json]

The B matrices of some layers are trained numbers; their gradient by autograd is the truth. The squared cosine of an
estimate by ``q`` queries to a gradient of ``d`` numbers is a Beta(q/2, (d - 1)/2) number where the loss is linear,
whatever the model; the mean cosine that follows is printed beside.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measured_on import measured_on
from torch import Tensor

from gossamer.training import PRGE, target_loss

REFERENCE = Path(__file__).resolve().parent.parent / "models" / "reference"
TRAINED = ((("v_proj",), 1), (("q_proj", "v_proj"), 1), (("q_proj", "v_proj"), 4), (("q_proj", "v_proj"), 16))
QUERIES = (1, 4, 16, 64)
TEXT = "A language model reads what stands before and says what comes next. " * 2


def expected(queries: int, numbers: int) -> float:
    """The mean cosine: of the root of a Beta number."""
    a, b = queries / 2, (numbers - 1) / 2
    return math.exp(math.lgamma(a + 0.5) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(a + b + 0.5))


def truth(model: Any, tuner: PRGE, batch: dict[str, Tensor]) -> Tensor:
    """By autograd, flat."""
    places = [adapter.b.requires_grad_() for adapter in tuner.adapters.values()]
    loss = target_loss(model(input_ids=batch["input_ids"], use_cache=False), batch).mean()
    found = torch.autograd.grad(loss, places)
    for place in places:
        place.requires_grad_(False)
    return torch.cat([g.flatten() for g in found])


def measure(seeds: int, queries: tuple[int, ...] = QUERIES) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval().requires_grad_(False)
    ids = AutoTokenizer.from_pretrained(REFERENCE)(TEXT, return_tensors="pt")["input_ids"]
    batch, rows = {"input_ids": ids, "labels": ids}, []
    for targets, rank in TRAINED:
        for q in queries:
            cosines = []
            for seed in range(seeds):
                # In float32 a smaller distance drowns in the rounding of the loss.
                tuner = PRGE(model, targets, rank=rank, queries=q, eps=3e-3, batched="pair", seed=seed)
                gradient = truth(model, tuner, batch)
                estimate = torch.cat([g.flatten() for g in tuner.gradient(batch).values()])
                cosines.append(round(float(F.cosine_similarity(estimate, gradient, dim=0)), 5))
                tuner.remove()
            d = len(gradient)
            row = {"targets": targets, "rank": rank, "numbers": d, "queries": q, "cosines": cosines}
            rows.append(row | {"expected": round(expected(q, d), 5)})
            print(f"{d:6} numbers, {q:3} queries: {statistics.fmean(cosines):.4f}, expected {rows[-1]['expected']:.4f}")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a JSON file of the cosines")
    given = parser.parse_args(arguments)
    found = {"machine": measured_on(), "torch": torch.__version__, "seeds": given.seeds, "rows": measure(given.seeds)}
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
