"""Tables of what trainable layers recall (`gossamer mqar`), cost by length (`benchmarks/modules.py`), and do in the
examples that train them."""

import json
from pathlib import Path
from typing import Any

from marked import markdown

from gossamer.evaluate.mqar.routers import ROLES
from gossamer.evaluate.mqar.summary import RecallRow, guess, near_and_far, recall_rows
from gossamer.evaluate.summary import read_results

IMAGES = Path(__file__).resolve().parent / "images"
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
NOT_MEASURED = "Not measured yet."
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


def recall_tables(path: Path) -> list[Table]:
    """Of each setting and task in a file, a row for each mixer and width."""
    records = read_results(path)
    machine = next(record for record in records if record["kind"] == "run")["machine"]
    rows = recall_rows(records)
    made: list[Table] = []
    for group in dict.fromkeys((row.settings, row.task) for row in rows):
        here = [row for row in rows if (row.settings, row.task) == group]
        edges = sorted({edge for row in here for edge, _ in near_and_far(row)})
        above = f"Setting `{', '.join(group[0])}`, `{group[1]}`; {machine['processor']} (`{path.parent.name}`)."
        if (by_chance := guess(here[0])) is not None:
            above += f" A guess among a sequence's own values is right in {by_chance:.3g}."
        header = ("layers", "width", "accuracy", "worst to best", "seeds", *(f"to {edge}" for edge in edges))
        made.append((above, (*header, "state", "logits", "of dense"), [recall_row(row, edges) for row in here]))
    return made


def recall_row(row: RecallRow, edges: list[int]) -> tuple[Any, ...]:
    far = dict(near_and_far(row))
    shares = (f"{far[edge]:.2f}" if edge in far else "" for edge in edges)
    said = (f"`{row.mixer}`", row.width, f"{row.accuracy:.3f}", f"{row.low:.3f} to {row.high:.3f}", row.seeds)
    return (*said, *shares, f"{row.state:,}", f"{row.reads:.1f}", f"{row.share:.0%}")


def recall_table() -> str:
    made = [table for path in sorted(RESULTS.glob("*/mqar.jsonl")) for table in recall_tables(path)]
    return "\n\n".join(markdown(*table) for table in made) or NOT_MEASURED


WHAT = {"forward": "forward", "step": "step", "decode": "decoding"}


def costs_of(found: dict[str, Any]) -> Table:
    """A row for each layer: how its time grows, forward, in a step and where it decodes, and from where it is faster
    than dense."""
    by = {(row["module"], row["what"]): row for row in found["summary"]}
    kinds = [what for what in WHAT if any(row["what"] == what for row in found["summary"])]
    longest = max(row["longest"] for row in found["summary"])
    each = ("exponent", "of the last doubling", "faster from", f"times dense at {longest:,}")
    if any(row["times_gossamer"] is not None for row in found["summary"]):
        each = (*each, f"times dense on gossamer's kernels at {longest:,}")
    rows = []
    for name in dict.fromkeys(row["module"] for row in found["summary"]):
        cells: list[Any] = [f"`{name}`"]
        for what in kinds:
            row = by.get((name, what))
            if row is None:
                cells += [""] * len(each)
                continue
            if row["beside"] not in ("dense", name):
                cells[0] = f"`{name}`, beside `{row['beside']}`"
            at = "" if row["longest"] == longest else f" at {row['longest']:,}"
            times = [_number(row[key]) for key in ("times_dense", "times_gossamer")[: len(each) - 3]]
            # Of two lengths there is only the last doubling.
            exponents = _number(row["exponent"] if row["lengths"] > 2 else None), _number(row["last_exponent"])
            cells += [*exponents, _even(row), *(f"{one}{at}" if one else "" for one in times)]
        rows.append(tuple(cells))
    tokens = f" Decoding is of {found['decoded_tokens']} tokens, one by one." if "decode" in kinds else ""
    above = (
        f"{found['machine']['cpu']}, {found['threads']} threads, fp32, width {found['width']}, {found['heads']} heads; "
        f"medians of {found['rounds']} rounds, while others used {_load(found['rows'])} of the machine. A step is a "
        f"forward and a backward pass.{tokens}"
    )
    return above, ("layer", *(f"{WHAT[what]}: {name}" for what in kinds for name in each)), rows


def _even(row: dict[str, Any]) -> str:
    """From which length a layer is faster; the shortest that was timed bounds it from above alone."""
    if row["module"] == row["beside"]:
        return ""
    if row["break_even"] is None:
        return "never"
    return f"{'≤ ' if row['break_even'] == row['shortest'] else ''}{row['break_even']:,}"


def _load(rows: list[dict[str, Any]]) -> str:
    shares = [row["used_by_others"] for row in rows if row["used_by_others"] is not None]
    return f"{min(shares):.0%} to {max(shares):.0%}" if shares else "an unknown share"


