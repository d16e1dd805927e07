"""Attention on encoded keys and values in C++, against the definition on what they decode to."""

from __future__ import annotations

import pytest
import torch
from cpu_checks import BF16_ISAS, ISAS
from encoded_calls import CODINGS, TOLERANCE, drawn
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.backends.cpu.native import ENVIRONMENT
from gossamer.backends.torch.attend import attend as definition
from gossamer.encoded import EncodedTokens


# Few queries run on fp32 kernels.
@pytest.fixture(autouse=True, params=[isa for isa in ISAS if isa not in BF16_ISAS])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ENVIRONMENT, request.param)
    return request.param


def check(call: AttentionCall, plan: SparsePlan | None = None) -> Tensor:
    """Our result, which is that of the definition on decoded tokens; nothing was decoded for ours."""
    plan = plan or SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
    out, lse = cpu.attend(call, plan)
    assert isinstance(call.k, EncodedTokens)
    assert call.k.at_hand() is call.k
    k, v = (x.rows() if isinstance(x, EncodedTokens) else x for x in (call.k, call.values))
    sinks = None if call.sinks is None else call.sinks.double()
    fields = call.extent, call.scale, sinks, call.softcap
    exact = AttentionCall(call.q.double(), k.double(), v.double(), *fields)
    expected, expected_lse = definition(exact, plan)
    bound = TOLERANCE[call.q.dtype]
    assert float((out.double() - expected).norm() / expected.norm()) < bound
    torch.testing.assert_close(lse.double(), expected_lse.double(), atol=bound, rtol=bound)
    return out


def fresh(call: AttentionCall) -> AttentionCall:
    """The same call of keys and values that nobody has read."""
    k, v = (EncodedTokens(x.encoded, x.tail) if isinstance(x, EncodedTokens) else x for x in (call.k, call.values))
    return AttentionCall(call.q, k, v, call.extent, call.scale, call.sinks, call.softcap)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_a_step_is_that_of_decoded_tokens(coding: str, dtype: torch.dtype, dim: int) -> None:
    group = 16 if dim == 80 else 32
    tails = (44, 40) if coding != "kivi4" else (12, 0)
    check(AttentionCall(*drawn(coding, dim=dim, dtype=dtype, group=group, tails=tails)))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (7, 1), (8, 1), (3, 1)])
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_heads_and_queries_share_what_is_read(coding: str, heads: int, groups: int, queries: int) -> None:
    check(AttentionCall(*drawn(coding, heads=heads, groups=groups, queries=queries)))


@pytest.mark.parametrize("coding", CODINGS)
def test_scale_cap_sinks_and_padding(coding: str) -> None:
    q, k, v = drawn(coding)
    live = torch.arange(300)[None] >= torch.tensor([0, 77])[:, None]
    extent = Extent.from_key_mask(live, 1)
    check(AttentionCall(q, k, v, extent, scale=0.3, softcap=5.0, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0])))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("tails", [(300 - 32, 300 - 1), (12, 0), (300 - 64, 300 - 65)])
def test_few_or_nearly_all_tokens_are_encoded(coding: str, tails: tuple[int, int]) -> None:
    check(AttentionCall(*drawn(coding, tails=tails)))


@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_small_groups(group: int) -> None:
    check(AttentionCall(*drawn("kivi2", group=group, tails=(44, 44))))


def test_keys_encoded_before_values_are() -> None:
    q, k, v = drawn("mustafar")
    check(AttentionCall(q, k, v.rows()))


def test_values_of_another_dimension() -> None:
    check(AttentionCall(*drawn("mustafar", dim=96, value_dim=64)))


@pytest.mark.parametrize("coding", CODINGS)
def test_chosen_tokens_and_pages(coding: str) -> None:
    q, k, v = drawn(coding, batch=1)
    call = AttentionCall(q, k, v)
    tokens = torch.tensor([0, 3, 64, 65, 130, 131, 132, 250, 255, 256, 260, 299], dtype=torch.int32)
    columns = torch.tensor([0, 12, 24]), tokens.repeat(2)
    check(call, SparsePlan(2, 1, 300, call.extent, column_indptr=columns[0], column_indices=columns[1]))
    indptr, indices = torch.tensor([0, 3, 5]), torch.tensor([0, 2, 4, 1, 3], dtype=torch.int32)
    bands = torch.tensor([2, 2], dtype=torch.int32), torch.tensor([9, 9], dtype=torch.int32)
    plan = SparsePlan(
        2, 1, 300, call.extent, block_indptr=indptr, block_indices=indices, sink=bands[0], window=bands[1]
    )
    check(fresh(call), plan)


