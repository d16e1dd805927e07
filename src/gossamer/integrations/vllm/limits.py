"""What of a server's configuration decides whether the plug-in may serve it, and whose pages its requests may read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["connectors", "fills_unseen", "shares_pages", "why_not"]

# Those that find pages by vLLM's hashes of blocks or by the request's salt, in both of which our policy is; and those
# that bring the pages of one request from the server that wrote them for it. Read in vLLM 0.32's source.
KNOWN_CONNECTORS = frozenset(
    (
        "DecodeBenchConnector",
        "LMCacheMPConnector",
        "MoRIIOConnector",
        "MooncakeConnector",
        "MooncakeStoreConnector",
        "NixlConnector",
        "NixlPullConnector",
        "NixlPushConnector",
        "OffloadingConnector",
        "SimpleCPUOffloadConnector",
    )
)


def connectors(config: Any) -> Iterator[str]:
    """The names of the KV connectors of a `VllmConfig`; of several that are one, each."""
    transfer = getattr(config, "kv_transfer_config", None)
    name = getattr(transfer, "kv_connector", None)
    if transfer is None or name is None:
        return
    elsewhere = getattr(transfer, "kv_connector_module_path", None)
    if elsewhere or name != "MultiConnector":
        yield f"{name} (not vLLM's own)" if elsewhere else name
        return
    for child in transfer.kv_connector_extra_config.get("connectors", ()):
        own = isinstance(child, Mapping) and not child.get("kv_connector_module_path")
        yield str(child.get("kv_connector")) if own else "one that is not vLLM's own"


def shares_pages(config: Any) -> bool:
    """Whether pages may come from other servers, or from this one before it was started anew."""
    return any(True for _ in connectors(config))


def fills_unseen(config: Any) -> bool:
    """Whether pages change by more than a layer's writes, so that nothing is kept of what they hold.

    A connector brings them; vLLM copies the page that a shared prefix ends in, where hits may end inside of pages.
    With its fast prefill of layers that share keys, a step does not say which rows are prompts'.
    """
    cache = getattr(config, "cache_config", None)
    copies = getattr(cache, "mamba_cache_mode", "none") == "align" or isinstance(
        getattr(cache, "prefix_match_unit", None), int
    )
    return copies or getattr(cache, "kv_sharing_fast_prefill", False) is True or shares_pages(config)


def why_not(config: Any) -> str | None:
    """Why no layer of a server runs a plan, or None."""
    parallel = config.parallel_config
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False):
        return "dual-batch overlap"  # a step's halves do not say whose rows they have, nor is a row in one of them
    # A connector that names pages by their tokens alone would hand out sparse ones as dense ones.
    unknown = any(name not in KNOWN_CONNECTORS for name in connectors(config))
    return "KV connector" if unknown else None
