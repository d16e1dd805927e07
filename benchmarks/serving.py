"""Time to the first token of vLLM's server, stock and with gossamer's plug-in: servers on one machine, in turn.

    python benchmarks/serving.py MODEL [--lengths 8192,16384] [--methods LIST] [--rounds 5] [--out FILE]
        [--python PYTHON] [--dtype bfloat16] [--chunk TOKENS] [--requests N] [--load-rounds 3] [--text FILE]
        [--enforce-eager]

``--python`` is one that has vLLM and gossamer (see ``make vllm``). A server for each contender is started; they share
all cores, and no two of them work at the same time. Each round sends every contender the same new prompt of the
repository's own text (no prefix of it was seen before; caching of prefixes is off) and waits for one token: *seconds*
are medians over the rounds, *ratio* the median of the stock server's seconds over a contender's in the same round.

*attention*: what the plug-in counted, planning included. The stock kernel counts nothing: its attention is taken as
what remains of its seconds without all else that the server with dense plans did, in the same round.

*requests per second* are of N requests of mixed lengths that are sent at once, 16 tokens each to be generated; *ratio*
is the median of a contender's over the stock server's in the same round. ``--rounds 0`` measures the load alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from machines import machine, results
from timing import write

from gossamer.cli.specs import parse_method, split_specs
from gossamer.evaluate.haystack import load_haystack

STOCK, DENSE = "stock", "dense(kernel=gossamer)"
STARTS_WITHIN = 600.0
MIXED = (40, 90, 200, 400, 900, 1800, 3500)
NEW_TOKENS = 16


@dataclass
class Server:
    """One contender's server."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    seconds: dict[int, list[float]] = field(default_factory=dict)
    attention: dict[int, list[float]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """
        Raises:
            RuntimeError: the server refused, or its engine is gone; the message has the end of its log.
        """
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=3600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{self.name}: {error}; its log ends so:\n{self.log.read_text()[-4000:]}") from error

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def complete(self, ids: list[int], tokens: int = 1) -> dict[str, Any]:
        body = {"model": "m", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return self.post("/v1/completions", body)

    def counted(self, *metrics: str) -> float:
        """The sum of what the plug-in counts under these names."""
        time.sleep(1.2)  # workers tell once a second
        found = re.findall(r"^(\w+)_total(?:\{.*\})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(float(value) for name, value in found if name in metrics)


@contextmanager
def served(
    arguments: argparse.Namespace,
    name: str,
    port: int,
    longest: int,
    settings: Mapping[str, Any] | None = None,
    flags: Sequence[str] = ("--no-enable-prefix-caching",),
) -> Iterator[Server]:
    """A server until it answers, ended on the way out.

    Args:
        settings: what is asked of the plug-in, where it is no method for prompts that the name says.

    Raises:
        RuntimeError: it did not start; the message has the end of its log.
    """
    asked: dict[str, Any] = {}
    if name != STOCK:
        asked["gossamer"] = settings or parse_method(name).to_dict() | {"min_tokens": arguments.min_tokens}
    command = [arguments.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(arguments.model)]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--dtype", arguments.dtype]
    command += [
        "--max-model-len",
        str(longest + NEW_TOKENS),
        "--max-num-batched-tokens",
        str(arguments.chunk or longest),
    ]
    command += [*flags, "--additional-config", json.dumps(asked)]
    command += ["--enforce-eager"] * arguments.enforce_eager
    space = str(getattr(arguments, "cache_space", 1))
    fixed = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": space, "VLLM_NO_USAGE_STATS": "1"}
    # A step of a long prompt may take longer than the 300 seconds after which vLLM gives a worker up.
    fixed["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = "3600"
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=os.environ | fixed | {"HF_HUB_OFFLINE": "1"}, stdout=out, stderr=subprocess.STDOUT
        )
    server = Server(name, port, process, log)
    try:
        ends = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                server.get("/health")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > ends:
                    raise RuntimeError(f"{name}: the server did not start:\n{log.read_text()[-4000:]}") from None
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        log.unlink()


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """On what, and with which vLLM, a section was measured."""
    found = subprocess.run(
        [arguments.python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=True
    )
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "vllm": found.stdout.split()[-1],
        "dtype": arguments.dtype,
        "eager": arguments.enforce_eager,
    }


def prompts(arguments: argparse.Namespace, length: int, seed: int) -> list[int]:
    """Tokens of a window of the text, which begins with a number of its own: no two share a prefix."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = Path(arguments.text).read_text() if arguments.text else load_haystack().text
    start = random.Random(seed).randrange(max(1, len(text) - 8 * length))
    ids = tokenizer(f"{seed} {length}\n{text[start : start + 8 * length]}")["input_ids"]
    while len(ids) < length:
        ids = ids + ids
    return ids[:length]


def first_tokens(arguments: argparse.Namespace, servers: list[Server], length: int) -> Iterator[list[int]]:
    """Each round's first tokens of the contenders."""
    for n in range(arguments.rounds):
        ids = prompts(arguments, length, n)
        found = {}
        for server in servers[n % len(servers) :] + servers[: n % len(servers)]:
            parts = ("gossamer_planning_seconds", "gossamer_attention_seconds")
            before = server.counted(*parts) if server.name != STOCK else 0.0
            started = time.perf_counter()
            answer = server.complete(ids)
            taken = time.perf_counter() - started
            server.seconds.setdefault(length, []).append(taken)
            if server.name != STOCK:
                server.attention.setdefault(length, []).append(server.counted(*parts) - before)
            found[server.name] = answer["choices"][0]["text"]
            print(f"  {length} tokens, {server.name}: {taken:.2f} s", file=sys.stderr, flush=True)
        yield [found[server.name] for server in servers]


def rows(servers: list[Server], length: int, same: dict[str, int]) -> Iterator[dict[str, Any]]:
    of = {server.name: server for server in servers}
    stock = of[STOCK].seconds[length]
    dense = of.get(DENSE)
    rest = None
    if dense is not None:
        rest = [s - a for s, a in zip(dense.seconds[length], dense.attention[length], strict=True)]
    for server in servers:
        seconds, attention = server.seconds[length], server.attention.get(length)
        if server.name == STOCK and rest is not None:
            attention = [s - r for s, r in zip(seconds, rest, strict=True)]
        yield {
            "contender": server.name,
            "length": length,
            "seconds": statistics.median(seconds),
            "each_s": [round(s, 4) for s in seconds],
            "ratio": statistics.median(a / b for a, b in zip(stock, seconds, strict=True)),
            "attention_s": None if attention is None else statistics.median(attention),
            "rest_share": None
            if attention is None
            else statistics.median(1 - a / s for a, s in zip(attention, seconds, strict=True)),
            "attention_ratio": None
            if rest is None or attention is None
            else statistics.median((s - r) / a for s, r, a in zip(stock, rest, attention, strict=True)),
            "same_first_tokens": same[server.name],
            "rounds": len(seconds),
        }


def load(arguments: argparse.Namespace, servers: list[Server], longest: int) -> Iterator[dict[str, Any]]:
    """Requests per second of many requests at once."""
    lengths = [length for length in MIXED if length <= longest]
    for n in range(arguments.load_rounds):
        asked = [prompts(arguments, lengths[i % len(lengths)], 1000 * (n + 1) + i) for i in range(arguments.requests)]
        for server in servers[n % len(servers) :] + servers[: n % len(servers)]:
            started = time.perf_counter()
            with ThreadPoolExecutor(len(asked)) as pool:
                list(pool.map(lambda ids, of=server: of.complete(ids, NEW_TOKENS), asked))
            server.rates.append(len(asked) / (time.perf_counter() - started))
            print(f"  load, {server.name}: {server.rates[-1]:.3f} requests/s", file=sys.stderr, flush=True)
    stock = next(server for server in servers if server.name == STOCK)
    for server in servers:
        yield {
            "contender": server.name,
            "requests": arguments.requests,
            "lengths": lengths,
            "requests_per_s": statistics.median(server.rates),
            "each_per_s": [round(rate, 3) for rate in server.rates],
            "ratio": statistics.median(a / b for a, b in zip(server.rates, stock.rates, strict=True)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="of the model in the results (default: its folder's)")
    parser.add_argument("--lengths", default="8192,16384")
    parser.add_argument("--methods", default=f"{DENSE},max_relative")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=0, help="of the mixed load; 0 leaves it out")
    parser.add_argument("--load-rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a step; 0 for whole prompts")
    parser.add_argument("--min-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text")
    parser.add_argument("--enforce-eager", action="store_true", help="no compilation: servers start in seconds")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--port", type=int, default=8900)
    parser.add_argument("--out", type=Path, default=results("serving.json"))
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    names = [STOCK, *split_specs(arguments.methods)]
    name = arguments.name or arguments.model.name
    found: list[dict[str, Any]] = []
    mixed: list[dict[str, Any]] = []
    with ExitStack() as stack:
        servers = [
            stack.enter_context(served(arguments, one, arguments.port + i, max(lengths))) for i, one in enumerate(names)
        ]
        for server in servers:  # warm: a plan and a dense row
            for length in (arguments.min_tokens + 1, arguments.min_tokens // 2):
                server.complete(prompts(arguments, length, -1))
        for length in lengths if arguments.rounds else ():
            same = dict.fromkeys(names, 0)
            for texts in first_tokens(arguments, servers, length):
                for server, text in zip(servers, texts, strict=True):
                    same[server.name] += text == texts[0]
            found += rows(servers, length, same)
        if arguments.requests:
            mixed = list(load(arguments, servers, max(lengths)))
    section = about(arguments) | {
        "chunk": arguments.chunk or None,
        "min_tokens": arguments.min_tokens,
        "first_token": found,
        "load": mixed,
    }
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    write(arguments.out, known | {f"{name}{f', chunks of {arguments.chunk}' if arguments.chunk else ''}": section})
    for row in found:
        line = f"{name}, {row['length']} tokens, {row['contender']}: {row['seconds']:.2f} s, x {row['ratio']:.2f}"
        for label, key in (("attention", "attention_s"), ("of it x", "attention_ratio"), ("rest", "rest_share")):
            line += f", {label} {row[key]:.2f}" if row[key] is not None else ""
        print(line)
    for row in mixed:
        print(f"{name}, load, {row['contender']}: {row['requests_per_s']:.3f} requests/s, x {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
