"""Sparse prefill inside vLLM: ``pip install gossamer[vllm]``, then ask for it.

    vllm serve MODEL --additional-config '{"gossamer": {"method": "max_relative", "alpha": 0.1}}'

vLLM finds `register` through the entry point group ``vllm.general_plugins`` and calls it in each of its processes.
A server that was not asked for gossamer runs as it would without.
"""

from __future__ import annotations

import logging

__all__ = ["register"]


def register() -> None:
    """Offer gossamer to this process's vLLM. It may be called more than once.

    A vLLM whose interface is another one runs untouched, and its log says so.
    """
    try:
        from gossamer.integrations.vllm.plugin import install

        install()
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.gossamer").warning("gossamer does not know this vLLM, which runs without it: %s", error)
