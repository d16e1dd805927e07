"""The exact oracle: where attention mass lies, and the best plan at a given budget."""

from gossamer.oracle.masses import (
    ExactMasses,
    block_counts,
    block_mass,
    exact_masses,
    live_rows,
    log_sum_exp,
    oracle_blocks,
    oracle_recall,
    plan_recall,
    visible_pairs,
)

__all__ = [
    "ExactMasses",
    "block_counts",
    "block_mass",
    "exact_masses",
    "live_rows",
    "log_sum_exp",
    "oracle_blocks",
    "oracle_recall",
    "plan_recall",
    "visible_pairs",
]
