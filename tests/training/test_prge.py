"""P-RGE: the estimator beside autograd, batched beside one by one, and models that are tuned and given back."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gossamer
from gossamer.training import PRGE, estimate_gradient, target_loss
from gossamer.training.prge import noise


def quadratic(dim: int) -> tuple[Any, list[Tensor], Tensor]:
    """A loss of two tensors, themselves, and its gradient, flat."""
    generator = torch.Generator().manual_seed(dim)
    w = [
        torch.randn(dim // 2, generator=generator).double(),
        torch.randn(1, dim - dim // 2, generator=generator).double(),
    ]
    pull = torch.randn(dim, generator=generator).double()

    def loss(weights: list[Tensor]) -> Tensor:
        flat = torch.cat([one.flatten() for one in weights])
        return (flat @ pull).sin() + 0.1 * flat.square().sum()

    leaves = [one.clone().requires_grad_() for one in w]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(leaves), leaves)])
    return loss, w, gradient


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([one.flatten() for one in tensors])


def test_the_estimator_is_its_formula() -> None:
    loss, w, _ = quadratic(6)
    before = flat(w).clone()
    expected = torch.zeros(6).double()
    for query in range(3):
        z = noise((5, query), w)
        up, down = (loss([a + s * 0.01 * b for a, b in zip(w, z, strict=True)]) for s in (1, -1))
        expected += (up - down) / 0.02 * flat(z) / 3
    torch.testing.assert_close(flat(estimate_gradient(loss, w, queries=3, eps=0.01, seed=5)), expected)
    assert torch.equal(flat(w), before)


def test_the_mean_over_seeds_tends_to_the_gradient() -> None:
    loss, w, gradient = quadratic(6)
    found = torch.stack([flat(estimate_gradient(loss, w, 4, 1e-4, seed)) for seed in range(500)])
    # Of 2,000 queries, each with a deviation of about the gradient's norm in every number.
    error = (found.mean(0) - gradient).abs().max() / gradient.norm()
    assert error < 4 * math.sqrt(2 / 2000)


@pytest.mark.parametrize(("queries", "dim"), [(1, 16), (4, 16), (4, 64), (16, 64)])
def test_the_cosine_grows_with_queries_over_dimensions(queries: int, dim: int) -> None:
    loss, w, gradient = quadratic(dim)
    cosines = [
        float(F.cosine_similarity(flat(estimate_gradient(loss, w, queries, 1e-4, seed)), gradient, dim=0))
        for seed in range(150)
    ]
    squares = sum(c * c for c in cosines) / len(cosines)
    assert min(cosines) > 0
    assert squares == pytest.approx(queries / (queries + dim - 1), rel=0.2)


def test_seeds_give_the_same_numbers_again() -> None:
    like = [torch.zeros(3, 2), torch.zeros(4, dtype=torch.bfloat16)]
    first, again, other = noise((1, 2), like), noise((1, 2), like), noise((1, 3), like)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[1].dtype == torch.bfloat16
    many = noise((0,), [torch.zeros(4000)])[0]
    assert abs(float(many.mean())) < 0.06
    assert float(many.std()) == pytest.approx(1.0, abs=0.05)


def language_model(dtype: torch.dtype = torch.float32) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def batch_of(rows: int = 3, length: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """Rows padded left and right, with targets in the second half."""
    ids = torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[-1, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    tuner = PRGE(model, **{"rank": 2, "eps": 1e-3, "seed": 3} | options)
    try:
        return flat(list(tuner.gradient(batch).values()))
    finally:
        tuner.remove()


def test_batched_is_one_after_the_other() -> None:
    model, batch = language_model(torch.float64), batch_of()
    whole = gradients(model, batch, queries=3, batched="all")
    for batched in ("pair", "one"):
        torch.testing.assert_close(gradients(model, batch, queries=3, batched=batched), whole, rtol=1e-8, atol=1e-10)
    assert gradients(model, batch, queries=3, seed=4).dot(whole) != pytest.approx(float(whole.dot(whole)))


def test_the_gradient_is_the_estimators_on_the_model_itself() -> None:
    """One pass with everything stacked, beside a loss that puts each B into the weights."""
    model, batch = language_model(torch.float64), batch_of()
    tuner = PRGE(model, rank=2, queries=2, eps=1e-3, seed=3)
    adapters, layers = list(tuner.adapters.values()), list[Any](tuner.layers.values())
    found = tuner.gradient(batch)
    tuner.remove()
    given = {name: value for name, value in batch.items() if name != "labels"}

    def loss(weights: list[Tensor]) -> Tensor:
        before = [layer.weight.clone() for layer in layers]
        for layer, adapter, b in zip(layers, adapters, weights, strict=True):
            layer.weight += 8.0 * b @ adapter.a
        out = target_loss(model(**given), batch).mean()
        for layer, weight in zip(layers, before, strict=True):
            layer.weight.copy_(weight)
        return out

    expected = [torch.zeros_like(b) for b in found.values()]
    places = [adapter.b for adapter in adapters]
    for query in range(2):
        z = noise((3, 0, query), places)
        with torch.no_grad():
            up, down = (float(loss([s * 1e-3 * n for n in z])) for s in (1, -1))
        for g, n in zip(expected, z, strict=True):
            g += (up - down) / 2e-3 * n / 2
    torch.testing.assert_close(list(found.values()), expected, rtol=1e-6, atol=1e-9)


def test_the_loss_of_rows_is_transformers_own() -> None:
    model, batch = language_model(), batch_of()
    with torch.no_grad():
        found = target_loss(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]), batch)
        for row in range(3):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            torch.testing.assert_close(found[row], model(**one).loss)


def test_logits_are_made_from_the_first_target_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = language_model(), []
    model.lm_head.register_forward_hook(lambda *call: seen.append(call[-1].shape))
    PRGE(model, rank=2, queries=2).step(batch_of(rows=3, length=10))
    assert seen == [(12, 6, 40)]  # targets are at positions 5 .. 9, predicted from 4 on


def test_rows_without_targets_count_nothing() -> None:
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[-100, 1, -100, 2], [3, -100, -100, -100]])
    found = target_loss(SimpleNamespace(logits=logits), {"labels": labels})
    expected = -(logits[0, 0].log_softmax(-1)[1] + logits[0, 2].log_softmax(-1)[2]) / 2
    torch.testing.assert_close(found, torch.stack([expected, torch.zeros(())]))


class Toy(nn.Module):
    """Logistic regression through a layer that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 1)
        nn.init.zeros_(self.q_proj.weight)
        nn.init.zeros_(self.q_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)[:, 0]


