"""What workers count, how it is told, and how the files of many become one. Needs no vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gossamer.attention import CallRecord
from gossamer.integrations.vllm.counters import FOLDER, METRICS, Counters, collected


def record(**changes: Any) -> CallRecord:
    given: dict[str, Any] = {
        "layer": 0,
        "path": "sparse",
        "reason": None,
        "density": 0.25,
        "plan_seconds": 0.5,
        "attention_seconds": 2.0,
        "executor": "cpu",
        "query_len": 8,
        "key_len": 8,
    }
    return CallRecord(**given | changes)


def value(rows: Any, metric: str, **labels: str) -> float:
    """The sum of a metric over all that has these labels."""
    return sum(found for name, its, found in rows if name == metric and labels.items() <= its.items())


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestCounting:
    def test_a_row_counts_by_layer_method_and_path(self) -> None:
        counters = Counters(rank=1)
        counters.add(record(), "max_relative", 36)
        counters.add(record(layer=3), "max_relative", 36)
        counters.add(record(path="dense", reason="short prompt", density=1.0), "a_shape", 10)
        counters.add(record(layer=None), "a_shape", 4)
        rows = counters.rows()
        assert value(rows, "gossamer_rows") == 4
        assert value(rows, "gossamer_rows", layer="0", method="max_relative", path="sparse", rank="1") == 1
        assert value(rows, "gossamer_rows", layer="-") == 1
        assert value(rows, "gossamer_dense_rows") == value(rows, "gossamer_dense_rows", reason="short prompt") == 1
        assert value(rows, "gossamer_planning_seconds", layer="3") == 0.5
        assert value(rows, "gossamer_attention_seconds") == 8
        assert value(rows, "gossamer_pairs") == 86
        assert value(rows, "gossamer_computed_pairs") == 0.25 * 76 + 10
        assert {name for name, _, _ in rows} == set(METRICS)

    def test_rows_of_the_stock_kernel_count_by_reason(self) -> None:
        counters = Counters()
        counters.add_stock(2, [("decode", 5), ("few queries", 1)])
        counters.add_stock(2, [("decode", 2)])
        rows = counters.rows()
        assert value(rows, "gossamer_rows", layer="2", method="stock", path="stock") == 8
        assert value(rows, "gossamer_dense_rows", layer="2", reason="decode") == 7
        assert value(rows, "gossamer_dense_rows", layer="2", reason="few queries") == 1

    def test_a_metric_has_the_same_labels_everywhere(self) -> None:
        counters = Counters()
        counters.add(record(reason="x"), "a_shape", 1)
        counters.add_stock(None, [("decode", 1)])
        names: dict[str, set[tuple[str, ...]]] = {}
        for metric, labels, _ in counters.rows():
            names.setdefault(metric, set()).add(tuple(sorted(labels)))
        assert all(len(found) == 1 for found in names.values())

    def test_threads_lose_nothing(self) -> None:
        counters = Counters()

        def work(layer: int) -> None:
            for _ in range(500):
                counters.add(record(layer=layer % 2), "a_shape", 1)
                counters.add_stock(layer, [("decode", 1)])
                counters.rows()

        threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rows = counters.rows()
        assert value(rows, "gossamer_rows", method="a_shape") == value(rows, "gossamer_rows", method="stock") == 2000
        assert value(rows, "gossamer_pairs") == 2000


class TestNews:
    def test_nothing_ran_here(self) -> None:
        counters = Counters()
        assert counters.news() is None
        counters.add_stock(0, [("decode", 5)])
        assert counters.news() is None

    def test_a_line_says_what_ran_since_the_last(self) -> None:
        counters = Counters()
        for layer in range(3):
            counters.add(record(layer=layer), "max_relative", 40)
            counters.add_stock(layer, [("decode", 2)])
        counters.add(record(path="dense", reason="plan too dense to pay", density=1.0), "max_relative", 40)
        assert counters.news() == (
            "max_relative: 3 sparse, 1 dense, density 0.438, planning 2.00 s, attention 8.00 s; "
            "no plan: decode x6, plan too dense to pay x1 (rows times layers)"
        )
        assert counters.news() is None
        counters.add(record(), "a_shape", 1)
        assert counters.news() == (
            "a_shape: 1 sparse, density 0.250, planning 0.50 s, attention 2.00 s (rows times layers)"
        )


class TestFiles:
    def test_those_of_two_processes_add_up(self, tmp_path: Path) -> None:
        code = (
            "import sys, time, pathlib; from gossamer.integrations.vllm.counters import Counters\n"
            "folder = pathlib.Path(sys.argv[1]); counters = Counters(int(sys.argv[2])); counters.write_in(folder)\n"
            "counters.add_stock(1, [('decode', int(sys.argv[3]))])\n"
            "while not list(folder.glob(f'{__import__(\"os\").getpid()}-*.json')): time.sleep(0.01)"
        )
        folder = tmp_path / "metrics"
        for rank, rows in ((0, 3), (1, 4), (0, 5)):
            subprocess.run([sys.executable, "-c", code, str(folder), str(rank), str(rows)], check=True, timeout=60)
        found = list(collected(folder))
        assert value(found, "gossamer_dense_rows", rank="0", reason="decode") == 8
        assert value(found, "gossamer_dense_rows", rank="1", reason="decode") == 4
        assert folder.stat().st_mode & 0o777 == 0o700

    def test_two_engines_of_a_process_do_not_overwrite_each_other(self, tmp_path: Path) -> None:
        both = Counters(), Counters()
        for counters in both:
            counters.write_in(tmp_path)
            counters.write_in(tmp_path)
            counters.add_stock(0, [("decode", 1)])
        wait_for(lambda: value(collected(tmp_path), "gossamer_rows") == 2)
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_file_follows_what_is_counted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gossamer.integrations.vllm.counters.SECONDS_BETWEEN_FILES", 0.01)
        counters = Counters()
        counters.write_in(tmp_path / "metrics")
        assert not (tmp_path / "metrics").exists()
        for rows in range(1, 4):
            counters.add_stock(0, [("decode", 1)])
            wait_for(lambda rows=rows: value(collected(tmp_path / "metrics"), "gossamer_rows") == rows)

    def test_a_folder_that_its_owner_removed_is_not_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gossamer.integrations.vllm.counters.SECONDS_BETWEEN_FILES", 0.01)
        folder, counters = tmp_path / "metrics", Counters()
        counters.write_in(folder)
        counters.add_stock(0, [("decode", 1)])
        wait_for(lambda: bool(list(folder.glob("*.json")) if folder.exists() else []))
        time.sleep(0.1)
        (file,) = folder.glob("*.json")
        file.unlink()
        folder.rmdir()
        counters.add_stock(0, [("decode", 1)])
        wait_for(lambda: not counters._writer.is_alive())  # type: ignore[union-attr]
        assert not folder.exists()

    @pytest.mark.parametrize(
        "broken",
        [
            "",
            "{",
            "3",
            "null",
            "[[1]]",
            '[["m", 3, 1]]',
            '[["m", {"a": ""}, "x"]]',
            '[["m", {}, NaN]]',
            "[[[]]]",
            "\xff",
        ],
    )
    def test_a_broken_one_is_passed_over(self, tmp_path: Path, broken: str) -> None:
        (tmp_path / "1-0.json").write_bytes(broken.encode("latin-1"))
        (tmp_path / "2-0.json").write_text(json.dumps([["gossamer_rows", {"rank": "0"}, 3]]))
        (tmp_path / "3-0.json").mkdir()
        assert list(collected(tmp_path)) == [("gossamer_rows", {"rank": "0"}, 3.0)]

    def test_without_a_folder_there_is_nothing(self, tmp_path: Path) -> None:
        assert list(collected(tmp_path / "none")) == []
        assert list(collected(Path(os.devnull))) == []


class TestAnnounce:
    def test_the_folder_is_removed_by_the_process_that_named_it_alone(self, tmp_path: Path) -> None:
        code = (
            "import os, pathlib, sys; from gossamer.integrations.vllm import counters as c\n"
            "c.announce(); folder = pathlib.Path(os.environ[c.FOLDER]); print(folder)\n"
            "first = os.environ[c.FOLDER]; c.announce(); assert os.environ[c.FOLDER] == first\n"
            "assert not folder.exists(); folder.mkdir(); (folder / '1-0.json').write_text('[]')\n"
            "child = os.fork()\n"
            "if not child: sys.exit()\n"
            "os.waitpid(child, 0); assert folder.exists(), 'removed by a child'"
        )
        environment = {name: text for name, text in os.environ.items() if name != FOLDER} | {"TMPDIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, timeout=60, env=environment, capture_output=True, text=True
        )
        assert Path(done.stdout.strip()).parent == tmp_path
        assert list(tmp_path.glob("gossamer-vllm-*")) == []

    def test_workers_have_the_folder_of_their_front_and_other_servers_one_of_their_own(self, tmp_path: Path) -> None:
        code = (
            "import multiprocessing, os, subprocess, sys; from gossamer.integrations.vllm import counters as c\n"
            "def named(queue): c.announce(); queue.put(os.environ[c.FOLDER])\n"
            "def main():\n"
            "    c.announce(); mine = os.environ[c.FOLDER]\n"
            "    for kind in ('spawn', 'fork'):\n"
            "        context = multiprocessing.get_context(kind); queue = context.Queue()\n"
            "        worker = context.Process(target=named, args=(queue,)); worker.start()\n"
            "        assert queue.get() == mine, kind\n"
            "        worker.join()\n"
            "    if len(sys.argv) == 1:\n"
            "        done = subprocess.check_output([sys.executable, __file__, 'server'], text=True)\n"
            "        assert done and done != mine\n"
            "    print(mine, end='')\n"
            "if __name__ == '__main__': main()\n"
        )
        script = tmp_path / "server.py"
        script.write_text(code)
        done = subprocess.run([sys.executable, str(script)], timeout=120, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
