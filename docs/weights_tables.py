"""Tables of pruned models that are trained on, and of training with N:M weights, from the two examples' files."""

import math
import statistics
from typing import Any

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
PRUNED = {
    "magnitude-50": "50% by magnitude",
    "sparsegpt-50": "50% by SparseGPT",
    "magnitude-70": "70% by magnitude",
    "sparsegpt-70": "70% by SparseGPT",
}
TRAINED = {
    "dense": "dense",
    "forward": "forward-only",
    "shared": "one mask for both",
    "shared+decay": "SR-STE: one mask for both, with decay",
    "bdwp": "BDWP",
}


def recover_table(found: dict[str, Any]) -> Table:
    """Loss of held-out text by steps, of each way to prune, in the mean over seeds."""
    steps = [point["step"] for point in found["rows"][0]["curve"]]
    dense, rows = found["dense"]["loss"], []
    for kind, name in PRUNED.items():
        curves = [row["curve"] for row in found["rows"] if row["kind"] == kind]
        if not curves:
            continue
        losses = [[curve[n]["loss"] for curve in curves] for n in range(len(steps))]
        means = [statistics.fmean(values) for values in losses]
        back = (means[0] - means[-1]) / (means[0] - dense)
        ends = f"{min(losses[-1]):.3f} to {max(losses[-1]):.3f}"
        perplexities = (f"{math.exp(means[n]):.1f}" for n in (0, -1))
        kl = (f"{statistics.fmean(curve[n]['kl'] for curve in curves):.3f}" for n in (0, -1))
        figures = (*(f"{mean:.3f}" for mean in means), ends, *perplexities, f"{back:.0%}", *kl)
        rows.append((name, *figures, len(curves)))
    above = (
        f"Nats a token of {found['held_out']} held-out windows of {found['tokens']} tokens; the dense model has "
        f"{dense:.3f}, perplexity {math.exp(dense):.1f}. A step has {found['rows_a_step'] * found['tokens']:,} tokens."
    )
    header = ("pruned", *(f"after {step} steps" for step in steps), "best to worst seed", "perplexity before", "after")
    return above, (*header, "of the loss back", "KL to dense before", "KL after", "seeds"), rows


def sparse_training_table(found: dict[str, Any]) -> Table:
    """What each training reaches, and what it multiplies, beside dense training of the same seeds."""
    dense = {row["seed"]: row["bits"] for row in found["rows"] if row["kind"] == "dense"}
    whole, rows = found["macs"]["dense"], []
    for kind, name in TRAINED.items():
        mine = {row["seed"]: row["bits"] for row in found["rows"] if row["kind"] == kind}
        if not mine:
            continue
        bits = list(mine.values())
        apart = "" if kind == "dense" else ", ".join(f"{mine[seed] - dense[seed]:+.3f}" for seed in sorted(mine))
        macs = found["macs"][kind]
        sparse = sum(macs[part] < whole[part] for part in ("forward", "to_inputs", "to_weights"))
        ends = f"{min(bits):.3f} to {max(bits):.3f}"
        counted = (f"{sparse} of 3", f"{macs['total'] / whole['total']:.0%}")
        rows.append((name, f"{statistics.fmean(bits):.3f}", ends, apart, *counted, len(bits)))
    above = (
        f"{found['pattern']}, {found['steps']} steps of {found['batch']} samples of {found['tokens']} characters; "
        "multiply-adds are those of the linear layers, where zeros that lie in groups are skipped."
    )
    header = ("training", "bits a character", "best to worst", "beside dense, by seed", "sparse products")
    return above, (*header, "multiply-adds of dense", "seeds"), rows
