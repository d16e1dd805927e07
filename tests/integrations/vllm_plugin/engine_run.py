"""Run vLLM once and say what it answered: a script for the Python that has vLLM, ``engine_run.py RESULT < job``.

A job is JSON: ``model``, ``args`` of `vllm.LLM`, ``gossamer`` (what is asked of the plug-in, or null), ``waves`` (lists
of requests that are generated together), ``max_tokens`` and ``poison``. A request is a list of token ids, or an object
of ``ids`` and ``policy``. The result has each request's ``tokens``, ``logprob`` of the first, ``cached`` tokens or
``error``; the plug-in's counters; how often a request was preempted, where the scheduler is in this process; and how
many rows were attended again with all that is not theirs poisoned.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch


def poison_foreign(checks: list[bool]) -> None:
    """Attend each row a second time with NaN in every page and slot that is not its own; the outputs must agree."""
    from gossamer.integrations.vllm import cpu

    attend = cpu.SparseCPUImpl._attend

    def twice(self: Any, row: Any, query: Any, key: Any, value: Any, cache: Any, table: Any, out: Any) -> None:
        attend(self, row, query, key, value, cache, table, out)
        page = cache.shape[2]
        window = self.sliding_window if self.sliding_window > 0 else row.tokens + 1
        first = max(0, row.past - window + 1) // page
        own = table[row.index][first : -(-row.tokens // page)].long()
        poisoned = torch.full_like(cache, torch.nan)
        poisoned[own] = cache[own]
        spare = -row.tokens % page
        if spare:
            # What lies past the last token, by writing NaN there as vLLM writes keys.
            slots = own[-1] * page + torch.arange(page - spare, page)
            nan = torch.full((spare, self.num_kv_heads, self.head_size), torch.nan, dtype=cache.dtype)
            self.do_kv_cache_update(cpu._Isa(self.isa), nan, nan, poisoned, slots)
        entries = table.clone()
        entries[:, :first] = entries.max()
        again = torch.full_like(out, torch.nan)
        # Other rows' queries, keys and values of this step are poisoned too.
        mine = torch.zeros(len(query), dtype=torch.bool)
        mine[row.start : row.end] = True
        others: list[Any] = [
            None if t is None else torch.where(mine.view(-1, *[1] * (t.ndim - 1)), t, torch.nan)
            for t in (query, key, value)
        ]
        attend(self, row, others[0], others[1], others[2], poisoned, entries, again)
        checks.append(torch.equal(out[row.start : row.end], again[row.start : row.end]))

    cpu.SparseCPUImpl._attend = twice  # type: ignore[method-assign]


def poison_readers(checks: list[bool]) -> None:
    """Likewise queries that choose what they read; what is known of the pages is then worked out from those there."""
    from gossamer.integrations.vllm import cpu

    decode = cpu.SparseCPUImpl._decode

    def twice(self: Any, some: Any, query: Any, cache: Any, table: Any, out: Any) -> None:
        before = copy.deepcopy(some.states)
        decode(self, some, query, cache, table, out)
        page, poisoned = cache.shape[2], torch.full_like(cache, torch.nan)
        slots = []
        for index, tokens in dict(zip(some.indices, some.counts, strict=True)).items():  # of a row's queries the last
            own = table[index][: -(-tokens // page)].long()
            poisoned[own] = cache[own]
            slots += [int(own[-1]) * page + place for place in range((tokens - 1) % page + 1, page)]
        if slots:
            nan = torch.full((len(slots), self.num_kv_heads, self.head_size), torch.nan, dtype=cache.dtype)
            self.do_kv_cache_update(cpu._Isa(self.isa), nan, nan, poisoned, torch.tensor(slots))
        mine = torch.zeros(len(query), dtype=torch.bool)
        mine[some.places] = True
        alone = torch.where(mine.view(-1, *[1] * (query.ndim - 1)), query, torch.nan)
        again = torch.full_like(out, torch.nan)
        some.states, after = before, some.states
        decode(self, some, alone, poisoned, table, again)
        some.states = after
        assert self.engine is not None
        self.engine._bounds.pop((poisoned.data_ptr(), poisoned.shape), None)
        checks.append(torch.equal(out[some.places], again[some.places]))

    cpu.SparseCPUImpl._decode = twice  # type: ignore[method-assign]


def count_preemptions(found: list[str]) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempt = Scheduler._preempt_request

    def noted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    Scheduler._preempt_request = noted  # type: ignore[method-assign]


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMClientError

    checks: list[bool] = []
    preempted: list[str] = []
    count_preemptions(preempted)
    if job.get("poison"):
        poison_foreign(checks)
        poison_readers(checks)
    asked = {} if job.get("gossamer") is None else {"gossamer": job["gossamer"]}
    llm = LLM(job["model"], additional_config=asked, seed=0, skip_tokenizer_init=True, **job.get("args", {}))
    answers = []
    for wave in job["waves"]:
        requests = [one if isinstance(one, dict) else {"ids": one} for one in wave]
        prompts = [{"prompt_token_ids": one["ids"]} for one in requests]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=one.get("max_tokens", job["max_tokens"]),
                logprobs=1,
                ignore_eos=True,
                detokenize=False,
                extra_args={"gossamer": one["policy"]} if "policy" in one else None,
            )
            for one in requests
        ]
        try:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        except (ValueError, VLLMClientError) as error:
            answers += [{"error": str(error)} for _ in requests]
            continue
        for output in outputs:
            found = output.outputs[0]
            logprob = next(iter(found.logprobs[0].values())).logprob
            answers.append({"tokens": list(found.token_ids), "logprob": logprob, "cached": output.num_cached_tokens})
    result: dict[str, Any] = {"answers": answers, "checks": len(checks), "wrong": checks.count(False)}
    result["preempted"] = len(preempted)
    result["rows"] = [list(row) for row in _counted()]
    Path(sys.argv[1]).write_text(json.dumps(result))
    llm.llm_engine.engine_core.shutdown()


def _counted() -> list[Any]:
    from gossamer.integrations.vllm import plugin
    from gossamer.integrations.vllm.counters import FOLDER, collected

    engines = [engine for _, engine in plugin._engines.values() if engine is not None]
    if engines:
        return [row for engine in engines for row in engine.counters.rows()]
    time.sleep(1.5)  # workers write theirs once a second
    return list(collected(Path(os.environ[FOLDER])))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of an engine in this process are not waited for
