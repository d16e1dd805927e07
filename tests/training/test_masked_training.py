"""Pruned models that are trained on: zeros stay, the teacher stays, and what fails leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from gossamer.compressed import SparseLinear  # noqa: E402
from gossamer.compressed.model import compress  # noqa: E402
from gossamer.training import MaskedLinear, distillation_loss, pack, recover, unpack  # noqa: E402


def tiny(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(**(sizes | heads | fields))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def batches(count: int = 2, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(60, (2, 12), generator=generator) for _ in range(count)]


def pruned(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A student and its teacher."""
    teacher = tiny(dtype)
    return compress(copy.deepcopy(teacher), {"recipe": "magnitude", "pattern": "0.5"}, batches()), teacher


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def layer_and_mask() -> tuple[MaskedLinear, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(6, 10, generator=generator) < 0.4
    return MaskedLinear(torch.randn(6, 10, generator=generator), mask, torch.zeros(6)), mask


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1),
        lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda parameters: torch.optim.Adam(parameters, 1e-2, amsgrad=True),
    ],
)
def test_what_is_left_out_stays_zero(optimizer: Any) -> None:
    layer, mask = layer_and_mask()
    before = layer.weight.detach().clone()
    steps = optimizer(list(layer.parameters()))
    for _ in range(5):
        steps.zero_grad()
        layer(torch.randn(7, 10)).square().sum().backward()
        steps.step()
    assert bool((layer.weight[~mask] == 0).all())
    assert bool((layer.weight[mask] != before[mask]).all())


def test_gradients_are_those_of_the_masked_product() -> None:
    layer, mask = layer_and_mask()
    weight = layer.weight.detach().double().requires_grad_()
    bias = layer.bias.detach().double().requires_grad_()  # type: ignore[union-attr]
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    mine = x.detach().float().requires_grad_()
    layer(mine).sin().sum().backward()
    F.linear(x, weight * mask, bias).sin().sum().backward()
    for found, wanted in ((mine.grad, x.grad), (layer.weight.grad, weight.grad), (layer.bias.grad, bias.grad)):  # type: ignore[union-attr]
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    assert bool((layer.weight.grad[~mask] == 0).all())  # type: ignore[index]


def test_nothing_comes_through_the_mask() -> None:
    mask = torch.tensor([[True, False]])
    layer = MaskedLinear(torch.tensor([[2.0, float("nan")]]), mask)
    layer(torch.tensor([[1.0, float("inf")]]).clamp(max=3e38)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[1.0, 0.0]]
    with torch.no_grad():
        layer.weight[0, 1] = float("inf")
    assert layer(torch.ones(1, 2)).tolist() == [[2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_the_inverse_of_unpacking(dtype: torch.dtype) -> None:
    student, _ = pruned(dtype)
    before, dense = state(student), [layer.weight for layer in sparse_layers(student).values()]
    assert len(unpack(student)) == 14
    assert not sparse_layers(student)
    pack(student)
    assert same(state(student), before)
    layers = sparse_layers(student).values()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, dense, strict=True))


def test_a_kept_weight_that_became_zero_stays_kept() -> None:
    layer, mask = layer_and_mask()
    place = tuple(mask.nonzero()[0].tolist())
    with torch.no_grad():
        layer.weight[place] = 0.0
    stored = layer.packed()
    stored.check()
    assert len(stored.values) == int(mask.sum())
    assert torch.equal(MaskedLinear.of(stored).mask, mask)
    with torch.no_grad():
        layer.weight[place] = float("inf")
    with pytest.raises(ValueError, match=r"not finite in torch\.float32"):
        layer.packed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recovering_lowers_the_loss_and_keeps_the_zeros(dtype: torch.dtype) -> None:
    student, teacher = pruned(dtype)
    held = batches(1, seed=9)[0]
    maps = {name: layer.bitmap.clone() for name, layer in sparse_layers(student).items()}
    others = {name: x.clone() for name, x in state(student).items() if "proj" not in name}
    taught, told = state(teacher), []
    with torch.no_grad():
        before = float(distillation_loss(student, teacher, held))
    losses = recover(
        student,
        teacher,
        batches(25, seed=2),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=0.01),
        progress=lambda step, loss: told.append((step, loss)),
    )
    with torch.no_grad():
        after = float(distillation_loss(student, teacher, held))
    assert after < 0.7 * before
    assert told == list(enumerate(losses, 1))
    assert same({name: layer.bitmap for name, layer in sparse_layers(student).items()}, maps)
    assert all(layer.dtype == layer.values.dtype == dtype for layer in sparse_layers(student).values())
    assert all(layer.check() is None for layer in sparse_layers(student).values())
    assert same({name: x for name, x in state(student).items() if "proj" not in name}, others)
    assert same(state(teacher), taught)
    assert all(parameter.grad is None for model in (student, teacher) for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for name, parameter in student.named_parameters() if "proj" not in name)


