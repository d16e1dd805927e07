"""What tests of the plug-in inside vLLM share: jobs for `engine_run`, and prompts."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT / "models" / "reference"
RUN = Path(__file__).with_name("engine_run.py")
# The folder of these tests is called so too, and answers where there is no other.
_found = importlib.util.find_spec("vllm")
needs_vllm = pytest.mark.skipif(_found is None or _found.origin is None, reason="vLLM is not installed: make vllm")

# A plan for every row that may have one, with all pairs in it.
FULL = {"method": "a_shape", "sink": 1, "window": 1 << 20, "min_tokens": 0, "max_density": 2}
SPARSE = {"method": "a_shape", "sink": 1, "window": 64, "min_tokens": 0}
_READ = ("gossamer", "vllm:num_requests", "vllm:request_success_total", "vllm:generation_tokens_total")


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(10, 5000, (length,), generator=generator).tolist()


def environment(**more: str) -> dict[str, str]:
    fixed = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "GOSSAMER_COST_MODEL": "off",
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOSSAMER", "TRITON"))}
    return kept | fixed | more


def run(job: dict[str, Any], **more: str) -> dict[str, Any]:
    """The result of a job.

    Raises:
        RuntimeError: vLLM ended with an error, which the message has.
    """
    job = {"model": str(REFERENCE), "max_tokens": 8} | job
    job["args"] = {"enforce_eager": True, "dtype": "float32", "max_model_len": 8192} | job.get("args", {})
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log.txt"
        with log.open("w") as out:  # a pipe would stay open for what processes of an engine outlive it
            done = subprocess.run(
                [sys.executable, str(RUN), str(result)],
                input=json.dumps(job),
                env=environment(**more),
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=900,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(log.read_text()[-8000:])
        return json.loads(result.read_text())


def tokens(result: dict[str, Any]) -> list[list[int]]:
    return [answer["tokens"] for answer in result["answers"]]


def counted(result: dict[str, Any], metric: str = "gossamer_rows", **labels: str) -> float:
    """The sum of a metric over all rows with these labels."""
    rows = result["rows"]
    return sum(value for name, of, value in rows if name == metric and labels.items() <= of.items())


class Server:
    """An OpenAI server of vLLM's, with the plug-in."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.port, self.process, self.log = port, process, log

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.base + path, timeout=30) as answer:
            return answer.read().decode()

    def post(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer of a completion."""
        body = {"model": "m", "max_tokens": 2, "temperature": 0, "logprobs": 1, "ignore_eos": True} | body
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.base}/v1/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def first_logprob(self, body: dict[str, Any]) -> float:
        status, answer = self.post(body)
        assert status == 200, answer
        return answer["choices"][0]["logprobs"]["token_logprobs"][0]

    def metrics(self) -> dict[str, float]:
        time.sleep(1.5)  # workers write once a second
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(_READ)]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def raw_post(body: bytes) -> bytes:
    """A request for a completion as it goes over the wire."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def total(metrics: dict[str, float], name: str, *labels: str) -> float:
    return sum(v for key, v in metrics.items() if key.startswith(name) and all(label in key for label in labels))


@contextmanager
def served(settings: dict[str, Any] | None, *flags: str) -> Iterator[Server]:
    """A server of the reference model until the end of the block; without settings, a stock one.

    Raises:
        AssertionError: it does not start; the message has the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(REFERENCE)]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "8192", "--enforce-eager", "--additional-config"]
    command += [json.dumps({} if settings is None else {"gossamer": settings})]
    variables = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with log.open("wb") as out:
            process = subprocess.Popen([*command, *flags], env=variables, stdout=out, stderr=subprocess.STDOUT)
        found = Server(port, process, log)
        try:
            for _ in range(1200):
                try:
                    found.get("/health")
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()[-4000:]
                    time.sleep(0.5)
            yield found
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
