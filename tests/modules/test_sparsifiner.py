"""Sparsifiner against its formula, row by row; its two stages inside a small ViT; what pruned tokens may do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer import AttentionCall
from gossamer.backends import attend
from gossamer.modules import (
    Connections,
    SparsifinerAttention,
    distillation_loss,
    plan_of_connections,
    prune_tokens,
    reconstruction_loss,
    set_stage,
)

TOKENS = 13


def layer(**options: Any) -> SparsifinerAttention:
    given = {"rank": 5, "coefficients": 3, "keep": 0.3, "dtype": torch.float64}
    made = SparsifinerAttention(8, 2, TOKENS, **{**given, **options})
    with torch.no_grad():  # larger than at the start, so that predictions differ
        made.predictor.down.normal_()
        made.predictor.basis.copy_(0.05 * torch.randn(TOKENS, 5))
    return made


def drawn(batch: int = 2) -> Tensor:
    return torch.randn(batch, TOKENS, 8, dtype=torch.float64)


def run(made: nn.Module, x: Tensor, *mask: Tensor) -> tuple[Tensor, Connections]:
    seen: list[Connections] = []
    return made(x, *mask, record=seen.append), seen[0]


def predicted_row(made: SparsifinerAttention, q: Tensor, k: Tensor, i: int, sparse: bool) -> Tensor:
    """What token i of one head is predicted to attend, ``[N]``."""
    predictor = made.predictor
    low = torch.stack([predictor.k_proj(row) for row in k])  # [N, c]
    keys = torch.stack([(low * predictor.down[:, n, None]).sum(0) for n in range(predictor.down.shape[1])])
    weights = (keys @ predictor.q_proj(q[i]) / 2**0.5).softmax(0)
    basis = predictor.basis.detach().clone()
    if sparse:
        basis = torch.where(basis.abs() <= 0.02, 0.0, basis.abs())
        few = weights.argsort(descending=True)[:3]
        weights = torch.zeros_like(weights).index_put((few,), weights[few])
    return torch.stack([weights[n] * basis[:, n] for n in range(len(weights))]).sum(0)


@pytest.mark.parametrize("stage", ["reconstruct", "masked"])
def test_predictions_are_their_formula(stage: Any) -> None:
    made, x = layer(stage=stage), drawn()
    q, k, _ = made.projections.split(x)
    _, seen = run(made, x)
    assert seen.predicted is not None
    assert seen.predicted.shape == (2, 2, TOKENS - 1, TOKENS)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(1, TOKENS)).tolist():
        row = predicted_row(made, q[b, h], k[b, h], i, stage == "masked")
        torch.testing.assert_close(seen.predicted[b, h, i - 1], row)


def test_rows_attend_what_is_predicted_most_and_the_class_token_all() -> None:
    made, x = layer(), drawn()
    q, k, v = made.projections.split(x)
    out, seen = run(made, x)
    predicted = seen.predicted
    assert predicted is not None
    assert seen.chosen is not None
    assert bool((seen.chosen[:, :, 1:].sum(-1) == 4).all())  # 0.3 of 13, rounded up
    torch.testing.assert_close(seen.attention.sum(-1), torch.ones_like(seen.attention[..., 0]))
    heads = torch.zeros_like(v)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(TOKENS)).tolist():
        order = sorted(range(TOKENS), key=lambda j: (-float(predicted[b, h, i - 1, j]), j))
        kept = order[:4] if i else list(range(TOKENS))
        heads[b, h, i] = (k[b, h, kept] @ q[b, h, i] * 0.5).softmax(0) @ v[b, h, kept]
    torch.testing.assert_close(out, made.projections.merge(heads))


@pytest.mark.parametrize("options", [{"stage": "dense"}, {"stage": "reconstruct"}, {"keep": 1.0}], ids=str)
def test_everything_kept_is_dense(options: Any) -> None:
    made, x = layer(**options), drawn()
    dense = torch.nn.functional.scaled_dot_product_attention(*made.projections.split(x))
    torch.testing.assert_close(made(x), made.projections.merge(dense))


def test_equal_predictions_take_the_earlier_token() -> None:
    made = layer()
    with torch.no_grad():
        made.predictor.basis.zero_()
    _, seen = run(made, drawn())
    assert seen.chosen is not None
    assert bool((seen.chosen[:, :, 1:] == (torch.arange(TOKENS) < 4)).all())


def test_a_threshold_may_leave_a_row_empty() -> None:
    made, x = layer(keep=None, least=0.03), drawn()
    _, seen = run(made, x)
    assert seen.predicted is not None
    assert seen.chosen is not None
    assert torch.equal(seen.chosen[:, :, 1:], seen.predicted > 0.03)
    made.predictor.least = 1e9
    _, seen = run(made, x)
    assert not bool(seen.attention[:, :, 1:].any())
    torch.testing.assert_close(seen.attention[:, :, 0].sum(-1), torch.ones(2, 2, dtype=torch.float64))


def test_kernels_agree_with_the_masked_definition() -> None:
    made, x = layer(dtype=torch.float32), drawn().float()
    parts = [part.detach().requires_grad_() for part in made.projections.split(x)]
    _, seen = run(made, x)
    assert seen.chosen is not None
    plan = plan_of_connections(seen.chosen)
    assert torch.equal(plan.to_mask(), seen.chosen)
    out, _ = attend(AttentionCall(parts[0], parts[1], parts[2], plan.extent), plan)
    masked = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=seen.chosen)
    torch.testing.assert_close(out, masked, atol=1e-5, rtol=1e-4)
    reaching = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(y, parts, reaching) for y in (out, masked)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_pruned_tokens_change_nothing() -> None:
    made, x = layer(), drawn()
    live = torch.ones(2, TOKENS, dtype=torch.bool)
    live[0, [2, 3, 7]] = False
    live[1, 3:] = False  # fewer than a row keeps
    moved = torch.where(live[..., None], x, 5.0 * drawn())
    out, seen = run(made, x, live)
    torch.testing.assert_close(out, made(moved, live))
    assert not bool(out[~live].any())
    assert seen.chosen is not None
    assert not bool(seen.chosen.movedim(3, 1)[~live].any())
    assert not bool(seen.chosen.movedim(2, 1)[~live].any())
    assert bool((seen.chosen[0, :, 1:].sum(-1)[:, live[0, 1:]] == 4).all())
    torch.testing.assert_close(made(x, torch.ones_like(live)), made(x))


def test_pruning_keeps_what_the_class_token_looks_at() -> None:
    attention = torch.zeros(1, 2, 5, 5)
    attention[0, :, 0] = torch.tensor([[0.1, 0.5, 0.0, 0.3, 0.1], [0.1, 0.0, 0.2, 0.3, 0.4]])
    assert prune_tokens(attention, 2)[0].tolist() == [True, True, False, True, False]  # of equal ones the first
    live = torch.tensor([[True, True, True, False, False]])
    assert prune_tokens(attention, 3, live)[0].tolist() == [True, True, True, False, False]


class Vit(nn.Module):
    """A host: patches of an image, a class token, and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 3, stride=3, dtype=torch.float64)
        self.first = nn.Parameter(torch.randn(1, TOKENS, 8, dtype=torch.float64))
        self.blocks = nn.ModuleList(layer(stage="dense") for _ in range(2))
        self.head = nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[Connections]]:
        x = self.first + torch.nn.functional.pad(self.patches(images).flatten(2).transpose(1, 2), (0, 0, 1, 0))
        seen: list[Connections] = []
        for block in self.blocks:
            x = x + block(x, record=seen.append)
        return self.head(x[:, 0]), x[:, 1:], seen


