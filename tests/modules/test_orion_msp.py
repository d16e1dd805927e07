"""Orion-MSP: its links one by one, its parts by their formulas, and that nothing leaks but where the release leaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer import AttentionCall
from gossamer.backends import attend
from gossamer.modules import OrionMSP, RowInteraction, links, plan_of_links
from gossamer.modules.tabular import Block, PerceiverMemory, RowLearner

SMALL = {"points": 3, "column_depth": 1, "blocks": 3, "classes": 2, "globals_": 1, "latents": 4, "memory_depth": 1}


def stirred(module: Any) -> Any:
    """With weights in the projections that begin at zero, so that everything counts."""
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return module.double()


def model(**options: Any) -> OrionMSP:
    torch.manual_seed(0)
    given = {**SMALL, "row_heads": 2, "column_heads": 2, "heads": 2, "depth": 2, "scales": (1, 2), "window": 1}
    return stirred(OrionMSP(8, 3, **{**given, **options}))


def table(tables: int = 2, rows: int = 9, columns: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(tables, rows, columns, dtype=torch.float64), torch.randint(0, 3, (tables, rows))


@pytest.mark.parametrize("window", [0, 2, None])
def test_links_are_special_near_and_random(window: int | None) -> None:
    seen = links(14, 3, window, random=2, seed=5)
    near = torch.zeros_like(seen)
    for i in range(14):
        for j in range(14):
            near[i, j] = i < 3 or j < 3 or i == j or (window is not None and abs(i - j) <= window)
    assert bool(seen[near].all())
    assert torch.equal(links(14, 3, window, random=0), near)
    more = (seen & ~near).sum(-1)
    assert int(more.max()) == 2
    assert torch.equal(seen, links(14, 3, window, random=2, seed=5))
    assert not torch.equal(seen, links(14, 3, window, random=2, seed=6))


def test_links_as_released_have_no_window_and_change_from_call_to_call() -> None:
    released = [links(40, 4, None, random=2, seed=None) for _ in range(2)]
    assert not torch.equal(*released)
    assert int(released[0][4:, 4:].sum(-1).max()) <= 3  # the diagonal and two links, no window
    assert int(links(40, 4, 8, random=2)[20, 4:].sum()) >= 17
    torch.manual_seed(0)
    table_, labels = table()
    made = model(window=None, seed=None, random=1, scales=(1,))
    assert not torch.equal(made(table_, labels, 6), made(table_, labels, 6))


def test_a_plan_has_the_same_links_and_kernels_attend_them() -> None:
    q, k, v = (torch.randn(1, 2, 21, 8) for _ in range(3))
    for window in (3, None):
        seen = links(21, 4, window, random=2)
        plan = plan_of_links(seen, 4, window, heads=2)
        assert torch.equal(plan.to_mask()[0], seen.expand(2, -1, -1))
        out, _ = attend(AttentionCall(q, k, v, plan.extent), plan)
        masked = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        torch.testing.assert_close(out, masked, atol=1e-5, rtol=1e-4)


def test_a_block_is_attention_to_its_context_under_a_mask() -> None:
    block = stirred(Block(8, 2))
    x, other = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    seen = torch.rand(2, 5, 4) < 0.5
    seen[..., 0] = True
    heads = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        heads.in_proj_weight.copy_(torch.cat([block.q_proj.weight, block.kv_proj.weight]))
        heads.in_proj_bias.copy_(torch.cat([block.q_proj.bias, block.kv_proj.bias]))
        heads.out_proj.load_state_dict(block.o_proj.state_dict())
    read = block.norm(other)
    mid = x + heads(block.norm(x), read, read, attn_mask=~seen.repeat_interleave(2, 0))[0]
    expected = mid + block.down(torch.nn.functional.gelu(block.up(block.feed_norm(mid))))
    torch.testing.assert_close(block(x, other, seen), expected)
    fresh = Block(8, 2).double()
    assert torch.equal(fresh(x), x)


@pytest.mark.parametrize("group", ["learned", "mean"])
def test_groups_are_their_formula(group: Any) -> None:
    made = stirred(RowInteraction(8, 2, 1, scales=(2,), group=group))
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    found = made.gather(x, 2, [5, 3])
    assert found.shape == (2, 3, 3, 8)
    for b, count in enumerate([5, 3]):
        for g in range((count + 1) // 2):
            if group == "mean":
                expected = x[b, :, 2 * g : min(2 * g + 2, count)].mean(1)
            else:
                rates = 10_000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
                place = torch.stack([torch.sin(g * rates), torch.cos(g * rates)], -1).flatten()
                keys, values = made.k_proj(x[b, :, :count]), made.v_proj(x[b, :, :count])
                weights = (keys @ made.q_proj(made.group + place) / 8**0.5).softmax(-1)
                expected = (weights[..., None] * values).sum(1)
            torch.testing.assert_close(found[b, :, g], expected)


def test_a_window_of_everything_is_dense() -> None:
    made = stirred(RowInteraction(8, 2, 3, window=20))
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    out = made(x)
    made._seen = lambda *_: torch.ones(1, 1, 1, dtype=torch.bool).expand(1, _[2], _[2])  # type: ignore[method-assign]
    torch.testing.assert_close(out, made(x))


def test_scales_have_their_own_blocks_and_links() -> None:
    made = RowInteraction(8, 2, 6, random=1, window=0)
    assert (len(made.blocks), made.depth) == (6, 2)
    assert RowInteraction(8, 2, 4).depth == 2  # each scale's share, rounded up
    masks = [made._seen(n, [9], 17, torch.device("cpu")) for n in range(2)]
    assert not torch.equal(*masks)
    assert torch.equal(masks[0], made._seen(0, [9], 17, torch.device("cpu")))


@pytest.mark.parametrize(("blocks", "shows"), [(2, False), (4, True)])
def test_links_show_from_the_second_block_of_a_scale_on(blocks: int, shows: bool) -> None:
    x, found = torch.randn(2, 3, 8, 8), []
    for window in (0, 8):
        torch.manual_seed(0)
        row = RowInteraction(8, 2, blocks, scales=(1, 2), classes=2, globals_=1, window=window, random=0, group="mean")
        for block in row.modules():
            if isinstance(block, Block):  # what it adds begins as nothing
                block.o_proj.reset_parameters()
                block.down.reset_parameters()
        found.append(row(x))
    assert torch.equal(*found) != shows


def test_split_attention_is_dense_under_the_split_mask() -> None:
    learner = stirred(RowLearner(8, 2, depth=2, classes=3))
    rows, labels = torch.randn(2, 7, 8, dtype=torch.float64), torch.randint(0, 3, (2, 4))
    x = rows.clone()
    x[:, :4] += learner.label(torch.nn.functional.one_hot(labels, 3).double())
    for block in learner.blocks:
        x = block(x, seen=(torch.arange(7) < 4).expand(7, 7))
    torch.testing.assert_close(learner(rows, labels), learner.head(learner.norm(x[:, 4:])))


def test_unlabelled_rows_and_later_labels_leak_nothing() -> None:
    made, (x, labels) = model(), table()
    out = made(x, labels, 6)
    assert out.shape == (2, 3, 3)
    other = labels.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 3
    torch.testing.assert_close(made(x, other, 6), out, rtol=0, atol=0)
    torch.testing.assert_close(made(x, labels[:, :6]), out, rtol=0, atol=0)
    moved = x.clone()
    moved[:, 7:] += 3.0 * torch.randn_like(moved[:, 7:])
    torch.testing.assert_close(made(moved, labels, 6)[:, :1], out[:, :1])
    torch.testing.assert_close(made(x[:, :7], labels, 6), out[:, :1])
    other = labels.clone()
    other[:, 0] = (other[:, 0] + 1) % 3
    assert not torch.allclose(made(x, other, 6), out, atol=1e-3)  # labels of labelled rows do count


def test_memory_is_written_from_labelled_rows_without_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    made, (x, labels) = model(), table()
    assert made.memory is not None
    written: list[Tensor] = []
    write = made.memory.write
    monkeypatch.setattr(made.memory, "write", lambda rows: written.append(write(rows)) or written[-1])
    moved = x.clone()
    moved[:, 6:] += 3.0
    for given in ((x, labels), (moved, labels), (x, (labels + 1) % 3), (x + 1.0, labels)):
        made(*given, 6)
    assert torch.equal(written[0], written[2])
    torch.testing.assert_close(written[0], written[1])
    assert not torch.allclose(written[0], written[3], atol=1e-3)


@pytest.mark.parametrize("options", [{"mixing": True}, {"embed_with_test": True}], ids=str)
def test_the_released_memory_and_columns_of_all_rows_leak_between_unlabelled_rows(options: Any) -> None:
    made, (x, labels) = model(**options), table()
    moved = x.clone()
    moved[:, 7:] += 3.0
    assert not torch.allclose(made(moved, labels, 6)[:, 0], made(x, labels, 6)[:, 0], atol=1e-4)


def test_the_released_memory_leaks_by_itself() -> None:
    rows = torch.randn(1, 6, 8, dtype=torch.float64)
    moved = rows.clone()
    moved[:, 5] += 3.0 * torch.randn(8)  # a norm does not see one number added to all channels
    for mixing in (False, True):
        memory = stirred(PerceiverMemory(8, 2, 4, 1, mixing=mixing))
        assert torch.allclose(memory(rows, 3)[:, :5], memory(moved, 3)[:, :5], rtol=0, atol=1e-12) != mixing


def test_the_order_of_labelled_rows_does_not_matter() -> None:
    made, (x, labels) = model(), table()
    order = torch.tensor([3, 0, 5, 1, 4, 2, 6, 7, 8])
    torch.testing.assert_close(made(x[:, order], labels[:, order], 6), made(x, labels, 6))


@pytest.mark.parametrize(("group", "known"), [("learned", False), ("mean", True)])
def test_the_place_of_a_column_is_lost_where_groups_are_learned(group: Any, known: bool) -> None:
    made, (x, labels) = model(group=group), table()
    out = made(x[:, :, [2, 0, 4, 1, 3]], labels, 6)
    assert torch.allclose(out, made(x, labels, 6), rtol=0, atol=1e-9) != known


@pytest.mark.parametrize("group", ["learned", "mean"])
def test_columns_that_are_not_there_change_nothing(group: Any) -> None:
    made, (x, labels) = model(group=group), table()
    x[1, :, 3:] = float("nan")
    out = made(x, labels, 6, features=torch.tensor([5, 3]))
    torch.testing.assert_close(out[0], made(x[:1], labels[:1], 6)[0])
    torch.testing.assert_close(out[1], made(x[1:, :, :3], labels[1:], 6)[0])


@pytest.mark.parametrize("options", [{}, {"latents": 0}, {"group": "mean"}], ids=str)
def test_gradients_reach_every_parameter(options: Any) -> None:
    made, (x, labels) = model(**options), table()
    torch.nn.functional.cross_entropy(made(x, labels, 6).flatten(0, 1), labels[:, 6:].flatten()).backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def test_wrong_arguments_of_orion_msp_are_named() -> None:
    x, labels = table()
    for make, message in (
        (lambda: RowInteraction(8, 2, scales=()), "scales must be"),
        (lambda: RowInteraction(8, 2, group="soft"), "group must be"),  # type: ignore[arg-type]
        (lambda: RowInteraction(8, 2, classes=0), "expected a class token"),
        (lambda: RowInteraction(8, 8), "heads must cut width"),
        (lambda: Block(9, 2), "multiple of heads"),
        (lambda: model(latents=-1), "latents must be"),
        (lambda: model()(x[0], labels), "x must be"),
        (lambda: model()(x, labels, 0), "labelled must be 1 to 9"),
        (lambda: model()(x, labels + 3, 6), "labels must be 0 to 2"),
        (lambda: model()(x, labels, 6, features=torch.tensor([5, 0])), "features must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
