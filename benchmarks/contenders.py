"""Time to the first token of other programs on the same prompts, and what their answers lose: processes in turn.

    python benchmarks/contenders.py MODEL [--lengths 4096,8000] [--rounds 5] [--only NAMES] [--what time,loss]
        [--prompts 1] [--every 16] [--work FOLDER] [--prefix COMMAND] [--others PYTHON] [--vllm PYTHON]

MODEL is a GGUF file (or a folder of transformers, without llama.cpp and OpenVINO's own GGUF reader). What else it has
to become is made once: a folder for transformers and vLLM in gossamer's cache, and OpenVINO's format under ``--work``,
with float32 and with int8 weights and as its own reader makes it from the GGUF file. ``make contenders`` makes the
environments: one for OpenVINO GenAI and llama.cpp (``--others``), one for vLLM.

*time*: each round every contender gets a process of its own, in an order that moves on by one a round. It loads, reads
512 tokens to warm up, and then a prompt of each length that no other round has; seconds are from the token ids to the
first token. All use the same number of threads. ``--prefix`` is put before each command, for machines that are shared.

*loss*: the log-probabilities that a contender gives at every 16th position (llama.cpp and vLLM: after the last token
alone), beside those of transformers with torch's dense attention in float32 on the same prompt: KL divergence in nats
and the share of equal first choices. Nothing is timed meanwhile.

Results are `contenders_<model>.json` in the folder of this machine; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from contender_rows import REFERENCE, closeness, summary
from machines import machine, results
from timing import Bystanders, write

from gossamer.cli.pretrained import file_hash, model_folder
from gossamer.evaluate.haystack import load_haystack

HERE = Path(__file__).resolve().parent
WARM_UP = 512
CALIBRATED = 2048  # tokens of a prompt that layers are compressed by
LAST_ONLY = ("llama.cpp", "vllm")
Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """One row of the table: a library, the weights that it gets and its settings."""

    name: str
    library: str
    settings: Row = field(default_factory=dict)
    weights: str = "folder"


def ours(name: str, method: str) -> Contender:
    return Contender(f"gossamer {name}", "gossamer", {"method": method})


def fast(name: str, **settings: Any) -> Contender:
    """In bfloat16, with memory that is kept; with a recipe, on compressed linear layers."""
    library = "gossamer" if "method" in settings else "transformers"
    return Contender(f"{library} {name}", library, {"dtype": "bfloat16", "keep_memory": True} | settings)


def openvino(name: str, weights: str = "float32", **settings: Any) -> Contender:
    kind = "" if weights == "float32" else f" {weights}"
    return Contender(f"openvino{kind} {name}", "openvino", settings, weights)


def xattention(threshold: float, weights: str = "float32", **settings: Any) -> Contender:
    more = {"mode": "XATTENTION", "xattention_threshold": threshold}
    chunk = f" in chunks of {settings['chunk']}" if "chunk" in settings else ""
    return openvino(f"xattention {threshold}{chunk}", weights, **more, **settings)


FEW, MORE = "minference(vertical_size=256,slash_size=1024)", "minference(vertical_size=512,slash_size=2048)"
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(REFERENCE, "transformers"),
        ours("dense", "dense(kernel=gossamer)"),
        ours("max_relative", "max_relative"),
        ours("max_relative 0.05", "max_relative(alpha=0.05)"),
        ours("max_relative 0.02", "max_relative(alpha=0.02)"),
        ours("minference 256/1024", FEW),
        ours("minference 512/2048", MORE),
        ours("xattention", "xattention"),
        ours("xattention as openvino's", "xattention(threshold=0.9,stride=8,block=64)"),
        fast("bfloat16"),
        fast("bfloat16 minference 256/1024", method=FEW),
        fast("int8 minference 256/1024", method=FEW, recipe="int8"),
        fast("int8 minference 512/2048", method=MORE, recipe="int8"),
        openvino("dense"),
        openvino("trishape", mode="TRISHAPE", chunk=256),
        openvino("trishape 128/896", mode="TRISHAPE", chunk=256, num_retained_recent_tokens_in_cache=896),
        *(xattention(threshold) for threshold in (0.8, 0.9, 0.95)),
        xattention(0.9, chunk=256),
        openvino("dense", "gguf"),
        xattention(0.9, "gguf"),
        openvino("dense", "int8"),
        xattention(0.9, "int8"),
        Contender("llama.cpp flash", "llama.cpp", {"flash": True}, "file"),
        Contender("llama.cpp no flash", "llama.cpp", {"flash": False}, "file"),
        Contender("vllm", "vllm"),
    )
}


class Unavailable(RuntimeError):
    """A contender cannot take part; the message says why."""


class Weights:
    """What the model has been turned into, each made when it is first asked for."""

    def __init__(self, model: Path, work: Path, others: str) -> None:
        self.model, self.work, self.others = model, work, others

    def of(self, kind: str) -> Path:
        """``folder``, ``file``, or OpenVINO's format of the kinds ``float32``, ``int8`` and ``gguf``.

        Raises:
            Unavailable: it cannot be made.
        """
        if kind == "folder":
            return model_folder(self.model)
        if kind in ("file", "gguf") and self.model.suffix != ".gguf":
            raise Unavailable(f"{self.model.name} is no GGUF file")
        if kind == "file":
            return self.model
        folder = self.work / kind
        if not (folder / "openvino_model.xml").exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._make(kind, folder)
        return folder

    def _make(self, kind: str, folder: Path) -> None:
        if kind == "gguf":
            beside = folder / self.model.name
            beside.unlink(missing_ok=True)
            beside.symlink_to(self.model.resolve())
            code = "import sys, openvino_genai as g; g.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
            command = [self.others, "-c", code, str(beside)]
        else:
            tool, form = Path(self.others).parent / "optimum-cli", "fp32" if kind == "float32" else kind
            command = [str(tool), "export", "openvino", "--model", str(self.of("folder"))]
            command += ["--task", "text-generation-with-past", "--weight-format", form, str(folder)]
        call(command, "")


def call(command: Sequence[str], given: str, environment: Row | None = None) -> str:
    """Standard output of a program.

    Raises:
        Unavailable: it failed, with the last line that it wrote.
    """
    try:
        run = subprocess.run(
            command, input=given, capture_output=True, text=True, env=os.environ | (environment or {}), check=False
        )
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from error
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()] or [f"exit status {run.returncode}"]
        raise Unavailable(lines[-1].strip()[:300])
    return run.stdout


def parse(output: str) -> list[Row]:
    """The answers among what a child wrote."""
    return [json.loads(line.removeprefix(">>")) for line in output.splitlines() if line.startswith(">>")]


class Prompts:
    """Token ids of windows of the package's text. Each begins with numbers of its own: no two share a prefix."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.text = load_haystack().text

    def ids(self, length: int, number: int) -> list[int]:
        start = random.Random(number).randrange(max(1, len(self.text) - 6 * length))
        ids = self.tokenizer(f"{number} {length}\n{self.text[start : start + 6 * length]}")["input_ids"]
        if len(ids) < length:
            raise ValueError(f"the text gives {len(ids)} tokens from character {start}, {length} are needed")
        return ids[:length]


