"""What choices of blocks are held against: as many of the best blocks, of random ones, of the nearest ones."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods.base import Settings, require_at_least, require_share
from gossamer.methods.denoising import Denoising, kept_through, layout_of, mass_of_blocks, plan_of_mask, text_blocks
from gossamer.plan import Grid, SparsePlan, on_device
from gossamer.rules import top_k

__all__ = ["OracleBlocks", "RandomBlocks", "WindowBlocks"]


@dataclass(frozen=True)
class BlockBound(Denoising):
    """A share of the blocks of patches, each query block's own always among them.

    Text attends and is attended by all, beside the share, as in the other methods for images and videos. Where there
    are no patches, as in a language model, all tokens are treated alike.

    Fields:
        density: share of the blocks, rounded up.
        block: tokens of a query block and of a key block.
    """

    settings: ClassVar[Settings] = tuple({"density": density} for density in (0.1, 0.2, 0.4))
    density: float = 0.2
    block: int = 64

    def __post_init__(self) -> None:
        require_share(self, "density")
        require_at_least(self, 1, "block")

    @abstractmethod
    def _chosen(self, call: AttentionCall, grid: Grid, free: Tensor, own: Tensor) -> Tensor:
        """Bool ``[B, H, M, N]``.

        Args:
            free: the blocks that count, bool ``[B, M, N]`` on the CPU.
            own: each query block's own, bool ``[M, N]`` on the CPU; all of them are to be chosen.
        """

    def _plan(self, call: AttentionCall) -> SparsePlan:
        grid = Grid(call.extent, self.block, self.block)
        low, high = grid.key_block_ends()
        first, last = grid.queries.unbind(-1)
        rows, columns = text_blocks(call, grid)
        if not layout_of(call).patches:
            rows, columns = torch.zeros_like(rows), torch.zeros_like(columns)
        live = (last.minimum(call.extent.key_count[:, None]) > first)[:, :, None] & (high > low)[:, None]
        forced = rows[:, :, None] | columns[:, None]
        own = torch.eye(grid.query_blocks, grid.key_blocks, dtype=torch.bool, device="cpu")
        chosen = self._chosen(call, grid, live & ~forced, own)
        always = forced | (own & (high > low)[:, None])
        return plan_of_mask(call, chosen | on_device(always, chosen.device)[:, None], self.block)

    def _count(self, free: Tensor) -> Tensor:
        """Of so many blocks, int64."""
        # Rounded, since a product such as 0.2 * 5 lies above the integer that it means.
        return (self.density * free.double()).mul(1e9).round().div(1e9).ceil().long()


@dataclass(frozen=True)
class OracleBlocks(BlockBound):
    """The bound of choices by block: those with the most attention mass, exact, found anew in each call.

    A head spreads its blocks over all its query blocks as pays best. It computes every logit to find them and saves no
    time: what any other choice of as many blocks can be held against.
    """

    name: ClassVar[str] = "oracle_blocks"
    alone: ClassVar[bool] = True

    def plan(self, call: AttentionCall) -> SparsePlan:
        return self._plan(call)

    def _chosen(self, call: AttentionCall, grid: Grid, free: Tensor, own: Tensor) -> Tensor:
        mass = mass_of_blocks(call, grid)
        worth = mass.masked_fill(on_device(own, mass.device), float("inf"))
        worth = worth.masked_fill(~on_device(free, mass.device)[:, None], float("-inf"))
        count = self._count(free.sum(dim=(1, 2)))[:, None].expand(-1, call.heads)
        return top_k(worth.flatten(2), count).view(mass.shape)


@dataclass(frozen=True)
class WindowBlocks(BlockBound):
    """As many of the nearest blocks for each query block: of the same number at the ends, where they lie on one side.

    Near is near in the order of tokens, frame by frame. What any choice has to beat.
    """

    name: ClassVar[str] = "window_blocks"
    alone: ClassVar[bool] = True

    def plan(self, call: AttentionCall) -> SparsePlan:
        return kept_through(call, self, lambda: self._plan(call))

    def _chosen(self, call: AttentionCall, grid: Grid, free: Tensor, own: Tensor) -> Tensor:
        rows, keys = (torch.arange(n, device="cpu") for n in own.shape)
        near = -(rows[:, None] - keys).abs().float()
        worth = near.expand(free.shape).masked_fill(~free, float("-inf"))
        chosen = top_k(worth, self._count(free.sum(dim=2)))
        return chosen[:, None].to(call.device).expand(-1, call.groups, -1, -1)


@dataclass(frozen=True)
class RandomBlocks(BlockBound):
    """As many random blocks for each query block, others for each head and layer, the same through a sampling.

    Fields:
        seed: of what is drawn.
    """

    name: ClassVar[str] = "random_blocks"
    apart: ClassVar[bool] = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "seed")

    def plan(self, call: AttentionCall) -> SparsePlan:
        return kept_through(call, self, lambda: self._plan(call))

    def _chosen(self, call: AttentionCall, grid: Grid, free: Tensor, own: Tensor) -> Tensor:
        batch, queries, keys = free.shape
        worth = torch.zeros(batch, call.heads, queries, keys, device="cpu")
        for row, count in enumerate(call.extent.key_count.tolist()):  # each as by itself
            number = min(-(-count // self.block), queries, keys)
            generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + (call.layer or 0))
            drawn = torch.rand(call.heads, number, number, generator=generator, device="cpu")
            worth[row, :, :number, :number] = drawn
        worth = worth.masked_fill(own, float("inf")).masked_fill(~free[:, None], float("-inf"))
        counts = self._count(free.sum(dim=2))[:, None].expand(-1, call.heads, -1)
        return top_k(worth, counts).to(call.device)
