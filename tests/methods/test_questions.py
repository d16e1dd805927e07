"""A question about something far away is itself read sparsely: at the prompt's end, before a long suffix, in chunks.

Methods that choose by the last queries look good where the question is among them, and only there. What each promises
stands in the table of docs/methods.md, which is read here and held. What is planted fills whole blocks, so that what
means of blocks lose is no part of it.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from listed import LISTED
from torch import Tensor

from gossamer import AttentionCall, Extent, methods
from gossamer.methods import Method, VerticalSlash
from gossamer.rotary import Rotary

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
HEADS, DIM = 2, 64  # query heads, which share a key/value head
TURNED = 16  # channels that rotate: what is planted lies in the others
CONTEXT, ASKED, ASKING, SUFFIX = 1280, 64, 32, 300  # tokens; the suffix is longer than any window of a probe here
NEEDLES = (704, 320, 1024)  # where they begin
FIRST, SUBJECT = 3, 4  # what else is looked at: the first tokens by all queries, the subject by those of the suffix
LOGIT = 14.0  # of a query and a key that belong together; of others it is near 0

_SLASHES = {"vertical_size": 100, "slash_size": 300}
_FLEX = {"block": 32, "min_budget": 128}
_BLOCKS = {"sink_blocks": 1, "window_blocks": 2, "block_k": 64}
_STEM = {"share": 0.1, "extra": 0, "full_blocks": 0, "dense_layers": 0, "block": 32, "stride": 4}
# Published thresholds, in small blocks; others are as in `LISTED`.
FIELDS: dict[str, dict[str, Any]] = {
    "auto": {"window": 40, "group": 2, "block": 32},
    "vertical_slash": _SLASHES,
    "vertical_slash(exact=true)": _SLASHES | {"exact": True},
    "mtraining": {"p": 0.9},
    "longgen": {"recent": 2, "block": 32},
    "minference": _SLASHES,
    "mminference": {"patterns": [VerticalSlash(100, 300)]},
    "flexprefill(tau=0)": _FLEX | {"tau": 0.0},
    "flexprefill(tau=1)": _FLEX | {"tau": 1.0, "gamma": 0.98},
    "xattention": {"stride": 8, "block": 32},
    "anchor_attention": {"theta": 4.0, "step": 2, "first_blocks": 1, "block": 32},
    "vec_attention": {"block": 32},
    "max_relative": _BLOCKS | {"last_rows": 256, "block_q": 32},
    "flash_prefill": _BLOCKS | {"last_tiles": 2},
    "flash_prefill(version=1)": _BLOCKS | {"version": 1, "last_tiles": 2, "tile_rows": 32},
    "sparge": {"similarity": 0.0, "p": 0.99, "block_q": 32, "block_k": 32},
    "prism": {"p_high": 0.8, "p_low": 0.8, "block": 32},
    "stem": _STEM,
    "cosa": {"block": 32},
    "pbs": {"segment": 64, "block": 32},
    "pbs(plus=true)": {"segment": 64, "block": 32, "plus": True},
    "seer_attention": {"threshold": 0.005},
    "seer_attention(share=0.3)": {"share": 0.3},
}


def promised() -> dict[str, list[str]]:
    """Of each method in the table: what becomes of a question at the end, before a suffix, and of several as chunks."""
    lines = PAGE.read_text(encoding="utf-8").partition("## Where the question stands")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {name: cells for names, *cells in rows for name in re.findall(r"`([^`]+)`", names)}


PROMISED = promised()
every_method = pytest.mark.parametrize("name", PROMISED)


def create(name: str) -> Method:
    of_heads = {listed.name: listed for listed in LISTED}
    known = FIELDS.get(name)
    return of_heads[name].create(HEADS) if known is None else methods.create(name.partition("(")[0], **known)


def direction(number: int) -> Tensor:
    x = torch.zeros(DIM)
    x[TURNED + number] = math.sqrt(LOGIT * math.sqrt(DIM))
    return x


def prompt(asked: list[int], suffix: int = 0) -> tuple[Tensor, Tensor, list[range]]:
    """q, k, and the rows of questions about needles, one after the other between the context and the suffix."""
    length = CONTEXT + len(asked) * ASKING + suffix
    generator = torch.Generator().manual_seed(0)
    q = 0.3 * torch.randn(1, HEADS, length, DIM, generator=generator) + 0.8 * direction(FIRST)
    k = 0.3 * torch.randn(1, 1, length, DIM, generator=generator)
    for number, first in ((FIRST, 0), (SUBJECT, 128), *enumerate(NEEDLES)):
        k[:, :, first : first + ASKED] += direction(number)
    q[:, :, length - suffix :] += direction(SUBJECT)
    rows = [range(CONTEXT + n * ASKING, CONTEXT + (n + 1) * ASKING) for n in range(len(asked))]
    for needle, own in zip(asked, rows, strict=True):
        q[:, :, own.start : own.stop] += direction(needle)
    return q, k, rows


def kept(method: Method, q: Tensor, k: Tensor, chunk: range, rows: range) -> Tensor:
    """Share of what some rows attend that the plan of a chunk of the prompt computes: ``[H]``."""
    queries, keys = q[:, :, chunk.start : chunk.stop], k[:, :, : chunk.stop]
    extent = Extent([chunk.start], [len(chunk)], [0], [chunk.stop])
    call = AttentionCall(queries, keys, keys, extent, layer=0, rotary=Rotary.of_base(TURNED))
    plan = method.plan(call)
    assert method.name == "dense" or len(chunk) < CONTEXT or plan.density() < 0.7
    logits = call.scale * q[0, :, rows.start : rows.stop] @ keys[0].transpose(-1, -2)
    later = torch.arange(chunk.stop) > torch.tensor(rows)[:, None]
    attended = logits.masked_fill(later, -math.inf).softmax(dim=-1)
    return (attended * plan.rows_mask(torch.tensor(rows) - chunk.start)[0]).sum(dim=-1).mean(dim=-1)


def assert_as_promised(shares: Tensor, promise: str) -> None:
    worst, best = float(shares.min()), float(shares.max())
    fits = {"found": worst >= 0.9, "lost": best <= 0.1, "by full heads": worst <= 0.1 and best >= 0.9}
    assert fits[promise], f"promised: {promise}; heads keep {shares.tolist()} of what the question attends"


def test_every_method_says_what_becomes_of_the_question() -> None:
    others = {"per_head", "grid"}  # as the methods that it holds; what repeats, in a prompt that is read in one piece
    assert {name.partition("(")[0] for name in PROMISED} == set(methods.available()) - others
    assert set(FIELDS) <= set(PROMISED)


@pytest.mark.parametrize("first", [0, 1000], ids=["one piece", "chunk"])
@every_method
def test_a_question_at_the_end(name: str, first: int) -> None:
    q, k, (rows,) = prompt([0])
    assert_as_promised(kept(create(name), q, k, range(first, rows.stop), rows), PROMISED[name][0])


@pytest.mark.parametrize("first", [0, 1000], ids=["one piece", "chunk"])
@every_method
def test_a_question_before_a_suffix_that_is_longer_than_the_probe(name: str, first: int) -> None:
    q, k, (rows,) = prompt([0], SUFFIX)
    assert_as_promised(kept(create(name), q, k, range(first, q.shape[2]), rows), PROMISED[name][1])


@every_method
def test_several_questions_as_chunks_on_one_prefix(name: str) -> None:
    q, k, questions = prompt([0, 1, 2])
    method = create(name)
    shares = torch.stack([kept(method, q, k, rows, rows) for rows in questions])
    for own in shares if PROMISED[name][2] != "lost" else [shares]:
        assert_as_promised(own, PROMISED[name][2])


def test_a_probe_that_reaches_the_question_finds_what_it_asks_for() -> None:
    """What is lost before a suffix is lost by the window alone."""
    q, k, (rows,) = prompt([0], SUFFIX)
    method = VerticalSlash(vertical_size=220, slash_size=300, last=SUFFIX + ASKING)
    assert_as_promised(kept(method, q, k, range(q.shape[2]), rows), "found")


def test_of_several_questions_in_one_piece_a_probe_finds_those_in_its_window() -> None:
    q, k, questions = prompt([0, 1, 2])
    shares = [
        kept(VerticalSlash(vertical_size=100, slash_size=300, last=64), q, k, range(q.shape[2]), rows)
        for rows in questions
    ]
    for share, promise in zip(shares, ("lost", "found", "found"), strict=True):
        assert_as_promised(share, promise)
