"""What a step reads, by a results file."""

from __future__ import annotations

from typing import Any

import pytest

from gossamer.evaluate.step_bytes import step_bytes
from gossamer.methods import create

MODEL = {"layers": 6, "kv_heads": 2, "head_dim": 64, "dtype": "bfloat16"}


def line(method: str, **fields: Any) -> dict[str, Any]:
    held = {"read": 0.25, "cache_bytes": 8000, "prompt_tokens": 1000}
    return held | {"decode_fields": create(method, **fields).to_dict()}


@pytest.mark.parametrize(
    ("method", "fields", "token", "layers"),
    [
        ("quest", {"page": 16}, 2 * 2 * 64 / 16, 4),  # bounds of 16 bits; the first two layers are read whole
        ("lserve", {"logical": 16, "interval": 4}, 2 * 2 * 64 / 16 / 4, 6),
        ("double_sparsity", {"group_factor": 8, "bits": 4}, 8 / 2 + 4, 4),
        ("oracle_topk", {"dense_layers": 0}, 128, 6),
        ("magicpig", {"hash_tables": 75, "dense_layers": (0, 16)}, 150, 5),
        ("retro_infer", {"size": 16}, 128 / 16 + 4, 6),
        ("infllm", {"block": 128, "count": 4}, 4, 6),
    ],
)
def test_what_is_read_to_choose_counts(method: str, fields: dict[str, Any], token: float, layers: int) -> None:
    assert step_bytes(line(method, **fields), MODEL) == pytest.approx(2000 + token * 2 * layers * 1000)


def test_what_old_lines_say() -> None:
    assert step_bytes({"score": 1.0}, MODEL) is None
    assert step_bytes({"cache_bytes": 10}, MODEL) == 10
    assert step_bytes({"cache_bytes": 10, "read": 0.5, "decode_fields": {"method": "quest"}}, {}) == 5
    assert step_bytes({"cache_bytes": 10, "prompt_tokens": 9, "decode_fields": {"method": "<of another>"}}, MODEL) == 10
