"""What a decode step costs and what it loses when a method chooses what it reads, beside dense steps.

    python benchmarks/decoding.py attention [--lengths 32768,131072] [--dtypes float32,bfloat16] [--methods LIST]
        [--rounds N] [--threads N] [--out FILE]
    python benchmarks/decoding.py model MODEL [--lengths 4096,16384] [--steps 64] [--texts N] [--methods LIST]
        [--out FILE]
    python benchmarks/decoding.py tokens MODEL [--lengths 32768] [--steps 16] [--rounds N] [--methods LIST]
        [--prefill METHOD]

*attention*: one layer of 32 query heads on 8 with 128 channels and a cache of so many tokens, as a store holds it. A
round draws queries for 8 steps in a row, each of which adds a token, and every contender reads them in turn: our dense
kernel, torch's SDPA, and methods with a budget of 2,048 tokens, whose state is that of a request (a choice that serves
several steps is made once in them). Seconds are of a step; *planning* is the part that goes to the choice, *ratio* the
median over rounds of our dense kernel's seconds over the method's, and *bytes* what a step reads of keys, values and of
what the store keeps for the method (bounds, labels, hashes, centroids), which is there of the prompt before.

*model*: a pretrained model reads windows of a text densely, and the last tokens one by one, by each method
(`gossamer.evaluate.steps`): divergence from dense steps, share of equal predictions, loss, share of the cache that was
read, seconds of a step.

*tokens*: the same model reads one text, by ``--prefill``, and then single tokens on that cache, by each method in turn,
by our dense kernel and by transformers' own sdpa with its own cache: tokens a second, and the median over rounds of
sdpa's seconds over the method's. Rows replace those of the file for the same method, length and dtype or model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machines import machine, results
from timing import Bystanders, timed, wake_threads, write
from torch import Tensor

from gossamer.attention import CallRecord, attend
from gossamer.backends.torch.dense import sdpa
from gossamer.cache import StoreLayer
from gossamer.call import AttentionCall
from gossamer.cli.specs import parse_method, split_specs
from gossamer.methods import Dense, MagicPIG
from gossamer.plan import Extent
from gossamer.policy import Policy

HEADS, GROUPS, DIM, STEPS, TOPICS = 32, 8, 128, 8, 64
TIMED = (
    "quest,quest(per_query_head=true),lserve(budget=2048),double_sparsity,double_sparsity(bits=8),"
    "double_sparsity(per_query_head=true),magicpig,retro_infer"
)
COMPARED = ",".join(
    [
        f"{name}(budget={budget})"
        for budget in (128, 256, 512, 1024)
        for name in ("oracle_topk", "quest", "lserve", "double_sparsity")
    ]
    # As many tokens: 128 sinks, a window of half of the budget and up to a block more, and blocks.
    + [f"infllm(blocks={blocks},local={local})" for blocks, local in ((1, 64), (2, 256), (4, 512))]
    + [f"magicpig(hash_tables={tables})" for tables in (75, 150, 300)]
    + [f"retro_infer(least=1024,probe={probe})" for probe in (0.018, 0.072, 0.288)]
)


def filled(length: int, dtype: torch.dtype, seed: int) -> tuple[StoreLayer, Tensor]:
    """A store with keys that drift with the position, and queries of `STEPS` steps that look for some of the topics."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randn(TOPICS, GROUPS, DIM, generator=generator)
    which = torch.randint(TOPICS, (length // 128 + 1,), generator=generator).repeat_interleave(128)[:length]
    k, v = (torch.randn(1, GROUPS, length, DIM, generator=generator).to(dtype) for _ in range(2))
    k += topic[which].transpose(0, 1).to(dtype)
    store = StoreLayer()
    store.update(k, v)
    store.place(Extent.full(1, 1, length))
    sought = topic[torch.randint(TOPICS, (STEPS,), generator=generator)].repeat_interleave(HEADS // GROUPS, dim=1)
    q = torch.randn(STEPS, HEADS, DIM, generator=generator) + 2 * sought
    return store, q[:, None, :, None].to(dtype)


class Contest:
    """Our dense kernel, torch's, and methods on the same steps."""

    def __init__(self, methods: list[str]) -> None:
        self.policies = {name: Policy(Dense("gossamer"), decode=parse_method(name)) for name in methods}
        self.policies["dense"] = Policy(Dense("gossamer"))
        self.wall: dict[str, list[float]] = {name: [] for name in [*self.policies, "sdpa"]}
        self.planning: dict[str, list[float]] = {name: [] for name in self.wall}
        self.density: dict[str, float] = dict.fromkeys(self.wall, 1.0)

    def run(self, length: int, dtype: torch.dtype, round_: int) -> None:
        """All in turn, in an order that moves on; round 0 does not count."""
        store, queries = filled(length, dtype, round_)
        names = list(self.wall)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            self._ask(name, store, queries[0])
            records: list[CallRecord] = []
            wake_threads()
            seconds, _ = timed(self.steps(name, store, queries, records))
            store.crop(-STEPS)
            if round_:
                self.wall[name].append(seconds / STEPS)
                self.planning[name].append(sum(record.plan_seconds for record in records) / STEPS)
            if records:
                self.density[name] = sum(record.density for record in records) / len(records)

    def _ask(self, name: str, store: StoreLayer, q: Tensor) -> None:
        """Have the store work out what a method needs of the prompt."""
        if name == "sdpa" or self.policies[name].decode is None:
            return
        k, v = store.read()
        self.policies[name].decide(AttentionCall(q, k, v, Extent.full(1, 1, k.shape[2]), layer=2, store=store))

    def steps(self, name: str, store: StoreLayer, queries: Tensor, records: list[CallRecord]) -> Callable[[], None]:
        new = torch.zeros(1, GROUPS, 1, DIM, dtype=queries.dtype)

        def run() -> None:
            for q in queries:
                k, v = store.update(new, new)
                if name == "sdpa":
                    sdpa(q, k, v, DIM**-0.5)
                    continue
                extent = Extent.full(1, 1, k.shape[2])
                store.place(extent)
                call = AttentionCall(q, k, v, extent, layer=2, store=store, state=store.state)
                attend(call, self.policies[name], record=records.append)

        return run

    def rows(self, length: int, dtype: str) -> list[dict[str, Any]]:
        return [self._row(name, length, dtype) for name in self.wall]

    def _row(self, name: str, length: int, dtype: str) -> dict[str, Any]:
        pairs = zip(self.wall["dense"], self.wall[name], strict=True)
        shares = zip(self.planning[name], self.wall[name], strict=True)
        return {
            "section": "attention",
            "method": name,
            "length": length,
            "dtype": dtype,
            "ratio": round(statistics.median(dense / own for dense, own in pairs), 3),
            "median_s": round(statistics.median(self.wall[name]), 6),
            "planning_share": round(statistics.median(part / whole for part, whole in shares), 3),
            "density": round(self.density[name], 5),
            "bytes": round(self._bytes(name, length, getattr(torch, dtype).itemsize)),
            "each_s": [round(seconds, 6) for seconds in self.wall[name]],
        }

    def _bytes(self, name: str, length: int, itemsize: int) -> float:
        """Of keys and values, and of what is kept beside them, where they are read; on average over steps.

        Where query heads choose apart, as if no two of them chose the same.
        """
        method = None if name not in self.policies else self.policies[name].decode
        apart = getattr(method, "per_query_head", False) or isinstance(method, MagicPIG)
        read = 2 * DIM * itemsize * length * self.density[name] * (HEADS if apart else GROUPS)
        return read + GROUPS * length * (0.0 if method is None else method.beside(DIM, itemsize))


@torch.inference_mode()
def attention(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for length in map(int, arguments.lengths.split(",")):
        for dtype in arguments.dtypes.split(","):
            contest = Contest(split_specs(arguments.methods or TIMED))
            for n in range(arguments.rounds + 1):
                contest.run(length, getattr(torch, dtype), n)
            rows += contest.rows(length, dtype)
            for row in rows[-len(contest.wall) :]:
                print(
                    *what(row)[1:], f"{row['median_s'] * 1e3:.2f} ms", row["ratio"], row["planning_share"], flush=True
                )
    return rows


def model(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from gossamer.cli.generation import load_checked, load_tokenizer
    from gossamer.cli.pretrained import model_folder
    from gossamer.evaluate.haystack import load_haystack
    from gossamer.evaluate.steps import compare_steps

    path = model_folder(arguments.model)
    loaded, tokenizer = load_checked(path, arguments.dtype), load_tokenizer(path)
    text = load_haystack(arguments.text).text
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    methods = {name: parse_method(name) for name in split_specs(arguments.methods or COMPARED)}
    rows = []
    for length in map(int, arguments.lengths.split(",")):
        found: dict[str, list[Any]] = {}
        for n in range(arguments.texts):
            start = n * max(1, (ids.shape[1] - length) // max(1, arguments.texts))
            for name, steps in compare_steps(loaded, ids[:, start : start + length], methods, arguments.steps).items():
                found.setdefault(name, []).append(steps)
        for name, some in found.items():
            names = [f.name for f in dataclasses.fields(some[0]) if f.name != "found"]
            means = {name: _mean([getattr(s, name) for s in some]) for name in names}
            by_step = [round(statistics.fmean(step), 4) for step in zip(*(s.found for s in some), strict=False)]
            rows.append(
                {"section": "model", "method": name, "length": length, "model": arguments.name or arguments.model.stem}
                | {"texts": arguments.texts, "steps": arguments.steps}
                | {key: round(value, 6) for key, value in means.items() if value is not None}
                | ({"found": by_step} if by_step else {})
            )
            print(*what(rows[-1])[1:], f"KL {means['kl']:.5f}", f"read {means['read']:.4f}", flush=True)
    return rows


def _mean(values: list[float | None]) -> float | None:
    """None where one is missing."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


@torch.inference_mode()
def tokens(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from transformers import DynamicCache

    import gossamer
    from gossamer.cli.generation import load_checked, load_tokenizer
    from gossamer.cli.pretrained import model_folder
    from gossamer.evaluate.haystack import load_haystack
    from gossamer.evaluate.steps import read_steps

    path, steps = model_folder(arguments.model), arguments.steps
    loaded, tokenizer = load_checked(path, arguments.dtype), load_tokenizer(path)
    text = tokenizer(load_haystack(arguments.text).text, return_tensors="pt")["input_ids"]
    rows = []
    for length in map(int, arguments.lengths.split(",")):
        ids = text.repeat(1, -(-length // text.shape[1]))[:, :length]
        with gossamer.enable(loaded, parse_method(arguments.prefill), cache="keep") as handle:
            kept = handle.new_cache()
            loaded(input_ids=ids[:, :-steps], past_key_values=kept, use_cache=True, logits_to_keep=1)
        stock = DynamicCache(config=loaded.config)
        for index, layer in enumerate(kept.layers):
            stock.update(*layer.read(), index)
        names = ["sdpa", "dense", *split_specs(arguments.methods or "quest(budget=2048),lserve(budget=2048)")]
        wall: dict[str, list[float]] = {name: [] for name in names}
        share: dict[str, float] = dict.fromkeys(names, 1.0)
        for n in range(arguments.rounds + 1):
            for name in names[n % len(names) :] + names[: n % len(names)]:
                wake_threads()
                if name == "sdpa":
                    _, seconds = read_steps(loaded, ids[:, -steps:], stock)
                    stock.crop(-steps)
                else:
                    decode = None if name == "dense" else parse_method(name)
                    with gossamer.enable(loaded, Policy(Dense("gossamer"), decode=decode), cache="keep") as handle:
                        _, seconds = read_steps(loaded, ids[:, -steps:], kept)
                        share[name] = statistics.fmean(layer.step_density for layer in handle.stats())
                    kept.crop(-steps)
                if n:
                    wall[name].append(statistics.median(seconds))
        for name in names:
            ratios = [theirs / own for theirs, own in zip(wall["sdpa"], wall[name], strict=True)]
            rows.append(
                {"section": "tokens", "method": name, "length": length, "dtype": arguments.dtype}
                | {"model": arguments.name or arguments.model.stem, "steps": steps, "rounds": arguments.rounds}
                | {"read": round(share[name], 5), "median_s": round(statistics.median(wall[name]), 5)}
                | {"tokens_per_s": round(1 / statistics.median(wall[name]), 3)}
                | {"ratio": round(statistics.median(ratios), 3), "each_s": [round(s, 5) for s in wall[name]]}
            )
            print(*what(rows[-1])[1:], f"{rows[-1]['tokens_per_s']} tokens/s", rows[-1]["ratio"], flush=True)
    return rows


def what(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(field) for field in ("section", "method", "length", "dtype", "model"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("section", choices=["attention", "model", "tokens"])
    parser.add_argument("model", type=Path, nargs="?", help="folder or GGUF file")
    parser.add_argument("--lengths", default=None)
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of attention")
    parser.add_argument("--dtype", default="float32", help="of a model")
    parser.add_argument("--methods", default=None)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prefill", default="minference", help="of tokens: what reads the text")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--text", default="package", help="file; default: gossamer's own text")
    parser.add_argument("--name", default=None, help="of the model in the rows; default: its file's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="default: in the folder of this machine's results")
    arguments = parser.parse_args()
    if (arguments.section != "attention") != (arguments.model is not None):
        parser.error("a model is for the sections `model` and `tokens`, which need one")
    torch.set_num_threads(arguments.threads)
    usual = {"attention": "32768,131072", "model": "4096,16384", "tokens": "32768"}
    arguments.lengths = arguments.lengths or usual[arguments.section]
    bystanders = Bystanders()
    rows = {"attention": attention, "model": model, "tokens": tokens}[arguments.section](arguments)
    path = arguments.out or results("decoding.json")
    measured = {what(row) for row in rows}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    setting = {"heads": HEADS, "groups": GROUPS, "dim": DIM, "threads": arguments.threads, "rounds": arguments.rounds}
    report = {"date": date.today().isoformat(), "machine": machine(), "setting": setting}
    report |= {"bystanders": bystanders.share(), "rows": [r for r in before if what(r) not in measured] + rows}
    write(path, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
