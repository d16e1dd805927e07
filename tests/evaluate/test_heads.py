"""Each pattern is recognised where it was built in; the figures are those of the model's own attention weights."""

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from gossamer import AttentionCall, Extent
from gossamer.evaluate.heads import PATTERNS, HeadReport, attention_map, describe_heads, heads_record, inspect_model

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

TOKENS, DIM = 2048, 64
COLUMNS = [300, 611, 1100]
DISTANCE = 300
BUILT = ("sink", "local", "vertical", "slash", "block", "diffuse")


def by_distance(distance: int) -> tuple[Tensor, Tensor]:
    """Queries and keys whose logits peak at one distance: phases that agree there only."""
    frequency = torch.rand(DIM // 2, generator=torch.Generator().manual_seed(0)) * 3.0
    phase = torch.arange(TOKENS)[:, None] * frequency
    late = phase + distance * frequency
    return torch.cat([phase.cos(), phase.sin()], 1), torch.cat([late.cos(), late.sin()], 1)


def built_in() -> AttentionCall:
    """One head for each of `BUILT`."""
    q, k = torch.zeros(2, 1, len(BUILT), TOKENS, DIM).unbind()
    q[0, 0, :, 0] = 1.0
    k[0, 0, 0, 0] = 14.0
    q[0, 1], k[0, 1] = by_distance(0)
    q[0, 2, :, 0] = 1.0
    k[0, 2, COLUMNS, 0] = 12.0
    q[0, 3], k[0, 3] = by_distance(DISTANCE)
    block = torch.arange(TOKENS) // 64
    chosen = (torch.rand(32, generator=torch.Generator().manual_seed(1)) * (torch.arange(32) + 1)).long()
    k[0, 4, torch.arange(TOKENS), block] = 12.0
    q[0, 4, torch.arange(TOKENS), chosen[block]] = 1.0
    return call_of(q, k)


def call_of(q: Tensor, k: Tensor, extent: Extent | None = None, **fields: Any) -> AttentionCall:
    given: dict[str, Any] = {"scale": 1.0} | fields
    return AttentionCall.of(q, k, extent=extent, layer=3, **given)


@pytest.fixture(scope="module")
def reports() -> list[HeadReport]:
    return describe_heads(built_in())


@pytest.mark.parametrize("rows", [None, 1024])
def test_each_pattern_is_recognised(rows: int | None) -> None:
    reports = describe_heads(built_in(), rows=rows)
    assert tuple(report.pattern for report in reports) == BUILT
    assert [(report.layer, report.head) for report in reports] == [(3, head) for head in range(6)]


def test_masses_are_shares_and_the_built_in_pattern_explains_the_most(reports: list[HeadReport]) -> None:
    for report in reports:
        assert tuple(report.mass) == PATTERNS
        assert all(0 <= share <= 1 for share in report.mass.values())
    for name, report in zip(BUILT[:-1], reports[:-1], strict=True):
        assert report.mass[name] > 0.75


def test_the_budget_is_that_of_the_local_window(reports: list[HeadReport]) -> None:
    window = TOKENS // 32
    pairs = window * TOKENS - window * (window - 1) / 2
    for report in reports:
        assert report.budget == pytest.approx(pairs / (TOKENS * (TOKENS + 1) / 2))


def test_an_even_head_is_explained_by_each_pattern_as_far_as_its_budget_goes(reports: list[HeadReport]) -> None:
    # Row i gives each of its i + 1 keys the same, so 64 keys hold min(1, 64 / (i + 1)).
    expected = float((64 / (torch.arange(TOKENS) + 1.0)).clamp(max=1.0).mean())
    assert reports[5].mass["sink"] == pytest.approx(expected, rel=1e-4)
    assert reports[5].mass["local"] == pytest.approx(expected, rel=1e-4)


def test_specifics_name_the_places(reports: list[HeadReport]) -> None:
    sink, local, vertical, slash, block, _ = reports
    assert sink.columns[0] == (0, pytest.approx(sink.first_token))
    assert sink.first_token > 0.99
    assert local.window <= 3
    assert local.diagonals[0][0] == 0
    assert sorted(position for position, _ in vertical.columns[:3]) == COLUMNS
    assert slash.diagonals[0][0] == DISTANCE
    assert slash.diagonals[0][1] > 0.7
    assert slash.window > DISTANCE
    # A block that has all attention of its 64 queries.
    assert block.blocks[0][2] == pytest.approx(64 / TOKENS, rel=0.05)
    query_block, key_block, _ = block.blocks[0]
    assert 0 < key_block < query_block - 1


def test_a_short_prompt_has_a_small_budget() -> None:
    (report,) = describe_heads(call_of(torch.zeros(1, 1, 80, 8), torch.zeros(1, 1, 80, 8)))
    assert report.pattern == "diffuse"
    assert report.budget < 0.25


def weights_of(call: AttentionCall) -> Tensor:
    """fp64 softmax weights ``[H, S, T]`` of a call without padding, sinks left out after the softmax."""
    share = call.q.shape[1] // call.k.shape[1]
    logits = call.q[0].double() @ call.k[0].double().repeat_interleave(share, 0).transpose(-1, -2) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    visible = call.extent.allowed(torch.arange(call.query_len), call.key_len)[0]
    logits = logits.masked_fill(~visible, float("-inf"))
    if call.sinks is None:
        return logits.softmax(-1)
    extra = call.sinks.double()[:, None, None].expand(-1, logits.shape[1], 1)
    return torch.cat([logits, extra], -1).softmax(-1)[..., :-1]


def random_call(**fields: Any) -> AttentionCall:
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(1, 4, 500, 16, generator=generator)
    k = torch.randn(1, 2, 700, 16, generator=generator)
    return call_of(q, k, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"limit": 90},
        {"sinks": torch.tensor([0.0, 1.0, 4.0, 7.0])},
        {"softcap": 2.0},
        {"causal": False},
        {"causal": False, "limit": 90},
    ],
    ids=["plain", "limit", "sinks", "softcap", "both directions", "both directions, limit"],
)
def test_figures_are_those_of_the_attention_weights(fields: dict[str, Any]) -> None:
    call = random_call(**fields)
    weights = weights_of(call)
    on_keys = weights.sum((1, 2))
    distance = (call.extent.query_positions(500)[0, :, None] - torch.arange(700)).abs()
    visible = call.extent.allowed(torch.arange(500), 700)[0]
    near = visible & (distance < 64)
    for report, rows, total in zip(describe_heads(call), weights, on_keys, strict=True):
        assert report.first_token == pytest.approx(float(rows[:, 0].sum() / total), abs=1e-5)
        assert report.first_tokens == pytest.approx(float(rows[:, :64].sum() / total), abs=1e-5)
        assert report.mass["local"] == pytest.approx(float(rows[near].sum() / total), 1e-4)
        assert report.budget == pytest.approx(float(near.sum() / visible.sum()))
        assert report.sink_logit == pytest.approx(1 - float(total) / 500, abs=1e-5)
        within = float(rows[distance < report.window].sum() / total)
        assert within >= 0.9 - 1e-5
        position, share = report.columns[0]
        assert share == pytest.approx(float(rows.sum(0).max() / total), rel=1e-4)
        assert float(rows[:, position].sum() / total) == pytest.approx(share, rel=1e-4)
    if "sinks" not in fields:
        assert {report.sink_logit for report in describe_heads(call)} == {0.0}


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("pad", [37, 128])
def test_padding_is_left_out(pad: int, left: bool) -> None:
    call = built_in()
    nan = torch.full((1, 6, pad, DIM), float("nan"))
    extent = Extent([-pad if left else 0], [TOKENS], [pad if left else 0], [TOKENS])
    q, k = (torch.cat([nan, tensor] if left else [tensor, nan], 2) for tensor in (call.q, call.k))
    padded = call_of(q, k, extent)
    for report, plain in zip(describe_heads(padded), describe_heads(call), strict=True):
        assert report.pattern == plain.pattern
        assert report.mass == pytest.approx(plain.mass, abs=1e-4)
        assert report.window == plain.window
        assert report.columns[0][0] == plain.columns[0][0]
        assert report.blocks[0][:2] == plain.blocks[0][:2]
    assert torch.equal(attention_map(padded, 4), attention_map(call, 4))


