"""The tables of associative recall and of the layers' costs, from files as the command and the benchmark write them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from repository import ROOT, script

from gossamer.evaluate.mqar.data import Plain
from gossamer.evaluate.mqar.mixers import parse_mixer
from gossamer.evaluate.mqar.settings import Cell
from gossamer.evaluate.mqar.summary import RecallRow, guess, near_and_far, recall_rows
from gossamer.evaluate.summary import read_results


def line(mixer: str, seed: int, accuracy: float, setting: str = "quick") -> dict[str, Any]:
    cell = Cell(parse_mixer(mixer), Plain(256, 64, 8), 32, 0.003, seed)
    more = {"accuracy": accuracy, "state": 128, "reads": 8.125, "by_distance": [[16, 4, 4], [32, 1, 4]]}
    return {"kind": "mqar", "training": {"of": setting}, "setting": setting} | cell.to_dict() | more


def test_the_table_of_recall(tmp_path: Path) -> None:
    path = tmp_path / "machine" / "mqar.jsonl"
    path.parent.mkdir()
    run = {"kind": "run", "format": 1, "machine": {"processor": "a processor"}}
    lines = [run, line("dense", 0, 1.0), line("dense", 1, 0.5), line("window(4)+dense", 0, 0.25, "small")]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    quick, small = script("docs/recall_tables.py").recall_tables(path)
    assert quick[0] == (
        "Setting `quick`, `plain(vocabulary=256,length=64,pairs=8)`; a processor (`machine`). "
        "A guess among a sequence's own values is right in 0.125."
    )
    assert quick[1] == (
        *("layers", "width", "accuracy", "worst to best", "seeds", "to 16", "to 32", "state", "logits", "of dense"),
    )
    assert quick[2] == [("`dense`", 32, "0.750", "0.500 to 1.000", 2, "1.00", "0.25", "128", "8.1", "25%")]
    assert [row[0] for row in small[2]] == ["`window(4)+dense`"]


NAMED = (("dense", None), ("fast", 2048), ("fastest", 1024), ("slow", None))


def test_the_table_of_costs() -> None:
    def row(module: str, what: str, even: int | None) -> dict[str, Any]:
        figures = {"exponent": 1.5, "last_exponent": 2.0, "times_dense": 0.5, "times_gossamer": None, "beside": "dense"}
        figures |= {"lengths": 3, "shortest": 1024, "longest": 4096}
        return {"module": module, "what": what, "break_even": even, **figures}

    summary = [row(m, w, n) for m, n in NAMED for w in ("forward", "step")]
    about = {"machine": {"cpu": "a cpu"}, "threads": 2, "width": 256, "heads": 4, "rounds": 5}
    found = about | {"rows": [{"used_by_others": share} for share in (0.25, None, 0.125)], "summary": summary}
    above, header, rows = script("docs/recall_tables.py").costs_of(found)
    assert above.startswith("a cpu, 2 threads, fp32, width 256, 4 heads; medians of 5 rounds, while")
    assert "while others used 12% to 25% of the machine" in above
    assert header[4] == "forward: times dense at 4,096"
    assert [cells[3] for cells in rows] == ["", "2,048", "≤ 1,024", "never"]
    assert rows[1] == ("`fast`", *("1.50", "2.00", "2,048", "0.50") * 2)


def test_the_table_of_characters() -> None:
    rows = [{"kind": "dense", "bits": bits, "seconds": 10.0, "steps": 5, "reads": 128.5} for bits in (2.0, 3.0)]
    found = {"machine": {"cpu": "a cpu"}, "threads": 2, "rows": rows}
    above, header, made = script("docs/recall_tables.py").characters_of(found)
    assert above == "a cpu, 2 threads; 5 steps."
    assert made == [("`dense`", "2.500", "2.000 to 3.000", 2, "128", "10")]
    assert len(header) == len(made[0])


def test_layers_that_stop_early_say_where_and_layers_that_do_not_decode_leave_it_empty() -> None:
    figures = {"exponent": 1.0, "last_exponent": 1.0, "break_even": 64, "times_dense": 2.0, "shortest": 64}
    rows = [("dense", "forward", 256, 3), ("short", "forward", 128, 2), ("dense", "decode", 256, 3)]
    more = [{"module": m, "what": w, "longest": n, "lengths": count} for m, w, n, count in rows]
    figures |= {"beside": "dense_bidirectional", "times_gossamer": 0.25}
    summary = [one | figures for one in more]
    found = {"machine": {"cpu": "a cpu"}, "threads": 2, "width": 8, "heads": 2, "rounds": 3, "decoded_tokens": 16}
    found["rows"] = [{"used_by_others": None}]
    above, header, made = script("docs/recall_tables.py").costs_of({**found, "summary": summary})
    assert "Decoding is of 16 tokens" in above
    assert header[6] == "decoding: exponent"
    cells = ("", "1.00", "≤ 64", "2.00 at 128", "0.25 at 128")  # two lengths have no exponent but the last
    assert made[1] == ("`short`, beside `dense_bidirectional`", *cells, *[""] * 5)


def test_the_table_of_what_routers_activate() -> None:
    def one(seed: int, accuracy: float, **active: float) -> dict[str, Any]:
        return line("seqboat(8)", seed, accuracy) | {"steps": 8, "active": [dict.fromkeys(active, 0.5), active]}

    shares = {"filler": 0.125, "key": 0.25, "value": 1.0, "query": 0.75}
    other = one(0, 0.5, **dict.fromkeys(shares, 0.0))
    lines = [other, one(0, 0.75, **shares), one(1, 0.25, **shares), line("dense", 0, 1.0)]
    _, header, rows = script("docs/recall_tables.py").active_of(lines)
    assert len(header) == len(rows[0])
    assert [row[3:8] for row in rows] == [(0, "0.003", 8, "0.750", "0.12"), (1, "0.003", 8, "0.250", "0.12")]
    assert rows[0][8:] == ("0.25", "1.00", "0.75")


MACHINE = {"processor": "a cpu", "threads": 1}


def test_the_table_of_shapes() -> None:
    rows = [
        {"seed": seed, "connections": name, "mass": 0.5, "before": 0.25 * (seed + 1), "after": 0.75}
        for seed in (0, 1)
        for name in ("dense", "random")
    ]
    found = {"machine": MACHINE, "steps": 8, "second_steps": 2, "keep": 0.25, "images": 9, "seconds": 1.2, "rows": rows}
    above, header, made = script("docs/recall_tables.py").shapes_of(found, "folder")
    assert above.startswith("a cpu (`folder`), 1 threads; 8 steps, then 2 with each mask, which keeps 25%")
    assert made == [(name, "0.500", "0.375 (0.250 to 0.500)", "0.750", 2) for name in ("dense", "random")]
    assert len(header) == len(made[0])


def test_the_table_of_learned_tables() -> None:
    rows = [
        {"model": "logistic regression", "seeds": [0.75], "interval": 0.01, "difference": [0.0, 0.0]},
        {"model": "Orion-MSP", "seeds": [0.5, 0.75], "interval": 0.02, "difference": [-0.125, 0.03]},
    ]
    sizes = {"steps": 8, "batch": 2, "tables": 4, "labelled": 32, "rows_of_a_table": 48, "columns": 8, "seconds": 1.0}
    _, header, made = script("docs/recall_tables.py").learned_of({"machine": MACHINE, "rows": rows, **sizes}, "folder")
    assert made[0] == ("logistic regression", "0.750 ± 0.010", "", "", "")
    assert made[1] == ("Orion-MSP", "0.625 ± 0.020", "0.500 to 0.750", 2, "-0.125 ± 0.030")
    assert len(header) == len(made[0])


FILE = ROOT / "benchmarks" / "results" / "amd-epyc-zen5-2-cores-avx512-bf16" / "mqar.jsonl"


def measured(second: str, width: int = 32, task: str = "plain(vocabulary=256,length=64,pairs=8)") -> RecallRow:
    """The row of a convolution over three tokens and another layer."""
    rows = [row for row in recall_rows(read_results(FILE)) if (row.settings, row.task) == (("quick",), task)]
    (one,) = [row for row in rows if (row.mixer, row.width) == (f"convolution(3)+{second}", width)]
    return one


def test_the_page_says_what_was_measured() -> None:
    text = (ROOT / "docs" / "recall.md").read_text(encoding="utf-8")
    kinds = ("dense", "window(16)", "oracle_topk(8)", "random_topk(8)", "fixed(8)", "combiner(8)", "convolution")
    for kind in (*kinds, "routing(16)", "combiner_logsparse"):
        row = measured(kind)
        assert row.seeds == 3
        assert f"{row.accuracy:.3f}" in text, kind
    assert measured("dense").low > 0.99
    assert measured("oracle_topk(8)").reads == measured("random_topk(8)").reads
    assert measured("oracle_topk(8)").low > measured("random_topk(8)").high + 0.4
    assert measured("fixed(8)").reads == measured("combiner(8)").reads
    assert measured("fixed(8)").low > measured("combiner(8)").high
    learned, mixed = measured("combiner_learnable(8)"), measured("combiner_mixture(8)")
    assert (learned.seeds, mixed.seeds) == (3, 3)
    assert learned.low > 0.99
    assert f"recalls {learned.accuracy:.3f}; a query" in text
    assert f"{mixed.accuracy:.3f}, from {mixed.low:.3f} to {mixed.high:.3f}, with 2.8 times" in text
    spans, rows, both = (
        parse_mixer(f"{kind}(8)").reads(1, 32, 64) for kind in ("fixed", "combiner_axial", "combiner_mixture")
    )
    assert (round(both / spans, 1), round(both / rows, 1)) == (2.8, 1.6)
    lines = [r for r in read_results(FILE) if r["kind"] == "mqar" and r["setting"] == "quick"]
    rates: dict[str, set[float]] = {}
    for record in lines:
        rates.setdefault(record["mixer"], set()).add(record["rate"])
    assert [mixer for mixer, tried in rates.items() if tried != {0.003, 0.01}] == [
        "convolution(3)+combiner_learnable(8)"
    ]


def test_a_hybrid_closes_the_gap_and_two_layers_of_attention_do_not_in_these_steps() -> None:
    text = (ROOT / "docs" / "recall.md").read_text(encoding="utf-8")
    rows = {row.mixer: row for row in recall_rows(read_results(FILE)) if row.settings == ("quick",)}
    hybrid, dense = rows["window(16)+dense"], rows["dense"]
    assert hybrid.seeds == dense.seeds == 3
    lines = [r for r in read_results(FILE) if r["kind"] == "mqar" and r["mixer"] == "window(16)+dense"]
    best = sorted(max(r["accuracy"] for r in lines if r["seed"] == seed) for seed in range(3))
    assert best[1] > 0.99
    assert f"off the ground in the third, {best[0]:.3f}" in text
    assert f"no farther than {dense.accuracy:.3f}" in text


def test_a_window_recalls_what_it_sees_and_nothing_else() -> None:
    far = dict(near_and_far(measured("window(16)")))
    assert min(far[8], far[16]) > 0.99
    assert max(far[32], far[64]) < 0.02


def test_a_dynamic_mask_recalls_while_the_tokens_fit_its_budget() -> None:
    text = (ROOT / "docs" / "recall.md").read_text(encoding="utf-8")
    lines = [r for r in read_results(FILE) if r["kind"] == "mqar" and r["mixer"] == "convolution(3)+dynamic_mask(16)"]
    lost = []
    for rate in (0.003, 0.01):
        worst, *kept = sorted(record["accuracy"] for record in lines if record["rate"] == rate)
        assert len(kept) == 2
        assert min(kept) > 0.99
        lost.append(worst)
    assert f"{lost[0]:.3f} and {lost[1]:.3f}" in text
    assert measured("dynamic_mask(16)").low > 0.99
    few, fitting = measured("dynamic_mask(4)"), measured("dynamic_mask(8)")
    eight = [r for r in read_results(FILE) if r["kind"] == "mqar" and r["mixer"].endswith("dynamic_mask(8)")]
    lower = sorted(max(r["accuracy"] for r in eight if r["seed"] == seed) for seed in range(3))[:2]
    assert few.high < 1 / 8 < fitting.low
    assert f"one seed recalls {fitting.high:.3f} and two do not, {lower[1]:.3f} and {lower[0]:.3f}" in " ".join(
        text.split()
    )
    assert f"none does: {few.accuracy:.3f}" in " ".join(text.split())


def test_attention_needs_no_width_and_two_convolutions_guess() -> None:
    dense = [measured("dense", width).accuracy for width in (16, 32, 64)]
    convolved = [measured("convolution", width).accuracy for width in (16, 32, 64)]
    assert [round(x, 3) for x in dense] == [0.997, 0.997, 0.999]
    assert guess(measured("convolution")) == 1 / 8
    assert max(convolved) < 1 / 8 + 0.03
    assert round(measured("seqboat(16)").accuracy, 3) == 0.026
    text = " ".join((ROOT / "docs" / "recall.md").read_text(encoding="utf-8").split())
    assert "0.997, 0.997 and 0.999 at widths of 16, 32 and 64" in text
    assert "SeqBoat learnt nothing** in these 800 steps: 0.026" in text


def test_a_router_of_seqboat_does_not_fire_on_what_matters() -> None:
    text = " ".join((ROOT / "docs" / "recall.md").read_text(encoding="utf-8").split())
    rows = {row.mixer: row for row in recall_rows(read_results(FILE)) if row.settings == ("routers",)}
    assert {(row.seeds, row.rate) for row in rows.values()} == {(3, 0.01)}
    routed, bare, window, dense = (
        rows[f"convolution(3)+{kind}"] for kind in ("seqboat(8)", "seqboat_local(8)", "window(8)", "dense")
    )
    assert f"{routed.accuracy:.3f}, from {routed.low:.3f} to {routed.high:.3f} on three seeds" in text
    assert f"without a router to {bare.accuracy:.3f}, plain windows to {window.accuracy:.3f}" in text
    assert f"dense attention to {dense.accuracy:.3f}" in text
    lines = [record for record in read_results(FILE) if record["kind"] == "mqar" and record["setting"] == "routers"]
    fired = [record["active"][-1] for record in lines if record["mixer"] == "convolution(3)+seqboat(8)"]
    every, some, none = sorted(fired, key=lambda active: -sum(active.values()))
    assert set(every.values()) == {1.0}
    assert set(none.values()) == {0.0}
    assert round(8 * some["value"]) == 1
    assert {name for name, share in some.items() if share} == {"value"}


def test_routing_beats_local_attention_where_pairs_are_scattered() -> None:
    text = (ROOT / "docs" / "recall.md").read_text(encoding="utf-8")
    task = "scattered(vocabulary=256,length=64,pairs=8)"
    routing, local = (measured(kind, task=task) for kind in ("routing(16)", "window_heads(16)"))
    assert routing.seeds == local.seeds == 3
    assert routing.low > local.high + 0.3
    for row in (routing, local):
        assert f"{row.accuracy:.3f}, from {row.low:.3f} to {row.high:.3f}" in text
    far = [dict(near_and_far(row)) for row in (routing, local)]
    assert round(min(far[0][32], far[0][64]), 2) == 0.79
    assert {round(far[1][edge], 2) for edge in (32, 64)} == {0.01}


def test_what_the_page_says_of_costs() -> None:
    found = json.loads((FILE.parent / "modules.json").read_text())
    assert (found["threads"], found["rounds"]) == (2, 7)
    text = " ".join((ROOT / "docs" / "recall.md").read_text(encoding="utf-8").split())
    assert "27 and 14 times as fast as dense attention by torch" in text
    assert "clusters 10.0 and a dynamic mask of 1,024 keys, which lie anywhere, 5.6" in text
    assert "itself 2.4 times as fast as torch's, they are 11.1, 5.8, 4.2 and 2.3 times as fast" in text
    assert "2.0 to 4.6 times as fast at 32K, which is 0.8 to 1.9 times" in text
    assert "activate 28% to 81% of the tokens" in text
    assert max(row["used_by_others"] for row in found["rows"]) < 0.2
    steps = {row["module"]: row for row in found["summary"] if row["what"] == "step"}
    said = {"window": 27, "combiner": 14, "routing": 10.0, "dynamic_mask": 5.6}
    assert {steps[name]["longest"] for name in ("dense", "dense_gossamer", *said)} == {32768}
    assert {name: steps[name]["times_dense"] for name in said} == {
        name: pytest.approx(times, rel=0.03) for name, times in said.items()
    }
    ours = {name: round(steps[name]["times_gossamer"], 1) for name in said}
    assert ours == {"window": 11.1, "combiner": 5.8, "routing": 4.2, "dynamic_mask": 2.3}
    assert round(steps["dense_gossamer"]["times_dense"], 1) == 2.4
    names = ("combiner_axial", "combiner_logsparse", "combiner_mixture", "seqboat", "seqboat_relu2")
    in_torch = [steps[name] for name in names]
    assert all(1000 < row["break_even"] < 6000 for row in in_torch)
    assert [round(pick(row["times_dense"] for row in in_torch), 1) for pick in (min, max)] == [2.0, 4.6]
    assert [round(pick(row["times_gossamer"] for row in in_torch), 1) for pick in (min, max)] == [0.8, 1.9]
    assert steps["seqboat_relu2"]["times_dense"] == pytest.approx(steps["seqboat"]["times_dense"], rel=0.05)
    shares = [row["active"] for row in found["rows"] if row["module"].startswith("seqboat") and "active" in row]
    assert [round(pick(shares), 2) for pick in (min, max)] == [0.28, 0.81]


def test_what_the_page_says_of_decoding_and_of_definitions() -> None:
    found = json.loads((FILE.parent / "modules.json").read_text())
    by = {(row["module"], row["what"]): row for row in found["summary"]}
    decoded = {name: row for (name, what), row in by.items() if what == "decode" and name != "dense"}
    text = " ".join((ROOT / "docs" / "recall.md").read_text(encoding="utf-8").split())
    assert "Combiner, 22 times as fast as dense attention" in text
    assert "9 and 13 times (with squared weights)" in text
    assert "1.7 times at 32K, slower below 13,000" in text
    assert "0.11 of dense attention's speed forward at 4K" in text
    assert "(0.006 forward at 2K)" in text
    assert "Sparsifiner (0.04 at 2K) and Orion-MSP's columns (0.17)" in text
    said = {"combiner": 22, "seqboat": 9, "seqboat_relu2": 13, "routing_prefix": 1.7}
    assert {name: row["longest"] for name, row in decoded.items()} == dict.fromkeys(said, 32768)
    assert {name: row["times_dense"] for name, row in decoded.items()} == {
        name: pytest.approx(times, rel=0.03) for name, times in said.items()
    }
    assert 5000 < decoded["seqboat_relu2"]["break_even"] < decoded["seqboat"]["break_even"] < 7000
    assert 12500 < decoded["routing_prefix"]["break_even"] < 13000
    whole = {
        "routing_prefix": (0.11, 4096, "dense"),
        "combiner_learnable": (0.006, 2048, "dense"),
        "sparsifiner": (0.04, 2048, "dense_bidirectional"),
        "orion_columns": (0.17, 2048, "dense_bidirectional"),
    }
    for name, (times, longest, beside) in whole.items():
        row = by[name, "forward"]
        assert row["times_dense"] == pytest.approx(times, abs=0.005), name
        assert (row["longest"], row["beside"]) == (longest, beside), name
        assert by[name, "step"]["break_even"] is row["break_even"] is None, name


def test_what_the_page_says_of_characters() -> None:
    text = " ".join((ROOT / "docs" / "recall.md").read_text(encoding="utf-8").split())
    rows = json.loads((FILE.parent / "characters.json").read_text())["rows"]
    assert {row["steps"] for row in rows} == {1500}
    bits: dict[str, list[float]] = {}
    for row in rows:
        bits.setdefault(row["kind"].removeprefix("convolution(3)+"), []).append(row["bits"])
    assert all(len(each) == 3 for each in bits.values())
    means = {kind: f"{fmean(each):.3f}" for kind, each in bits.items()}
    ahead = [a < b for a, b in zip(bits["combiner(16)"], bits["fixed(16)"], strict=True)]
    assert all(ahead)
    assert f"{means['combiner(16)']} and {means['fixed(16)']} bits" in text
    mixed = {a < b for a, b in zip(bits["routing(32)"], bits["window_heads(32)"], strict=True)}
    assert mixed == {True, False}
    assert f"{means['routing(32)']} and {means['window_heads(32)']}; which" in text
    assert f"{means['seqboat_local(32)']} bits with every token active and {means['seqboat(32)']} with" in text
    assert all(a < b for a, b in zip(bits["seqboat_local(32)"], bits["seqboat(32)"], strict=True))
    assert f"Dense attention is last**, {means['dense']}" in text
    assert max(means.values()) == means["dense"]


def test_what_the_page_says_of_learned_tables() -> None:
    text = " ".join((ROOT / "docs" / "modules.md").read_text(encoding="utf-8").split())
    rows = {row["model"]: row for row in json.loads((FILE.parent / "learn_tables.json").read_text())["rows"]}
    mean = {name: fmean(row["seeds"]) for name, row in rows.items()}
    meant, released = rows["Orion-MSP, as meant"], rows["Orion-MSP, as released"]
    assert len(meant["seeds"]) == len(released["seeds"]) == 3
    said = mean["Orion-MSP, as meant"], mean["logistic regression"], mean["5 nearest neighbours"], min(meant["seeds"])
    assert [round(x, 3) for x in said] == [0.813, 0.821, 0.755, 0.769]
    assert "0.813 beside 0.821, and better than five nearest neighbours, 0.755; the worst seed has 0.769" in text
    shift, interval = meant["difference"]
    assert abs(shift) < interval  # as good as: none is better
    assert sum(accuracy > 0.6 for accuracy in released["seeds"]) == 1
    assert f"one seed of three**, {max(released['seeds']):.3f}" in text


def test_how_many_logits_routing_computes() -> None:
    assert measured("routing(16)").reads / measured("dense").reads == pytest.approx(0.5, abs=0.01)


def test_what_the_page_says_of_shapes() -> None:
    rows = json.loads((FILE.parent / "shapes.json").read_text())["rows"]
    text = " ".join((ROOT / "docs" / "modules.md").read_text(encoding="utf-8").split())

    def of(connections: str, figure: str) -> list[float]:
        return [row[figure] for row in rows if row["connections"] == connections]

    mass = {name: of(name, "mass") for name in ("sparsifiner", "oracle top-k", "local window", "random")}
    assert len(mass["sparsifiner"]) == 3
    for found, best, near, any_ in zip(*mass.values(), strict=True):
        assert max(near, any_) < found < best
    means = {name: f"{fmean(values):.3f}" for name, values in mass.items()}
    said = f"{means['sparsifiner']} beside {means['local window']} in the mean, and less than the best connections do, "
    assert said + means["oracle top-k"] in text
    assert means["random"] == means["local window"]
    names = ("sparsifiner", "random", "local window", "oracle top-k", "dense")
    predicted, other, near, best, every = (f"{fmean(of(name, 'after')):.3f}" for name in names)
    assert (
        f"{predicted} with predicted connections, {other} with random ones, {near} with a window, {best} with" in text
    )
    assert f"{best} with the best ones, and {every} with all" in text
    before = [f"{fmean(of(name, 'before')):.3f}" for name in ("sparsifiner", "oracle top-k")]
    assert "connections leave a guess, {} and {}".format(*before) in text