@pytest.mark.parametrize("coding", CODINGS)
def test_many_queries_are_packed_from_what_is_encoded(coding: str) -> None:
    check(AttentionCall(*drawn(coding, queries=70)))


@pytest.mark.parametrize("name", [isa for isa in ISAS if isa in BF16_ISAS])
@pytest.mark.parametrize("queries", [1, 70])
def test_on_kernels_of_bf16(name: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, name)
    check(AttentionCall(*drawn("kivi4", queries=queries, dtype=torch.bfloat16)))


@pytest.mark.parametrize("coding", CODINGS)
def test_results_depend_on_neither_threads_nor_companions(coding: str) -> None:
    q, k, v = drawn(coding, tokens=2100, tails=(52, 40), batch=2)
    both = check(AttentionCall(q, k, v))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(cpu.attend(c := fresh(AttentionCall(q, k, v)), _dense(c))[0], both)
    finally:
        torch.set_num_threads(threads)
    one, other = (EncodedTokens(x.encoded.like([t[1:] for t in x.encoded.tensors]), x.tail[1:]) for x in (k, v))
    call = AttentionCall(q[1:], one, other)
    assert torch.equal(cpu.attend(call, _dense(call))[0], both[1:])


def _dense(call: AttentionCall) -> SparsePlan:
    return SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)


def test_heads_of_it() -> None:
    q, k, v = drawn("kivi4", tails=(44, 40))
    call = AttentionCall(q, k, v)
    whole = check(call)
    part = fresh(call).of_groups([1])
    assert torch.equal(cpu.attend(part, _dense(part))[0], whole[:, 2:])


def test_room_behind_encoded_tokens_is_not_read() -> None:
    """The tensors of a cache are views of longer ones."""
    q, k, v = drawn("mustafar", dtype=torch.bfloat16)
    expected = check(AttentionCall(q, k, v))

    def in_room(x: EncodedTokens) -> EncodedTokens:
        rooms = []
        for held in x.encoded.tensors:
            room = torch.full((*held.shape[:2], held.shape[2] + 9, held.shape[3]), 255).to(held.dtype)
            if room.is_floating_point():
                room.fill_(torch.nan)
            room[:, :, : held.shape[2]] = held
            rooms.append(room[:, :, : held.shape[2]])
        return EncodedTokens(x.encoded.like(rooms), x.tail)

    call = AttentionCall(q, in_room(k), in_room(v))
    assert torch.equal(cpu.attend(call, _dense(call))[0], expected)


def test_head_dimensions_that_kernels_do_not_know_are_decoded() -> None:
    q, k, v = drawn("mustafar", dim=40)
    call = AttentionCall(q, k, v)
    out, _ = cpu.attend(call, _dense(call))
    rows = AttentionCall(q, k.rows(), v.rows())
    assert torch.equal(out, cpu.attend(rows, _dense(rows))[0])


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = drawn("kivi4")
    scale = k.encoded.scale
    for change, error, message in (
        ({"scale": scale.double()}, TypeError, "numbers of that dtype"),
        ({"scale": scale[:, :, :-1]}, ValueError, "scales' rows"),
        ({"codes": k.encoded.codes[..., :-1]}, ValueError, "codes' numbers"),
    ):
        tensors = [change.get(name, getattr(k.encoded, name)) for name in ("codes", "scale", "zero")]
        call = AttentionCall(q, EncodedTokens(k.encoded.like(tensors), k.tail), v)
        with pytest.raises(error, match=message):
            cpu.attend(call, _dense(call))


def test_bitmaps_that_were_written_since_read_nothing_else() -> None:
    """Their tokens count as zeros, whatever the bits say."""
    q, k, v = drawn("mustafar")
    k.encoded.bitmap[:, :, 5:40] = 255
    k.encoded.bitmap[:, :, 255] = 255
    call = AttentionCall(q, k, v)
    out, _ = cpu.attend(call, _dense(call))
    assert bool(out.isfinite().all())
