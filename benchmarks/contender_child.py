"""One contender in a process of its own: `contenders.py` starts it with the interpreter of the contender's environment.

It reads one JSON object from standard input and answers with JSON lines on standard output, each begun by ``>>``:

    {"library": name, "model": folder or file, "threads": n, "settings": {...}, "warm_up": [ids], "prompts": [[ids]]}

Each prompt is read once and one token is generated, greedily; ``seconds`` are from the ids to that token. With
``"save": FOLDER`` and ``"positions": [[...]]`` nothing is timed: the log-probabilities at those positions are saved as
float32, ``[positions, vocabulary]``, a file ``<number of the prompt>.npy`` each. It needs the contender's own packages
and numpy alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Ids = list[int]
Answer = dict[str, Any]


def log_softmax(logits: Any) -> Any:
    """Along the last axis, in float32."""
    logits = np.asarray(logits, dtype=np.float32)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class Transformers:
    """transformers with torch's attention, or with gossamer's plans where the settings name a method.

    ``dtype``, float32 unless the settings say another; ``recipe`` compresses linear layers, calibrated on the request's
    ``calibrate``; with ``keep_memory`` glibc keeps what is freed.
    """

    def __init__(self, request: dict[str, Any], settings: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(request["threads"])
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.method = torch, settings.get("method")
        load = transformers.AutoModelForCausalLM.from_pretrained
        dtype = getattr(torch, settings.get("dtype", "float32"))
        self.model = load(request["model"], dtype=dtype, attn_implementation="sdpa").eval()
        if "recipe" in settings:
            import gossamer

            gossamer.compress(self.model, settings["recipe"], [torch.tensor([ids]) for ids in request["calibrate"]])
        if settings.get("keep_memory"):
            from gossamer.backends.cpu import keep_freed_memory

            if not keep_freed_memory():
                raise RuntimeError("this system's allocator has no option to keep memory")
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def _run(self, ids: Ids, keep: Any) -> tuple[Any, Answer]:
        tokens = self.torch.tensor([ids])
        with self.torch.inference_mode():
            if self.method is None:
                return self.model(input_ids=tokens, use_cache=True, logits_to_keep=keep).logits[0], {}
            from gossamer.cli.specs import parse_method
            from gossamer.integrations.transformers import enable

            with enable(self.model, parse_method(self.method)) as handle:
                logits = self.model(input_ids=tokens, use_cache=True, logits_to_keep=keep).logits[0]
                layers = list(handle.stats())
        attention = sum(layer.plan_seconds + layer.attention_seconds for layer in layers)
        density = sum(layer.density for layer in layers) / len(layers)
        return logits, {"attention_s": round(attention, 4), "density": round(density, 4)}

    def first_token(self, ids: Ids) -> Answer:
        logits, more = self._run(ids, 1)
        return {"token": int(logits[-1].argmax()), **more}

    def log_probabilities(self, ids: Ids, positions: Sequence[int]) -> Any:
        return log_softmax(self._run(ids, self.torch.tensor(positions))[0].float().numpy())


class Vllm:
    """vLLM's engine in this process, without its cache of prefixes and with the whole prompt in one step."""

    def __init__(self, request: dict[str, Any], settings: dict[str, Any]) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""}
        os.environ |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        import vllm  # pyright: ignore[reportMissingImports]

        longest = max(map(len, request["prompts"])) + 8
        self.vllm, self.versions = vllm, {"vllm": vllm.__version__}
        self.engine = vllm.LLM(
            model=request["model"],
            dtype="float32",
            max_model_len=longest,
            max_num_batched_tokens=longest,
            max_num_seqs=1,
            max_logprobs=-1,
            enable_prefix_caching=False,
            enforce_eager=settings.get("eager", True),
        )

    def _run(self, ids: Ids, **more: Any) -> Any:
        sampling = self.vllm.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, **more)
        return self.engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0].outputs[0]

    def first_token(self, ids: Ids) -> Answer:
        return {"token": self._run(ids).token_ids[0]}

    def log_probabilities(self, ids: Ids, positions: Sequence[int]) -> Any:
        only_last(ids, positions)
        found = self._run(ids, logprobs=-1).logprobs[0]
        return by_token([(token, entry.logprob) for token, entry in found.items()])


