"""What a server and its requests may ask of decoding, and whose pages they then share. Needs no vLLM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gossamer import Policy, Profile
from gossamer.backends import backend_of, cpu
from gossamer.backends import torch as torch_backend
from gossamer.integrations.vllm.bounds import KeptBounds
from gossamer.integrations.vllm.decoding import check_pages, check_sizes
from gossamer.integrations.vllm.engine import salt_of
from gossamer.integrations.vllm.limits import fills_unseen
from gossamer.integrations.vllm.rows import NEVER
from gossamer.integrations.vllm.settings import Settings
from gossamer.methods import AShape, Dense, LServe, MInference, Quest

QUEST = {"method": "quest", "budget": 512}


class TestAServer:
    @pytest.mark.parametrize(
        ("given", "policy"),
        [
            ({"method": "a_shape", "decode": "quest"}, Policy(AShape(), decode=Quest())),
            ({"method": "minference", "decode": QUEST}, Policy(MInference(), decode=Quest(512))),
            ({"decode": QUEST}, Policy(Dense(), NEVER, decode=Quest(512))),
            ({"decode": "lserve", "max_density": 0.5}, Policy(Dense(), NEVER, 0.5, decode=LServe())),
            ({"method": "a_shape", "decode": None}, Policy(AShape())),
        ],
    )
    def test_names_what_decoding_reads_beside_its_method_or_alone(self, given: Any, policy: Policy) -> None:
        assert Settings.of(given).policy == policy
        assert Settings.of(json.dumps(given)).policy == policy

    def test_says_from_how_many_tokens_on(self) -> None:
        assert Settings.of({"decode": "quest"}).min_context == 8192
        assert Settings.of({"decode": "quest", "min_context": 0}).min_context == 0

    def test_has_that_of_its_profile(self, tmp_path: Path) -> None:
        path = tmp_path / "profile.json"
        replace(Profile.uniform(2, 4, AShape()), decode=Quest(512)).save(path)
        assert Settings.of({"profile": str(path)}).policy.decode == Quest(512)
        assert Settings.of({"profile": str(path), "decode": "lserve"}).policy.decode == LServe()
        assert Settings.of({"profile": str(path), "decode": None}).policy.decode is None

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"decode": "a_shape"}, "got a_shape"),
            ({"decode": "nonsense"}, "decode: unknown method 'nonsense'"),
            ({"decode": {"method": "quest", "page": 0}}, "decode: quest.page"),
            ({"decode": 7}, "decode: expected a method's name"),
            ({"decode": "quest", "min_tokens": 9}, "min_tokens is of prompts, for which no method is named"),
            ({"decode": "quest", "min_context": -1}, "min_context must be an integer, 0 or more, got -1"),
            ({"decode": "quest", "min_context": True}, "min_context must be an integer"),
            ({"decode": "oracle_topk"}, "decode: oracle_topk needs keys in one piece, which vLLM's pages do not keep"),
            ({"decode": "magicpig"}, "decode: magicpig needs keys in one piece"),
            ({"decode": "infllm"}, "decode: infllm needs Representatives, which vLLM's pages do not keep"),
            ({"decode": {"method": "double_sparsity"}}, "decode: double_sparsity needs Labels"),
            ({"method": "quest"}, "give such a method as decode="),
        ],
    )
    def test_is_told_what_is_wrong(self, given: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Settings.of(given)

    def test_a_profile_s_that_cannot_be_served_is_refused(self, tmp_path: Path) -> None:
        from gossamer.methods import InfLLM

        replace(Profile.uniform(2, 4, AShape()), decode=InfLLM()).save(tmp_path / "profile.json")
        with pytest.raises(ValueError, match="infllm needs Representatives"):
            Settings.of({"profile": str(tmp_path / "profile.json")})

    def test_pages_must_hold_whole_pages_of_the_method_s(self) -> None:
        check_pages(Quest(page=16), 128)
        check_pages(LServe(page=64, logical=16), 32)  # its pages are of logical ones, which alone have bounds
        check_pages(None, 128)
        for page in (48, 256):
            with pytest.raises(ValueError, match=f"quest has bounds of {page} tokens, which do not divide .* of 128"):
                check_pages(Quest(page=page), 128)


class TestARequest:
    SERVER = Settings.of({"method": "a_shape", "decode": "quest", "policies": {"same": {"decode": QUEST}}})

    def test_brings_its_own(self) -> None:
        assert self.SERVER.of_request({"decode": QUEST})[1] == Policy(Dense(), NEVER, decode=Quest(512))
        assert self.SERVER.of_request("same")[1].decode == Quest(512)
        assert self.SERVER.of_request("a_shape")[1].decode is None

    def test_shares_pages_with_those_that_decode_alike(self) -> None:
        """An answer's tokens are in pages that later requests find, and depend on what was read for them."""
        given = [None, {"method": "a_shape", "decode": "quest"}, {"method": "a_shape", "decode": {"method": "quest"}}]
        assert [salt_of(self.SERVER, one, None) for one in given] == [None] * 3
        others = ["a_shape", {"decode": "quest"}, {"method": "a_shape", "decode": QUEST}, "same", "dense"]
        salts = [salt_of(self.SERVER, one, None) for one in others]
        assert all(salts)
        assert len(set(salts)) == len(others)

    def test_pages_that_leave_the_server_have_it_in_their_salt(self) -> None:
        dense = Settings.of("dense")
        assert salt_of(dense, None, None, shared=True) is None
        assert salt_of(Settings.of({"method": "dense", "decode": "quest"}), None, None, shared=True)


def test_a_rank_has_its_part() -> None:
    gates = [[1.0, 0.0, 0.2, 0.9]] * 2
    settings = Settings.of({"decode": {"method": "lserve", "gates": gates}})
    mine = settings.of_rank(1, 2, 8, 4).policy.decode
    assert isinstance(mine, LServe)
    assert mine.full == ((False, True),) * 2


@pytest.mark.parametrize(
    ("cache", "unseen"),
    [
        ({}, False),
        ({"mamba_cache_mode": "all", "prefix_match_unit": None, "kv_sharing_fast_prefill": False}, False),
        ({"mamba_cache_mode": "align"}, True),
        ({"prefix_match_unit": 16}, True),
        ({"kv_sharing_fast_prefill": True}, True),
    ],
)
def test_where_vllm_copies_pages_nothing_is_kept_of_them(cache: dict[str, Any], unseen: bool) -> None:
    assert fills_unseen(SimpleNamespace(cache_config=SimpleNamespace(**cache))) is unseen


def test_a_request_asks_for_no_bounds_that_the_server_has_not() -> None:
    """Each size of pages takes memory of its own, as much as keys take at one token a page."""
    settings = Settings.of({"decode": {"method": "quest", "page": 32}, "policies": {"few": {"decode": "lserve"}}})
    for size in (16, 32):
        check_sizes(Settings.of({"decode": {"method": "quest", "page": size}}).policy, settings)
    with pytest.raises(ValueError, match="bounds of 1 tokens are not kept by this server, only of 16, 32"):
        check_sizes(Settings.of({"decode": {"method": "quest", "page": 1}}).policy, settings)


@pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels were not built")
@pytest.mark.parametrize("dim", [128, 256])
def test_bounds_of_wide_heads_are_kept_in_c(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds are twice as wide as keys, and so wider than a head may be."""
    kept = KeptBounds(torch.zeros(2, 1, 32, 2 * dim), 16)
    monkeypatch.setattr(torch_backend, "forget_slots", None)
    kept.forget(torch.tensor([3]))
    assert backend_of(kept.keys_of, "keep_bounds") is not torch_backend