def costs_table() -> str:
    made = [costs_of(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/modules*.json"))]
    return "\n\n".join(markdown(*table) for table in made) or NOT_MEASURED


def characters_of(found: dict[str, Any]) -> Table:
    """A row for each kind of attention of `examples/character_model.py`."""
    rows = []
    for kind in dict.fromkeys(one["kind"] for one in found["rows"]):
        mine = [one for one in found["rows"] if one["kind"] == kind]
        bits, seconds = [one["bits"] for one in mine], [one["seconds"] for one in mine]
        said = (f"{sum(bits) / len(bits):.3f}", f"{min(bits):.3f} to {max(bits):.3f}", len(mine))
        rows.append((f"`{kind}`", *said, f"{mine[0]['reads']:.0f}", f"{sum(seconds) / len(seconds):.0f}"))
    above = f"{found['machine']['cpu']}, {found['threads']} threads; {found['rows'][0]['steps']} steps."
    return (
        above,
        ("attention", "bits a character", "best to worst", "seeds", "keys a query, mean of both layers", "seconds"),
        rows,
    )


def characters_table() -> str:
    made = [characters_of(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/characters*.json"))]
    return "\n\n".join(markdown(*table) for table in made) or NOT_MEASURED


def active_of(records: list[dict[str, Any]]) -> Table:
    """Of each mixer with a router what share of the tokens of each role it activates, of the rate that each seed did
    best with; beside it what it recalls."""
    best: dict[tuple[str, str, str, int], dict[int, dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "mqar" and record.get("active"):
            key = (record["mixer"], record["task"], json.dumps(record["training"], sort_keys=True), record["width"])
            seeds = best.setdefault(key, {})
            if record["seed"] not in seeds or record["accuracy"] > seeds[record["seed"]]["accuracy"]:
                seeds[record["seed"]] = record
    rows = []
    for (mixer, task, _, width), seeds in best.items():
        for seed, record in sorted(seeds.items()):
            shares = (f"{record['active'][-1][role]:.2f}" for role in ROLES)
            said = (f"`{mixer}`", f"`{task}`", width, seed, f"{record['rate']:g}", record["steps"])
            rows.append((*said, f"{record['accuracy']:.3f}", *shares))
    header = ("layers", "task", "width", "seed", "rate", "steps", "accuracy", *(f"of {role} tokens" for role in ROLES))
    return "Share of the tokens that the last router activates, after training.", header, rows


def active_table() -> str:
    made = [active_of(read_results(path)) for path in sorted(RESULTS.glob("*/mqar.jsonl"))]
    return "\n\n".join(markdown(*table) for table in made if table[2]) or NOT_MEASURED


def recall_pictures() -> str:
    """As benchmarks/pictures.py drew them."""
    files = sorted(IMAGES.glob("*/recall_*.svg"))
    shown = {"state": "state", "width": "width"}
    return "\n\n".join(
        f"![Share recalled against {shown[file.stem.removeprefix('recall_')]}, {file.parent.name}]"
        f"(images/{file.parent.name}/{file.name})"
        for file in files
    )


def _told(found: dict[str, Any], folder: str) -> str:
    return f"{found['machine']['processor']} (`{folder}`), {found['machine']['threads']} threads"


def shapes_of(found: dict[str, Any], folder: str) -> Table:
    """A row for each choice of connections of `examples/shapes.py`."""
    rows = []
    for name in dict.fromkeys(row["connections"] for row in found["rows"]):
        mine = [row for row in found["rows"] if row["connections"] == name]
        cells = (mean_and_range([row[what] for row in mine]) for what in ("mass", "before", "after"))
        rows.append((name, *cells, len(mine)))
    above = (
        f"{_told(found, folder)}; {found['steps']} steps, then {found['second_steps']} with each mask, which keeps "
        f"{found['keep']:.0%} of the tokens; {found['images']} images, {found['seconds']:.0f} seconds in all."
    )
    return above, ("connections", "mass kept", "accuracy", "after the second stage", "seeds"), rows


def shapes_table() -> str:
    paths = sorted(RESULTS.glob("*/shapes.json"))
    made = [shapes_of(json.loads(path.read_text()), path.parent.name) for path in paths]
    return "\n\n".join(markdown(*table) for table in made) or NOT_MEASURED


def _in_all(seconds: float | None) -> str:
    """Nothing of trainings that shared their machine with others."""
    return "" if seconds is None else f"; {seconds:.0f} seconds in all"


def learned_of(found: dict[str, Any], folder: str) -> Table:
    """A row for each model of `examples/learn_tables.py`."""
    rows = []
    for row in found["rows"]:
        apart, interval = row["difference"]
        beside = "" if row["model"] == "logistic regression" else f"{apart:+.3f} ± {interval:.3f}"
        accuracy = f"{sum(row['seeds']) / len(row['seeds']):.3f} ± {row['interval']:.3f}"
        several = len(row["seeds"]) > 1
        worst = f"{min(row['seeds']):.3f} to {max(row['seeds']):.3f}" if several else ""
        rows.append((row["model"], accuracy, worst, len(row["seeds"]) if several else "", beside))
    above = (
        f"{_told(found, folder)}; {found['steps']} steps of {found['batch']} tables; {found['tables']} tables of "
        f"{found['rows_of_a_table']} rows, {found['labelled']} of them labelled, and {found['columns']} columns; 95% "
        f"intervals over the tables{_in_all(found['seconds'])}."
    )
    header = ("model", "accuracy", "worst to best seed", "seeds", "beside logistic regression")
    return above, header, rows


def learned_table() -> str:
    paths = sorted(RESULTS.glob("*/learn_tables.json"))
    made = [learned_of(json.loads(path.read_text()), path.parent.name) for path in paths]
    return "\n\n".join(markdown(*table) for table in made) or NOT_MEASURED


def mean_and_range(values: list[float]) -> str:
    mean = f"{sum(values) / len(values):.3f}"
    return mean if min(values) == max(values) else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


TABLES = {
    "recall": recall_table,
    "recall_active": active_table,
    "recall_pictures": recall_pictures,
    "module_costs": costs_table,
    "characters": characters_table,
    "shapes": shapes_table,
    "learn_tables": learned_table,
}
