"""The page: the first screen, then tables, pictures and circumstances, folded. No network, no scripts."""

from __future__ import annotations

import base64
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gossamer.evaluate.closeness import closeness_table
from gossamer.evaluate.summary import SummaryRow, closeness_of, main_table, summary_rows, task_table, warnings_of
from gossamer.profiles.files import write_whole
from gossamer.report.charts import figures
from gossamer.report.decoding import decoding
from gossamer.report.figure import Figure, Record, family
from gossamer.report.html import Html, breakable, document, element, join
from gossamer.report.latency import dense_labels
from gossamer.report.overview import decodes, in_words, overview, short_table
from gossamer.report.spreadsheet import csv_text

__all__ = ["findings", "write_report"]

_LARGEST_INLINE_CSV = 200_000
_FEW = 20
# So many intervals fit beside their figures; of more, each goes below its figure.
_MOST_WIDE_COLUMNS = 3
_HEADINGS = {
    "summary": "Summary",
    "tasks": "Accuracy by task",
    "closeness": "Beside dense runs, by kind of prompt",
}
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --soft: #5b6570; --grid: #dfe3e8; --axis: #8a939e;
  --card: #f6f8fa; --link: #0a66c2; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --text: #e4e8ec; --soft: #9aa5b1; --grid: #2c333b;
  --axis: #76818d; --card: #1c2127; --link: #6cb4ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 78rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; }
a { color: var(--link); } nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .9rem; }
p.note, figcaption, footer { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: break-word; min-width: 7rem;
  max-width: 17rem; position: sticky; left: 0; background: var(--back); }
th { white-space: normal; overflow-wrap: normal; }
td small { color: var(--soft); font-size: .85em; } .tight small { display: block; }
.tight td, .tight th { padding: .3rem .4rem; }
@media (max-width: 60rem) { th, td { padding: .3rem .4rem; } th { white-space: normal; overflow-wrap: normal; }
td small { display: block; }
  th:first-child, td:first-child { max-width: 7rem; font-size: .75rem; } }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.panels.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.3rem), 1fr)); }
