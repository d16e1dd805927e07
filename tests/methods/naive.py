"""What naive planners share: a call's blocks, token by token in positions, and how their choices are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from definitions import Row, rows_of
from torch import Tensor

from gossamer import AttentionCall, SparsePlan

__all__ = ["QueryBlock", "assert_chosen", "blocks_of", "cell_rows", "tokens"]

CellRow = dict[int, float]


class QueryBlock:
    """The live queries of one query block of a batch row.

    Attributes:
        number: global, by position.
        seen: key blocks of which some query may attend some key, each with its live positions.
        own: key blocks at the positions of the queries; of queries beyond the keys, the last one.
    """

    def __init__(self, row: Row, number: int, positions: list[int], block_k: int) -> None:
        self.number, self.positions = number, positions
        keys: dict[int, list[int]] = {}
        for key in range(row.key_count):
            keys.setdefault(key // block_k, []).append(key)
        self.seen = {n: own for n, own in keys.items() if any(row.allows(i, j) for i in positions for j in own)}
        self.own = {min(i, row.key_count - 1) // block_k for i in positions}


def blocks_of(row: Row, block_q: int, block_k: int) -> dict[int, QueryBlock]:
    """Query blocks by the plan's row."""
    found: dict[int, list[int]] = {}
    for position in row.positions():
        found.setdefault(position // block_q, []).append(position)
    first = max(row.query_start, 0) // block_q
    return {number - first: QueryBlock(row, number, queries, block_k) for number, queries in found.items()}


def tokens(x: Tensor, b: int, head: int, start: int, positions: list[int]) -> Tensor:
    """Those at some positions, where position 0 lies in slot ``start``: fp64 ``[n, D]``."""
    return x[b, head, [start + position for position in positions]].double()


def assert_chosen(
    call: AttentionCall, plan: SparsePlan, chosen: Callable[[int, Row, int, QueryBlock], set[int]]
) -> None:
    """A plan's key blocks are those that ``chosen(b, row, head, block)`` gives, of what each query block sees."""
    mask = plan.block_mask()
    for b, row in enumerate(rows_of(call.extent)):
        blocks = blocks_of(row, plan.block_q, plan.block_k)
        for head in range(plan.heads):
            for m in range(mask.shape[2]):
                got = set(mask[b, head, m].nonzero().flatten().tolist())
                expected = chosen(b, row, head, blocks[m]) & set(blocks[m].seen) if m in blocks else set()
                assert got == expected, (b, head, m)


def cell_rows(call: AttentionCall, b: int, row: Row, head: int, block: QueryBlock, stride: int) -> Iterator[CellRow]:
    """Logits of the cells that count, for each row of cells of a query block: the mean product on the antidiagonal."""
    group = head // call.share
    for t in sorted({i // stride for i in block.positions}):
        queries = {i: call.q[b, head, i - row.query_start].double() for i in row.positions() if i // stride == t}
        logits: CellRow = {}
        for u in range(-(-row.key_count // stride)):
            keys = {j: call.k[b, group, j + row.key_start].double() for j in range(row.key_count) if j // stride == u}
            if any(row.allows(i, j) for i in queries for j in keys):
                pairs = [((t + 1) * stride - 1 - n, u * stride + n) for n in range(stride)]
                products = [float(queries[i] @ keys[j]) for i, j in pairs if i in queries and j in keys]
                logits[u] = call.scale * sum(products) / stride
        yield logits
