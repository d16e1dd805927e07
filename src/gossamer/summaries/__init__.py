"""What methods need of a cache besides its keys and values: worked out when first asked for, and kept up from then on.

A `Summary` says what is worked out, and is the name by which a store finds it (`gossamer.call.Store.summary`); a `Kept`
is one layer's, which follows the layer's tokens as they are added, cut off and moved between batch rows. Another one is
a frozen dataclass whose ``begin`` makes a `Kept`: no store needs to know it.
"""

from gossamer.summaries.base import Growing, Held, Kept, Summary
from gossamer.summaries.clusters import Clusters, ClusterSet
from gossamer.summaries.hashes import Hashes, HashSet
from gossamer.summaries.labels import Labels, LabelSet
from gossamer.summaries.pages import PageBounds
from gossamer.summaries.representatives import Representatives

__all__ = [
    "ClusterSet",
    "Clusters",
    "Growing",
    "HashSet",
    "Hashes",
    "Held",
    "Kept",
    "LabelSet",
    "Labels",
    "PageBounds",
    "Representatives",
    "Summary",
]