class Report:
    """The file of a model's results, written whole after each measurement; what others wrote meanwhile stays."""

    def __init__(self, path: Path, about: Row) -> None:
        self.path, self.about = path, about
        self.found: Row = {}
        self._read()

    def _read(self) -> None:
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        if known and known["model"] != self.about["model"]:
            raise SystemExit(f"{self.path} holds results of another model, {known['model']}; move it away")
        self.found = {"runs": [], "losses": [], "versions": {}, "unavailable": {}} | known | self.about

    def lacks(self, kind: str, **wanted: Any) -> bool:
        self._read()
        return not any(all(row[name] == value for name, value in wanted.items()) for row in self.found[kind])

    def add(self, kind: str, rows: Sequence[Row], name: str, versions: Row) -> None:
        self._read()
        self.found[kind] += rows
        self.found["versions"][name] = versions
        self.found["unavailable"].pop(name, None)
        self._write()

    def cannot(self, name: str, why: str) -> None:
        print(f"{name}: cannot take part: {why}", flush=True)
        self._read()
        self.found["unavailable"][name] = why
        self._write()

    def _write(self) -> None:
        self.found["date"] = date.today().isoformat()
        self.found["rows"] = list(summary(self.found["runs"], self.found["losses"], list(CONTENDERS)))
        write(self.path, self.found)


