"""The exact oracle against the whole softmax matrix in fp64, in every situation a call can be in."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import Extent, SparsePlan, methods
from gossamer import oracle as exact
from gossamer.testing import SITUATIONS, Case, make_case, random_plan

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

HEADS, GROUPS, DIM = 4, 2, 16
SINKS = torch.tensor([-1.0, 0.5, 2.0, 4.0])
# Odd blocks, so that no block ends where a tile or the prompt does.
BLOCKS: dict[str, Any] = {"block_q": 16, "block_k": 24}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "limit": {"limit": 40},
    "sinks": {"sinks": SINKS},
    "softcap": {"softcap": 1.5},
    "all": {"limit": 50, "sinks": SINKS, "softcap": 2.0},
}
# fp32 logits of this size carry errors of 1e-6; a mass sums up to 130 weights.
TOLERANCE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}

in_every_situation = pytest.mark.parametrize("situation", SITUATIONS)
at_odd_lengths = pytest.mark.parametrize("length", [1, 63, 130])
with_every_variant = pytest.mark.parametrize("variant", VARIANTS)


def poisoned_case(situation: str, length: int, dtype: torch.dtype = torch.float32) -> Case:
    """A case whose dead keys and padding queries are NaN."""
    case = make_case(situation, length=length, heads=HEADS, groups=GROUPS, dim=DIM, dtype=dtype, seed=length)
    keys, rows = case.extent.key_positions(case.key_len), case.extent.query_positions(case.query_len)
    dead = (keys < 0) | (keys >= case.extent.key_count[:, None])
    k = case.k.masked_fill(dead[:, None, :, None], float("nan"))
    q = case.q.masked_fill((rows < 0)[:, None, :, None], float("nan"))
    return Case(q, k, case.v, case.extent, case.scale)


def softmax_matrix(case: Case, limit=None, sinks: Tensor | None = None, softcap=None, causal=True) -> Tensor:
    """fp64 ``[B, H, S, T]``: all weights of live rows, 0 elsewhere."""
    visible = SparsePlan.dense(1, case.query_len, case.key_len, case.extent, causal=causal, limit=limit).to_mask()
    visible = visible & exact.live_rows(case.extent, case.query_len)[:, None, :, None]
    q, k = case.q.double().nan_to_num(), case.k.double().nan_to_num()
    logits = q @ k.repeat_interleave(HEADS // GROUPS, 1).transpose(-1, -2) * case.scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, float("-inf"))
    lse = logits.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None])
    return (logits - lse[..., None]).exp().masked_fill(~visible, 0.0)


def blocks_of(matrix: Tensor, block_q: int, block_k: int) -> Tensor:
    rows, keys = -matrix.shape[2] % block_q, -matrix.shape[3] % block_k
    padded = torch.nn.functional.pad(matrix, (0, keys, 0, rows))
    return padded.unflatten(3, (-1, block_k)).sum(-1).unflatten(2, (-1, block_q)).sum(3)


def dense_lse(case: Case, limit=None, sinks=None, softcap=None) -> Tensor:
    arguments: dict[str, Any] = {
        "scale": case.scale,
        "extent": case.extent,
        "limit": limit,
        "sinks": sinks,
        "softcap": softcap,
    }
    return exact.log_sum_exp(case.q, case.k, **arguments)


@in_every_situation
@at_odd_lengths
@with_every_variant
def test_masses_are_those_of_the_whole_matrix(variant: str, length: int, situation: str) -> None:
    case, options = poisoned_case(situation, length), VARIANTS[variant]
    matrix = softmax_matrix(case, **options)
    got = exact.exact_masses(case.q, case.k, scale=case.scale, extent=case.extent, **BLOCKS, **options)
    distance = (
        case.extent.query_positions(case.query_len)[:, :, None] - case.extent.key_positions(case.key_len)[:, None]
    )
    diagonals = torch.zeros(matrix.shape[0], HEADS, case.key_len, dtype=torch.float64)
    index = distance.clamp(0, case.key_len - 1)[:, None].expand(matrix.shape).flatten(2)
    diagonals.scatter_add_(2, index, matrix.flatten(2))
    torch.testing.assert_close(got.columns.double(), matrix.sum(2), **TOLERANCE)
    torch.testing.assert_close(got.diagonals.double(), diagonals, **TOLERANCE)
    torch.testing.assert_close(got.blocks.double(), blocks_of(matrix, **BLOCKS), **TOLERANCE)
    assert torch.equal(got.rows, exact.live_rows(case.extent, case.query_len).sum(1))


@in_every_situation
@with_every_variant
def test_block_mass_is_that_of_the_whole_matrix(variant: str, situation: str) -> None:
    case, options = poisoned_case(situation, 130), VARIANTS[variant]
    lse = dense_lse(case, **options)
    options: dict[str, Any] = {name: value for name, value in options.items() if name != "sinks"}
    got = exact.block_mass(case.q, case.k, lse, scale=case.scale, extent=case.extent, **BLOCKS, **options)
    expected = blocks_of(softmax_matrix(case, **VARIANTS[variant]), **BLOCKS)
    torch.testing.assert_close(got.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("limit", [None, 40])
def test_block_mass_without_causality(limit: int | None) -> None:
    case = poisoned_case("no padding", 130)
    options: dict[str, Any] = {"scale": case.scale, "extent": case.extent, "causal": False, "limit": limit}
    lse = exact.log_sum_exp(case.q, case.k, **options)
    got = exact.block_mass(case.q, case.k, lse, **BLOCKS, **options)
    expected = blocks_of(softmax_matrix(case, limit=limit, causal=False), **BLOCKS)
    torch.testing.assert_close(got.double(), expected, **TOLERANCE)


def test_a_row_of_blocks_sums_to_its_live_rows() -> None:
    case = poisoned_case("left padding", 130)
    got = exact.block_mass(case.q, case.k, dense_lse(case), scale=case.scale, extent=case.extent, **BLOCKS)
    live = exact.live_rows(case.extent, case.query_len).float()
    expected = torch.nn.functional.pad(live, (0, -live.shape[1] % 16)).unflatten(1, (-1, 16)).sum(-1)
    torch.testing.assert_close(got.sum(3), expected[:, None].expand(-1, HEADS, -1), **TOLERANCE)


def test_tiles_smaller_and_larger_than_blocks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = poisoned_case("left padding", 500)
    whole = exact.exact_masses(case.q, case.k, scale=case.scale, extent=case.extent, block_q=100, block_k=150)
    monkeypatch.setattr("gossamer.oracle.tiles.TILE_BYTES", 1 << 10)
    small = exact.exact_masses(case.q, case.k, scale=case.scale, extent=case.extent, block_q=100, block_k=150)
    for name in ("columns", "diagonals", "blocks", "rows"):
        torch.testing.assert_close(getattr(small, name), getattr(whole, name), **TOLERANCE)


@in_every_situation
def test_samples_of_all_offsets_add_up_to_the_whole(situation: str) -> None:
    case = poisoned_case(situation, 250)
    options: dict[str, Any] = {"scale": case.scale, "extent": case.extent, "sinks": SINKS, **BLOCKS}
    whole = exact.exact_masses(case.q, case.k, **options)
    parts = [exact.exact_masses(case.q, case.k, step=3, offset=offset, **options) for offset in range(3)]
    for name in ("columns", "diagonals", "rows"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name), **TOLERANCE)
    for part in parts:
        torch.testing.assert_close(part.blocks, whole.blocks[:, :, list(part.query_blocks)], **TOLERANCE)


@pytest.mark.parametrize(("step", "offset"), [(0, None), (2, 2), (2, -1)])
def test_a_step_out_of_range_is_an_error(step: int, offset: int | None) -> None:
    case = make_case("no padding", length=63, heads=HEADS, groups=GROUPS, dim=DIM)
    with pytest.raises(ValueError, match=f"step={step}, offset={offset}"):
        exact.exact_masses(case.q, case.k, scale=1.0, extent=case.extent, step=step, offset=offset)


def test_an_lse_of_another_shape_is_an_error() -> None:
    case = make_case("no padding", length=63, heads=HEADS, groups=GROUPS, dim=DIM)
    with pytest.raises(ValueError, match=r"\(1, 4, 63\), got \(1, 4, 62\)"):
        exact.block_mass(case.q, case.k, torch.zeros(1, 4, 62), scale=1.0, extent=case.extent, **BLOCKS)


def test_bfloat16_is_computed_in_float32() -> None:
    case = poisoned_case("chunked", 130, torch.bfloat16)
    wide = Case(case.q.float(), case.k.float(), case.v, case.extent, case.scale)
    torch.testing.assert_close(dense_lse(case), dense_lse(wide), rtol=0, atol=0)
    expected = blocks_of(softmax_matrix(wide), **BLOCKS)
    got = exact.exact_masses(case.q, case.k, scale=case.scale, extent=case.extent, **BLOCKS)
    torch.testing.assert_close(got.blocks.double(), expected, **TOLERANCE)


@in_every_situation
@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_visible_pairs_are_counted_block_by_block(causal: bool, limit: int | None, situation: str) -> None:
    case = poisoned_case(situation, 130)
    options: dict[str, Any] = {"causal": causal, "limit": limit}
    visible = SparsePlan.dense(1, case.query_len, case.key_len, case.extent, **options).to_mask()
    visible = visible & exact.live_rows(case.extent, case.query_len)[:, None, :, None]
    got = exact.visible_pairs(case.extent, case.query_len, case.key_len, **BLOCKS, **options)
    assert torch.equal(got, blocks_of(visible.long(), **BLOCKS)[:, 0])


@in_every_situation
@with_every_variant
@pytest.mark.parametrize("name", methods.available())
def test_plan_recall_is_the_mass_inside_the_plan(name: str, variant: str, situation: str) -> None:
    case, options = poisoned_case(situation, 130), VARIANTS[variant]
    # Padding queries are NaN here only: estimators may pool whatever lies in a padding row.
    q = case.q.nan_to_num()
    small: dict[str, dict[str, Any]] = {
        "a_shape": {"sink": 3, "window": 20},
        "tri_shape": {"sink": 3, "window": 20, "last": 9},
        "vertical_slash": {"vertical_size": 9, "slash_size": 20},
        "minference": {"vertical_size": 9, "slash_size": 20},
        "block_sparse": {"blocks": 1},
    }
    method = methods.create(name, **small.get(name, {}))
    plan = method.plan(q, case.k, scale=case.scale, extent=case.extent, layer=0).with_limit(options.get("limit"))
    check_recall(case, plan, options)


@pytest.mark.parametrize("seed", range(6))
def test_plan_recall_of_random_plans(seed: int) -> None:
    case = poisoned_case("chunked", 130)
    size: dict[str, Any] = {"query_len": case.query_len, "key_len": case.key_len}
    plan = random_plan(seed, batch=1, heads=(2, 4)[seed % 2], permuted=seed % 3 == 0, **size, **BLOCKS)
    check_recall(case, plan, {"sinks": SINKS})


def check_recall(case: Case, plan: SparsePlan, options: dict[str, Any]) -> None:
    matrix = softmax_matrix(case, **options)
    inside = (matrix * plan.to_mask().repeat_interleave(HEADS // plan.heads, 1)).sum(-1)
    live = exact.live_rows(case.extent, case.query_len)[:, None]
    sink = live.double() - matrix.sum(-1)
    expected = ((inside + sink) * live).sum(-1) / live.sum(-1)
    softening: dict[str, Any] = {name: value for name, value in options.items() if name != "limit"}
    got = exact.plan_recall(case.q, case.k, plan, dense_lse(case, **options), scale=case.scale, **softening)
    torch.testing.assert_close(got.double(), expected, **TOLERANCE)


def block_plan(case: Case, heads: int, share: float, limit: int | None = None) -> SparsePlan:
    """Blocks by chance, and the diagonal ones."""
    shape = (-(-case.query_len // 16), -(-case.key_len // 24))
    own = exact.visible_pairs(case.extent, case.query_len, case.key_len, **BLOCKS, limit=1) > 0
    chosen = torch.rand(case.extent.batch, heads, *shape, generator=torch.Generator().manual_seed(1)) < share
    mask = chosen | own[:, None]
    return SparsePlan.from_block_mask(mask, case.query_len, case.key_len, extent=case.extent, limit=limit, **BLOCKS)


@in_every_situation
@pytest.mark.parametrize("heads", [GROUPS, HEADS])
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_the_oracle_beats_a_plan_with_as_many_blocks(variant: str, heads: int, situation: str) -> None:
    case, options = poisoned_case(situation, 250), VARIANTS[variant]
    limit, softcap, sinks = options.get("limit"), options.get("softcap"), options.get("sinks")
    plan = block_plan(case, heads, 0.2, limit)
    lse = dense_lse(case, **options)
    where: dict[str, Any] = {"extent": case.extent, "limit": limit, **BLOCKS}
    mass = exact.block_mass(case.q, case.k, lse, scale=case.scale, softcap=softcap, **where)
    counts = exact.block_counts(plan)
    mask = exact.oracle_blocks(mass, counts, query_len=case.query_len, key_len=case.key_len, **where)
    assert torch.equal(mask.sum((2, 3)), counts)
    own = exact.visible_pairs(case.extent, case.query_len, case.key_len, **BLOCKS, limit=1) > 0
    assert bool((mask | ~own[:, None]).all())

    rows = exact.live_rows(case.extent, case.query_len).sum(1)
    best = exact.oracle_recall(mass, mask, rows)
    recall = exact.plan_recall(case.q, case.k, plan, lse, scale=case.scale, sinks=sinks, softcap=softcap)
    # A plan that is shared by a group is judged by the group.
    assert bool((best.unflatten(1, (heads, -1)).mean(2) >= recall.unflatten(1, (heads, -1)).mean(2)).all())
    ours = SparsePlan.from_block_mask(mask, case.query_len, case.key_len, extent=case.extent, limit=limit, **BLOCKS)
    again = exact.plan_recall(case.q, case.k, ours, lse, scale=case.scale, sinks=sinks, softcap=softcap)
    torch.testing.assert_close(again, best, **TOLERANCE)


def test_the_oracle_picks_the_heaviest_blocks() -> None:
    mass = torch.tensor([[4.0, 0, 0, 0], [3.0, 1, 0, 0], [2.9, 3.1, 0, 0], [0, 0, 3.2, 0]])[None, None]
    size: dict[str, Any] = {
        "extent": Extent.full(1, 64, 64),
        "query_len": 64,
        "key_len": 64,
        "block_q": 16,
        "block_k": 16,
    }
    mask = exact.oracle_blocks(mass, torch.tensor([[6]]), **size)
    assert mask[0, 0].nonzero().tolist() == [[0, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]


def test_more_blocks_than_there_are_give_them_all() -> None:
    case = poisoned_case("no padding", 130)
    size: dict[str, Any] = {"extent": case.extent, "query_len": 130, "key_len": 130, **BLOCKS}
    mask = exact.oracle_blocks(torch.rand(1, HEADS, 9, 6), torch.full((1, HEADS), 1000), **size)
    assert torch.equal(mask, (exact.visible_pairs(**size) > 0)[:, None].expand(1, HEADS, 9, 6))


def test_counts_for_another_number_of_heads_are_an_error() -> None:
    size: dict[str, Any] = {
        "extent": Extent.full(1, 64, 64),
        "query_len": 64,
        "key_len": 64,
        "block_q": 16,
        "block_k": 16,
    }
    with pytest.raises(ValueError, match=r"a divisor of 4, got \(1, 3\)"):
        exact.oracle_blocks(torch.rand(1, 4, 4, 4), torch.ones(1, 3, dtype=torch.int64), **size)


def test_mass_of_another_block_size_is_an_error() -> None:
    size: dict[str, Any] = {
        "extent": Extent.full(1, 64, 64),
        "query_len": 64,
        "key_len": 64,
        "block_q": 16,
        "block_k": 16,
    }
    with pytest.raises(ValueError, match=r"\(2, 2\) blocks.*give \(4, 4\)"):
        exact.oracle_blocks(torch.rand(1, 4, 2, 2), torch.ones(1, 4, dtype=torch.int64), **size)


def test_a_plan_of_bands_is_worth_the_blocks_that_its_pairs_fill() -> None:
    plan = SparsePlan(1, 256, 256, Extent.full(1, 256, 256), block_q=64, block_k=64, window=[129])
    diagonal = 4 * (64 * 65 // 2)
    full = (int(plan.count_pairs()) - diagonal) // (64 * 64)
    assert full > 0
    assert exact.block_counts(plan).tolist() == [[4 + full]]


def test_a_batch_row_without_queries_has_recall_one() -> None:
    q, k = torch.randn(2, HEADS, 40, DIM), torch.randn(2, GROUPS, 40, DIM)
    extent = Extent([-40, 0], [40, 0], [0, 40])
    plan = SparsePlan(GROUPS, 40, 40, extent, window=5)
    lse = exact.log_sum_exp(q, k, scale=0.25, extent=extent)
    got = exact.plan_recall(q, k, plan, lse, scale=0.25)
    assert bool((got[0] == 1).all())
    assert bool((got[1] < 1).all())