def test_blocks_of_a_chunk_count_from_the_prompts_first_token() -> None:
    call = built_in()
    chunk = call_of(call.q[:, :, 1024:], call.k)
    whole, late = (describe_heads(one, top=500)[4].blocks for one in (call, chunk))
    assert late
    # Shares are of other masses.
    assert {place[:2] for place in late if place[2] > 1e-2} == {
        place[:2] for place in whole if place[0] >= 16 and place[2] > 5e-3
    }


def test_rows_of_a_batch_are_described_one_at_a_time() -> None:
    first, second = random_call(), random_call(scale=0.1)
    q, k = torch.cat([first.q, first.q * 0.1]), torch.cat([first.k, first.k])
    both = call_of(q, k)
    assert [r.mass for r in describe_heads(both, row=1)] == [
        {name: pytest.approx(share, abs=1e-5) for name, share in r.mass.items()} for r in describe_heads(second)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row": 1}, "1 batch rows, got row 1"),
        ({"heads": [4]}, "heads 0 to 3, got 4"),
        ({"heads": [-1, 2]}, "heads 0 to 3, got -1"),
        ({"rows": 0}, "rows=0"),
        ({"top": -1}, "top=-1"),
        ({"map_size": 0}, "size of at least 1, got 0"),
    ],
)
def test_what_a_call_does_not_have_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_heads(random_call(), **arguments)