@dataclass
class Bench:
    """Runs contenders and notes what they say."""

    arguments: argparse.Namespace
    weights: Weights
    prompts: Prompts
    report: Report

    def ask(self, contender: Contender, prompts: Sequence[list[int]], **more: Any) -> Any:
        """Versions and answers of a child."""
        python = {"openvino": self.arguments.others, "llama.cpp": self.arguments.others, "vllm": self.arguments.vllm}
        threads = self.arguments.threads
        request = {
            "library": contender.library,
            "model": str(self.weights.of(contender.weights)),
            "threads": threads,
            "settings": contender.settings,
            "vocabulary": len(self.prompts.tokenizer),
            "warm_up": self.prompts.ids(WARM_UP, 10**6),
            "prompts": prompts,
        }
        if "recipe" in contender.settings:
            request["calibrate"] = [self.prompts.ids(CALIBRATED, 10**6 + n) for n in range(1, 5)]
        command = shlex.split(self.arguments.prefix)
        command += [python.get(contender.library, sys.executable), str(HERE / "contender_child.py")]
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        first, *answers = parse(call(command, json.dumps(request | more), environment))
        if len(answers) != len(prompts):
            raise Unavailable(f"it answered {len(answers)} of {len(prompts)} prompts")
        return first["versions"], answers

    def time(self, contender: Contender, number: int) -> None:
        """One round of a contender, at the lengths that it lacks."""
        known: Row = {"contender": contender.name, "round": number}
        lengths = [n for n in self.arguments.lengths if self.report.lacks("runs", length=n, **known)]
        if not lengths:
            return
        prompts = [self.prompts.ids(length, number) for length in lengths]
        bystanders = Bystanders()
        versions, answers = self.ask(contender, prompts)
        known["used_by_others"] = bystanders.share()
        rows = [known | {"length": n} | answer for n, answer in zip(lengths, answers, strict=True)]
        self.report.add("runs", rows, contender.name, versions)
        for row in rows:
            print(json.dumps(row), flush=True)

    def lose(self, contender: Contender, length: int, number: int) -> None:
        """What a contender's predictions on one prompt differ from the reference's."""
        known = {"contender": contender.name, "length": length, "prompt": number}
        if contender.name == REFERENCE or not self.report.lacks("losses", **known):
            return
        last = contender.library in LAST_ONLY
        positions = [length - 1] if last else kept(length, self.arguments.every)
        reference = self._saved(CONTENDERS[REFERENCE], length, number, kept(length, self.arguments.every))[0]
        saved, versions = self._saved(contender, length, number, positions)
        row = known | closeness(reference, saved)
        if not last:
            saved.unlink()
        self.report.add("losses", [row], contender.name, versions)
        print(json.dumps(row), flush=True)

    def _saved(self, contender: Contender, length: int, number: int, positions: list[int]) -> tuple[Path, Row]:
        folder = self.weights.work / "logits" / contender.name.replace("/", "-").replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{length}-{number}-{len(positions)}.npy"
        if path.exists() and contender.name == REFERENCE:
            return path, {}
        prompts = [self.prompts.ids(length, number)]
        versions, _ = self.ask(contender, prompts, save=str(folder), positions=[positions])
        (folder / "0.npy").replace(path)
        return path, versions


def kept(length: int, every: int) -> list[int]:
    """Each so-manieth position, the last one among them."""
    return list(range((length - 1) % every, length, every))


def visits(names: Sequence[str], arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, int]]:
    """What is to be done, in order: the kind, the contender, and a round, or a length and a prompt."""
    if "loss" in arguments.what:
        for number in range(arguments.prompts):
            for length in arguments.lengths:
                yield from (("loss", name, length, number) for name in names)
    if "time" in arguments.what:
        for number in range(arguments.rounds):
            turned = number % len(names)
            yield from (("time", name, 0, number) for name in [*names[turned:], *names[:turned]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="of the model in the results (default: the file's)")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[4096, 8000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, by their names in the results")
    parser.add_argument("--what", default="loss,time")
    parser.add_argument("--prompts", type=int, default=1, help="of the loss, at each length")
    parser.add_argument("--every", type=int, default=16, help="so-manieth position of the loss")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=Path("build/contenders"))
    parser.add_argument("--prefix", default="", help="a command that runs the others")
    parser.add_argument("--others", default=".venv-contenders/bin/python", help="has OpenVINO GenAI and xllamacpp")
    parser.add_argument("--vllm", default=".venv-vllm/bin/python")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        parser.error(f"--only takes {', '.join(CONTENDERS)}; got {unknown[0]!r}")
    name = arguments.name or arguments.model.stem
    known = {"name": name} | ({"sha256": file_hash(arguments.model)} if arguments.model.is_file() else {})
    about = {"machine": machine(), "model": known} | (
        {"threads": arguments.threads} if "time" in arguments.what else {}
    )
    report = Report(arguments.out or results(f"contenders_{name}.json"), about)
    weights = Weights(arguments.model, arguments.work / name, arguments.others)
    bench = Bench(arguments, weights, Prompts(weights.of("folder")), report)
    failed: set[str] = set()
    for what, one, length, number in visits(names, arguments):
        if one in failed:
            continue
        try:
            if what == "time":
                bench.time(CONTENDERS[one], number)
            else:
                bench.lose(CONTENDERS[one], length, number)
        except Unavailable as error:
            failed.add(one)
            report.cannot(one, str(error))


if __name__ == "__main__":
    main()
