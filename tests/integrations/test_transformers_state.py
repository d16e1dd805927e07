"""Models, configs and handles over a life: switched by hand, shared, copied, refused, on another default device."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import logging
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import ALWAYS_SPARSE, FULL, forward, pair, prompt, tiny_llama
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForCausalLM,
    BigBirdPegasusConfig,
    BigBirdPegasusForCausalLM,
    GitConfig,
    GitForCausalLM,
    LlamaConfig,
)

from gossamer import Policy, backends, methods, sparse_attention
from gossamer.integrations import transformers as transformers_room
from gossamer.integrations.transformers import NAME, enable
from gossamer.methods.registry import class_of
from gossamer.rotary import Rotary

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

ROOMS = (
    "attention", "configs", "fallback", "handle", "masks", "operator", "owners", "reached", "supported",
    "verify",
)  # fmt: skip
SMALL: dict[str, Any] = {"sink": 1, "window": 3} | ALWAYS_SPARSE


def two_models_of_one_config() -> tuple[Any, Any]:
    config = copy.deepcopy(pair("llama")[0].config)
    first, second = (AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval() for _ in range(2))
    assert first.config is second.config
    return first, second


class TestSwitchedByHand:
    def test_the_handle_notices_and_leaves_the_choice(self) -> None:
        model = tiny_llama()
        handle = enable(model, "a_shape", **FULL)
        model.set_attn_implementation("eager")
        assert not handle.enabled
        assert "switched off by set_attn_implementation" in repr(handle)
        forward(model, prompt())
        assert len(handle.stats()) == 0
        handle.disable()
        assert model.config._attn_implementation == "eager"

    def test_back_to_ours_counts_again(self) -> None:
        model = tiny_llama()
        with enable(model, "a_shape", **FULL) as handle:
            model.set_attn_implementation("eager")
            model.set_attn_implementation(NAME)
            assert handle.enabled
            forward(model, prompt())
            assert all(row.sparse_calls == 1 for row in handle.stats())
        assert model.config._attn_implementation == "sdpa"


class TestSharedConfig:
    def test_a_model_that_is_not_enabled_stays_as_it_was(self, caplog: pytest.LogCaptureFixture) -> None:
        first, second = two_models_of_one_config()
        expected = forward(second, prompt())
        with enable(first, "a_shape", **SMALL) as handle, caplog.at_level(logging.WARNING, logger="gossamer"):
            got = forward(second, prompt())
            assert len(handle.stats()) == 0
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)
        assert not caplog.records

    @pytest.mark.parametrize("first_out", [0, 1])
    def test_each_keeps_its_policy_and_the_last_gives_the_config_back(self, first_out: int) -> None:
        models = two_models_of_one_config()
        expected = forward(models[1], prompt())
        narrow, full = enable(models[0], "a_shape", **SMALL), enable(models[1], "a_shape", **FULL)
        forward(models[0], prompt())
        torch.testing.assert_close(forward(models[1], prompt()).logits, expected.logits, atol=1e-5, rtol=1e-4)
        assert [row.density < 0.5 for row in (*narrow.stats(), *full.stats())] == [True, True, False, False]
        handles = (narrow, full)
        handles[first_out].disable()
        assert models[0].config._attn_implementation == NAME
        assert handles[1 - first_out].enabled
        handles[1 - first_out].disable()
        assert models[0].config._attn_implementation == "sdpa"

    def test_a_model_that_is_deleted_gives_the_config_back(self) -> None:
        first, second = two_models_of_one_config()
        narrow = enable(first, "a_shape", **SMALL)
        with enable(second, "a_shape", **FULL):
            del first
            gc.collect()
            assert not narrow.enabled
            assert repr(narrow) == "<gossamer a_shape on a model that is gone, disabled>"
            assert second.config._attn_implementation == NAME
        assert second.config._attn_implementation == "sdpa"
        alone, other = two_models_of_one_config()
        enable(alone, "a_shape", **SMALL)
        del alone
        gc.collect()
        assert other.config._attn_implementation == "sdpa"

    def test_two_ways_of_enabling_do_not_fit_one_config(self) -> None:
        first, second = two_models_of_one_config()
        with enable(first, "a_shape", **FULL):
            with pytest.raises(ValueError, match=r"shares its config.*copy\.deepcopy"):
                enable(second, "a_shape", bidirectional=True)
            assert first.config._attn_implementation == NAME


class TestCopies:
    def test_a_copy_is_a_model_loaded_by_name(self) -> None:
        model = tiny_llama()
        with enable(model, "a_shape", **SMALL) as handle:
            twin = copy.deepcopy(model)
        assert twin.config._attn_implementation == NAME
        stock = forward(model, prompt())
        # Short prompts are dense by the default policy.
        torch.testing.assert_close(forward(twin, prompt()).logits, stock.logits, atol=1e-5, rtol=1e-4)
        assert len(handle.stats()) == 0
        with enable(twin, "a_shape", **FULL) as second:
            forward(twin, prompt())
            assert all(row.sparse_calls == 1 for row in second.stats())

    def test_an_enabled_model_can_be_pickled(self) -> None:
        model = tiny_llama()
        with enable(model, "a_shape", **FULL):
            twin = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(forward(twin, prompt()).logits, forward(model, prompt()).logits)


class TestRefused:
    def test_models_that_declare_it(self) -> None:
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        git = GitForCausalLM(
            GitConfig(
                vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                vision_config=vision | {"image_size": 28, "patch_size": 7},
            )
        )  # fmt: skip
        pegasus = BigBirdPegasusForCausalLM(
            BigBirdPegasusConfig(
                vocab_size=96, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32,
                is_decoder=True, is_encoder_decoder=False, encoder_layers=1, encoder_attention_heads=4,
                encoder_ffn_dim=32,
            )
        )  # fmt: skip
        for model in (git, pegasus):
            before = model.config._attn_implementation
            with pytest.raises(
                ValueError, match=f"{type(model).__name__} declares that its attention can't be replaced"
            ):
                enable(model)
            assert model.config._attn_implementation == before

    def test_a_model_that_adds_compressed_keys(self) -> None:
        model = tiny_llama()
        model.config.layer_types = ["sliding_attention", "compressed_sparse_attention"]
        with pytest.raises(ValueError, match="LlamaForCausalLM adds compressed keys"):
            enable(model)
        assert model.config._attn_implementation == "sdpa"

    def test_layers_that_run_several_times_are_counted_once(self) -> None:
        model = tiny_llama()
        model.config.num_hidden_layers = 8  # of its 2 layers, as HRM-Text counts them
        with enable(model, "a_shape", **FULL) as handle:
            forward(model, prompt(), use_cache=False)
        assert len(handle.stats()) == 2

    def test_one_module_for_all_layers_is_all_of_them(self) -> None:
        sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "embedding_size": 32, "intermediate_size": 48}
        model = AlbertModel(AlbertConfig(**sizes, num_attention_heads=4, num_hidden_layers=3)).eval()
        with torch.no_grad():
            expected = model(input_ids=prompt()).last_hidden_state
            with enable(model, "a_shape", **FULL) as handle:
                got = model(input_ids=prompt()).last_hidden_state
        assert sum(row.calls for row in handle.stats()) == 3
        torch.testing.assert_close(got, expected)

    def test_layers_that_attend_to_images_alone_are_not_expected(self) -> None:
        model = tiny_llama()
        model.config.cross_attention_layers = [1]  # as Mllama names them, which a prompt of text leaves out
        model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
        with enable(model, "a_shape", **FULL) as handle:
            forward(model, prompt(), use_cache=False)
        assert len(handle.stats()) == 1

    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("missing", [1, 2])
    def test_layers_that_do_not_come_here(self, missing: int, bidirectional: bool) -> None:
        model = tiny_llama()
        for layer in model.model.layers[:missing]:
            layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
        with enable(model, "a_shape", bidirectional=bidirectional, **FULL):
            with pytest.raises(
                RuntimeError, match=f"of the 2 attention layers of LlamaForCausalLM, {2 - missing} reached"
            ):
                forward(model, prompt(), use_cache=False)
            forward(model, prompt(), use_cache=False)  # said once

    def test_layers_dropped_in_training_are_none_of_these(self) -> None:
        model = tiny_llama().train()
        model.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
        with enable(model, "a_shape", **FULL):
            forward(model, prompt(), use_cache=False)


@pytest.fixture
def _default_device() -> Any:
    yield torch.set_default_device("meta")
    torch.set_default_device(None)


@pytest.mark.parametrize("method", [name for name in methods.available() if name != "per_head"])
@pytest.mark.parametrize("planner", ["torch", "cpu"])
@pytest.mark.usefixtures("_default_device")
def test_nothing_lands_on_the_default_device(method: str, planner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if planner == "cpu" and not backends.cpu.is_available():
        pytest.skip("no C++ kernels")
    monkeypatch.setenv("GOSSAMER_PLANNER", planner)
    q = torch.randn(1, 4, 200, 16, device="cpu")
    tables = {field: [[0.0, 1.0, 2.0, 3.0]] for field in class_of(method).tables}
    policy = Policy(methods.create(method, **tables), min_tokens=1, max_density=2.0)
    out, lse = sparse_attention(q, q[:, :2], q[:, 2:], policy, return_lse=True, layer=0, rotary=Rotary.of_base(16))
    assert out.device == lse.device == q.device
    assert torch.isfinite(out).all()


def test_a_model_runs_under_another_default_device() -> None:
    model, ids = tiny_llama(), prompt()
    positions = torch.arange(ids.shape[1])[None]
    expected = forward(model, ids, position_ids=positions)
    torch.set_default_device("meta")
    try:
        with enable(model, "a_shape", **FULL) as handle:
            got = forward(model, ids, position_ids=positions)
            assert all(row.sparse_calls == 1 for row in handle.stats())
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)


def test_llama_has_a_config_of_its_own() -> None:
    """Parity passes vacuously where two models share one."""
    assert isinstance(tiny_llama().config, LlamaConfig)
    assert tiny_llama().config is not tiny_llama().config


def test_what_is_handed_on_is_frozen() -> None:
    """But for the statistics that layers count in."""
    rooms = [importlib.import_module(f"{transformers_room.__name__}.{name}") for name in ROOMS]
    classes: set[Any] = {v for room in rooms for v in vars(room).values() if dataclasses.is_dataclass(v)}
    loose = {kind.__name__ for kind in classes if not kind.__dataclass_params__.frozen}
    assert loose == {"LayerStats"}
    assert {"Observation", "Owner", "Compact", "Check", "Verification", "Stats", "_Asked"} <= {
        c.__name__ for c in classes
    }


BY_NAME = """
import sys
import gossamer
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder, attn_implementation="gossamer")
except ValueError as error:
    print(error)
import gossamer.integrations.transformers
print(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="gossamer").config._attn_implementation)
"""


def test_a_model_is_loaded_by_name_after_the_import_alone(tmp_path: Path) -> None:
    """As the documentation says, with transformers' own error before it."""
    tiny_llama().save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BY_NAME, str(tmp_path)], capture_output=True, text=True, check=True
    )
    before, after = done.stdout.strip().splitlines()
    page = (Path(__file__).resolve().parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    (promised,) = re.findall(r"it raises `ValueError: ([^`]+)`", page)
    assert before.replace("`", "").startswith(promised)
    assert after == NAME
