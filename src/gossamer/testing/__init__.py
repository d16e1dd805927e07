"""Generators and assertions that our tests and third-party methods share. Needs torch alone."""

from gossamer.testing.conformance import SITUATIONS, assert_accurate, assert_keeps_diagonal, make_call
from gossamer.testing.plans import random_extent, random_plan

__all__ = ["SITUATIONS", "assert_accurate", "assert_keeps_diagonal", "make_call", "random_extent", "random_plan"]
