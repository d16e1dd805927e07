"""Policies by name: all are made, written down, and described where a user looks."""

import pickle
from pathlib import Path

import pytest
from cache_steps import Tokens

from gossamer.cache import StoreLayer, available, create

DOCS = Path(__file__).parents[2]
NEEDED: dict[str, dict] = {"duo_attention": {"gates": [[1.0, 0.0], [0.0, 0.5]]}}


@pytest.mark.parametrize("name", available())
def test_policies_come_back_from_their_fields(name: str) -> None:
    policy = create(name, **NEEDED.get(name, {}))
    fields = policy.to_dict()
    assert fields.pop("cache") == name
    assert create(name, **fields) == policy


@pytest.mark.parametrize("name", available())
def test_layers_can_be_copied_with_what_they_hold(name: str) -> None:
    tokens = Tokens.random([0], 45, heads=4, groups=2, dim=32)
    layer = create(name, **NEEDED.get(name, {})).layer(0, 2)
    assert isinstance(layer, StoreLayer)
    list(tokens.run(layer, 40))
    copy = pickle.loads(pickle.dumps(layer))
    assert copy.nbytes == layer.nbytes > 0
    assert copy.get_seq_length() == 40


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("page", ["docs/decoding.md", "README.md"])
def test_every_policy_is_described(name: str, page: str) -> None:
    if page == "README.md" and name == "keep":
        return
    assert f"`{name}`" in (DOCS / page).read_text(encoding="utf-8")


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: keep, streaming_llm"):
        create("all")
