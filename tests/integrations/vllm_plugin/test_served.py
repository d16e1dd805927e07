"""The plug-in inside a real vLLM: with plans of all pairs it answers as vLLM's own kernel does."""

import json
from pathlib import Path
from typing import Any

import pytest
from integrations.vllm_plugin.serving import FULL, REFERENCE, SPARSE, counted, needs_vllm, prompt, run, tokens
from integrations.vllm_plugin.tiny_models import saved

pytestmark = [needs_vllm, pytest.mark.slow, pytest.mark.vllm]

MIXED = [prompt(length) for length in (5, 70, 300, 1000, 2500, 64, 129)]
# Prefixes of one another, so that later waves find pages of the former ones.
WAVES = [MIXED, [prompt(2500)[:2000] + prompt(300, 1), prompt(2500), prompt(1000)[:800] + prompt(90, 2), prompt(40)]]


CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "mixed lengths, then prefixes": ({"waves": WAVES}, {}),
    "chunks of 512": ({"waves": [MIXED], "args": {"max_num_batched_tokens": 512, "max_num_seqs": 8}}, {}),
    "chunks of 2,048": ({"waves": WAVES, "args": {"max_num_batched_tokens": 2048, "max_num_seqs": 8}}, {}),
    "preemption": (
        {
            # Five hold 40 of the 44 pages, and each asks for one more at its 1,025th token.
            "waves": [[prompt(1000, n) for n in range(6)]],
            "args": {"num_gpu_blocks_override": 45, "max_model_len": 2048},
            "max_tokens": 40,
        },
        {},
    ),
    "bfloat16": ({"waves": [MIXED], "args": {"dtype": "bfloat16"}}, {}),
    "float16": ({"waves": [MIXED], "args": {"dtype": "float16"}}, {}),
    "compiled, in processes": (
        {"waves": [MIXED], "args": {"enforce_eager": False}},
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    ),
    "two ranks": (
        {"waves": [MIXED], "args": {"tensor_parallel_size": 2}},
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ),
    "drafts": (
        {
            "waves": [[(prompt(300) * 4)[:1100], prompt(500)]],
            "args": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}},
            "max_tokens": 24,
        },
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_full_plans_answer_as_the_stock_kernel(name: str) -> None:
    job, variables = CASES[name]
    stock = run(job | {"gossamer": None}, **variables)
    ours = run(job | {"gossamer": FULL}, **variables)
    assert stock["rows"] == []
    assert counted(ours, path="sparse") > 0, "no row ran a plan"
    assert counted(ours, path="dense") == 0
    assert tokens(ours) == tokens(stock)
    for mine, theirs in zip(ours["answers"], stock["answers"], strict=True):
        assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=0.2 if "float16" in name else 1e-3)
    assert counted(ours, "gossamer_dense_rows", reason="method failed") == 0
    # What the case is about took place.
    assert (ours["preempted"] > 0) == (name == "preemption")
    cached = [answer["cached"] > 0 for answer in ours["answers"]]
    assert any(cached[len(MIXED) :]) == (len(job["waves"]) > 1)
    if name == "drafts":  # its prompts have no such rows
        assert counted(ours, "gossamer_dense_rows", reason="few queries") > 0


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 4), ("gpt_oss", 4), ("gemma3n", 6)])
def test_windows_soft_caps_sinks_and_shared_keys(name: str, layers: int, tmp_path: Path) -> None:
    job = {"model": str(saved(name, tmp_path)), "waves": WAVES}
    job["args"] = {"max_num_batched_tokens": 768, "max_num_seqs": 8}
    stock, ours = run(job | {"gossamer": None}), run(job | {"gossamer": FULL})
    assert tokens(ours) == tokens(stock)
    for mine, theirs in zip(ours["answers"], stock["answers"], strict=True):
        assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-3)
    planned = {of["layer"] for metric, of, _ in ours["rows"] if metric == "gossamer_rows" and of["path"] == "sparse"}
    assert planned == {str(layer) for layer in range(layers)}


def test_a_sparse_plan_changes_answers() -> None:
    """The control of what stands above: a plan of few pairs gives other logits, at a lower density."""
    job = {"waves": [[prompt(2500), prompt(1000)]]}
    stock, ours = run(job | {"gossamer": None}), run(job | {"gossamer": SPARSE})
    assert [a["logprob"] for a in stock["answers"]] != [a["logprob"] for a in ours["answers"]]
    computed, pairs = (counted(ours, f"gossamer_{name}") for name in ("computed_pairs", "pairs"))
    assert computed < 0.2 * pairs


