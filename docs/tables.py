"""Fills the benchmarks page from the measured files when the documentation is built (an mkdocs hook).

Files of several machines stand beside each other, ``benchmarks/results/<machine>/``: the page has a table for each.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Files beside this one: mkdocs finds them while it loads a hook.
import bidirectional_tables
import calibration_tables
import choices
import compressed_tables
import contender_tables
import decoding_tables
import demo_tables
import end_to_end_tables
import family_tables
import gpu_tables
import integer_tables
import less_training_tables
import linear_tables
import masked_tables
import pretrained_tables
import recall_tables
import schedule_tables
import serving_tables
import training_tables
import video_tables
import weights_tables
from marked import markdown
from targets import targets_of

from gossamer.evaluate.summary import SummaryRow, read_results, summary_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
NOT_MEASURED = "Not measured yet."


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers ``<!-- table: name -->`` and ``<!-- picture: name -->`` of a page."""
    for name, make in TABLES.items():
        marker = f"<!-- table: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    for name, title in PICTURES.items():
        markdown = markdown.replace(f"<!-- picture: {name} -->", pictures(name, title))
    return markdown


def for_each_machine(file: str, make: Callable[[dict[str, Any], Path], str | None]) -> str:
    """What a function makes of a machine's file and its folder, below the machine's name."""
    parts = []
    for path in sorted(RESULTS.glob(f"*/{file}")):
        found = json.loads(path.read_text())
        made = make(found, path.parent)
        if made:
            parts.append(f"**{machine_name(found)}** (`{path.parent.name}`)\n\n{made}")
    return "\n\n".join(parts) or NOT_MEASURED


def one(make: Callable[[dict[str, Any]], tuple[Any, ...]]) -> Callable[[dict[str, Any], Path], str]:
    """For `for_each_machine`: the table that a function makes of a file."""
    return lambda found, _: markdown(*make(found))


# Tables that a file has one of, by name.
OF_A_FILE: dict[str, tuple[str, Callable[[dict[str, Any]], tuple[Any, ...]]]] = {
    "first_token": ("first_token_*.json", compressed_tables.first_token_table),
    "recover_pruned": ("recover_pruned.json", weights_tables.recover_table),
    "sparse_training": ("sparse_training.json", weights_tables.sparse_training_table),
    "calibration": ("calibration_*.json", calibration_tables.calibration_table),
    "calibrate_memory": ("calibrate_memory.json", calibration_tables.memory_table),
    "extend": ("extend_context.json", training_tables.extend_table),
    "extend_seeds": ("extend_context.json", training_tables.seeds_table),
    "extend_differences": ("extend_context.json", training_tables.differences_table),
    "extend_served": ("extend_context.json", training_tables.served_table),
}


def machine_name(found: dict[str, Any]) -> str:
    """As a file of results says it of itself, or its first part that does."""
    parts = [found, *found.get("sections", found).values()]
    machine = next(part["machine"] for part in parts if isinstance(part, dict) and "machine" in part)
    if "device" in machine:
        return machine["device"]
    known = f" ({machine['generation']})" if machine.get("generation") else ""
    return f"{machine['cpu']}{known}, {machine['cores']} cores"


def pictures(name: str, title: str) -> str:
    """A picture of each machine, as benchmarks/pictures.py drew it."""
    files = sorted(IMAGES.glob(f"*/{name}.svg"))
    return "\n\n".join(f"![{title}, {file.parent.name}](images/{file.parent.name}/{file.name})" for file in files)


def cpu_table() -> str:
    """Speed-up over SDPA by length, dtype and density, for key blocks of 128."""
    return for_each_machine("cpu.json", lambda found, _: prefill_table(found["sections"].get("prefill")))


