"""Mixed traffic against one server.

    python tests/integrations/vllm_plugin/soak.py [--minutes 20] [--clients 6] [--stock] [--out FILE]

Clients send prompts of 40 to 6,000 tokens, a third with a prefix that others have, under the server's policy or one of
their own; some go away in the middle, some ask for a policy that there is not. At the end: each request was answered as
it should be, the plug-in's counts add up, and the memory of the server's processes did not grow in the second half.
``--stock`` sends the same traffic to a server without gossamer: what grows there is vLLM's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from integrations.vllm_plugin.serving import SPARSE, Server, prompt, raw_post, served, total

SETTINGS = {"method": "max_relative", "min_tokens": 512, "policies": {"few": SPARSE, "dense": {"method": "dense"}}}
PREFIXES = [prompt(1024 * n, 99) for n in (1, 2, 4)]
# So few that all were written to before the second half: a cache takes memory when it is first touched.
PAGES = 400
# Of the second half's memory, by a line through it: more is a leak.
MOST_GROWTH = 0.02


def children(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += children(int(child))
    return found


def resident(pid: int) -> dict[str, int]:
    """Bytes of a process and of all that it started, by name; memory that they share is counted once a process."""
    found: dict[str, int] = {}
    for one in children(pid):
        try:
            name = Path(f"/proc/{one}/comm").read_text().strip()
            pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
        except OSError:
            continue
        found[name] = found.get(name, 0) + pages * os.sysconf("SC_PAGE_SIZE")
    return found


class Clients:
    """Threads that send requests until they are told to end, and what came of it."""

    def __init__(self, server: Server, seed: int, stock: bool) -> None:
        self.server, self.seed, self.stock = server, seed, stock
        self.counts: dict[str, int] = {}
        self.wrong: list[str] = []
        self.ends = threading.Event()
        self._lock = threading.Lock()

    def note(self, kind: str, wrong: str | None = None) -> None:
        with self._lock:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            if wrong is not None:
                self.wrong.append(wrong)

    def run(self, number: int) -> None:
        draw = random.Random(self.seed * 1000 + number)
        while not self.ends.is_set():
            ids = prompt(draw.choice((40, 90, 300, 700, 1500, 3000, 6000)), draw.randrange(1 << 20))
            if draw.random() < 0.33:
                ids = (draw.choice(PREFIXES) + ids)[:7000]
            body: dict[str, Any] = {"prompt": ids, "max_tokens": draw.choice((1, 4, 16))}
            kind = draw.choices(("plain", "few", "dense", "gone", "refused"), (6, 1, 1, 1, 0.5))[0]
            if kind in ("few", "dense", "refused") and not self.stock:
                body["vllm_xargs"] = {"gossamer": "nonsense" if kind == "refused" else kind}
            if kind == "gone":
                self.leave(ids, draw.random())
                self.note(kind)
                continue
            try:
                status, answer = self.server.post(body)
            except OSError as error:
                self.note(kind, f"{kind}: {error}")
                continue
            wanted = 400 if kind == "refused" and not self.stock else 200
            made = answer.get("usage", {}).get("completion_tokens") if status == 200 else None
            right = status == wanted and (status == 400 or made == body["max_tokens"])
            self.note(kind, None if right else f"{kind}: {status} {json.dumps(answer)[:300]}")

    def leave(self, ids: list[int], seconds: float) -> None:
        body = json.dumps({"model": "m", "prompt": ids, "max_tokens": 200, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", self.server.port)) as gone:
            gone.sendall(raw_post(body))
            time.sleep(seconds)


def growth(memory: list[tuple[float, int]]) -> float:
    """Of a line through the second half of the measurements: its rise over its mean."""
    half = memory[len(memory) // 2 :]
    times, sizes = [t for t, _ in half], [size for _, size in half]
    middle, mean = sum(times) / len(times), sum(sizes) / len(sizes)
    spread = sum((t - middle) ** 2 for t in times)
    slope = sum((t - middle) * (size - mean) for t, size in half) / spread if spread else 0.0
    return slope * (times[-1] - times[0]) / mean


def counts(metrics: dict[str, float], layers: int) -> list[str]:
    """What does not add up in the plug-in's counters."""
    wrong = []
    rows = [total(metrics, "gossamer_rows_total", f'layer="{layer}"') for layer in range(layers)]
    if len(set(rows)) != 1:
        wrong.append(f"layers counted different numbers of rows: {rows}")
    planned = total(metrics, "gossamer_rows_total", 'path="sparse"')
    reasons = total(metrics, "gossamer_dense_rows_total")
    # A dense method gives no reason: it was asked for.
    asked = total(metrics, "gossamer_rows_total", 'method="dense"', 'path="dense"')
    if planned + reasons + asked != sum(rows):
        wrong.append(f"{sum(rows):.0f} rows, but {planned:.0f} planned, {reasons:.0f} with a reason, {asked:.0f} dense")
    if total(metrics, "gossamer_dense_rows_total", 'reason="method failed"'):
        wrong.append("a method failed")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    flags = ("--max-num-batched-tokens", "2048", "--num-gpu-blocks-override", str(PAGES))
    with served(None if arguments.stock else SETTINGS, *flags) as server:
        clients = Clients(server, arguments.seed, arguments.stock)
        threads = [threading.Thread(target=clients.run, args=(n,), daemon=True) for n in range(arguments.clients)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        memory: list[tuple[float, dict[str, int]]] = []
        while time.monotonic() - began < 60 * arguments.minutes:
            time.sleep(5)
            memory.append((time.monotonic() - began, resident(server.process.pid)))
            if server.process.poll() is not None:
                print(server.log.read_text()[-4000:], file=sys.stderr)
                return 1
        clients.ends.set()
        for thread in threads:
            thread.join(300)
        metrics = server.metrics()
        for _ in range(60):
            if total(metrics, "vllm:num_requests_running") == 0:
                break
            metrics = server.metrics()
        wrong = clients.wrong + ([] if arguments.stock else counts(metrics, 6))
        running = total(metrics, "vllm:num_requests_running")
        if running:
            wrong.append(f"{running:.0f} requests still run")
        whole = [(at, sum(parts.values())) for at, parts in memory]
        rise = growth(whole)
        if rise > MOST_GROWTH:
            wrong.append(f"memory grew by {rise:.1%} in the second half")
        report = {
            "minutes": arguments.minutes,
            "requests": clients.counts,
            "rows": {
                path: total(metrics, "gossamer_rows_total", f'path="{path}"') for path in ("sparse", "dense", "stock")
            },
            "memory_mib": {
                name: [round(parts.get(name, 0) / 2**20) for _, parts in memory[:: max(1, len(memory) // 20)]]
                for name in memory[-1][1]
            },
            "growth": round(rise, 4),
            "wrong": wrong,
        }
    print(json.dumps(report, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