class LlamaCpp:
    """llama.cpp through xllamacpp's server, asked in this process."""

    def __init__(self, request: dict[str, Any], settings: dict[str, Any]) -> None:
        from importlib.metadata import version

        import xllamacpp  # pyright: ignore[reportMissingImports]

        params = xllamacpp.CommonParams()
        params.model.path = request["model"]
        params.n_ctx = max(map(len, request["prompts"])) + 64
        params.n_parallel, params.cache_prompt, params.cache_ram_mib, params.verbosity = 1, False, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
        kinds = xllamacpp.llama_flash_attn_type
        on, off = kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED, kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if settings["flash"] else off
        self.versions = {"xllamacpp": version("xllamacpp")}
        self.vocabulary = request.get("vocabulary", 1)
        self.server = xllamacpp.Server(params)

    def _run(self, ids: Ids, tokens: int) -> list[tuple[int, float]]:
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "cache_prompt": False, "n_probs": tokens}
        answer = self.server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        read = answer["usage"]["prompt_tokens"]
        if read != len(ids):
            raise RuntimeError(f"llama.cpp read {read} tokens of {len(ids)}")
        first = answer["choices"][0]["logprobs"]["content"][0]
        return [(one["id"], one["logprob"]) for one in first["top_logprobs"]]

    def first_token(self, ids: Ids) -> Answer:
        return {"token": self._run(ids, 1)[0][0]}

    def log_probabilities(self, ids: Ids, positions: Sequence[int]) -> Any:
        only_last(ids, positions)
        return by_token(self._run(ids, self.vocabulary))


class OpenVino:
    """OpenVINO GenAI's pipeline of continuous batching, the one that has sparse attention."""

    def __init__(self, request: dict[str, Any], settings: dict[str, Any]) -> None:
        import openvino  # pyright: ignore[reportMissingImports]
        import openvino_genai  # pyright: ignore[reportMissingImports]

        self.openvino, self.genai = openvino, openvino_genai
        self.request, self.settings = request, settings
        self.versions = {"openvino-genai": openvino_genai.__version__}
        self.fixed = {"INFERENCE_NUM_THREADS": request["threads"]}
        self.pipeline: Any = None

    def _start(self) -> Any:
        scheduler = self.genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = 1
        scheduler.cache_size = 2
        longest = max(map(len, self.request["prompts"]))
        scheduler.max_num_batched_tokens = self.settings.get("chunk") or longest + 8
        mode = self.settings.get("mode")
        if mode:
            sparse = {name: value for name, value in self.settings.items() if name not in ("mode", "chunk")}
            kind = getattr(self.genai.SparseAttentionMode, mode)
            scheduler.use_sparse_attention = True
            scheduler.sparse_attention_config = self.genai.SparseAttentionConfig(mode=kind, **sparse)
        model = self.request["model"]
        return self.genai.LLMPipeline(model, "CPU", scheduler_config=scheduler, **self.fixed)

    def first_token(self, ids: Ids) -> Answer:
        self.pipeline = self.pipeline or self._start()
        config = self.genai.GenerationConfig(max_new_tokens=1, do_sample=False, ignore_eos=True)
        tokens = self.genai.TokenizedInputs(
            self.openvino.Tensor(np.array([ids], dtype=np.int64)),
            self.openvino.Tensor(np.ones((1, len(ids)), dtype=np.int64)),
        )
        return {"token": int(self.pipeline.generate(tokens, config).tokens[0][0])}

    def log_probabilities(self, ids: Ids, positions: Sequence[int]) -> Any:
        from contender_openvino import Paged

        return log_softmax(Paged(self.request["model"], self.request["threads"], self.settings).logits(ids, positions))


LIBRARIES: dict[str, Any] = {
    "transformers": Transformers,
    "gossamer": Transformers,
    "openvino": OpenVino,
    "llama.cpp": LlamaCpp,
    "vllm": Vllm,
}


def only_last(ids: Ids, positions: Sequence[int]) -> None:
    """For those that give the distribution of the first token alone."""
    if list(positions) != [len(ids) - 1]:
        raise ValueError(f"this contender gives position {len(ids) - 1} alone, asked for {list(positions)[:8]}")


def by_token(found: Sequence[tuple[int, float]]) -> Any:
    """``[1, vocabulary]`` from pairs of a token and its log-probability, normalised over what there is."""
    out = np.full((1, 1 + max(token for token, _ in found)), -1e4, dtype=np.float32)
    for token, value in found:
        out[0, token] = max(value, -1e4)
    return log_softmax(out)


def answers(request: dict[str, Any]) -> Any:
    """A line for the library and one for each prompt."""
    contender = LIBRARIES[request["library"]](request, request["settings"])
    yield {"versions": contender.versions}
    if "save" in request:
        for number, (ids, positions) in enumerate(zip(request["prompts"], request["positions"], strict=True)):
            np.save(Path(request["save"]) / f"{number}.npy", contender.log_probabilities(ids, positions))
            yield {"saved": number}
        return
    contender.first_token(request["warm_up"])
    for ids in request["prompts"]:
        started = time.perf_counter()
        answer = contender.first_token(ids)
        yield {"seconds": round(time.perf_counter() - started, 4), **answer}


def main() -> None:
    request = json.loads(sys.stdin.read())
    out = os.fdopen(os.dup(1), "w")  # libraries write what they like to standard output
    os.dup2(2, 1)
    for answer in answers(request):
        print(">>" + json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
