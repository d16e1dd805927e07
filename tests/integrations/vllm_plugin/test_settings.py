"""What a server and its requests may ask for, and what they are told where they may not. Needs no vLLM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from transformers import LlamaConfig

from gossamer import Policy, Profile, methods
from gossamer.integrations.vllm.settings import VARIABLE, Settings, check_model
from gossamer.methods import AShape, Dense, DuoAttention, MaxRelative, MInference, PerHead, SeerAttention, VerticalSlash
from gossamer.profiles import Provenance
from gossamer.profiles.models import written

GATES = [[0.1, 0.9], [0.8, 0.2]]


def llama(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    given: dict[str, Any] = sizes | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64} | changes
    return LlamaConfig(**given)


def saved(folder: Path, layers: int = 2, heads: int = 4, **provenance: Any) -> str:
    profile = replace(Profile.uniform(layers, heads, MaxRelative(0.3)), provenance=Provenance(**provenance))
    profile.save(folder / "profile.json")
    return str(folder / "profile.json")


class TestAServer:
    def test_asks_by_name_by_json_or_by_an_object(self) -> None:
        for given in ("max_relative", ' {"method": "max_relative"} ', {"method": "max_relative"}):
            assert Settings.of(given) == Settings(Policy(MaxRelative()))

    def test_gives_fields_and_thresholds_side_by_side(self) -> None:
        given = {"method": "a_shape", "sink": 3, "window": 9, "min_tokens": 500, "max_density": 0.5, "min_queries": 40}
        assert Settings.of(given) == Settings(Policy(AShape(3, 9), 500, 0.5), min_queries=40)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (None, "expected a method's name or an object with method and fields, got null"),
            (3, "expected a method's name or an object .*, got 3"),
            (["max_relative"], "expected a method's name or an object"),
            ("[]", r"unknown method '\[\]'"),
            ("{", "not JSON"),
            ('{"alpha": NaN, "method": "max_relative"}', "not JSON: a number in it is nan"),
            ("", "unknown method ''; known: dense, auto"),
            ("nothing", "unknown method 'nothing'; known: dense, auto"),
            ({}, "needs the key 'method', one of: dense, auto"),
            ({"method": 3}, "needs the key 'method', one of"),
            ({"method": "max_relative", "beta": 1}, "'max_relative' has no field 'beta'; its fields are: alpha, "),
            ({"method": "max_relative", "alpha": "much"}, "alpha must be a number, got 'much'"),
            ({"method": "max_relative", "alpha": 2}, r"alpha must lie in \[0, 1\], got 2"),
            ({"method": "a_shape", "min_tokens": "many"}, "min_tokens must be an integer or None, got 'many'"),
            ({"method": "a_shape", "min_tokens": 1.5}, "min_tokens must be an integer or None, got 1.5"),
            ({"method": "a_shape", "min_tokens": True}, "min_tokens must be an integer or None, got True"),
            ({"method": "a_shape", "min_tokens": -1}, "min_tokens must not be negative, got -1"),
            ({"method": "a_shape", "max_density": "all"}, "max_density must be a number, got 'all'"),
            ({"method": "a_shape", "max_density": 0}, "max_density must be above 0, got 0"),
            ({"method": "a_shape", "min_queries": 31}, "min_queries must be an integer of at least 32, got 31"),
            ({"method": "a_shape", "min_queries": 64.0}, "min_queries must be an integer of at least 32, got 64.0"),
            ({"method": "a_shape", "min_queries": True}, "min_queries must be an integer of at least 32, got true"),
            ({"method": "a_shape", "min_queries": "64"}, "min_queries must be an integer of at least 32, got '64'"),
            ({"method": "a_shape", "policies": []}, r"policies must be an object of policies by name, got \[\]"),
            ({"method": "a_shape", "policies": {"": "dense"}}, "policies must be an object of policies by name"),
            ({"method": "a_shape", "policies": {3: "dense"}}, "policies must be an object of policies by name"),
            ({"method": "a_shape", "policies": {"x": "no"}}, "policies, 'x': unknown method 'no'"),
            ({"method": "a_shape", "policies": {"x": 1}}, "policies, 'x': expected a method's name"),
            ({"method": "a_shape", "policies": {"x": {"method": "duo_attention", "gates": "/no"}}}, "'x': .*No such"),
            ({"profile": 3}, "profile must be the path of a file, got 3"),
            ({"profile": "p", "alpha": 1, "method": "a_shape"}, "a method for each head; leave alpha, method out"),
        ],
    )  # fmt: skip
    def test_is_told_what_is_wrong(self, given: Any, message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            Settings.of(given)

    def test_has_a_profile_of_its_model(self, tmp_path: Path) -> None:
        settings = Settings.of({"profile": saved(tmp_path), "min_tokens": 7, "max_density": 0.4})
        assert settings.policy == Policy(PerHead([[MaxRelative(0.3)] * 4] * 2), 7, 0.4)
        assert settings.for_model(llama()) is None

    def test_does_not_start_with_a_profile_of_another(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="for 3 layers of 4 heads, but this model has 2 layers of 4"):
            Settings.of({"profile": saved(tmp_path, layers=3)}).for_model(llama())
        other = written(llama(num_key_value_heads=4))
        with pytest.raises(ValueError, match=r"made for his, with num_key_value_heads 4 \(here 2\); use a profile"):
            Settings.of({"profile": saved(tmp_path, model="his", config=other)}).for_model(llama())

    def test_is_told_that_the_model_differs_a_little(self, tmp_path: Path) -> None:
        theirs = written(llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
        remark = Settings.of({"profile": saved(tmp_path, model="his", config=theirs)}).for_model(llama())
        assert remark is not None
        assert "made for his, with rotary" in remark

    def test_is_told_of_a_profile_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"GOSSAMER_VLLM: .*No such file"):
            read({VARIABLE: json.dumps({"profile": str(tmp_path / "none")})})
        (tmp_path / "broken").write_text("{")
        with pytest.raises(ValueError, match=r"GOSSAMER_VLLM: .*broken is not JSON"):
            read({VARIABLE: json.dumps({"profile": str(tmp_path / "broken")})})

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("per_head", "per_head has no methods for this model's heads; give a file of them"),
            ("duo_attention", "duo_attention has no gates for this model's heads; give a file of them"),
            ({"method": "duo_attention", "gates": [[1, 0, 1]] * 2}, r"gates is for 2 layers of 3 heads, but this"),
            ({"method": "corrected", "base": {"method": "lserve", "gates": [[1, 0]] * 3}}, "for 3 layers of 2 heads"),
            ({"method": "dense", "policies": {"x": "duo_attention"}}, "policies, 'x': duo_attention has no gates"),
        ],
    )  # fmt: skip
    def test_does_not_start_without_numbers_for_its_heads(self, given: Any, message: str) -> None:
        settings = Settings.of(given)
        with pytest.raises(ValueError, match=message):
            settings.for_model(llama())

    def test_reads_tables_and_gates_from_files(self, tmp_path: Path) -> None:
        (tmp_path / "gates.json").write_text(json.dumps(GATES))
        duo = {"method": "duo_attention", "gates": str(tmp_path / "gates.json")}
        settings = Settings.of({**duo, "policies": {"x": duo, "seer": {"method": "seer_attention", "gates": "here"}}})
        assert settings.policy == settings.policies["x"] == Policy(DuoAttention(GATES))
        assert settings.policies["seer"] == Policy(SeerAttention("here"))


def read(environment: dict[str, str], additional: Any = None) -> Settings | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        return Settings.read(additional)


class TestWhereItIsAskedFor:
    @pytest.mark.parametrize("additional", [None, {}, {"other": 1}, "text"])
    def test_nowhere(self, additional: Any) -> None:
        assert read({}, additional) is None
        assert read({VARIABLE: "  "}, additional) is None

    def test_in_the_config_before_the_environment(self) -> None:
        found = read({VARIABLE: "dense"}, {"gossamer": "a_shape"})
        assert found == Settings(Policy(AShape()))
        assert read({VARIABLE: "dense"}, {"other": 1}) == Settings(Policy(Dense()))

    def test_a_message_says_where(self) -> None:
        with pytest.raises(ValueError, match=r'additional_config\["gossamer"\]: unknown method \'x\''):
            read({VARIABLE: "dense"}, {"gossamer": "x"})
        with pytest.raises(ValueError, match=r"GOSSAMER_VLLM: .*min_queries"):
            read({VARIABLE: '{"method": "dense", "min_queries": 1}'})


SERVER = Settings.of(
    {"method": "max_relative", "policies": {"fast": {"method": "a_shape", "sink": 4, "window": 99}, "all": "dense"}}
)


class TestARequest:
    def test_names_a_policy_or_brings_its_own(self) -> None:
        assert SERVER.of_request("fast")[1] == Policy(AShape(4, 99))
        assert SERVER.of_request("a_shape")[1] == Policy(AShape())
        assert SERVER.of_request('{"method": "a_shape", "min_tokens": 9}')[1] == Policy(AShape(), 9)

    def test_equal_policies_have_one_text_and_others_another(self) -> None:
        same = [
            "fast",
            {"window": 99, "method": "a_shape", "sink": 4},
            '{"sink":4,"method":"a_shape","window":99,"max_density":0.9}',
        ]
        others = [
            "a_shape",
            "all",
            "dense",
            {"method": "a_shape", "sink": 4, "window": 99, "min_tokens": 0},
            {"method": "a_shape", "sink": 4, "window": 99, "max_density": 0.8},
            {"method": "tri_shape", "sink": 4, "window": 99},
        ]
        assert len({SERVER.of_request(one)[0] for one in same}) == 1
        assert len({SERVER.of_request(one)[0] for one in [same[0], *others]}) == len(others)  # "all" is "dense"

    @pytest.mark.parametrize(("one", "other"), [(1, 1.0), (0, 0.0), (0.0, -0.0)])
    def test_numbers_that_are_equal_have_one_text(self, one: float, other: float) -> None:
        texts = {SERVER.of_request({"method": "max_relative", "alpha": alpha})[0] for alpha in (one, other)}
        assert len(texts) == 1

    def test_the_text_of_every_method_is_json(self) -> None:
        for name in methods.available():
            text, policy = SERVER.of_request(name)
            assert json.loads(text)["method"] == name
            assert policy == Policy.of(name)
        assert json.loads(SERVER.of_request({"method": "duo_attention", "gates": GATES})[0])["gates"][0][0] == 0.1

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("faster", "unknown method 'faster'.* or one of this server's policies: fast, all"),
            ("", "unknown method ''"),
            (7, "expected a method's name or an object"),
            ([1], "expected a method's name or an object"),
            (["fast"], "expected a method's name or an object"),
            ("{}", "needs the key 'method'"),
            ('{"method": "max_relative", "alpha": "x"}', "alpha must be a number"),
            ({"method": "max_relative", "beta": 1}, "no field 'beta'"),
            ({"method": "a_shape", "min_tokens": "x"}, "min_tokens must be an integer"),
            ({"method": "a_shape", "min_queries": 64}, "no field 'min_queries'"),
            ({"method": "a_shape", 3: 4}, "keywords must be strings"),
            ('{"method": "a_shape"' + 100_000 * " " + "}", "a policy of 100021 characters; at most 100000"),
            (40_000 * '{"a":', "nested too deeply|a policy of"),
            ("{" + 70 * '"a":{' + 71 * "}", "nested too deeply"),
        ],
        ids=range(14),
    )
    def test_is_told_what_is_wrong(self, given: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SERVER.of_request(given)

    @pytest.mark.parametrize(
        "given",
        [
            {"method": "duo_attention", "gates": "FILE"},
            {"method": "moa", "alphas": "FILE", "betas": "FILE"},
            {"method": "seer_attention", "gates": "FILE"},
            {"method": "corrected", "base": {"method": "seer_attention", "gates": "FILE"}},
            {"method": "corrected", "base": {"method": "duo_attention", "gates": "FILE"}},
            {"method": "per_head", "layers": [[{"method": "seer_attention", "gates": "FILE"}]]},
            {"profile": "FILE"},
            {"method": "per_head", "profile": "FILE"},
            {"method": "dense", "policies": {"x": {"method": "duo_attention", "gates": "FILE"}}},
        ],
    )
    def test_names_no_file(self, given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "gates.json"
        file.write_text(json.dumps(GATES))
        for module in ("gossamer.profiles.tables", "gossamer.profiles.profile"):
            monkeypatch.setattr(f"{module}.read_file", lambda *_: pytest.fail("a request's file was read"))
        text = json.dumps(given).replace("FILE", str(file))
        for one in (text, json.loads(text)):
            with pytest.raises(
                ValueError, match=r"names a file, which a request must not|must be a list|profile|policies"
            ):
                SERVER.of_request(one)

    def test_brings_numbers_for_the_model_of_the_server(self) -> None:
        check_model(SERVER.of_request({"method": "duo_attention", "gates": GATES})[1], llama())
        with pytest.raises(ValueError, match="but this model has 3 layers of 4"):
            check_model(SERVER.of_request({"method": "duo_attention", "gates": GATES})[1], llama(num_hidden_layers=3))


class TestARank:
    def test_has_its_part_of_methods_per_head_and_tables(self) -> None:
        per_head = [[MaxRelative(0.1 * (1 + 4 * layer + head)) for head in range(4)] for layer in range(2)]
        settings = Settings(
            Policy(PerHead(per_head), 5, 0.7),
            policies={"duo": Policy(DuoAttention(GATES)), "plain": Policy(VerticalSlash(3, 4))},
        )
        whole = settings.of_rank(0, 1, 4, 2)
        mine = settings.of_rank(1, 2, 4, 2)
        assert whole is settings
        assert mine.policy == Policy(PerHead([row[2:] for row in per_head]), 5, 0.7)
        assert mine.policies["plain"] == Policy(VerticalSlash(3, 4))
        duo = mine.policies["duo"].method
        assert isinstance(duo, DuoAttention)
        assert duo.full == tuple(row[1:] for row in DuoAttention(GATES).full)
        assert mine.of_request("duo")[1] == mine.policies["duo"]

    def test_has_its_part_of_what_a_request_brings(self) -> None:
        given = {"method": "duo_attention", "gates": GATES}
        first, second = (Settings.of("dense").of_rank(rank, 2, 4, 2) for rank in range(2))
        parts = [one.of_request(given)[1].method for one in (first, second)]
        assert [part.full for part in parts if isinstance(part, DuoAttention)] == [
            tuple(row[rank : rank + 1] for row in DuoAttention(GATES).full) for rank in range(2)
        ]

    def test_is_told_of_heads_that_do_not_divide(self) -> None:
        with pytest.raises(ValueError, match="4 heads with 2 key/value heads cannot be split over 3 ranks"):
            Settings(Policy(MInference([[MaxRelative()] * 4]))).of_rank(0, 3, 4, 2)