def test_the_predictor_learns_in_the_first_stage_alone() -> None:
    torch.manual_seed(0)
    teacher, student = Vit(), Vit()
    student.load_state_dict(teacher.state_dict())
    images, labels = torch.randn(3, 1, 12, 9, dtype=torch.float64), torch.tensor([0, 1, 2])
    logits, tokens, seen = teacher(images)
    set_stage(student, "reconstruct")
    own = student(images)
    torch.testing.assert_close(own[0], logits)  # attention stays dense
    loss = reconstruction_loss(own[2], seen)
    wanted = [
        sum(((a.predicted - b.attention[:, :, 1:]) ** 2).flatten().tolist()) for a, b in zip(own[2], seen, strict=True)
    ]
    assert float(loss.detach()) == pytest.approx(0.01 * sum(wanted) / 2)
    loss.backward()
    predictors = [p for name, p in student.named_parameters() if "predictor" in name]
    assert all(p.grad is not None and bool(p.grad.any()) for p in predictors)
    assert student.get_parameter("blocks.0.projections.q_proj.weight").grad is not None

    student.zero_grad()
    set_stage(student, "masked")
    masked = student(images)
    second = distillation_loss(masked[0], masked[1], logits, tokens, labels)
    chances, sure = masked[0].softmax(-1), logits.softmax(-1)
    by_hand = -chances[torch.arange(3), labels].log().mean()
    by_hand = by_hand + 0.5 * (sure * (sure / chances).log()).sum() / 3 + 0.5 * (masked[1] - tokens).square().mean()
    torch.testing.assert_close(second, by_hand)
    second.backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in predictors)
    rest = {id(p) for p in predictors}
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters() if id(p) not in rest)
    assert all(p.grad is None for p in teacher.parameters())


