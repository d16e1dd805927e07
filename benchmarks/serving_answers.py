"""Answers of generated tasks by vLLM's server with the plug-in, over HTTP, beside the same methods in transformers.

    python benchmarks/serving_answers.py MODEL [--length 16384] [--tasks needle_single,needle_multikey] [--samples 10]
        [--methods dense,max_relative,minference] [--python PYTHON] [--chunk 2048] [--enforce-eager] [--out FILE]

One server for all: requests name their method, whose pages no other method reads. The same samples are read by the same
model in transformers with `gossamer.enable`, in one piece; the server reads them in chunks.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import torch
from machines import machine, results
from serving import served
from timing import write

from gossamer.cli.specs import parse_method, parse_task, split_specs
from gossamer.cli.subjects import load_subject
from gossamer.evaluate.haystack import load_haystack
from gossamer.evaluate.metrics import bootstrap_interval
from gossamer.evaluate.runner import Job
from gossamer.policy import Policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--tasks", default="needle_single,needle_multikey")
    parser.add_argument("--methods", default="dense,max_relative,minference")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--min-tokens", type=int, default=2048)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--enforce-eager", action="store_true", help="no compilation in vLLM")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--port", type=int, default=8950)
    parser.add_argument("--out", type=Path, default=results("serving_answers.json"))
    arguments = parser.parse_args()
    arguments.device = "cpu"
    torch.manual_seed(0)
    subject = load_subject(arguments, arguments.length)
    tasks = [parse_task(name) for name in split_specs(arguments.tasks)]
    names = split_specs(arguments.methods)
    job = Job((Policy.of("dense"),), tuple(tasks), (arguments.length,), arguments.samples, load_haystack())
    rows = []
    with served(arguments, "dense(kernel=gossamer)", arguments.port, arguments.length) as server:
        for task in tasks:
            samples = [job.sample(subject, task, arguments.length, index) for index in range(arguments.samples)]
            for name in names:
                method = parse_method(name)
                here, there, same = [], [], 0
                for sample in samples:
                    ids, references = subject.prompt_tokens(sample), sample.turns[0].references
                    body = {"model": "m", "prompt": ids, "max_tokens": task.max_new_tokens, "temperature": 0}
                    named = {"gossamer": json.dumps(method.to_dict() | {"min_tokens": arguments.min_tokens})}
                    stop = {"stop": "\n"} if task.one_line else {}
                    text = server.post("/v1/completions", body | stop | {"vllm_xargs": named})["choices"][0]["text"]
                    policy = Policy(method, arguments.min_tokens)
                    other = subject.answer([sample], policy, task.max_new_tokens, one_line=task.one_line)[0].texts[0]
                    there.append(task.score(text, references))
                    here.append(task.score(other, references))
                    same += text.strip() == other.strip()
                row = {"task": task.label(), "method": name, "samples": len(samples), "same_texts": same}
                for where, scores in (("server", there), ("transformers", here)):
                    row[where] = [sum(scores) / len(scores), *bootstrap_interval(scores)]
                rows.append(row)
                shown = ", ".join(f"{where} {row[where][0]:.2f}" for where in ("server", "transformers"))
                print(f"{task.label()}, {name}: {shown}, same text {same} of {len(samples)}", flush=True)
    section = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "length": arguments.length,
        "dtype": arguments.dtype,
        "chunk": arguments.chunk,
        "rows": rows,
    }
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    write(arguments.out, known | {arguments.name or arguments.model.name: section})


if __name__ == "__main__":
    main()
