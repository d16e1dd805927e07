"""Whole models: replaced, saved, loaded, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import gossamer  # noqa: E402
from gossamer.compressed.model import compress  # noqa: E402
from gossamer.compressed.recipes import RECIPES, recipe_of  # noqa: E402


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():  # biases too
        parameter.data.normal_(0, 0.2)
    return model


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(60, (2, 24), generator=generator) for _ in range(2)]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=samples()[0]).logits


SPARSE_INT8 = {"recipe": "sparsegpt", "bits": 8}


@pytest.mark.parametrize("recipe", ["sparsegpt", "magnitude", "billm", "int8", SPARSE_INT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_model(recipe: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(dtype=dtype)
    dense = logits(model)
    compress(model, recipe, samples())
    assert not any(type(module) is nn.Linear for module in model.model.modules())
    found = logits(model)
    assert not torch.equal(found, dense)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype for key in state)
    torch.testing.assert_close(logits(loaded), found, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    )


def test_full_budgets_are_dense() -> None:
    for recipe in ({"recipe": "sparsegpt", "pattern": "0"}, {"recipe": "magnitude", "pattern": "0"}):
        model = tiny()
        dense = logits(model)
        torch.testing.assert_close(logits(compress(model, recipe, samples())), dense)


def test_better_recipes_are_nearer() -> None:
    def loss(recipe: dict[str, Any]) -> float:
        total = 0.0
        for seed in range(3):
            model = tiny(seed)
            dense = logits(model)
            total += float((logits(compress(model, recipe, samples())) - dense).square().mean())
        return total

    assert loss({"recipe": "sparsegpt"}) < loss({"recipe": "magnitude"})
    assert loss({"recipe": "billm", "block": 16}) < loss({"recipe": "sign_and_scale"}) < loss({"recipe": "rounded"})
    assert loss({"recipe": "int8"}) < loss({"recipe": "int8", "share": 0.98, "outliers": 0.0})


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not recipe.looks])
def test_recipes_that_look_at_weights_alone_need_no_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = compress(tiny(), name, samples()), tiny()
    monkeypatch.setattr(other, "forward", None)  # nor is the model run
    assert compress(other, name) is other
    monkeypatch.undo()
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), logits(tiny()))


def test_layers_with_the_largest_outliers_keep_them() -> None:
    model = tiny()
    model.model.layers[0].input_layernorm.weight.data[3] *= 80.0
    compress(model, {"recipe": "int8", "outliers": 0.2, "share": 0.95}, samples())
    apart = [name for name, module in model.named_modules() if getattr(module, "outliers", False)]
    assert len(apart) == round(0.2 * 14)
    assert {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"} <= set(apart)


def damage(folder: Path, key: str, change: Any) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith(key))
    state[name] = change(state[name])
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("recipe", "key", "change", "said"),
    [
        ("sparsegpt", "bitmap", lambda x: x ^ 1, "its bitmap has"),
        ("sparsegpt", "starts", lambda x: x + 1, "its bitmap has"),
        ("sparsegpt", "starts", lambda x: x.flip(0), "its bitmap has"),
        (SPARSE_INT8, ".scale", lambda x: x * float("inf"), "above 0 and finite"),
        (SPARSE_INT8, ".scale", lambda x: -x, "above 0 and finite"),
        (SPARSE_INT8, "bitmap", lambda x: x ^ 1, "its bitmap has"),
        (SPARSE_INT8, "values", lambda x: x * 0 - 128, "below -127"),
        ("billm", "salient", lambda x: x * 0 + 255, "salient columns go beyond"),
        ("billm", "codes", lambda x: x * 0 + 255, "codes go beyond"),
        ("billm", "levels", lambda x: x * float("nan"), "not finite"),
        ("int8", "by_row", lambda x: x * 0, "above 0"),
        ("int8", ".scale", lambda x: x - 1e9, "above 0"),
    ],
)
def test_damaged_files_are_refused(recipe: Any, key: str, change: Any, said: str, tmp_path: Path) -> None:
    compress(tiny(), recipe, samples()).save_pretrained(tmp_path)
    damage(tmp_path, key, change)
    with pytest.raises(ValueError, match=f"is damaged: .*{said}"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"kind": "pickle"}, "of kind 'pickle'"),
        ({"kind": "sparse", "values": -1}, "not numbers of 0 or more"),
        ({"kind": "sparse", "values": "9"}, "not numbers of 0 or more"),
        ({"kind": "sparse"}, "a layer of kind sparse is not"),
        ({"kind": "sparse", "values": 9, "bits": 4}, "a layer of kind sparse is not"),
        ({"kind": "sparse", "values": 2**50}, "a layer of kind sparse is not"),
        ({"kind": "one_bit", "block": 0}, "a layer of kind one_bit is not"),
        ({"kind": "one_bit", "block": 2**28}, "a layer of kind one_bit is not"),
    ],
)
def test_hostile_configurations_are_refused(entry: dict[str, Any], said: str, tmp_path: Path) -> None:
    compress(tiny(), {"recipe": "sparsegpt"}, samples()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"] = {"model.layers.0.self_attn.q_proj": entry}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        *(("sparsegpt", key) for key in ("bitmap", "values", "starts")),
        *(("billm", key) for key in ("codes", "levels", "salient")),
        (SPARSE_INT8, ".scale"),
        *(("int8", key) for key in ("quantised", "by_row", ".scale")),
    ],
)
def test_files_that_lack_a_tensor_are_refused(recipe: Any, key: str, tmp_path: Path) -> None:
    compress(tiny(), recipe, samples()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state.pop(next(name for name in state if name.endswith(key)))
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match="it lacks 1 tensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config["layers"].pop("model.layers.0.self_attn.q_proj"), "nothing says of which layer"),
        (lambda config: config.pop("recipe"), "needs a recipe, and layers"),
        (lambda config: config.update(layers=[1]), "needs a recipe, and layers"),
        (lambda config: config["layers"].update({"model.layers.0.self_attn.q_proj": "x"}), "needs a recipe"),
        (lambda config: config["layers"].update({"model.layers.9.x": {"kind": "sparse", "values": 1}}), "has none"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    compress(tiny(), "sparsegpt", samples()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sparsegpt", "rounded"):
        model = tiny().train()
        before = model.state_dict()
        plain = [type(module) for module in model.modules()]
        told: list[str] = []

        def progress(layer: str, told: list[str] = told) -> None:
            told.append(layer)
            if len(told) == 2:
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            compress(model, name, samples(), progress=progress)
        after = model.state_dict()
        assert [type(module) for module in model.modules()] == plain
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert model.training
        assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("recipe", ["int8", "billm", "sparsegpt"])
def test_compressed_models_run_sparse(recipe: str) -> None:
    model = compress(tiny(), recipe, samples())
    dense = logits(model)
    with gossamer.enable(model, "dense", kernel="gossamer", min_tokens=0):
        torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-4)
    with gossamer.enable(model, "a_shape", sink=1, window=2, min_tokens=0):
        assert not torch.allclose(logits(model), dense, atol=1e-2)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="a recipe is one of"):
        recipe_of({"recipe": "gptq"})
    with pytest.raises(ValueError, match="has no field bits"):
        recipe_of({"recipe": "billm", "bits": 1})
    for recipe in (3, None):
        with pytest.raises(ValueError, match="a recipe is a name"):
            recipe_of(recipe)  # type: ignore[arg-type]
    for fields, said in (
        ({"recipe": "billm", "block": 0}, "block must be"),
        ({"recipe": "sparsegpt", "damp": "x"}, "damp must be"),
        ({"recipe": "billm", "search": "x"}, "search must be"),
        ({"recipe": "sparsegpt", "pattern": "2:4", "block": 6}, "multiple of 4"),
        ({"recipe": "sparsegpt", "pattern": None}, "a pattern is"),
        ({"recipe": "sparsegpt", "bits": 4}, "bits must be 8"),
    ):
        with pytest.raises(ValueError, match=said):
            recipe_of(fields)
    assert recipe_of({"recipe": "sparsegpt", "pattern": 0.5}).to_dict()["pattern"] == 0.5
    with pytest.raises(ValueError, match="multiples of 5, and model"):
        compress(tiny(), {"recipe": "magnitude", "pattern": "2:5"}, samples())
    for some in (samples()[0], [samples()[0][0]], [[1, 2]]):
        with pytest.raises(TypeError, match="list of tensors"):
            compress(tiny(), "int8", some)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs samples"):
        compress(tiny(), {"recipe": "int8"}, [])
    model = compress(tiny(), {"recipe": "int8"}, samples())
    with pytest.raises(ValueError, match="quantised already"):
        compress(model, {"recipe": "int8"}, samples())
    for name, recipe in RECIPES.items():
        assert recipe_of(recipe().to_dict()) == recipe()
        assert recipe.name == name
