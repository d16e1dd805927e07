"""What the CPU kernels were to reach, beside what was measured; `tables.py` puts it in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def targets_of(found: dict[str, Any], folder: Path) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """The line above the table, its header and its rows, from a machine's ``cpu.json`` and its folder."""
    sections = found["sections"]

    def prefill(field: str, length: int, what: str, dim: int = 128, dtype: str = "bf16") -> list[float]:
        return [
            row[field]
            for row in sections.get("prefill", {"rows": []})["rows"]
            if (row["length"], row["dim"], row["dtype"]) == (length, dim, dtype) and row["what"].startswith(what)
        ]

    def of(section: str, field: str, **wanted: Any) -> list[float]:
        rows = sections.get(section, {"rows": []})["rows"]
        return [row[field] for row in rows if field in row and all(row.get(k) == v for k, v in wanted.items())]

    def held_to_avx2(field: str, what: str) -> list[float]:
        return [x for x in of("avx2", field, dtype="fp32", what=f"{what}, all held to AVX2") if x is not None]

    tenth = {"length": 16384, "dtype": "bf16", "dim": 128}
    flex = [x for k in (64, 128) for x in of("flex", "speedup_over_flex", what=f"10% in 64x{k}", **tenth)]
    decoding = of("decode", "speedup", length=32768, dim=128, what="decode, dense")
    shares = planning_shares(folder / "planning.json")
    targets: list[tuple[str, str, list[float], str]] = [
        ("dense over SDPA, bf16, 32K, head dimension 128", "2.0", prefill("speedup", 32768, "dense"), "x"),
        ("the same, head dimension 64", "1.8", prefill("speedup", 32768, "dense", 64), "x"),
        ("10% of the pairs over SDPA dense, 32K", "16", prefill("speedup", 32768, "10%"), "x"),
        ("5%, 64K", "28", prefill("speedup", 65536, "5% "), "x"),
        ("2%, 64K", "60", prefill("speedup", 65536, "2% "), "x"),
        ("efficiency at 10%, 64K", "0.90", prefill("efficiency", 65536, "10%"), ""),
        ("efficiency at 5%, 64K", "0.85", prefill("efficiency", 65536, "5% "), ""),
        ("efficiency at 2%, 64K", "0.75", prefill("efficiency", 65536, "2% "), ""),
        ("over compiled FlexAttention at 10%, 16K", "2.5", flex, "x"),
        (
            "a pair in gathered columns over one in blocks, at most",
            "1.35",
            of("parts", "pair_cost_over_blocks", what="1000 columns"),
            "x",
        ),
        (
            "AVX-512 fp32, dense, over SDPA",
            "1.1",
            of("instruction_sets", "speedup", isa="avx512", dtype="fp32", what="dense", length=8192, dim=128),
            "x",
        ),
        ("AVX2 over SDPA held to AVX2, fp32, 8K to 32K", "1.5", held_to_avx2("speedup", "dense"), "x"),
        ("AVX2 of the multiply-add peak, the same", "0.85", held_to_avx2("share_of_peak", "dense"), ""),
        ("AVX2 efficiency at 10%, 32K", "0.90", held_to_avx2("efficiency", "10% in 64x128"), ""),
        ("AVX2 efficiency at 5%, 32K", "0.85", held_to_avx2("efficiency", "5% in 64x128"), ""),
        ("dense decoding at 32K over SDPA", "1.0", decoding, "x"),
        ("planning of the whole, minference, 64K, at most", "12%", shares.get("minference", []), "%"),
        ("planning of the whole, max_relative, 64K, at most", "12%", shares.get("max_relative", []), "%"),
        (
            "memory beyond packed keys and values, 128K, 32 heads, at most",
            "256 MiB",
            of("memory", "beyond_packed_mib"),
            " MiB",
        ),
        ("exponent of cost against length, fixed budgets, at most", "1.15", of("growth", "exponent"), ""),
    ]
    rows = [
        (name, target, ", ".join(f"{v:.3g}{unit}" for v in values) or "-") for name, target, values, unit in targets
    ]
    return "", ("figure", "aimed at", "measured"), rows


def planning_shares(file: Path) -> dict[str, list[float]]:
    """Planning's share of a call at 64K in percent, by method."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return {row["method"]: [100 * row["cpp_share"]] for row in rows if row["length"] == 65536}
