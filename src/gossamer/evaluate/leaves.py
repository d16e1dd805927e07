"""What lines of results are made of: texts, counts, shares, seconds, each with its range."""

from __future__ import annotations

from gossamer.evaluate.checks import OBJECT, Fields, integer, leaf, mapping_of, number, or_null

__all__ = [
    "AMOUNT",
    "COSINE",
    "COUNT",
    "FLAG",
    "LENGTH",
    "MORE_OF_A_METHOD",
    "NATS",
    "POSITIVE_SECONDS",
    "ROUNDING",
    "SCORE",
    "SECONDS",
    "SHARE",
    "TEXT",
]

# Shares are sums of rounded masses: they may pass 1 by a hair.
ROUNDING = 1e-6


TEXT = leaf("text", lambda value: isinstance(value, str))
FLAG = leaf("true or false", lambda value: isinstance(value, bool))
COUNT = integer(0)
LENGTH = integer(1, 2**40)
SCORE = number("a number, 0 to 1", lambda value: 0 <= value <= 1)
SHARE = number("a share, 0 to 1", lambda value: -ROUNDING <= value <= 1 + ROUNDING)
COSINE = number("a cosine, -1 to 1", lambda value: abs(value) <= 1 + ROUNDING)
AMOUNT = number("a number, 0 or more", lambda value: value >= 0)
NATS = number("nats, 0 to 1e9", lambda value: 0 <= value <= 1e9)
# Ratios and logarithms of them stay finite.
SECONDS = number("seconds, 0 to 1e9", lambda value: value == 0 or 1e-15 <= value <= 1e9)
POSITIVE_SECONDS = number("seconds, above 0 to 1e9", lambda value: 1e-15 <= value <= 1e9)

MORE_OF_A_METHOD = {
    "run": TEXT,
    "profile": TEXT,
    "method_fields": Fields({"method": TEXT}),
    "policy": TEXT,
    "decode_fields": Fields({"method": TEXT}),
    "cache_fields": Fields({"cache": TEXT}),
    "task": TEXT,
    "task_fields": OBJECT,
    "dense_because": or_null(mapping_of(COUNT)),
}