.panels.wide { grid-template-columns: minmax(0, 1fr); }
.panels.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
details { border-top: 1px solid var(--grid); } details > summary { cursor: pointer; padding: .5rem 0; }
details > summary h2 { display: inline; margin: 0; }
figure { margin: 0; padding: .7rem; background: var(--card); border-radius: .5rem; min-width: 0; }
figcaption { overflow-wrap: anywhere; margin-bottom: .3rem; }
svg { width: 100%; height: auto; display: block; font-family: inherit; }
img.map { width: 100%; max-width: 260px; image-rendering: pixelated; border: 1px solid var(--grid); background: #fff; }
.legend { margin-top: .6rem; display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .85rem; }
.legend > span { display: inline-flex; align-items: center; gap: .3rem; } .legend svg { width: 34px; flex: none; }
.warning { border-left: 4px solid #d55e00; padding: .4rem .8rem; background: var(--card); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; } dd { margin: 0;
  overflow-wrap: anywhere; }
"""


def write_report(
    records: Sequence[Record], out: Path, title: str = "Sparse attention, measured", *, keep: Sequence[Path] = ()
) -> list[Path]:
    """Write the page to ``out`` and a CSV for each picture and table to ``<stem>_csv`` beside it.

    Every file is written under a temporary name first, and all text is escaped.

    Args:
        keep: files that must not be written to, such as those that the records were read from.

    Returns:
        the files written, the page first.

    Raises:
        ValueError: results of several models, which one page cannot compare; or in the place of the page or of a CSV
            there is a file that is one of ``keep``, or that is no page or CSV, or something else than a file.
        OSError: a file cannot be written.
    """
    _check_models(records)
    rows = summary_rows(records)
    first, pictures = overview(rows), figures(records, rows)
    steps = decoding(rows)
    pictures = [steps, *pictures] if steps.panels else pictures
    near = closeness_of(records)
    tables = [("summary", main_table(rows)), ("tasks", task_table(rows))]
    if len({row.kind for row in near}) > 1:
        tables.append(("closeness", closeness_table(near)))
    folder = out.with_name(f"{out.stem}_csv")
    contents = [(folder / f"{name}.csv", table) for name, table in tables]
    drawn = [first, *pictures] if first.panels else pictures
    contents += [(folder / f"{figure.name}.csv", figure.table) for figure in drawn]
    _check_place(out, keep, page=True)
    for path, _ in contents:
        _check_place(path, keep, page=False)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [(out, _page(title, records, rows, first, pictures, tables, folder.name))]
    texts += [(path, csv_text(table)) for path, table in contents]
    for path, content in texts:
        write_whole(path, content)
    return [path for path, _ in texts]


def _models(records: Sequence[Record]) -> list[Record]:
    """What `run` and `heads` lines say of their models; `heads` lines of older versions have a name at most."""
    found = [record.get("model") for record in records if record["kind"] in ("run", "heads", "calibration")]
    return [model for model in found if isinstance(model, dict)]


def _check_models(records: Sequence[Record]) -> None:
    models = {model["fingerprint"]: f"{model['name']} {model['fingerprint']}" for model in _models(records)}
    if len(models) > 1:
        raise ValueError(
            f"the results are of {len(models)} models ({', '.join(sorted(models.values()))}); make a report of each. "
            "A fingerprint tells the folder and the dtype that a model was loaded with apart, too: give both commands "
            "the same"
        )


def _check_place(path: Path, keep: Sequence[Path], *, page: bool) -> None:
    """Refuse to write over results, or over anything else that no report wrote."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise ValueError(f"cannot write {path}: it is {what}, not a file; choose another --out")
    if any(other.exists() and path.samefile(other) for other in keep):
        raise ValueError(f"{path} is one of the results that the report is made from; choose another --out")
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start and (not start.startswith(b"<!doctype html") if page else start.startswith((b"{", b"<"))):
        raise ValueError(
            f"{path} exists and is no {'HTML page' if page else 'CSV'}: it would be lost; choose another --out, or "
            "delete it first"
        )


def findings(rows: Sequence[SummaryRow]) -> list[str]:
    """One sentence for each method at the longest length, from the figures alone."""
    if not rows:
        return []
    longest = max(row.length for row in rows)
    rows = [row for row in rows if row.length == longest]
    seconds = {row.method: row.prefill_s for row in rows}
    plain = [(label, other) for label in dense_labels(list(seconds)) if (other := seconds[label])]
    steps = decodes(rows)
    sentences = []
    for row in rows:
        # Dense attention on another kernel is something to compare with, not a method.
        if family(row.method) == "dense" or row.difference is None or row.difference_interval is None:
            continue
        low, high = row.difference_interval
        if high < 0:
            judged = f"loses {-row.difference:.3f} of accuracy against dense (95% interval {-high:.3f} to {-low:.3f})"
        elif low > 0:
            judged = f"is {row.difference:.3f} more accurate than dense (95% interval {low:.3f} to {high:.3f})"
        else:
            judged = (
                f"does not differ measurably from dense (difference {row.difference:+.3f}, {low:+.3f} to {high:+.3f})"
            )
        if row.fewest < _FEW:
            judged += f"; {row.fewest} samples a task are too few to say more"
        cost = [f"computes {row.density:.1%} of the pairs"] if row.density is not None else []
        if steps:
            cost = [] if row.read is None else [f"reads {row.read:.1%} of the cache"]
            cost.append(f"takes {1e3 * (row.token_s or 0.0):.1f} ms a token")
        elif row.speedup is not None and row.prefill_s and plain:
            more = "".join(f", {row.prefill_s / other:.2f} times that of {name}" for name, other in plain[1:])
            cost.append(f"takes {1 / row.speedup:.2f} times the prefill of {plain[0][0]}{more}")
        worst = min(row.tasks, key=lambda task: row.tasks[task][0]) if len(row.tasks) > 1 else None
        tail = f" Its weakest task is {worst}, {row.tasks[worst][0]:.3f}." if worst and row.accuracy != 1.0 else ""
        sentences.append(f"At {longest:,} tokens {row.method} {judged}; it {' and '.join(cost)}.{tail}")
    return sentences


def _page(
    title: str,
    records: Sequence[Record],
    rows: Sequence[SummaryRow],
    first: Figure,
    pictures: Sequence[Figure],
    tables: Sequence[tuple[str, list[list[str]]]],
    folder: str,
) -> str:
    runs = [record for record in records if record["kind"] == "run"]
    sections = [(name, _HEADINGS[name], table) for name, table in tables if len(table) > 1]
    links = [(name, heading) for name, heading, _ in sections] + [(f.name, f.title) for f in pictures]
    links.append(("circumstances", "Circumstances"))
    contents = (element("a", heading, href=f"#{name}") for name, heading in links)
    parts = [element("h1", title), _headline(_models(records)), _warnings(records), _first(rows, first, folder)]
    parts.append(element("nav", *contents, aria_label="Contents"))
    folded = []
    for name, heading, table in sections:
        said = [element("li", sentence) for sentence in findings(rows)] if name == "summary" else []
        shown = [element("ul", *said) if said else Html(), _html_table(table), _download(name, table, folder)]
        folded.append((name, heading, shown))
    folded += [(figure.name, figure.title, _drawn(figure, folder)) for figure in pictures]
    folded.append(("circumstances", "Circumstances", [_circumstances(runs)]))
    # Where there is nothing for a first screen, the first part stands there.
    parts += [_folded(*part, shown=not first.panels and n == 0) for n, part in enumerate(folded)]
    return document(title, _STYLE, *(part for part in parts if part))


def _first(rows: Sequence[SummaryRow], figure: Figure, folder: str) -> Html:
    """The first screen: nothing where no answers or predictions were measured."""
    if not figure.panels:
        return Html()
    said = element("ul", *(element("li", breakable(line)) for line in in_words(rows)))
    *drawn, link = _drawn(figure, folder)
    table = short_table(rows)
    shown = (said, *drawn, _html_table(table) if table else "", link)
    return element("section", *shown, id=figure.name)


def _folded(name: str, heading: str, content: Sequence[Html], *, shown: bool) -> Html:
    """A part that opens by a click, or when a link leads into it."""
    part = element("section", *content, id=name)
    return element("details", element("summary", element("h2", heading)), "\n", part, "\n", open="" if shown else None)


def _drawn(figure: Figure, folder: str) -> list[Html]:
    panels = (
        element("figure", element("figcaption", breakable(caption)), drawn, "\n") for caption, drawn in figure.panels
    )
    parts = (
        element("p", figure.note, class_="note"),
        element("div", *panels, class_=f"panels {figure.layout}".strip()),
        figure.legend,
        _html_table(figure.words) if figure.words else Html(),
        _download(figure.name, figure.table, folder),
    )
    return [part for part in parts if part]


def _headline(models: Sequence[Record]) -> Html:
    if not models:
        return Html()
    model = models[0]
    known = [
        form.format(**model)
        for form, needed in (
            ("{architecture}", ("architecture",)),
            ("{layers} layers of {heads} heads", ("layers", "heads")),
            ("{parameters:,} parameters", ("parameters",)),
            ("{dtype}", ("dtype",)),
        )
        if all(name in model for name in needed)
    ]
    return element("p", f"{model['name']}{': ' if known else ''}{', '.join(known)}.")


def _warnings(records: Sequence[Record]) -> Html:
    runs = [record for record in records if record["kind"] == "run"]
    lines = []
    nameless = [r.get("model") for r in records if r["kind"] == "heads" and not isinstance(r.get("model"), dict)]
    if nameless:
        named = f" but its name, {nameless[0]}" if nameless[0] else ""
        lines.append(
            f"Heads are drawn from a file of an older version, which does not tell of which model they are{named}. "
            "Make it again with `gossamer inspect --out`, unless you are sure that it is this model."
        )
    if len({str(run.get("machine")) for run in runs}) > 1:
        lines.append("The results come from several machines: do not compare their seconds.")
    if len({run.get("haystack", {}).get("sha256") for run in runs}) > 1:
        lines.append("The results come from several haystacks.")
    lines += warnings_of(records)
    return join(element("p", line, class_="warning") for line in lines)


def _circumstances(runs: Sequence[Record]) -> Html:
    # In the order of the first that says it, each once.
    entries: dict[tuple[str, str], None] = {}
    for run in runs:
        for name in ("machine", "versions", "haystack"):
            entries[name, ", ".join(f"{key} {value}" for key, value in run.get(name, {}).items())] = None
        entries["seed", str(run.get("seed"))] = None
    listed = (join((element("dt", name), element("dd", value))) for name, value in entries)
    return element("dl", *listed)


def _html_table(table: Sequence[Sequence[str]]) -> Html:
    head = (element("th", cell, scope="col") for cell in table[0])
    body = (element("tr", *(_cell(cell, column) for column, cell in enumerate(row))) for row in table[1:])
    with_interval = sum(any(" [" in row[column] for row in table[1:]) for column in range(1, len(table[0])))
    shown = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", shown, class_="scroll tight" if with_interval > _MOST_WIDE_COLUMNS else "scroll")


def _cell(text: str, column: int) -> Html:
    """A cell: a label in the first column; an interval may go below its figure in the others."""
    if column == 0:
        return element("td", breakable(text))
    value, bracket, interval = text.partition(" [")
    return element("td", value, " ", element("small", f"[{interval}")) if bracket else element("td", text)


def _download(name: str, table: Sequence[Sequence[Any]], folder: str) -> Html:
    """A link to a table: inside the page, or, where that would make it heavy, to the file beside it."""
    content = csv_text(table).encode()
    href = f"data:text/csv;base64,{base64.b64encode(content).decode()}"
    if len(content) > _LARGEST_INLINE_CSV:
        href = f"{quote(folder)}/{name}.csv"
    return element("p", element("a", f"{name}.csv", download=f"{name}.csv", href=href), class_="note")