def test_attention_that_is_not_finite_is_an_error() -> None:
    call = random_call()
    call.k[0, 0, 5, 0] = float("nan")
    with pytest.raises(ValueError, match="is not finite"):
        describe_heads(call)


def test_nothing_but_padding_is_an_error() -> None:
    q, k = torch.zeros(1, 2, 20, 8), torch.zeros(1, 1, 20, 8)
    with pytest.raises(ValueError, match="no live query that sees a key"):
        describe_heads(call_of(q, k, Extent([-20], [0], [20], [0])))


@pytest.mark.parametrize(
    "fields", [{}, {"limit": 90}, {"sinks": torch.tensor([0.0, 1.0, 4.0, 7.0])}, {"causal": False}]
)
def test_a_map_shows_the_mean_weight_of_each_tile(fields: dict[str, Any]) -> None:
    # 8 queries a tile: all of them are looked at.
    call = random_call(**fields)
    extent = Extent([200], [400], [0], [600], limit=fields.get("limit"), causal=fields.get("causal", True))
    call = replace(call, q=call.q[:, :, :400], extent=extent, k=call.k[:, :, :600])
    weights = weights_of(call)[1]
    visible = (weights_of(replace(call, q=call.q * 0, sinks=None))[1] > 0).double()
    tiles, pairs = (x.view(50, 8, 50, 12).sum((1, 3)) for x in (weights, visible))
    mean = tiles / pairs.clamp(min=1)
    expected = (255 * (1 + (mean / mean.max()).log10() / 3).clamp(0, 1)).round()
    got = attention_map(call, 1, 50)
    assert got.dtype == torch.uint8
    assert int((got - expected).abs().max()) <= 1
    assert int(got.max()) == 255


def test_a_map_shows_a_line_at_its_place() -> None:
    call = built_in()
    assert bool((attention_map(call, 0)[:, 0] > 150).all())
    slash = attention_map(call, 3).float()
    tile = TOKENS // 64
    assert bool((slash.diagonal(-DISTANCE // tile) > 150).all())
    assert int(attention_map(call, 3).triu(1).max()) == 0


def test_a_map_of_few_tokens_has_a_tile_for_each() -> None:
    assert attention_map(call_of(torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 9, 8)), 0).shape == (9, 9)


def test_a_record_holds_what_the_format_says() -> None:
    reports = describe_heads(random_call(), heads=[1, 3], map_size=16)
    record = json.loads(json.dumps(heads_record(reports, run="a", task="text", length=500, index=0), allow_nan=False))
    assert (record["kind"], record["run"], record["length"]) == ("heads", "a", 500)
    assert [(head["layer"], head["head"]) for head in record["heads"]] == [(3, 1), (3, 3)]
    assert set(record["heads"][0]["mass"]) == set(PATTERNS)
    assert [len(base64.b64decode(picture["data"])) for picture in record["maps"]] == [256, 256]
    assert base64.b64decode(record["maps"][0]["data"]) == attention_map(random_call(), 1, 16).numpy().tobytes()


SIZE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize("make", [LlamaConfig, Qwen3Config])
def test_a_model_end_to_end(make: type) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make(**SIZE), attn_implementation="eager").eval()
    ids = torch.randint(0, 96, (1, 200))
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    reports = inspect_model(model, ids, map_size=8)
    assert [(r.layer, r.head) for r in reports] == [(layer, head) for layer in range(3) for head in range(4)]
    for report in reports:
        own = weights[report.layer][0, report.head].double()
        assert report.first_token == pytest.approx(float(own[:, 0].mean()), abs=1e-4)
        assert report.map is not None
        assert report.map.shape == (8, 8)
    assert model.config._attn_implementation == "eager"
    chosen = inspect_model(model, ids, layers=[1], heads=[0, 2])
    assert [(r.layer, r.head) for r in chosen] == [(1, 0), (1, 2)]
    assert chosen[1] == replace(reports[6])


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.long), ValueError, r"\[1, S\], got \(2, 5\)"),
        (torch.zeros(5, dtype=torch.long), ValueError, r"\(5,\)"),
        (torch.zeros(1, 5), TypeError, "float32"),
    ],
)
def test_bad_token_ids_are_an_error(ids: Tensor, error: type[Exception], message: str) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE))
    with pytest.raises(error, match=message):
        inspect_model(model, ids)


def test_layers_that_the_model_lacks_are_an_error() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE))
    with pytest.raises(ValueError, match=r"in layers \[7\]"):
        inspect_model(model, torch.zeros(1, 20, dtype=torch.long), layers=[7])
