"""Generators and assertions that our tests and third-party methods share. Needs torch alone."""

from gossamer.testing.conformance import (
    SITUATIONS,
    Case,
    assert_accurate,
    assert_keeps_diagonal,
    make_case,
    reference_rows,
)
from gossamer.testing.plans import random_plan

__all__ = [
    "SITUATIONS",
    "Case",
    "assert_accurate",
    "assert_keeps_diagonal",
    "make_case",
    "random_plan",
    "reference_rows",
]
