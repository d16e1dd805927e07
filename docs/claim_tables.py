"""Figures of the papers' claims on the small video model, from the lines of `models/video_claims.py`."""

import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from gossamer.evaluate.metrics import bootstrap_interval

Record = dict[str, Any]
Figure = tuple[float, tuple[float, float]]
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
SHUFFLES = 50


class Claims:
    """The lines of one file. A figure is a mean over clips with its 95% bootstrap interval over them."""

    def __init__(self, path: Path) -> None:
        self.lines: list[Record] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    @property
    def header(self) -> Record:
        return self.lines[0]

    @property
    def setting(self) -> Record:
        return self.header["setting"]

    @property
    def looked(self) -> list[int]:
        return self.setting["looked"]

    def of(self, what: str, **fields: Any) -> list[Record]:
        """Lines of a kind with these values."""
        found = [line for line in self.lines if line.get("what") == what]
        return [line for line in found if all(line.get(name) == value for name, value in fields.items())]

    @cached_property
    def clips(self) -> int:
        return len(self.of("modes"))

    def figure(self, lines: Iterable[Record], name: str) -> Figure:
        """Of a number of lines: first the mean of each clip."""
        return figure(by_clip(lines, lambda line: line[name]))

    def recall(self, source: str, at: int, step: int | None = None) -> Figure:
        given = {} if step is None else {"step": step}
        return self.figure(self.of("recall", **{"from": source}, at=at, **given), "recall")

    def modes(self, weight: float, table: str) -> tuple[Figure, float]:
        """Error on clips whose prompts did not choose, and density: of a table that the others chose.

        Args:
            table: ``chosen``, ``shuffled`` among heads (mean over shuffles), or the clip's ``own`` best one.
        """
        of = self.of("modes")
        chose, held = ([line for line in of if line["chose"] is flag] for flag in (True, False))
        best = argmin(mean_of([line["error"] for line in chose]), mean_of([line["density"] for line in chose]), weight)
        errors, densities = [], []
        for line in held:
            own = argmin(line["error"], line["density"], weight) if table == "own" else best
            tables = shuffled(own) if table == "shuffled" else [own]
            errors.append(fmean(picked(line["error"], one) for one in tables))
            densities.append(fmean(picked(line["density"], one) for one in tables))
        return figure(errors), fmean(densities)

    def orders(self, number: int, table: str) -> Figure:
        """Recall, on clips whose prompts did not choose, of the best blocks at one of the densities.

        Args:
            number: of the density.
            table: ``FHW`` for all heads, as ``chosen`` by the published score, ``shuffled`` among heads, ``recalled``:
                the order with the most recall on the clips that choose; ``own``: on the clip itself.
        """
        of = self.of("orders")
        chose, held = ([line for line in of if line["chose"] is flag] for flag in (True, False))
        scored: list[list[int]] = self.of("chosen")[0]["orders"]
        most = [[best(head) for head in layer] for layer in mean_of([line["recall"][number] for line in chose])]
        recalls = []
        for line in held:
            recall = line["recall"][number]
            tables = {
                "FHW": [[[0] * len(layer) for layer in recall]],
                "chosen": [scored],
                "shuffled": shuffled(scored),
                "recalled": [most],
                "own": [[[best(head) for head in layer] for layer in recall]],
            }[table]
            recalls.append(fmean(picked(recall, one) for one in tables))
        return figure(recalls)


def by_clip(lines: Iterable[Record], value: Callable[[Record], float]) -> list[float]:
    found: dict[Any, list[float]] = {}
    for line in lines:
        found.setdefault((line["prompt"], line["seed"]), []).append(value(line))
    return [fmean(values) for values in found.values()]


def figure(values: list[float]) -> Figure:
    return fmean(values), bootstrap_interval(values)


def mean_of(tables: list[Any]) -> Any:
    """Of lists of numbers of one shape, however deep."""
    if isinstance(tables[0], list):
        return [mean_of([table[n] for table in tables]) for n in range(len(tables[0]))]
    return fmean(tables)


def best(numbers: list[float]) -> int:
    return max(range(len(numbers)), key=lambda n: numbers[n])


def argmin(errors: Any, densities: Any, weight: float) -> list[list[int]]:
    """Of each head the mode with the least ``error + weight density``."""
    return [
        [best([-(e + weight * d) for e, d in zip(*head, strict=True)]) for head in zip(*layer, strict=True)]
        for layer in zip(errors, densities, strict=True)
    ]


def picked(figures: Any, table: list[list[int]]) -> float:
    """Mean over layers and heads of what a table picks of ``[layer][head][choice]``."""
    rows = zip(figures, table, strict=True)
    return fmean(head[choice] for layer, row in rows for head, choice in zip(layer, row, strict=True))


def shuffled(table: list[list[int]]) -> list[list[list[int]]]:
    """The same choices for other heads, as many times as `SHUFFLES` says."""
    made, rng = [], Random(0)
    for _ in range(SHUFFLES):
        flat = [choice for layer in table for choice in layer]
        rng.shuffle(flat)
        wide = len(table[0])
        made.append([flat[n : n + wide] for n in range(0, len(flat), wide)])
    return made