def test_counts_add_up() -> None:
    """Each row of each step is counted once a layer: on a plan, dense on our kernel, or on vLLM's with a reason."""
    lengths, new = (5, 400, 300, 1000), 8
    ours = run({"waves": [[prompt(length)] for length in lengths], "gossamer": SPARSE, "max_tokens": new})
    steps = len(lengths) * new
    for layer in range(6):
        assert counted(ours, layer=str(layer)) == steps
        assert counted(ours, layer=str(layer), path="sparse") == 3
        assert counted(ours, "gossamer_dense_rows", layer=str(layer), reason="few queries") == 1
        assert counted(ours, "gossamer_dense_rows", layer=str(layer), reason="decode") == steps - 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_request_sees_keys_of_others(dtype: str, tmp_path: Path) -> None:
    """Each row again, with NaN in every page, slot and key that is not its own: bit for bit the same."""
    waves = [[prompt(64 + 37 * n % 1500, n % 5) for n in range(24)] for _ in range(2)]
    args = {"dtype": dtype, "max_num_batched_tokens": 700, "max_num_seqs": 16, "num_gpu_blocks_override": 120}
    for model in (REFERENCE, saved("gemma2", tmp_path), saved("gemma3n", tmp_path)):
        job = {"model": str(model), "waves": waves, "gossamer": SPARSE, "poison": True, "args": args, "max_tokens": 3}
        found = run(job)
        assert found["wrong"] == 0
        assert found["checks"] > 100


def test_pages_of_one_policy_are_not_read_under_another() -> None:
    long = prompt(1500)
    named = {"few": SPARSE | {"window": 32}}
    asked = [
        {"ids": long},
        {"ids": long},
        {"ids": long, "policy": "few"},
        {"ids": long, "policy": "few"},
        {"ids": long, "policy": json.dumps(SPARSE)},
        {"ids": long, "policy": json.dumps(FULL)},
        {"ids": long, "policy": {"method": "dense"}},
        {"ids": long, "policy": {"method": "dense"}},
    ]
    job = {"waves": [[one] for one in asked], "gossamer": FULL | {"policies": named}, "max_tokens": 2}
    plain = {"waves": [[{"ids": long}]], "gossamer": None, "max_tokens": 2}
    answers, stock = run(job)["answers"], run(plain)["answers"]
    cached = [answer["cached"] > 0 for answer in answers]
    # The sixth asks for what the server does anyway.
    assert cached == [False, True, False, True, False, True, False, True]
    logprobs = [answer["logprob"] for answer in answers]
    assert logprobs[0] == pytest.approx(stock[0]["logprob"], abs=1e-3)
    assert logprobs[6] == pytest.approx(stock[0]["logprob"], abs=1e-3)
    assert abs(logprobs[2] - logprobs[0]) > 1e-3
    assert abs(logprobs[4] - logprobs[2]) > 1e-4


def test_pages_of_one_policy_are_not_read_under_another_where_workers_are_processes() -> None:
    """The scheduler's process has no layers then, and must know what the server was asked for nevertheless."""
    long = prompt(1500)
    asked = [{"ids": long}, {"ids": long, "policy": "dense"}, {"ids": long, "policy": "few"}, {"ids": long}]
    settings = SPARSE | {"policies": {"few": SPARSE}}
    found = run(
        {"waves": [[one] for one in asked], "gossamer": settings, "args": {"tensor_parallel_size": 2}, "max_tokens": 2},
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )["answers"]
    assert [answer["cached"] > 0 for answer in found] == [False, False, True, True]
    assert abs(found[1]["logprob"] - found[0]["logprob"]) > 1e-3


def test_policies_in_one_batch() -> None:
    """Requests with policies of their own, in steps that they share, answer as they do alone."""
    asked = [
        {"ids": prompt(1100, 1), "policy": "few"},
        {"ids": prompt(1100, 2)},
        {"ids": prompt(1100, 3), "policy": "few"},
        {"ids": prompt(30, 4)},
    ]
    settings = FULL | {"policies": {"few": SPARSE}}
    together = run({"waves": [asked], "gossamer": settings, "max_tokens": 4})["answers"]
    alone = run({"waves": [[one] for one in asked], "gossamer": settings, "max_tokens": 4})["answers"]
    assert [a["tokens"] for a in together] == [a["tokens"] for a in alone]
    for one, other in zip(together, alone, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)