def prefill_table(section: dict[str, Any] | None) -> str | None:
    if section is None or not section["rows"]:
        return None
    machine, others = section["machine"], section["used_by_others"] or 0
    rows = [row for row in section["rows"] if row["what"] == "dense" or row["block_k"] == 128]
    # Rows of before the arithmetic on registers was measured lack a share of it.
    with_peak = all(row.get("share_of_peak") is not None for row in rows)
    return markdown(
        f"{section['threads']} threads, torch {machine['torch']}; medians of {section['rounds']} rounds (fewer where "
        f"SDPA takes half a minute); 4 query heads on one key/value head; other programs used {others:.0%} of the "
        "machine.",
        (
            "tokens",
            "dtype",
            "head dim",
            "density",
            "times SDPA",
            "GFLOP/s",
            "of peak" if with_peak else "of GEMM",
            "efficiency",
        ),
        [
            (
                f"{row['length']:,}",
                row["dtype"],
                row["dim"],
                f"{row['density']:.3f}",
                f"{row['speedup']:.1f}",
                f"{row['gflops']:.0f}",
                f"{row['share_of_peak' if with_peak else 'share_of_gemm']:.2f}",
                f"{row['efficiency']:.2f}",
            )
            for row in rows
        ],
    )


def parts_table() -> str:
    """The other sections, and what prefill has besides blocks, a row each."""
    return for_each_machine("cpu.json", lambda found, _: parts_of(found["sections"]))


def parts_of(sections: dict[str, Any]) -> str | None:
    def of(name: str) -> list[dict[str, Any]]:
        return sections.get(name, {"rows": []})["rows"]

    besides = [row for row in of("prefill") if row["what"] != "dense" and " in 64x" not in row["what"]]
    rows = [
        (
            row["what"],
            row["dtype"],
            row["dim"],
            f"{row['length']:,}",
            f"`{row['isa']}`",
            f"{row['density']:.3f}",
            f"{row['speedup']:.1f}",
            f"{row['speedup_over_flex']:.1f}" if "speedup_over_flex" in row else "",
            f"{row['gb_per_s']:.0f} GB/s" if "gb_per_s" in row else f"{row['gflops']:.0f} GFLOP/s",
        )
        for row in (
            *besides,
            *(row for name in ("flex", "parts", "decode", "instruction_sets", "avx2") for row in of(name)),
        )
    ]
    header = ("what", "dtype", "head dim", "tokens", "kernel", "density", "times SDPA", "times Flex", "rate")
    return markdown("", header, rows) if rows else None


def end_to_end_table() -> str:
    """Seconds of whole layers and of the reference model, by part."""
    return for_each_machine("end_to_end.json", end_to_end_tables.layers_table)


def vllm_table() -> str:
    """Speed-up over vLLM's dense attention, alone and with its writing to the cache."""
    return for_each_machine("cpu.json", lambda found, _: beside_vllm(found["sections"].get("vllm")))


def beside_vllm(section: dict[str, Any] | None) -> str | None:
    if section is None or not section["rows"]:
        return None
    machine, others = section["machine"], section["used_by_others"] or 0
    return markdown(
        f"vLLM {machine['vllm']}, torch {machine['torch']}, {section['threads']} threads; medians of "
        f"{section['rounds']} rounds; other programs used {others:.0%} of the machine.",
        (
            "what",
            "dtype",
            "head dim",
            "tokens",
            "density",
            "vLLM's kernel",
            "times vLLM",
            "with its write",
            "times SDPA",
        ),
        [
            (
                row["what"],
                row["dtype"],
                row["dim"],
                f"{row['length']:,}",
                f"{row['density']:.3f}",
                f"`{row['vllm_isa']}`",
                f"{row['speedup_over_vllm']:.1f}",
                f"{row['speedup_over_vllm_with_cache_write']:.1f}",
                f"{row['speedup']:.1f}",
            )
            for row in section["rows"]
        ],
    )


def targets_table() -> str:
    """What was aimed at, and what was measured."""
    return for_each_machine("cpu.json", lambda found, folder: markdown(*targets_of(found, folder)))


