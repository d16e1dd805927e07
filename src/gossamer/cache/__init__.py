"""What decoding reads: stores that are layers of a transformers cache, and the policies that make them.

A `StoreLayer` holds one layer's keys and values, grows in place, and knows more than they say: which token a slot holds
once some were dropped, and what methods want to know of its keys (`gossamer.summaries`). A `CachePolicy` (by name:
`create`) makes one for each layer; `adopt` puts them into a stock ``DynamicCache``, which is what ``gossamer.enable``
does before a model's forward pass.

How a step goes, in this order:

1. ``Cache.update`` calls `StoreLayer.update`: `before_update` (an eviction that makes room), then `append` and `read`.
   The keys that it returns know their layer (`store_of`).
2. The attention function finds the store by its keys. `StoreLayer.extent` describes the call where tokens were
   dropped; else the mask does, and `StoreLayer.place` tells the store where each row's padding ends.
3. The policy plans with ``call.store`` and ``call.state`` (`gossamer.call.Store`), and a backend attends.
4. `StoreLayer.attended` sees the call: an eviction after a prefill scores its last queries and calls `keep`.

A new policy is a frozen dataclass in a file of its own whose ``layer`` makes a subclass of `StoreLayer`, listed in
``registry``. Evictions override `before_update` or `attended` and call `keep(index)`; encodings override `append`,
`read`, `cut`, `keep` and `rearrange`.
"""

from gossamer.cache.caches import adopt, nbytes, new_cache, peak_nbytes
from gossamer.cache.encodings import Int8, Kivi, Mustafar
from gossamer.cache.evictions import PyramidKV, SnapKV, StreamingLLM
from gossamer.cache.layer import Part, StoreLayer
from gossamer.cache.marks import store_of
from gossamer.cache.policies import CachePolicy, Keep
from gossamer.cache.registry import available, create
from gossamer.cache.split import DuoAttention
from gossamer.cache.tiers import TieredLayer, Tiers

__all__ = [
    "CachePolicy",
    "DuoAttention",
    "Int8",
    "Keep",
    "Kivi",
    "Mustafar",
    "Part",
    "PyramidKV",
    "SnapKV",
    "StoreLayer",
    "StreamingLLM",
    "TieredLayer",
    "Tiers",
    "adopt",
    "available",
    "create",
    "nbytes",
    "new_cache",
    "peak_nbytes",
    "store_of",
]
