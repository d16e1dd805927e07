"""Decoding inside a real vLLM by a method that chooses pages: with all of them it answers as vLLM's own kernel does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from integrations.vllm_plugin.serving import FULL, counted, needs_vllm, prompt, run, tokens
from integrations.vllm_plugin.tiny_models import saved

pytestmark = [needs_vllm, pytest.mark.slow, pytest.mark.vllm]

QUEST = {"method": "quest", "budget": 256, "dense_layers": 0}
ALL = {"decode": QUEST | {"budget": 1 << 20}, "max_density": 2, "min_context": 0}
FEW = {"decode": QUEST, "min_context": 0}
MIXED = [prompt(length) for length in (5, 70, 300, 1000, 2500, 64, 129)]
WAVES = [MIXED, [prompt(2500)[:2000] + prompt(300, 1), prompt(2500), prompt(1000)[:800] + prompt(90, 2), prompt(40)]]
DRAFTS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}}
IN_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "mixed lengths, then prefixes": ({"waves": WAVES}, ALL, {}),
    "beside plans of prompts, in chunks": (
        {"waves": [MIXED], "args": {"max_num_batched_tokens": 512, "max_num_seqs": 8}},
        FULL | ALL,
        {},
    ),
    "preemption": (
        {
            "waves": [[prompt(1000, n) for n in range(6)]],
            "args": {"num_gpu_blocks_override": 45, "max_model_len": 2048},
            "max_tokens": 40,
        },
        ALL,
        {},
    ),
    "bfloat16": ({"waves": [MIXED], "args": {"dtype": "bfloat16"}}, ALL, {}),
    "compiled, in processes": ({"waves": [MIXED], "args": {"enforce_eager": False}}, ALL, IN_PROCESSES),
    "two ranks": (
        {"waves": [MIXED], "args": {"tensor_parallel_size": 2}},
        ALL,
        IN_PROCESSES | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ),
    "drafts": ({"waves": [[(prompt(300) * 4)[:1100], prompt(500)]], "args": DRAFTS, "max_tokens": 24}, ALL, {}),
    "choices that serve several steps": (
        {"waves": WAVES, "max_tokens": 12},
        {"decode": {"method": "lserve", "budget": 1 << 20}, "max_density": 2, "min_context": 0},
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_choices_of_all_answer_as_the_stock_kernel(name: str) -> None:
    job, asked, variables = CASES[name]
    stock = run(job | {"gossamer": None}, **variables)
    ours = run(job | {"gossamer": asked}, **variables)
    assert counted(ours, method=asked["decode"]["method"], path="sparse") > 0, "no row chose"
    assert counted(ours, "gossamer_dense_rows", reason="decode") == 0
    assert counted(ours, "gossamer_dense_rows", reason="method failed") == 0
    assert tokens(ours) == tokens(stock)
    assert (ours["preempted"] > 0) == (name == "preemption")
    if name == "mixed lengths, then prefixes":
        assert any(answer["cached"] > 0 for answer in ours["answers"])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gemma3n"])
def test_windows_soft_caps_sinks_and_shared_keys(name: str, tmp_path: Path) -> None:
    job = {"model": str(saved(name, tmp_path)), "waves": WAVES}
    job["args"] = {"max_num_batched_tokens": 768, "max_num_seqs": 8}
    stock, ours = run(job | {"gossamer": None}), run(job | {"gossamer": ALL})
    assert tokens(ours) == tokens(stock)
    assert counted(ours, "gossamer_dense_rows", reason="method failed") == 0
    choosing = {of["layer"] for metric, of, _ in ours["rows"] if metric == "gossamer_rows" and of["path"] == "sparse"}
    whole = {
        of["layer"]
        for metric, of, _ in ours["rows"]
        if metric == "gossamer_dense_rows" and of["reason"] in ("decode", "whole layer")
    }
    assert choosing
    assert whole  # those with a window
    assert not choosing & whole


def test_counts_add_up() -> None:
    lengths, new = (5, 400, 1500), 10
    ours = run({"waves": [[prompt(length)] for length in lengths], "max_tokens": new, "gossamer": FULL | FEW})
    for layer in map(str, range(6)):
        assert counted(ours, layer=layer) == len(lengths) * new
        assert counted(ours, layer=layer, method="a_shape", path="sparse") == 2
        assert counted(ours, layer=layer, method="quest", path="sparse") == len(lengths) * (new - 1)
    pairs, computed = (counted(ours, f"gossamer_{name}", method="quest") for name in ("pairs", "computed_pairs"))
    few = sum(lengths[0] + n for n in range(1, new))  # less than the budget: all of it
    assert pairs == 6 * (few + sum(length + n for length in lengths[1:] for n in range(1, new)))
    assert 6 * (few + 2 * 9 * 241) <= computed <= 6 * (few + 2 * 9 * 256)


@pytest.mark.parametrize("method", ["quest", "lserve"])
def test_no_query_sees_keys_of_others_and_bounds_are_those_of_the_pages(method: str) -> None:
    """Each call again, with NaN in all that is not its own, and bounds worked out from what is left."""
    waves = [[prompt(64 + 37 * n % 1500, n % 5) for n in range(24)] for _ in range(2)]
    args = {"max_num_batched_tokens": 700, "max_num_seqs": 16, "num_gpu_blocks_override": 120}
    decode = QUEST | {"budget": 128} if method == "quest" else {"method": "lserve", "budget": 192}
    job = {"waves": waves, "gossamer": {"decode": decode, "min_context": 0}, "poison": True, "args": args}
    found = run(job | {"max_tokens": 20})
    assert found["wrong"] == 0
    assert found["checks"] > 100


def test_pages_of_answers_are_read_by_those_alone_that_decode_alike() -> None:
    first = run({"waves": [[prompt(1200)]], "gossamer": FEW, "max_tokens": 150})
    told = prompt(1200) + first["answers"][0]["tokens"]
    settings = FEW | {"policies": {"other": {"decode": QUEST | {"budget": 512}}, "all": {"method": "dense"}}}
    asked = [told, {"ids": told, "policy": "other"}, {"ids": told, "policy": "all"}, {"ids": told}]
    waves = [[{"ids": prompt(1200), "max_tokens": 150}], *([one] for one in asked)]
    answers = run({"waves": waves, "gossamer": settings, "max_tokens": 2})["answers"]
    assert answers[0]["tokens"] == first["answers"][0]["tokens"]
    assert [answer["cached"] for answer in answers] == [0, 1280, 0, 0, 1280]


def test_policies_in_one_batch() -> None:
    """Requests that decode differently, in steps that they share, answer as they do alone."""
    asked = [
        {"ids": prompt(1100, 1), "policy": "few"},
        {"ids": prompt(1100, 2)},
        {"ids": prompt(1300, 3), "policy": {"decode": QUEST | {"dense_layers": 2}}},
        {"ids": prompt(900, 4), "policy": "few"},
    ]
    settings = FULL | {"policies": {"few": {"decode": QUEST}}, "min_context": 0}
    together = run({"waves": [asked], "gossamer": settings})
    alone = run({"waves": [[one] for one in asked], "gossamer": settings})
    assert tokens(together) == tokens(alone)
    # Two of three choose in all layers, the third in those behind its first two.
    assert [counted(together, layer=layer, method="quest") for layer in "125"] == [14, 21, 21]


def test_a_server_whose_pages_do_not_fit_says_so_when_it_starts() -> None:
    with pytest.raises(RuntimeError, match="bounds of 48 tokens, which do not divide this server's pages of 128"):
        run({"waves": [], "gossamer": {"decode": {"method": "quest", "page": 48}}})