def integers_table() -> str:
    """Errors and speed-ups of a score product in integers."""
    return for_each_machine(
        "quantised.json",
        lambda found, _: "\n\n".join(
            markdown(*make(found)) for make in (integer_tables.errors_table, integer_tables.speed_table)
        ),
    )


def gpu_table() -> str:
    """What was timed on each GPU."""
    return chosen("gpu.json", gpu_tables.gpu_rows)


def demo_table() -> str:
    """The rows of the demo."""
    return markdown(*demo_tables.demo_rows(json.loads((ROOT / "examples" / "demo.json").read_text())))


def methods_table() -> str:
    """The methods on the reference model at the longest length that was measured."""
    records = read_results(RESULTS / "reference_eval.jsonl")
    rows = summary_rows(records)
    longest = max(row.length for row in rows)
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    machine = next(record for record in records if record["kind"] == "run")["machine"]

    def share(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [row for row in rows if row.length == longest]
    counts = {task: {row.tasks[task][2] for row in rows if task in row.tasks} for task in tasks}

    def same(task: str) -> str:
        return f", n {min(counts[task])}" if len(counts[task]) == 1 else ""

    def headed(task: str) -> str:
        return task + same(task)

    def score(row: SummaryRow, task: str) -> str:
        if task not in row.tasks:
            return ""
        mean, (low, high), samples = row.tasks[task]
        return f"{mean:.2f} [{low:.2f}, {high:.2f}]" + ("" if same(task) else f" n {samples}")

    return "\n".join(
        [
            f"{machine['processor']}, {machine['threads']} threads, {longest:,} tokens, bfloat16; mean scores with "
            "their 95% intervals, n samples of each task.",
            "",
            f"| method | {' | '.join(map(headed, tasks))} | recall | oracle | density | prefill s | times dense |",
            "|---|" + "---|" * (len(tasks) + 5),
            *(
                f"| `{row.method}` | {' | '.join(score(row, task) for task in tasks)} | {share(row.recall)} | "
                f"{share(row.oracle_recall)} | {share(row.density)} | {share(row.prefill_s, 2)} | "
                f"{share(row.speedup, 1)} |"
                for row in rows
            ),
        ]
    )


def kept_table() -> str:
    """What each method keeps of the reference model's answers, and what it gains, a table a length."""
    records = read_results(RESULTS / "reference_eval.jsonl")
    return "\n\n".join(markdown(*table) for table in choices.kept_tables(records))


def of_lines(pattern: str, *makers: Callable[[list[dict[str, Any]]], Any]) -> str:
    """The tables of each file of lines; a maker gives one or a list of them."""
    made = [make(read_results(path)) for path in sorted(RESULTS.glob(pattern)) for make in makers]
    cells = [table for some in made for table in (some if isinstance(some, list) else [some])]
    return "\n\n".join(markdown(*table) for table in cells) or NOT_MEASURED


def front_table() -> str:
    """What no other setting beats in time and error, for each model and machine of `gossamer compare`."""
    paths = sorted(RESULTS.glob("*/compare_*.jsonl"))
    return "\n\n".join(markdown(*table) for path in paths for table in choices.front_tables(read_results(path)))


def chosen(file: str, make: Callable[[dict[str, Any]], choices.Cells | None]) -> str:
    """A table of `choices` for each machine that has the file."""

    def made(found: dict[str, Any], _: Path) -> str | None:
        cells = make(found)
        return None if cells is None else markdown(*cells)

    return for_each_machine(file, made)


def mutants_table() -> str:
    """What became of the mutants of each part, and what the survivors are."""
    result = json.loads((ROOT / "tests" / "mutants.json").read_text(encoding="utf-8"))
    columns = ("possible", "sampled", "killed", "timed_out", "survived")
    rows = [(f"`{name}`", *(counts[c] for c in columns)) for name, counts in result["parts"].items()]
    total = ("all", *(sum(counts[c] for counts in result["parts"].values()) for c in columns))
    explained = sum(bool(survivor["explanation"]) for survivor in result["survivors"])
    return markdown(
        f"{result['tool']} {result['version']}, seed {result['seed']}, commit {result['commit'][:10]}; of the "
        f"{len(result['survivors'])} survivors, {explained} are explained.",
        ("part", *(column.replace("_", " ") for column in columns)),
        [*rows, total],
    )


TABLES = {
    **recall_tables.TABLES,
    "bidirectional": lambda: for_each_machine("bidirectional.json", bidirectional_tables.kernels_table),
    "denoising_steps": lambda: for_each_machine("bidirectional.json", bidirectional_tables.steps_table),
    **video_tables.TABLES,
    **masked_tables.TABLES,
    **less_training_tables.TABLES,
    **{name: partial(for_each_machine, "linear_decode.json", make) for name, make in linear_tables.MAKERS.items()},
    "cpu": cpu_table,
    "parts": parts_table,
    "vllm": vllm_table,
    "end_to_end": end_to_end_table,
    "targets": targets_table,
    **{name: partial(for_each_machine, file, one(make)) for name, (file, make) in OF_A_FILE.items()},
    "compressed": compressed_tables.compressed_table,
    "integers": integers_table,
    "gpu": gpu_table,
    "serving": lambda: for_each_machine(
        "serving.json", lambda found, _: "\n\n".join(markdown(*one) for one in serving_tables.serving_tables(found))
    ),
    "contenders": lambda: for_each_machine(
        "contenders_*.json",
        lambda found, _: "\n\n".join(markdown(*one) for one in contender_tables.contender_tables(found)),
    ),
    "linear_shares": lambda: chosen("linear_*.json", contender_tables.shares_table),
    "linear_variants": lambda: chosen("linear_*.json", contender_tables.variants_table),
    **{name: partial(for_each_machine, *found) for name, found in decoding_tables.TABLES.items()},
    "decode_answers": lambda: of_lines("*/decoding_*.jsonl", decoding_tables.answers),
    "paged": lambda: for_each_machine("paged.json", lambda found, _: markdown(*serving_tables.paged_table(found))),
    "heads": lambda: of_lines("*/*_heads.jsonl", pretrained_tables.heads_table),
    "heads_kinds": lambda: of_lines("*/*_heads.jsonl", pretrained_tables.kinds_table),
    "heads_reference": lambda: of_lines("reference_heads.jsonl", pretrained_tables.heads_table),
    "heads_methods": lambda: of_lines("*/compare_*.jsonl", pretrained_tables.methods_table),
    "heads_closeness": lambda: of_lines("*/*_eval.jsonl", *pretrained_tables.BESIDE_DENSE),
    "chunk_schedule": schedule_tables.chunk_schedule_table,
    "demo": demo_table,
    "demo_pretrained": lambda: chosen("demo_pretrained.json", demo_tables.demo_rows),
    "methods": methods_table,
    "mutants": mutants_table,
    "kept": kept_table,
    "front": front_table,
    "lengths": lambda: chosen("cpu.json", lambda found: choices.lengths_table(found["sections"].get("prefill"))),
    "planning": lambda: chosen("planning.json", choices.planning_table),
    "gains": lambda: chosen("end_to_end.json", choices.gains_table),
    "families": lambda: markdown(*family_tables.counts_table()),
    **{
        f"families_{name}": partial(lambda made: markdown(*made()), made) for name, made in family_tables.TABLES.items()
    },
}
PICTURES = {
    "contenders_*": "Loss against seconds to the first token",
    "cpu_latency": "Seconds against length",
    "cpu_roofline": "Roofline",
    "recover_pruned": "Held-out text after pruning, by steps",
    "sparse_training": "Held-out text by steps of training",
    "extend_loss": "Loss of answers by steps and by seconds",
    "extend_needles": "Right answers by length",
    "video_frontier": "What clips lose against density",
    "video_frames": "Frames of clips beside dense ones",
    "video_modes": "Modes by layer and head",
    "masked_fills": "What is filled in, against density",
    "masked_overlaps": "Blocks in common by step",
}
