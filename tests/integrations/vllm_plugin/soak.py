"""Mixed traffic against one server.

    python tests/integrations/vllm_plugin/soak.py [--minutes 20] [--clients 6] [--core 0] [--bounded] [--stock]
        [--out FILE]

Clients send prompts of 40 to 6,000 tokens, a third with a prefix that others have, under the server's policy or one of
their own; some go away in the middle, some ask for a policy that there is not. Before it is measured, each page of the
cache is written to, the server sees steps of many sizes, and there is traffic for some minutes: all of these take
memory when they are new, without gossamer too. At the end: each request was answered as it should be, the counters
agree with what was sent and with each other, and the memory of the server's processes did not grow. ``--stock`` sends
the same traffic to a server without gossamer: what grows there is vLLM's. With ``--core`` a server has one core and one
thread, so that both can run at once.

Most of what a server takes for steps of sizes that are new is oneDNN's, which keeps what it compiled for the last 1,024
of them. ``--bounded`` leaves it 16, and has the allocator give large buffers back: then nothing grows that is not lost.
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
PAGES, PAGE = 400, 128
# Of a process's memory while it is measured, by a line through it: more is a leak.
MOST_GROWTH = 0.01
INTERVAL = 10.0  # seconds


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
        self.made = 0  # tokens of answers
        self.wrong: list[str] = []
        self.ends = threading.Event()
        self._lock = threading.Lock()

    def note(self, kind: str, wrong: str | None = None, made: int = 0) -> None:
        with self._lock:
            self.made += made
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
            self.note(kind, None if right else f"{kind}: {status} {json.dumps(answer)[:300]}", made or 0)

    def leave(self, ids: list[int], seconds: float) -> None:
        body = json.dumps({"model": "m", "prompt": ids, "max_tokens": 200, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", self.server.port)) as gone:
            gone.sendall(raw_post(body))
            time.sleep(seconds)


def growth(memory: list[tuple[float, int]]) -> float:
    """Of a line through measurements: its rise over its mean."""
    times, sizes = [t for t, _ in memory], [size for _, size in memory]
    middle, mean = sum(times) / len(times), sum(sizes) / len(sizes)
    spread = sum((t - middle) ** 2 for t in times)
    slope = sum((t - middle) * (size - mean) for t, size in memory) / spread if spread else 0.0
    return slope * (times[-1] - times[0]) / mean


def disagreements(metrics: dict[str, float], layers: int) -> list[str]:
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


def against_sent(metrics: dict[str, float], clients: Clients, stock: bool) -> list[str]:
    """What in the counters does not agree with what the clients sent."""
    wrong = []
    answered = sum(n for kind, n in clients.counts.items() if kind != "gone" and (stock or kind != "refused"))
    finished = total(metrics, "vllm:request_success_total")
    # Who went away may have been done before the server knew.
    if not answered <= finished <= answered + clients.counts.get("gone", 0):
        wrong.append(f"{answered} requests were answered, but vLLM counts {finished:.0f}")
    if stock:
        return wrong
    # Each token but a request's first is made by a row of one query; those who went away had some made for them.
    few = ('layer="0"', 'reason="decode"'), ('layer="0"', 'reason="few queries"')
    decoded = sum(total(metrics, "gossamer_dense_rows_total", *labels) for labels in few)
    made = total(metrics, "vllm:generation_tokens_total")
    if not clients.made - answered <= decoded or decoded > made + 2 * sum(clients.counts.values()):
        wrong.append(f"{clients.made} tokens of {answered} answers, {made:.0f} in all, {decoded:.0f} rows that decode")
    prefilled = total(metrics, "gossamer_rows_total", 'layer="0"') - decoded
    if prefilled + decoded < clients.made:
        wrong.append(f"{clients.made} tokens were made by {prefilled + decoded:.0f} rows")
    return wrong


def fill(server: Server, lengths: int) -> None:
    """Write to each page of the cache, and have steps of many sizes, twice: a server takes memory for what is new.

    Pages are taken in turn, and prompts with nothing in common share none. What vLLM's linear layers keep of a number
    of tokens, and what the allocator keeps, no longer grows then (see ``passes.py``).
    """
    draw = random.Random(0)
    sizes = [6912] * -(-(PAGES + 54) * PAGE // 6912) + 2 * [draw.randrange(40, 2048) for _ in range(lengths)]
    for n, size in enumerate(sizes):
        status, answer = server.post({"prompt": prompt(size, -n - 1), "max_tokens": 1})
        if status != 200:
            raise RuntimeError(f"{status} {answer}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--warm", type=float, default=4, help="minutes of traffic before it is measured")
    parser.add_argument("--lengths", type=int, default=130, help="sizes of a step that the server sees before that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int)
    parser.add_argument("--bounded", action="store_true")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": str(arguments.core), "OMP_NUM_THREADS": "1"}
    if arguments.bounded:
        os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    flags = ("--max-num-batched-tokens", "2048", "--num-gpu-blocks-override", str(PAGES))
    with served(None if arguments.stock else SETTINGS, *flags) as server:
        fill(server, arguments.lengths)
        filled = server.metrics()
        clients = Clients(server, arguments.seed, arguments.stock)
        threads = [threading.Thread(target=clients.run, args=(n,), daemon=True) for n in range(arguments.clients)]
        for thread in threads:
            thread.start()
        memory = watched(server, 60 * arguments.warm, 60 * arguments.minutes)
        clients.ends.set()
        for thread in threads:
            thread.join(600)
        lost = sum(thread.is_alive() for thread in threads)
        metrics = server.metrics()
        for _ in range(60):
            if total(metrics, "vllm:num_requests_running") == 0:
                break
            metrics = server.metrics()
        rows = {path: total(metrics, "gossamer_rows_total", f'path="{path}"') for path in ("sparse", "dense", "stock")}
        since = {name: value - filled.get(name, 0.0) for name, value in metrics.items()}
    wrong = clients.wrong + against_sent(since, clients, arguments.stock)
    if not arguments.stock:
        wrong += disagreements(metrics, 6)
    if lost:
        wrong.append(f"{lost} requests were never answered")
    running = total(metrics, "vllm:num_requests_running") + total(metrics, "vllm:num_requests_waiting")
    if running:
        wrong.append(f"{running:.0f} requests still run")
    parts = {name: [(at, parts.get(name, 0)) for at, parts in memory] for name in memory[-1][1]}
    rises = {name: round(growth(sizes), 5) for name, sizes in parts.items()}
    wrong += [f"memory of {name} grew by {rise:.1%}" for name, rise in rises.items() if rise > MOST_GROWTH]
    report = {
        "minutes": arguments.minutes,
        "warm_minutes": arguments.warm,
        "requests": clients.counts,
        "finished": total(since, "vllm:request_success_total"),
        "tokens_of_answers": clients.made,
        "rows": rows,
        "no_plan": reasons(metrics),
        "memory_mib": {
            name: [round(size / 2**20, 1) for _, size in sizes[:: round(30 / INTERVAL)]]
            for name, sizes in parts.items()
        },
        "growth": rises,
        "wrong": wrong,
    }
    print(json.dumps(report, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong else 0


def reasons(metrics: dict[str, float]) -> dict[str, float]:
    """Rows of the first layer that ran no plan, by reason."""
    found = {}
    for name, value in metrics.items():
        if name.startswith("gossamer_dense_rows_total") and 'layer="0"' in name:
            found[name.partition('reason="')[2].partition('"')[0]] = value
    return found


def watched(server: Server, warm: float, seconds: float) -> list[tuple[float, dict[str, int]]]:
    """The memory of a server's processes, from ``warm`` seconds on."""
    began = time.monotonic()
    memory: list[tuple[float, dict[str, int]]] = []
    while (now := time.monotonic() - began) < warm + seconds:
        if now >= warm:
            memory.append((now, resident(server.process.pid)))
        time.sleep(INTERVAL)
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended: {server.log.read_text()[-4000:]}")
    return memory


if __name__ == "__main__":
    sys.exit(main())
