"""What the page says of two processes beside one stands in the committed results."""

import json

from repository import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "intel-xeon-ice-lake-2-cores-avx512" / "ring.json"


def test_the_page_says_what_the_file_has() -> None:
    rows = [row for row in json.loads(RESULTS.read_text())["rows"] if row["ranks"] == 2]
    assert {row["length"] for row in rows} == {32768}
    assert all(len(row["ring"]["forward_s"]) == 5 for row in rows)
    found = {(row["plan"], row["dtype"]): (row["ratio"], row["predicted_over_measured"]) for row in rows}
    page = " ".join((ROOT / "docs" / "distributed.md").read_text().split())
    dense, sparse = ([found[plan, dtype] for dtype in ("fp32", "bf16")] for plan in ("dense", "planted"))
    assert f"{dense[0][0]:.2f} of one process's with a dense plan in float32 and {dense[1][0]:.2f} in bfloat16" in page
    assert f"{sparse[0][0]:.2f} and {sparse[1][0]:.2f} with a planted sparse plan" in page
    assert f"{dense[0][1]:.2f} and {dense[1][1]:.2f} of the measured ones with dense plans" in page
    assert f"and {sparse[0][1]:.2f} and {sparse[1][1]:.2f} with sparse ones" in page


def test_the_page_says_what_was_predicted_of_four() -> None:
    rows = [row for row in json.loads(RESULTS.read_text())["rows"] if row["ranks"] == 4]
    assert {row["length"] for row in rows} == {8192}
    share = {(row["plan"], row["dtype"]): f"{row['predicted_over_measured']:.2f}" for row in rows}
    page = " ".join((ROOT / "docs" / "distributed.md").read_text().split())
    dense, sparse = ([share[plan, dtype] for dtype in ("fp32", "bf16")] for plan in ("dense", "planted"))
    assert f"they are {' and '.join(dense)} with dense plans and {' and '.join(sparse)} with sparse ones" in page