def test_the_loss_is_what_it_is_said_to_be() -> None:
    student, teacher = pruned()
    (ids,) = batches(1)
    with torch.no_grad():
        mine, theirs = (model(input_ids=ids, output_hidden_states=True) for model in (student, teacher))
        p, q = (out.logits.double() / 2.0 for out in (theirs, mine))
        kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
        surprise = -mine.logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        layers = [
            ((own - wanted).double() ** 2).mean() / (wanted.double() ** 2).mean()
            for own, wanted in zip(mine.hidden_states[1:], theirs.hidden_states[1:], strict=True)
        ]
        assert len(layers) == 2
        wanted = 0.5 * surprise + 3.0 * 2.0**2 * kl + 0.25 * torch.stack(layers).mean()
        found = distillation_loss(student, teacher, ids, temperature=2.0, text=0.5, logits=3.0, hidden=0.25)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        assert float(distillation_loss(teacher, teacher, ids)) < 1e-5
        alone = distillation_loss(student, None, ids, text=1.0, logits=0.0, hidden=0.0)
        torch.testing.assert_close(alone.double(), surprise, rtol=1e-5, atol=1e-5)


def test_a_text_can_be_learned_without_a_teacher() -> None:
    student, _ = pruned()
    losses = recover(
        student,
        None,
        batches(1) * 12,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-2),
        text=1.0,
        logits=0.0,
        hidden=0.0,
    )
    assert losses[-1] < losses[0] - 0.2
    assert len(sparse_layers(student)) == 14


def failing(kind: type[BaseException]) -> Iterator[Tensor]:
    yield from batches(1)
    raise kind("stop")


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_model_as_it_was(kind: type[BaseException]) -> None:
    student, teacher = pruned()
    student.model.norm.weight.requires_grad_(False)
    before, layers = state(student), sparse_layers(student)
    with pytest.raises(kind, match="stop"):
        recover(student, teacher, failing(kind))
    assert sparse_layers(student) == layers
    assert same(state(student), before)
    assert not student.model.norm.weight.requires_grad
    assert student.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"hidden": -1.0}, "weights of a loss are 0 or more"),
        ({"logits": 0.0, "hidden": 0.0}, "one is above 0"),
        ({"logits": float("nan")}, "weights of a loss are 0 or more"),
    ],
)
def test_options_that_are_refused(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recover(*pruned(), batches(), **options)


def test_bad_input() -> None:
    student, teacher = pruned()
    before, layers = state(student), sparse_layers(student)
    for some, said in (
        (batches()[0], "in a list"),
        ([batches()[0][0]], r"a batch is a tensor of token ids \[B, T\]; got torch.int64 \[12\]"),
        ([[1, 2]], "got list"),
        ([torch.zeros(1, 2)], "got torch.float32"),
    ):
        with pytest.raises(TypeError, match=said):
            recover(student, teacher, some)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the teacher has the pruned layers"):
        recover(student, student, batches())
    with pytest.raises(ValueError, match="without a teacher"):
        recover(student, None, batches())
    for other, said in (
        (tiny(vocab_size=50), "another vocabulary"),
        (tiny(num_hidden_layers=3), "other hidden states"),
        (tiny(hidden_size=32), "other hidden states"),
    ):
        ids = [torch.randint(50, (1, 8))]
        with pytest.raises(ValueError, match=said):
            recover(student, other, ids)
    with pytest.raises(ValueError, match="the loss of step 2 is nan"):
        recover(student, teacher, batches(3), optimizer=lambda p: torch.optim.SGD(p, float("inf")))
    assert sparse_layers(student) == layers
    assert same(state(student), before)
    with pytest.raises(ValueError, match=r"no pruned layers: gossamer\.compress"):
        unpack(teacher)
    with pytest.raises(ValueError, match="the mask of a weight"):
        MaskedLinear(torch.zeros(2, 3), torch.zeros(2, 3))


def test_pruned_layers_in_int8_are_refused() -> None:
    layer = SparseLinear.of(torch.randn(4, 8), None, torch.full((4,), 0.05))
    with pytest.raises(ValueError, match="int8 cannot be trained"):
        MaskedLinear.of(layer)
