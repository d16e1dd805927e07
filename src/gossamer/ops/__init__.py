"""Executors: ``(q, k, v, plan) -> (out, lse)``. One signature, one meaning; `reference` is the definition."""