def toy_loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, batch["labels"], reduction="none")


def test_a_logistic_task_is_learnt_and_merged() -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    batch = {"x": x, "labels": (x @ torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0, -2.0]) > 0).float()}
    model = Toy().eval()
    tuner = PRGE(model, rank=6, alpha=6.0, queries=4, lr=0.3, loss=toy_loss)
    losses = [tuner.step(batch) for _ in range(150)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[-1] < 0.25
    adapted = model(x)
    tuner.merge()
    torch.testing.assert_close(model(x), adapted)
    assert float(((model(x) > 0) == (batch["labels"] > 0)).float().mean()) > 0.9


def test_a_model_is_as_before_until_a_step_and_after_removal() -> None:
    model, batch = language_model(), batch_of()
    ids = batch["input_ids"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(ids).logits
        tuner = PRGE(model, rank=2, queries=2, lr=0.5)
        torch.testing.assert_close(model(ids).logits, before)
        tuner.step(batch)
        changed = model(ids).logits
        assert not torch.allclose(changed, before)
        tuner.remove()
        assert torch.equal(model(ids).logits, before)
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])} == set()
    with pytest.raises(ValueError, match="merged or removed"):
        tuner.step(batch)


def test_merged_weights_give_what_adapters_gave() -> None:
    model, batch = language_model(), batch_of()
    tuner = PRGE(model, rank=2, queries=2, lr=0.5)
    for _ in range(3):
        tuner.step(batch)
    with torch.no_grad():
        adapted = model(batch["input_ids"]).logits
        tuner.merge()
        torch.testing.assert_close(model(batch["input_ids"]).logits, adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_graph_is_kept(mode: Any) -> None:
    model, batch, seen = language_model(), batch_of(), []
    model.lm_head.register_forward_hook(lambda *call: seen.append(call[-1].requires_grad))
    tuner = PRGE(model, rank=2, queries=2)
    with mode():
        tuner.step(batch)
        tuner.step(batch)
    assert seen == [False, False]
    assert all(p.grad is None for p in model.parameters())
    assert not any(adapter.b.is_inference() or adapter.b.requires_grad for adapter in tuner.adapters.values())


def test_bf16_models_have_fp32_adapters_and_estimates_like_exact_ones() -> None:
    model, batch = language_model(torch.bfloat16), batch_of()
    exact = gradients(language_model(torch.float64), batch, queries=2, eps=3e-3)
    found = gradients(model, batch, queries=2, eps=3e-3)
    assert F.cosine_similarity(found.double(), exact, dim=0) > 0.98
    tuner = PRGE(model, rank=2, queries=2, eps=3e-3, lr=0.1)
    assert math.isfinite(tuner.step(batch))
    assert {adapter.b.dtype for adapter in tuner.adapters.values()} == {torch.float32}
    assert {adapter.a.dtype for adapter in tuner.adapters.values()} == {torch.bfloat16}


def test_runs_on_sparse_prefill() -> None:
    model, batch = language_model(), batch_of(rows=2, length=300)
    tuner = PRGE(model, rank=2, queries=2, seed=1)
    dense = flat(list(tuner.gradient(batch).values()))
    with gossamer.enable(model, "a_shape", sink=16, window=64, min_tokens=128) as handle:
        sparse = flat(list(tuner.gradient(batch).values()))
        tuner.step(batch)
    assert [(row.sparse_calls, row.dense_calls) for row in handle.stats()] == [(2, 0)] * 2
    assert not torch.allclose(dense, sparse)
    assert all(row.density < 0.9 for row in handle.stats())


def test_compressed_layers_are_tuned_and_not_merged() -> None:
    model, batch = language_model(), batch_of()
    gossamer.compress(model, {"recipe": "int8"}, [batch["input_ids"]])
    tuner = PRGE(model, rank=2, queries=2)
    assert math.isfinite(tuner.step(batch))
    with pytest.raises(TypeError, match="floating-point weight"):
        tuner.merge()


def test_bad_arguments_and_batches() -> None:
    model, batch = language_model(), batch_of()
    with pytest.raises(ValueError, match="no linear layer is called query"):
        PRGE(model, targets=("query",))
    for bad in ({"queries": 0}, {"eps": 0.0}, {"rank": 0}, {"batched": "some"}):
        with pytest.raises(ValueError, match="got"):
            PRGE(model, **bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="queries must be"):
        estimate_gradient(lambda w: 0.0, [torch.zeros(2)], queries=0)
    tuner = PRGE(model, rank=2)
    with pytest.raises(ValueError, match="no label"):
        tuner.step(batch | {"labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(ValueError, match="at least one tensor"):
        PRGE(Toy().eval(), loss=toy_loss).step({"x": 1})
    model.train()
    with pytest.raises(ValueError, match="eval"):
        tuner.step(batch)


def test_losses_that_are_not_finite_change_nothing() -> None:
    model = Toy().eval()
    tuner = PRGE(model, rank=2, loss=lambda out, batch: out * math.nan)
    with pytest.raises(ValueError, match="not finite"):
        tuner.step({"x": torch.ones(2, 6)})
    assert not any(adapter.b.any() for adapter in tuner.adapters.values())
    tuner.remove()
    tuner = PRGE(model, rank=2, loss=lambda out, batch: out.mean())
    with pytest.raises(ValueError, match="one number a row"):
        tuner.step({"x": torch.ones(2, 6)})


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_a_step_needs_the_memory_of_reading_its_rows() -> None:
    model = language_model()
    batch = batch_of(rows=2, length=64)
    rows = {name: value.repeat(4, 1) for name, value in batch.items()}  # as a step with two queries has
    given = {name: value for name, value in rows.items() if name != "labels"} | {"logits_to_keep": 33}

    def read() -> None:
        with torch.no_grad():
            target_loss(model(**given, use_cache=False), rows)

    with Live() as reading:
        read()
    tuner = PRGE(model, rank=2, queries=2)
    with Live() as step:
        tuner.step(batch)
    places = [adapter.b.requires_grad_() for adapter in tuner.adapters.values()]
    model.requires_grad_(False)
    with Live() as training:
        target_loss(model(**given, use_cache=False), rows).mean().backward()
    copies = 4 * 4 * sum(b.numel() for b in places)  # stacked, and what they are stacked from
    assert step.most < 1.2 * reading.most + 3 * copies
    assert training.most > 2 * step.most
