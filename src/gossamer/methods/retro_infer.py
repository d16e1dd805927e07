"""RetroInfer: a decode step reads the tokens of the best clusters, and the next ones by their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods.base import Settings, require_at_least, require_share
from gossamer.methods.reduced import Reduced, Reducing, gathered, listed, reduced_call
from gossamer.plan import on_device
from gossamer.summaries import Clusters, ClusterSet

__all__ = ["RetroInfer"]


@dataclass(frozen=True)
class RetroInfer(Reducing):
    """RetroInfer (2505.02922, sections 4.1 and 4.2): exact attention to the best clusters, an estimate of the next.

    The middle of the cache is clustered by its keys (`gossamer.summaries.Clusters`). A step ranks the clusters by the
    sum, over the query heads of a key/value head, of the softmaxes of their centroids' logits. Of the best ones, a
    share ``probe`` of all, it attends every token; of the next, a share ``estimate``, the centroid, as if each of the
    cluster's ``n`` tokens had its key and their mean value: one key with the bias ``ln n``. The rest counts nothing.
    The first ``sinks`` tokens, the last ``local`` ones and those not in clusters yet are attended as they are. Prompts
    are not part of the method.

    Fields:
        size: tokens of a cluster, on average.
        segment: tokens within which clusters are sought.
        least: tokens that a cache has in clusters at least; a shorter one is read whole.
        update: tokens of an answer are clustered so many at a time.

    Defaults: the authors' but for ``least``, which is 16,384 there for batches below 8 and 8,192 for others.

    Deviation: what the store holds is not arranged by cluster, so that a step gathers single tokens.
    """

    name: ClassVar[str] = "retro_infer"
    needs: ClassVar[frozenset[str]] = frozenset({"store", "causal", "one query", "values"})
    settings: ClassVar[Settings] = tuple({"probe": probe} for probe in (0.009, 0.018, 0.036, 0.072, 0.144))
    probe: float = 0.018
    estimate: float = 0.232
    size: int = 16
    segment: int = 8192
    sinks: int = 4
    local: int = 64
    least: int = 8192
    update: int = 1024

    def __post_init__(self) -> None:
        require_share(self, "probe", "estimate")
        require_at_least(self, 0, "sinks")
        require_at_least(self, 1, "size", "segment", "local", "least", "update")

    def beside(self, dim: int, itemsize: int) -> float:
        return itemsize * dim / self.size + 4  # centroids, and whose each token is

    def least_density(self, call: AttentionCall) -> float:
        fewest = self.least + self.sinks + self.local
        return 1.0 if call.extent.longest < fewest else 0.0

    def reduce(self, call: AttentionCall) -> Reduced | None:
        assert call.store is not None
        clusters = call.store.summary(self.clusters(call))
        if not any(clusters.counts):
            return None
        probed, estimated = self._zones(call, clusters)
        index = listed(self._exact(call, clusters, probed))
        k, v = gathered(call, index)
        bias = torch.zeros(index.shape, device=call.device).masked_fill(index < 0, float("-inf"))
        some = estimated.clamp(min=0)
        means = [
            x.gather(2, some[..., None].expand(-1, -1, -1, x.shape[3])) for x in (clusters.centroids, clusters.means)
        ]
        weights = clusters.sizes.gather(2, some).float().log().masked_fill(estimated < 0, float("-inf"))
        k, v = (torch.cat([x, mean.to(x.dtype)], dim=2) for x, mean in zip((k, v), means, strict=True))
        return reduced_call(call, k, v, torch.cat([bias, weights], dim=2))

    def clusters(self, call: AttentionCall) -> Clusters:
        """What the cache of a call's layer keeps."""
        assert call.store is not None
        sinks, recent = max(self.sinks, call.store.sinks), max(self.local, call.store.recent)
        return Clusters(self.size, self.segment, sinks, recent, self.least, self.update)

    def _zones(self, call: AttentionCall, clusters: ClusterSet) -> tuple[Tensor, Tensor]:
        """Clusters that are read, bool ``[B, G, N]``, and that are estimated, ``[B, G, n]``, then ``-1``."""
        ranks, order = _shares(call, clusters).sort(dim=-1, descending=True, stable=True)
        counts = torch.tensor(clusters.counts, device=call.device)[:, None, None]
        read = (self.probe * counts).round().clamp(min=1)
        more = (self.estimate * counts).round()
        place = torch.arange(order.shape[2], device=call.device)
        there = ranks > float("-inf")  # empty ones are not
        probed = torch.zeros(order.shape, dtype=torch.bool, device=call.device)
        probed.scatter_(2, order, (place < read) & there)
        estimated = order.masked_fill(~((place >= read) & (place < read + more) & there), -1)
        first, last = int(read.min()), int((read + more).max())
        return probed, estimated[..., first:last]

    def _exact(self, call: AttentionCall, clusters: ClusterSet, probed: Tensor) -> Tensor:
        """Positions that are read as they are, bool ``[B, G, longest]``."""
        keys = on_device(call.extent.key_count, call.device)[:, None, None]
        exact = (torch.arange(call.extent.longest, device=call.device) < keys).repeat(1, call.groups, 1)
        owners = clusters.owners
        exact[..., : owners.shape[2]] &= (owners < 0) | probed.gather(2, owners.clamp(min=0).long())
        return exact


def _shares(call: AttentionCall, clusters: ClusterSet) -> Tensor:
    """What the query heads of each key/value head give each cluster: fp32 ``[B, G, N]``, -inf for empty ones."""
    q = call.q[:, :, 0].unflatten(1, (call.groups, call.share)).float() * call.scale
    logits = q @ clusters.centroids.float().transpose(-1, -2)
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    empty = clusters.sizes == 0
    weights = logits.masked_fill(empty[:, :, None], float("-inf")).softmax(dim=-1).nan_to_num().sum(dim=2)
    return weights.masked_fill(empty, float("-inf"))