def shown(value: Figure, digits: int = 3) -> str:
    mean, (low, high) = value
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def recall_of(claims: Claims) -> Table:
    """Mass that masks keep, by the step at which they are used."""
    rows: list[tuple[Any, ...]] = []
    kinds: list[tuple[str, str, int | None]] = [("found at that step", "own", None)]
    kinds += [(f"found at step {step}", "own", step) for step in (claims.looked[0], *claims.setting["search"])]
    kinds += [("of that step, the same prompt and another seed", "seed", None)]
    kinds += [("of that step, another prompt and the same seed", "prompt", None)]
    kinds += [("a window", "window", None), ("random blocks", "random", None)]
    for name, source, step in kinds:
        cells = []
        for at in claims.looked:
            there = step is None or step <= at
            found = at if step is None and source == "own" else step
            cells.append(shown(claims.recall(source, at, found)) if there else "")
        rows.append((name, *cells))
    kept = 1 - claims.setting["sparsity"]
    above = f"Share of the attention mass that masks of {kept:.0%} of the blocks keep; {claims.clips} clips."
    return above, ("mask", *(f"at step {at}" for at in claims.looked)), rows


def drift_of(claims: Claims) -> Table:
    first = claims.setting["search"][0]
    later = [step for step in claims.looked if step > first]
    names = (("mean", "difference of the LSE, mean"), ("sums", "a query's masses, distance of their sum from 1"))
    rows = [(said, *(shown(claims.figure(claims.of("drift", step=s), name)) for s in later)) for name, said in names]
    return f"With the LSE of step {first}; {claims.clips} clips.", ("", *(f"at step {step}" for step in later)), rows


def search_of(claims: Claims) -> Table:
    later = [step for step in claims.looked if step > claims.setting["search"][0]]
    rows = []
    for adaptive in (False, True):
        for cached in (False, True):
            some = {"adaptive": adaptive, "cached": cached}
            cells = [shown(claims.figure(claims.of("search", step=step, **some), "error")) for step in later]
            density = claims.figure(claims.of("search", **some), "density")[0]
            heads, lse = "adapted" if adaptive else "uniform", "cached" if cached else "fresh"
            rows.append((heads, lse, *cells, f"{density:.3f}"))
    said = " and ".join(map(str, claims.setting["search"]))
    above = f"Relative error of each head's output; searches at steps {said}; {claims.clips} clips."
    return above, ("heads", "LSE", *(f"at step {step}" for step in later), "density"), rows


def tiles_of(claims: Claims) -> Table:
    rows = []
    names = ("attention_tile", "window_blocks", "random_blocks", "oracle_blocks")
    for frames in sorted({line["frames"] for line in claims.of("tiles")}):
        density = claims.figure(claims.of("tiles", frames=frames, method=names[0]), "density")[0]
        cells = [shown(claims.figure(claims.of("tiles", frames=frames, method=name), "error")) for name in names]
        rows.append((frames, f"{density:.3f}", *cells))
    above = f"Relative error of each head's output with as many blocks; {claims.clips} clips."
    return above, ("reference frames", "density", *(f"`{name}`" for name in names)), rows


def modes_of(claims: Claims, weights: tuple[float, ...] = (0.03, 0.1, 0.5)) -> Table:
    rows = []
    for weight in weights:
        found = {table: claims.modes(weight, table) for table in ("chosen", "shuffled", "own")}
        cells = (f"{shown(error)}, {density:.2f}" for error, density in found.values())
        rows.append((f"{weight:g}", *cells))
    held = len([line for line in claims.of("modes") if not line["chose"]])
    above = f"Relative mean square error, and density, on {held} clips of prompts that did not choose."
    return above, ("weight of the density", "chosen table", "shuffled among heads", "each clip's own best"), rows


def orders_of(claims: Claims) -> Table:
    rows = []
    for number, density in enumerate(claims.setting["densities"]):
        tables = ("FHW", "chosen", "shuffled", "recalled", "own")
        rows.append((f"{density:g}", *(shown(claims.orders(number, table)) for table in tables)))
    held = len([line for line in claims.of("orders") if not line["chose"]])
    above = f"Share of the attention mass that the best blocks of a head keep, on {held} clips that did not choose."
    names = ("FHW for all", "chosen by the score", "shuffled among heads", "chosen by recall", "each clip's own best")
    return above, ("density", *names), rows


def stretch_of(claims: Claims) -> Table:
    rows = []
    for method in dict.fromkeys(line["method"] for line in claims.of("stretch")):
        for part in ("first", "last"):
            some = claims.of("stretch", method=method, part=part)
            cells = (shown(claims.figure(some, name), d) for name, d in (("psnr", 1), ("ssim", 3), ("distance", 4)))
            rows.append((f"`{method}`", f"the {part} quarter", *cells, len(by_clip(some, lambda line: line["psnr"]))))
    return "Whole clips beside dense ones.", ("method", "sparse in", "PSNR, dB", "SSIM", "distance", "clips"), rows


TABLES: dict[str, Callable[[Claims], Table]] = {
    "video_recall": recall_of,
    "video_drift": drift_of,
    "video_search": search_of,
    "video_tiles": tiles_of,
    "video_modes": modes_of,
    "video_orders": orders_of,
    "video_stretch": stretch_of,
}
