"""Tokens per second of vLLM's server, stock and with decoding that chooses what it reads: servers in turn.

    python benchmarks/serving_decode.py MODEL [--lengths 16384,32768] [--decode "quest,quest(budget=1024)"] [--rounds 5]
        [--requests 1] [--tokens 64] [--cache-space GIB] [--python PYTHON] [--dtype float32]
        [--enforce-eager] [--out FILE]

``--python`` is one that has vLLM and gossamer (see ``make vllm``). A server for each contender is started; they share
all cores, and no two of them work at the same time. vLLM's kernel reads all prompts. Each round sends every contender
the same prompts (``--requests`` of them at once, of one text whose pages are cached after the first round, with another
end each) and counts the tokens that come between the first one and the last: *ratio* is the median of a contender's
tokens per second over the stock server's in the same round. *same* says how many answers are the stock server's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from machines import results
from serving import STOCK, Server, about, prompts, served
from timing import write

from gossamer.cli.specs import parse_method, split_specs

OWN = 32  # last tokens of a prompt, which no other has


def streamed(server: Server, ids: list[int], tokens: int) -> tuple[str, list[float]]:
    """An answer, and when each part of it came."""
    body = {"model": "m", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    url, headers = f"http://127.0.0.1:{server.port}/v1/completions", {"Content-Type": "application/json"}
    times, text = [], ""
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=7200) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
                text += json.loads(line[6:])["choices"][0]["text"]
    return text, times


def decoded(server: Server, asked: list[list[int]], tokens: int) -> tuple[list[str], float]:
    """Answers of requests at once, and their tokens per second while all of them decode."""
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda ids: streamed(server, ids, tokens), asked))
    begin, end = max(times[0] for _, times in found), min(times[-1] for _, times in found)
    made = sum(sum(begin < at <= end for at in times) for _, times in found)
    return [text for text, _ in found], made / max(end - begin, 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="of the model in the results (default: its folder's)")
    parser.add_argument("--lengths", default="16384,32768")
    parser.add_argument("--decode", default="quest")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cache-space", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--text")
    parser.add_argument("--enforce-eager", action="store_true", help="no compilation: servers start in seconds")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--port", type=int, default=8920)
    parser.add_argument("--out", type=Path, default=results("serving_decode.json"))
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    names = [STOCK, *split_specs(arguments.decode)]
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        servers = []
        for n, name in enumerate(names):
            settings = None if name == STOCK else {"decode": parse_method(name).to_dict(), "min_context": 0}
            longest = max(lengths) + arguments.tokens
            make = served(arguments, name, arguments.port + n, longest, settings, ("--enable-prefix-caching",))
            servers.append(stack.enter_context(make))
        for length in lengths:
            shared = prompts(arguments, length - OWN, 0)
            rates: dict[str, list[float]] = {name: [] for name in names}
            same = dict.fromkeys(names, 0)
            for n in range(arguments.rounds + 1):  # the first one reads the text, and is not counted
                ends = [prompts(arguments, OWN, 1 + n * arguments.requests + i) for i in range(arguments.requests)]
                answers = {}
                for server in servers[n % len(servers) :] + servers[: n % len(servers)]:
                    texts, rate = decoded(server, [shared + end for end in ends], arguments.tokens)
                    answers[server.name] = texts
                    if n:
                        rates[server.name].append(rate)
                    print(f"  {length} tokens, {server.name}: {rate:.2f} tokens/s", file=sys.stderr, flush=True)
                for name in names if n else ():
                    same[name] += sum(a == b for a, b in zip(answers[name], answers[STOCK], strict=True))
            found += [
                {
                    "contender": name,
                    "length": length,
                    "requests": arguments.requests,
                    "tokens_per_s": statistics.median(rates[name]),
                    "each_per_s": [round(rate, 3) for rate in rates[name]],
                    "ratio": statistics.median(a / b for a, b in zip(rates[name], rates[STOCK], strict=True)),
                    "same": same[name],
                    "answers": arguments.rounds * arguments.requests,
                }
                for name in names
            ]
    section = about(arguments) | {"tokens": arguments.tokens, "rows": found}
    many = f", {arguments.requests} requests" if arguments.requests > 1 else ""
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    write(arguments.out, known | {f"{arguments.name or arguments.model.name}{many}": section})
    for row in found:
        print(
            f"{row['length']} tokens, {row['contender']}: {row['tokens_per_s']:.2f} tokens/s, x {row['ratio']:.2f}, "
            f"{row['same']} of {row['answers']} answers the same"
        )


if __name__ == "__main__":
    main()