def test_predictions_come_to_hold_the_mass_of_attention() -> None:
    torch.manual_seed(1)
    made = SparsifinerAttention(16, 2, 33, rank=8, keep=0.2, stage="reconstruct")
    base = 3.0 * torch.randn(1, 33, 16)
    for name in ("q_proj", "k_proj"):
        nn.init.normal_(getattr(made.projections, name).weight, std=0.25)
    optimizer = torch.optim.Adam(made.predictor.parameters(), lr=0.02)

    def held(stage: Any) -> tuple[Tensor, float, float, float]:
        """The prediction's error, or the mass of attention in the choice; in the best choice; in the nearest tokens."""
        made.stage = "dense"
        x = base + torch.randn(16, 33, 16)
        _, dense = run(made, x)
        made.stage = stage
        _, own = run(made, x)
        rows = dense.attention[:, :, 1:].detach()
        if own.chosen is None:
            return reconstruction_loss([own], [dense]), 0.0, 0.0, 0.0
        near = (torch.arange(33)[1:, None] - torch.arange(33)).abs() <= 3
        mine = (rows * own.chosen[:, :, 1:]).sum(-1).mean()
        return mine, float(mine), float(rows.topk(7).values.sum(-1).mean()), float((rows * near).sum(-1).mean())

    before = held("masked")[1]
    for _ in range(60):
        optimizer.zero_grad()
        held("reconstruct")[0].backward()
        optimizer.step()
    _, mine, best, local = held("masked")
    assert local < mine < best
    assert mine > before + 0.2
    assert mine > 0.7 * best


def test_multiplications_are_counted() -> None:
    made = layer()
    counted = made.multiplications()
    assert counted["dense"] == 2 * 13 * 13 * 8
    assert counted["masked"] == 2 * (13 + 12 * 4) * 8
    left = int((made.predictor.basis.abs() > 0.02).sum())
    low = 2 * 2  # heads times half of their four channels
    assert counted["predictor"] == pytest.approx(2 * 13 * low * 4 + 2 * 13 * low * 5 + 2 * 12 * 3 * left / 5)
    whole = SparsifinerAttention(384, 6).multiplications()  # DeiT-S
    assert 0.4 < (whole["masked"] + whole["predictor"]) / whole["dense"] < 0.75


def test_wrong_arguments_of_sparsifiner_are_named() -> None:
    x = drawn()
    for make, message in (
        (lambda: layer(keep=0.0), "keep must be"),
        (lambda: SparsifinerAttention(8, 2, 5), "rank must be"),
        (lambda: layer(reduce=5), "head_dim // reduce must be"),
        (lambda: layer(coefficients=0), "coefficients must be"),
        (lambda: layer(stage="sparse"), "stage must be one of"),
        (lambda: layer()(x[:, 1:]), "x must be"),
        (lambda: layer()(x, torch.zeros(2, TOKENS, dtype=torch.bool)), "class token"),
        (lambda: layer()(x, torch.tensor([3, 4])), "mask must be bool"),
        (lambda: set_stage(nn.Linear(1, 1), "masked"), "a model with layers"),
        (lambda: reconstruction_loss([], []), "as many layers"),
        (lambda: reconstruction_loss([run(layer(stage="dense"), x)[1]] * 1, [run(layer(), x)[1]]), "no prediction"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
