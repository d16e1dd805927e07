"""The exact oracle: where attention mass lies, and the best plan at a given budget."""

from gossamer.oracle.masses import ExactMasses, block_mass, block_peaks, exact_masses, log_sum_exp, plan_recall
from gossamer.oracle.plans import block_counts, oracle_blocks, oracle_recall, visible_pairs

__all__ = [
    "ExactMasses",
    "block_counts",
    "block_mass",
    "block_peaks",
    "exact_masses",
    "log_sum_exp",
    "oracle_blocks",
    "oracle_recall",
    "plan_recall",
    "visible_pairs",
]