def test_a_request_that_asks_wrongly_is_refused_and_the_engine_lives_on() -> None:
    asked = [
        {"ids": prompt(200), "policy": "nonsense"},
        {"ids": prompt(200), "policy": {"method": "a_shape", "window": "wide"}},
        {"ids": prompt(200), "policy": {"method": "duo_attention", "gates": "/etc/passwd"}},
        {"ids": prompt(200)},
    ]
    answers = run({"waves": [[one] for one in asked], "gossamer": FULL, "max_tokens": 2})["answers"]
    assert "unknown method 'nonsense'" in answers[0]["error"]
    assert "window" in answers[1]["error"]
    assert "gates" in answers[2]["error"]
    assert len(answers[3]["tokens"]) == 2


def test_a_method_that_fails_runs_dense() -> None:
    """Wrong for every call, which only planning finds out: bands have no pruned blocks to correct for."""
    failing = {"method": "corrected", "base": {"method": "a_shape"}, "min_tokens": 0}
    asked = [{"ids": prompt(400), "policy": failing}, prompt(400)]
    found = run({"waves": [[one] for one in asked], "gossamer": FULL, "max_tokens": 2})
    assert counted(found, "gossamer_dense_rows", reason="method failed") == 6
    assert found["answers"][0]["tokens"] == found["answers"][1]["tokens"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "nonsense"}, "unknown method 'nonsense'"),
        ({"method": "a_shape", "windows": 3}, "has no field 'windows'"),
        ("{", "not JSON"),
        ({"profile": "/nowhere/profile.json"}, "/nowhere/profile.json"),
    ],
    ids=["method", "field", "text", "file"],
)
def test_a_server_that_is_asked_wrongly_says_so_when_it_starts(given: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run({"waves": [], "gossamer": given})


def test_profiles(tmp_path: Path) -> None:
    """A profile's methods reach their layers and heads, whole and over two ranks; another model's is refused."""
    from gossamer.methods import AShape, Dense
    from gossamer.profiles import Profile

    wide = AShape(sink=1, window=1 << 20)
    layers = [[wide, AShape(sink=1, window=40), Dense(), wide] if layer == 2 else [wide] * 4 for layer in range(6)]
    path = tmp_path / "profile.json"
    Profile(layers).save(path)
    settings = {"profile": str(path), "min_tokens": 0, "max_density": 2}
    job = {"waves": [[prompt(1500), prompt(600)]], "gossamer": settings}
    one = run(job)
    two = run(
        job | {"args": {"tensor_parallel_size": 2}},
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    stock = run(job | {"gossamer": None})
    assert tokens(one) == tokens(two)
    for a, b, c in zip(one["answers"], two["answers"], stock["answers"], strict=True):
        assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-3)
        assert abs(a["logprob"] - c["logprob"]) > 1e-4
    density = {
        layer: counted(one, "gossamer_computed_pairs", layer=layer) / counted(one, "gossamer_pairs", layer=layer)
        for layer in ("1", "2")
    }
    assert density["1"] == pytest.approx(1.0)
    assert 0.6 < density["2"] < 0.9
    Profile([[wide] * 8] * 6).save(path)
    with pytest.raises(RuntimeError, match="the profile is for 6 layers of 8 heads"):
        run({"waves": [], "gossamer": settings})


def test_a_hybrid_s_profile(tmp_path: Path) -> None:
    """Full layers attend every pair, the others LongGen's pattern, and the model says what it does in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    import gossamer
    from gossamer.methods import LongGen
    from gossamer.profiles import hybrid_profile

    path, ids = tmp_path / "profile.json", prompt(1500)
    hybrid_profile(6, 4, (1, 2), LongGen(sink=1, recent=2)).save(path)
    served = run({"waves": [[ids]], "gossamer": {"profile": str(path), "min_tokens": 0, "max_density": 0.9}})
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    with gossamer.enable(model, profile=path, min_tokens=0, max_density=0.9) as handle, torch.inference_mode():
        logits = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
        rows = handle.stats()
    assert [row.sparse_calls for row in rows] == [1, 0, 0, 1, 1, 1]
    for row in rows:
        pairs, computed = (
            counted(served, name, layer=str(row.layer)) for name in ("gossamer_pairs", "gossamer_computed_pairs")
        )
        assert computed == pytest.approx(row.density * pairs) if row.sparse_calls else computed == pairs
    assert served["answers"][0]["tokens"][0] == int(logits.argmax())
    assert served["answers"][0]["logprob"] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-3)
