"""What docs/real-heads.md says of the measured files is what they hold."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from repository import script

from gossamer.evaluate.settings import bounds_of, comparison_rows
from gossamer.evaluate.summary import read_results, summary_rows

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
XEON = RESULTS / "intel-xeon-emerald-rapids-2-cores-amx"


def heads_of(path):
    return [head for line in read_results(path) if line["kind"] == "heads" for head in line["heads"]]


def share(heads, name, first=0, end=1000):
    """Mean mass that a pattern explains in some layers, or that the first token holds."""
    some = [head for head in heads if first <= head["layer"] < end]
    return fmean(head["first_token"] if name == "first token" else head["mass"][name] for head in some)


@pytest.fixture(scope="module")
def heads():
    return heads_of(XEON / "smollm2_heads.jsonl")


@pytest.fixture(scope="module")
def settings():
    return {row.method: row for row in comparison_rows(read_results(XEON / "compare_smollm2.jsonl"))}


def test_sinks_begin_in_the_middle(heads):
    assert share(heads, "first token", 0, 10) < 0.05
    assert 0.2 < share(heads, "first token", 10, 15) < 0.3
    assert 0.45 < share(heads, "first token", 25) < 0.55


def test_diagonals_are_the_local_window(heads):
    assert share(heads, "slash") < share(heads, "local") + 0.01
    assert fmean(head["pattern"] == "slash" for head in heads) < 0.01


def test_columns_matter_where_sinks_are_weak(heads):
    assert share(heads, "vertical", 5, 10) - share(heads, "first token", 5, 10) > 0.5
    assert share(heads, "vertical", 10) - share(heads, "first token", 10) < 0.1


def test_blocks_explain_the_upper_two_thirds(heads):
    groups = [share(heads, "block", first, first + 5) for first in range(10, 30, 5)]
    assert min(groups) >= 0.79
    assert max(share(heads, name, first, first + 5) for name in heads[0]["mass"] for first in (0, 5)) < 0.605


def test_kinds_of_prompts_look_alike():
    by_kind = {}
    for line in read_results(XEON / "smollm2_heads.jsonl"):
        by_kind.setdefault((line["length"], line["task"]), []).extend(line["heads"])
    assert len(by_kind) == 6
    for name in ("sink", "local", "vertical", "slash", "block", "first token"):
        for length in (4096, 7680):
            shares = [share(some, name) for (of_length, _), some in by_kind.items() if of_length == length]
            assert max(shares) - min(shares) < 0.06, name


def test_what_the_page_says_of_methods(settings):
    bounds = bounds_of(read_results(XEON / "compare_smollm2.jsonl"))[7680, "blocks"]
    best = next(step for step in bounds if 0.15 < step[0] < 0.25)
    held, window = settings["xattention(threshold=0.95)"], settings["a_shape(sink=64,window=1024)"]
    assert held.error == pytest.approx(best[2], abs=0.005)
    assert best[0] / held.density == pytest.approx(2 / 3, abs=0.02)
    assert held.kl / window.kl == pytest.approx(0.25, abs=0.03)
    assert window.time / held.time == pytest.approx(0.75, abs=0.03)
    small = [row for row in settings.values() if row.density <= 0.3]
    assert min(small, key=lambda row: row.error).method == "auto(error=0.1)"
    assert 0.4 < settings["auto"].plan < 0.55
    assert all(0.9 < settings[f"cosa{p}"].time * settings[f"cosa{p}"].plan < 1.1 for p in ("", "(p=0.7)", "(p=0.95)"))
    slashes = settings["vertical_slash(vertical_size=256,slash_size=1024)"]
    assert slashes.error < window.error
    assert slashes.kl > window.kl
    widths = [row.kl_interval[1] - row.kl_interval[0] for row in (slashes, window, held)]
    assert widths == sorted(widths, reverse=True)
    pooled = [settings[f"block_sparse(blocks={n})"] for n in (8, 16)]
    assert all(row.error > 0.5 for row in pooled)


def test_every_sparse_row_of_the_demo_is_faster_than_dense_attention():
    for path in RESULTS.glob("*/demo_pretrained.json"):
        torchs, ours, *sparse = json.loads(path.read_text())["rows"].values()
        assert ours["prefill_seconds"] < torchs["prefill_seconds"]
        assert max(row["prefill_seconds"] for row in sparse) < ours["prefill_seconds"]
        assert all(row["attention_seconds"] < row["prefill_seconds"] / 2 for row in sparse)


def test_predictions_and_answers_get_their_tables_when_they_are_measured(tmp_path, monkeypatch):
    tables = script("docs/tables.py")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.TABLES["heads_closeness"]() == "Not measured yet."
    one = {"length": 4096, "index": 0, "density": 0.5, "task": "passkey"}
    tables_of_heads = {name: [[0.5]] for name in ("head_density", "recall", "oracle_recall", "relative_l2")}
    logits = {"edges": [0, 64, 4096], "kl": [0.1, 0.2], "top1": [0.9, 0.8], "mean_kl": 0.125, "mean_top1": 0.8}
    near = {"kind": "fidelity", **tables_of_heads, "mean": {"recall": 0.7, "oracle_recall": 0.9}, "logits": logits}
    lines = [near | one | {"method": "fast"}, near | one | {"method": "fast", "task": "perplexity", "text": "prose"}]
    lines += [{"kind": "sample", "score": 0.5, "prefill_s": 1.0, "method": "fast"} | one]
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "m_eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = tables.TABLES["heads_closeness"]()
    assert "| `fast` | 0.500 | 0.700 | 0.900 | 0.125 | 0.125 | 0.125 | 0.800 |" in found
    assert "| setting | density | recall | oracle | KL | KL, passkey | KL, prose | top-1 |" in found
    assert "| `fast` | 0.50 [0.05, 0.95] n 1 |" in found


def test_what_the_reference_model_got_right_and_wrong():
    heads = heads_of(RESULTS / "reference_heads.jsonl")
    layers = {head["layer"] for head in heads}
    local = {n for n in layers if all(head["pattern"] == "local" for head in heads if head["layer"] == n)}
    assert (len(layers), len(local)) == (6, 4)
    sinks = {n for n in layers if share(heads, "first token", n, n + 1) > 0.4}
    assert sinks == layers - local == {1, 2}
    assert not any(head["pattern"] in ("vertical", "block") for head in heads)
    rows = summary_rows(read_results(RESULTS / "reference_eval.jsonl"))
    _, worst = min((row.difference, row.method) for row in rows if row.difference is not None)
    assert worst.startswith("block_sparse")
