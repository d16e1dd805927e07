"""Methods for denoising inside transformers of diffusers, over the steps of a sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
from tiny_diffusers import FAMILIES, inputs_of, tiny

from gossamer import methods, scores
from gossamer.calibrate.denoising import ModeSearch, OrderSearch
from gossamer.integrations.diffusers import enable

pytestmark = pytest.mark.filterwarnings(
    "ignore:gossamer runs its torch reference path:RuntimeWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
)
TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)
ALWAYS: dict[str, Any] = {"min_tokens": 0, "max_density": 2.0, "steps": len(TIMES)}
FULL: dict[str, dict[str, Any]] = {
    "adaspa": {"sparsity": 0.0, "search": (1, 3), "block": 16},
    "attention_tile": {"frames": 8, "block": 16},
    "paro": {"order": "WHF", "density": 1.0, "block": 16},
    "sparsed": {"share": 1.0, "block": 16},
    "sparse_vdit": {"mode": "dense"},
    **{f"{kind}_blocks": {"density": 1.0, "block": 16} for kind in ("oracle", "window", "random")},
}
SMALL: dict[str, dict[str, Any]] = {
    "adaspa": {"sparsity": 0.8, "search": (1, 3), "block": 16},
    "attention_tile": {"frames": 1, "block": 8},
    "paro": {"order": "WHF", "density": 0.2, "block": 16},
    "sparsed": {"share": 0.1, "block": 16},
    "sparse_vdit": {"mode": "multi_diagonal", "share": 0.3, "block": 8},
    **{f"{kind}_blocks": {"density": 0.2, "block": 16} for kind in ("oracle", "window", "random")},
}
# The first steps, which run dense; the last of them chooses, and is counted as a plan that computes everything.
DENSE = {"adaspa": (1, "adaspa needs step 1 or later"), "sparsed": (2, "sparsed needs step 2 or later")}


def sample(model: Any, name: str) -> list[Tensor]:
    with torch.no_grad():
        return [model(**inputs_of(name, 2, time * FAMILIES[name].scale))[0] for time in TIMES]


def test_every_method_is_here() -> None:
    assert set(FULL) == set(SMALL) == set(methods.denoising())


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "cogvideox", "qwen-image"])
@pytest.mark.parametrize("method", FULL)
def test_full_budget_is_dense_and_a_small_one_is_not(method: str, name: str) -> None:
    model = tiny(name)
    expected = sample(model, name)
    with enable(model, method, **FULL[method], **ALWAYS) as handle:
        got = sample(model, name)
        assert handle.steps == list(range(len(TIMES)))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
    with enable(model, method, **SMALL[method], **ALWAYS) as handle:
        got = sample(model, name)
        by_step = [handle.stats(step=step) for step in handle.steps]
    if method == "attention_tile" and name == "qwen-image":
        assert handle.stats().fallbacks() == {"attention_tile needs several frames": 2 * len(TIMES)}
        return
    dense, reason = DENSE.get(method, (0, ""))
    for step, (ours, theirs, stats) in enumerate(zip(got, expected, by_step, strict=True)):
        rows = [row for row in stats if row.layer is not None]
        assert len(rows) == FAMILIES[name].layers
        if step < dense:
            assert torch.equal(ours, theirs)  # by the model's own backend
            assert all(row.fallbacks == {reason: 1} for row in rows)
        elif step == dense and dense:
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
        else:
            assert all(row.sparse_calls == 1 and row.density < 1 for row in rows)
            assert (ours - theirs).abs().max() > 1e-3


def test_the_step_that_chooses_is_dense_under_any_policy() -> None:
    """It is counted with a reason, and no plan of everything runs as if it were sparse."""
    model = tiny("wan")
    with enable(model, "adaspa", **SMALL["adaspa"], min_tokens=0, steps=5) as handle:
        sample(model, "wan")
        rows = [row for row in handle.stats(step=1) if row.layer is not None]
        assert all(row.fallbacks == {"plan too dense to pay": 1} for row in rows)


def test_a_search_is_made_at_its_steps_alone_and_for_each_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masses = tiny("wan"), []
    found = scores.block_mass
    monkeypatch.setattr(scores, "block_mass", lambda *given: masses.append(1) or found(*given))
    with enable(model, "adaspa", **SMALL["adaspa"], **ALWAYS), torch.no_grad():
        counts = []
        for time in TIMES:
            for _ in ("with text", "without"):
                model(**inputs_of("wan", 1, time))
            counts.append(len(masses))
        assert counts == [0, 4, 4, 8, 8]  # 2 layers in 2 branches
        model(**inputs_of("wan", 1, TIMES[0]))
        model(**inputs_of("wan", 1, TIMES[1]))
        assert len(masses) == 10  # another sampling


@pytest.mark.parametrize("search", [ModeSearch(block=8, limit=2.0), OrderSearch(block=8, density=0.3)])
def test_what_a_search_finds_runs_from_its_profile(search: Any, tmp_path: Any) -> None:
    model = tiny("hunyuan-video")
    with enable(model, "dense", steps=5) as handle:
        handle.observe(search)
        expected = sample(model, "hunyuan-video")
    path = tmp_path / "heads.json"
    search.profile().save(path)
    with enable(model, profile=path, **ALWAYS) as handle:
        got = sample(model, "hunyuan-video")
        rows = [row for row in handle.stats() if row.layer is not None]
    assert [row.sparse_calls for row in rows] == [len(TIMES)] * 2
    assert all(row.density < 0.95 for row in rows)
    assert all(bool(x.isfinite().all()) for x in got)
    assert (got[-1] - expected[-1]).abs().max() > 1e-3
    other = tiny("qwen-image")  # of 3 heads
    with enable(other, profile=path, **ALWAYS), pytest.raises(ValueError, match="are for 2 layers of 2 heads"):
        sample(other, "qwen-image")
