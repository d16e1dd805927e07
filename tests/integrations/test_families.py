"""What `families.json` says of the model families is what running them finds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from tiny_families import LISTED
from tiny_transformers import tiny_llama

from gossamer.plan import Extent

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

RECORDS = families.read()
VERSION = json.loads(families.FILE.read_text(encoding="utf-8"))["about"]["transformers"]
# Of every outcome, and of every kind of mask, cache and layer.
DIVERSE = [
    "bart+seq2seq", "bloom", "cohere2", "deepseek_v32", "deepseek_v4", "falcon", "gemma3n_text", "gpt_oss", "hrm_text",
    "jamba", "llama4_text", "minimax_m3_vl_text", "qwen2_moe", "t5",
]  # fmt: skip

_COMPARED = ("class", "outcome", "sparse_layers", "dense_layers", "model_cannot")


def _same_as_recorded(family: str) -> None:
    if family not in LISTED:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    found, recorded = families.record(family, seconds=120), RECORDS[family]
    assert found["outcome"] != "wrong", found
    # What else is installed decides whether some can be built.
    if transformers.__version__ == VERSION and recorded["outcome"] not in ("not built", "model fails"):
        assert {key: found.get(key) for key in _COMPARED} == {key: recorded.get(key) for key in _COMPARED}


@pytest.mark.parametrize("family", DIVERSE)
def test_a_family_is_as_recorded(family: str) -> None:
    _same_as_recorded(family)


# Three minutes: `make families` makes the records in the same time, and this compares with them.
@pytest.mark.slow
@pytest.mark.skipif("GOSSAMER_ALL_FAMILIES" not in os.environ, reason="GOSSAMER_ALL_FAMILIES=1 runs all families")
@pytest.mark.parametrize("family", [family for family in RECORDS if family not in DIVERSE])
def test_every_family_is_as_recorded(family: str) -> None:
    _same_as_recorded(family)


def test_no_family_computes_something_else() -> None:
    assert not [family for family, found in RECORDS.items() if found["outcome"] == "wrong"]


def test_every_family_has_a_record() -> None:
    if transformers.__version__ == VERSION:
        assert set(RECORDS) == set(LISTED)
    assert {found["outcome"] for found in RECORDS.values()} <= set(families.OUTCOMES)


@pytest.mark.parametrize("what", ["padding", "window"])
def test_a_mask_that_is_not_followed_shows_in_a_family(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: tiny models are sharp enough."""
    from gossamer.integrations.transformers import attention

    extent_of = attention.extent_of

    def without(mask: Any, batch: int, queries: int, keys: int, window: int | None = None) -> tuple[Any, int]:
        extent, used = extent_of(mask, batch, queries, keys, window)
        if extent is None:
            return extent, used
        if what == "padding":
            return Extent.full(batch, queries, used, limit=extent.limit), used
        return Extent(*(getattr(extent, name) for name in _ROWS), causal=extent.causal), used

    monkeypatch.setattr(attention, "extent_of", without)
    found = families.record("cohere2")
    assert found["outcome"] == "wrong"
    assert ("a prompt" in found["situations"]) == (what == "window")
    assert "left padding" in found["situations"]


_ROWS = ("query_start", "query_count", "key_start", "key_count")


class TestOutcomes:
    """What a model does, as a record says it."""

    def of(self, monkeypatch: pytest.MonkeyPatch, forward: Any, seconds: int = 60) -> dict[str, Any]:
        model = tiny_llama()
        model.forward = forward(model, model.forward)
        monkeypatch.setattr(families, "build", lambda family: model)
        return families.record("llama", seconds)

    def test_a_difference_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def differs(model: Any, forward: Any) -> Any:
            def run(**given: Any) -> Any:
                out = forward(**given)
                out.logits = out.logits + (model.config._attn_implementation == "gossamer")
                return out

            return run

        found = self.of(monkeypatch, differs)
        assert found["outcome"] == "wrong"
        assert len(found["situations"]) == 7

    def test_what_gossamer_does_not_know_is_unsupported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(model: Any, forward: Any) -> Any:
            return lambda **given: forward(**given, wavelength=torch.ones(1))

        found = self.of(monkeypatch, unknown)
        assert found["outcome"] == "unsupported"
        assert "wavelength" in found["why"]

    def test_a_model_that_fails_by_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(model: Any, forward: Any) -> Any:
            def run(**given: Any) -> Any:
                raise ValueError("no image")

            return run

        found = self.of(monkeypatch, fails)
        assert (found["outcome"], found["why"]) == ("model fails", "ValueError: no image")

    def test_a_model_that_takes_long_is_stopped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def endless(model: Any, forward: Any) -> Any:
            def run(**given: Any) -> Any:
                while True:
                    pass

            return run

        found = self.of(monkeypatch, endless, 1)
        assert (found["outcome"], found["why"]) == ("not built", "more than 1 s")


def test_families_that_are_not_run_keep_their_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "families.json"
    kept = {"class": "LlamaForCausalLM", "task": "text", "outcome": "dense", "dense_layers": {}}
    families.write(out, {"llama": kept, "a type that is gone": kept})
    assert families.main(["--only", "bloom", "--out", str(out)]) == 0
    found = families.read(out)
    assert (list(found), found["llama"], found["bloom"]["outcome"]) == (["bloom", "llama"], kept, "refused")
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 sparse, 1 dense, 1 refused")
    assert [path.name for path in tmp_path.iterdir()] == ["families.json"]
