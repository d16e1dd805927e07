"""Scores by labels and collisions of hashes in C++ against their definitions, on every instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpu_checks import every_kernel, needs_kernels, poisoned, same_on_threads
from stored_calls import step
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.backends import cpu
from gossamer.backends import torch as reference
from gossamer.backends.cpu import native
from gossamer.summaries import Labels, LabelSet

pytestmark = [needs_kernels, poisoned]


@pytest.fixture(autouse=True)
def force(monkeypatch, request):
    if "isa" in request.fixturenames:
        monkeypatch.setenv(cpu.ENVIRONMENT, request.getfixturevalue("isa"))


def labels_of(call: AttentionCall, count: int, bits: int, heads: int | None = None) -> LabelSet:
    assert call.store is not None
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randperm(call.q.shape[3], generator=draw).tolist() for _ in range(heads or 0)]
    return call.store.summary(Labels(count, bits, tuple(map(tuple, rows)) or None))


@every_kernel
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize(
    ("groups", "share", "dim", "count", "apart"),
    [(2, 4, 64, 8, False), (1, 7, 20, 5, False), (3, 1, 80, 80, False), (2, 5, 128, 17, True), (1, 1, 8, 1, False)],
)
def test_scores(
    isa: str, dtype: torch.dtype, bits: int, groups: int, share: int, dim: int, count: int, apart: bool
) -> None:
    """Odd numbers of tokens, channels and heads; channels for each query head; fp16 labels of fp16 keys."""
    call = step(groups=groups, share=share, dim=dim, dtype=dtype)
    labels = labels_of(call, count, bits, groups * share if apart else groups)
    found, wanted = (backend.label_scores(call, labels) for backend in (cpu, reference))
    assert found.shape == (2, groups * share, 333)
    assert torch.equal(found == -torch.inf, wanted == -torch.inf)
    live = wanted > -torch.inf
    torch.testing.assert_close(found[live], wanted[live], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("keys", [1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_few_tokens(keys: int, bits: int) -> None:
    call = step(keys, padding=(0,), dim=12)
    labels = labels_of(call, 3, bits)
    torch.testing.assert_close(
        cpu.label_scores(call, labels), reference.label_scores(call, labels), rtol=1e-5, atol=1e-5
    )


@every_kernel
@pytest.mark.parametrize("bits", [4, 16])
def test_scores_depend_on_a_row_alone(isa: str, dtype: torch.dtype, bits: int) -> None:
    """Bit for bit: not on threads, and not on who else is in the batch."""
    call = step(9000, padding=(0, 130), dim=16, dtype=dtype)
    labels = labels_of(call, 8, bits)
    found = same_on_threads(lambda: cpu.label_scores(call, labels))
    alone = AttentionCall(call.q[:1], call.k[:1], call.k[:1], Extent([8999], [1], [0], [9000]))
    own = [None if x is None else x[:1] for x in (labels.codes, labels.channels, labels.low, labels.step)]
    assert torch.equal(cpu.label_scores(alone, LabelSet(*own)), found[:1])  # type: ignore[arg-type]


def hashes(batch: int, groups: int, share: int, tiles: int, tables: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tables)
    codes = torch.randint(-3, 3, (batch, groups, tiles, tables, 64), generator=draw, dtype=torch.int16)
    return torch.randint(-3, 3, (batch, groups * share, tables), generator=draw, dtype=torch.int16), codes


@every_kernel
@pytest.mark.parametrize(
    ("batch", "groups", "share", "tiles", "tables"),
    [(2, 2, 4, 3, 150), (1, 1, 7, 1, 1), (3, 2, 1, 40, 20), (1, 1, 1, 0, 3)],
)
def test_collisions(isa: str, dtype: torch.dtype, batch: int, groups: int, share: int, tiles: int, tables: int) -> None:
    queries, codes = hashes(batch, groups, share, tiles, tables)
    found = same_on_threads(lambda: cpu.collisions(queries, codes))
    assert torch.equal(found, reference.collisions(queries, codes))
    one = queries[-1, -1, None, :, None] == codes[-1, -1]
    assert torch.equal(found[-1, -1].long(), one.sum(dim=1).flatten())


def test_collisions_of_a_part_of_what_there_is_room_for() -> None:
    queries, codes = hashes(2, 2, 2, 9, 12)
    assert torch.equal(cpu.collisions(queries, codes[:, :, :4]), reference.collisions(queries, codes)[..., :256])


def test_sizes_are_checked() -> None:
    call = step(40, dim=8)
    labels = labels_of(call, 4, 8)
    for wrong, message in (
        (replace(labels, channels=labels.channels[..., :3]), "rows of labels"),
        (replace(labels, low=None, step=None), "have lows and steps"),
        (replace(labels, low=labels.codes[:, :, 0].bfloat16()[..., :9]), "steps"),
        (replace(labels, step=torch.zeros(2, 2, 40)), "steps of labels are bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.label_scores(call, wrong)
    queries, codes = hashes(2, 2, 2, 3, 12)
    with pytest.raises(ValueError, match="codes of queries"):
        cpu.collisions(queries[:, :, :5], codes)
    with pytest.raises(TypeError, match="int16"):
        cpu.collisions(queries.int(), codes)
    kernels = native.kernels()
    with pytest.raises(ValueError, match="four dimensions"):
        kernels.Labels(codes=0, shape=[1, 2], strides=[1, 1, 1], type=kernels.LabelType.uint8)
