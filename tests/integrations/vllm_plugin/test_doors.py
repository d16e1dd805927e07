"""Where requests come in: what is refused, and whose pages a request may read. Needs no vLLM."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
from transformers import LlamaConfig

from gossamer import Policy
from gossamer.integrations.vllm import plugin
from gossamer.integrations.vllm.settings import VARIABLE
from gossamer.methods import AShape, Dense


class Refused(Exception):
    """Of vLLM's exceptions the one that its server answers with 400; no ValueError."""


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = ModuleType("vllm.exceptions")
    vars(exceptions)["VLLMValidationError"] = Refused
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(plugin, "_settings", {})


def config(asked: Any = "a_shape", **more: Any) -> Any:
    model = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    given = {} if asked is None else {"gossamer": asked}
    return SimpleNamespace(additional_config=given, model_config=SimpleNamespace(hf_config=model), **more)


def params(given: Any) -> Any:
    return SimpleNamespace(extra_args=None if given is None else {"gossamer": given})


@plugin._checked
def passed(self: Any, request_id: Any, prompt: Any, params: Any) -> str:
    return "passed"


def ask(asked: Any, given: Any, **more: Any) -> str:
    door = SimpleNamespace(vllm_config=config(asked, **more))
    assert passed(door, "id", "prompt", params=params(given)) == "passed"
    return passed(door, "id", "prompt", params(given))


class TestTheDoor:
    @pytest.mark.parametrize("given", [None, "dense", {"method": "a_shape", "sink": 3}, '{"method": "max_relative"}'])
    def test_lets_policies_in(self, given: Any) -> None:
        assert ask("a_shape", given) == "passed"

    @pytest.mark.parametrize(
        ("asked", "given", "message"),
        [
            (None, "dense", r"names a policy \(gossamer\), but this server was started without gossamer"),
            ("a_shape", "nothing", "gossamer: unknown method 'nothing'"),
            ("a_shape", 3, "gossamer: expected a method's name"),
            ("a_shape", "per_head", "gossamer: per_head has no methods for this model's heads"),
            (
                "a_shape",
                {"method": "duo_attention", "gates": [[1, 0]]},
                "gossamer: .*for 1 layers of 2 heads",
            ),
            ("a_shape", {"method": "seer_attention", "gates": "/etc/passwd"}, "names a file, which a request must not"),
        ],
    )
    def test_keeps_others_out(self, asked: Any, given: Any, message: str) -> None:
        with pytest.raises(Refused, match=message):
            ask(asked, given)

    def test_keeps_policies_out_where_no_row_says_whose_it_is(self) -> None:
        assert ask("a_shape", None, use_v2_model_runner=True) == "passed"
        assert ask("a_shape", "a_shape", use_v2_model_runner=True) == "passed"
        with pytest.raises(Refused, match="start the server with VLLM_USE_V2_MODEL_RUNNER=0"):
            ask("a_shape", "dense", use_v2_model_runner=True)


@plugin._salted
def salted(self: Any, request: Any) -> str | None:
    return request.cache_salt


class TestTheSalt:
    @pytest.mark.parametrize(("given", "changed"), [(None, False), ("a_shape", False), ("dense", True), ("no", True)])
    def test_follows_the_policy(self, given: Any, changed: bool) -> None:
        core = SimpleNamespace(vllm_config=config())
        request = SimpleNamespace(sampling_params=params(given), cache_salt="mine")
        assert (salted(core, request) != "mine") == changed
        assert request.cache_salt == "mine"
        request.cache_salt = None
        assert (salted(core, request) is not None) == changed

    def test_follows_the_policy_of_the_engine_that_the_request_goes_to(self) -> None:
        """Of two in a process, or of one whose workers and front are other processes."""
        first, second = (SimpleNamespace(vllm_config=config(asked)) for asked in ("dense", "a_shape"))
        request = SimpleNamespace(sampling_params=params("dense"), cache_salt=None)
        assert salted(second, request) is not None
        assert salted(first, request) is None
        assert salted(second, request) is not None

    @pytest.mark.parametrize(
        ("asked", "given", "changed"),
        [("a_shape", None, True), ("a_shape", "a_shape", True), ("dense", None, False), ("dense", "dense", False)],
    )
    def test_has_the_server_s_policy_where_pages_go_elsewhere(self, asked: str, given: Any, changed: bool) -> None:
        request = SimpleNamespace(sampling_params=params(given), cache_salt="mine")
        transfer = SimpleNamespace(kv_connector="OffloadingConnector", kv_connector_module_path=None)
        core = SimpleNamespace(vllm_config=config(asked, kv_transfer_config=transfer))
        assert (salted(core, request) != "mine") == changed
        assert request.cache_salt == "mine"

    def test_is_the_same_for_one_policy_on_two_servers(self) -> None:
        transfer = SimpleNamespace(kv_connector="OffloadingConnector", kv_connector_module_path=None)
        first, second = (
            SimpleNamespace(vllm_config=config(asked, kv_transfer_config=transfer)) for asked in ("a_shape", "auto")
        )
        plain, naming = (SimpleNamespace(sampling_params=params(g), cache_salt=None) for g in (None, "a_shape"))
        assert salted(first, plain) == salted(first, naming) == salted(second, naming) != salted(second, plain)

    def test_stays_on_a_server_that_was_not_asked(self) -> None:
        request = SimpleNamespace(sampling_params=params("dense"), cache_salt="gossamer:x")
        assert salted(SimpleNamespace(vllm_config=config(None)), request) == "gossamer:x"


class TestADraftModel:
    def test_is_not_the_model_that_the_profile_is_for(self) -> None:
        asked = {"method": "duo_attention", "gates": [[1, 0]] * 3}
        with pytest.raises(ValueError, match="for 3 layers of 2 heads, but this model has 2"):
            plugin.settings_of(config(asked))
        draft = config(asked)
        draft.model_config.runner_type = "draft"
        assert plugin.settings_of(draft) is not None


class TestWhoseRows:
    @pytest.mark.parametrize(
        ("asked", "backends", "told"),
        [
            ("dense", ["stock"], True),
            ("dense", ["stock", "ours"], False),
            (None, ["stock"], False),
            ("dense", [], False),
        ],
    )
    def test_a_server_without_a_layer_of_ours_says_so(
        self, asked: Any, backends: list[str], told: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        builders: list[Any] = [type("Builder", (), {"sparse": None} if one == "ours" else {})() for one in backends]
        groups = [[SimpleNamespace(metadata_builders=[one])] for one in builders]
        runner: Any = type("Runner", (), {})()
        runner.attn_groups, runner.vllm_config = groups, config(asked)
        assert plugin._introduced(lambda self: "made")(runner) == "made"
        assert ("--attention-backend CUSTOM" in caplog.text) == told
        assert [one.runner() for one in builders if hasattr(one, "sparse")] == [runner] * backends.count("ours")

    def test_each_row_has_its_request_s_policy(self) -> None:
        named = {"a": params("dense"), "b": params(None), "c": None}
        runner = SimpleNamespace(
            input_batch=SimpleNamespace(req_ids=["b", "a", "c", "gone", "more"]),
            requests={name: SimpleNamespace(sampling_params=one) for name, one in named.items()},
        )
        engine: Any = SimpleNamespace(
            default=Policy(AShape()), policy_of=lambda given: Policy(Dense()) if given else engine.default
        )
        builder = SimpleNamespace(runner=lambda: runner)
        found = plugin.policies_of(builder, engine, 4)
        assert found == [engine.default, Policy(Dense()), engine.default, engine.default]
        assert plugin.policies_of(builder, engine, 1) is None
        assert plugin.policies_of(SimpleNamespace(runner=None), engine, 4) is None
        assert plugin.policies_of(SimpleNamespace(runner=lambda: None), engine, 4) is None
