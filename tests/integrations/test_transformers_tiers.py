"""A cache whose older tokens are in a file, in a model."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers_evictions import PROMPT, STEPS, decoded, left_padded, tiny, tokens

from gossamer import enable
from gossamer.cache import Tiers
from gossamer.cache.tiers import TieredLayer
from gossamer.methods import OracleTopK, Quest, create
from gossamer.methods.registry import class_of


@pytest.fixture
def policy(tmp_path: Path) -> Tiers:
    return Tiers(block=4, hot=6, resident=8, folder=str(tmp_path))


@pytest.mark.parametrize("decode", [None, Quest(budget=16, page=4, dense_layers=1)], ids=["whole", "quest"])
def test_logits_are_those_of_a_cache_in_memory(policy: Tiers, decode: Any) -> None:
    ids, mask = tokens(3), left_padded([7, 0, 25])
    model, chunks = tiny(), [PROMPT, 1, 3, *[1] * (STEPS - 4)]
    found = []
    for kept in ("keep", policy):
        with enable(model, "dense", cache=kept, decode=decode) as handle:
            past = handle.new_cache()
            found.append(decoded(model, past, ids, mask, *chunks))
            steps = [layer.sparse_steps for layer in handle.stats()]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert all(isinstance(layer, TieredLayer) and layer.first >= 24 for layer in past.layers)
    assert (steps[-1] > 0) is (decode is not None)


def test_rows_generate_the_same_in_a_batch_in_beams_and_over_turns(policy: Tiers) -> None:
    ids, mask = tokens(2)[:, :PROMPT], left_padded([8, 0])[:, :PROMPT]
    model, fields = tiny(), {"max_new_tokens": 5, "do_sample": False}
    found = []
    for kept in ("keep", policy):
        with enable(model, "dense", cache=kept) as handle:
            out = [model.generate(ids, attention_mask=mask, **fields)]
            out.append(model.generate(ids, attention_mask=mask, num_beams=2, **fields))
            out.append(model.generate(ids[1:], prompt_lookup_num_tokens=3, **fields))
            past = handle.new_cache()
            first = model.generate(ids[1:], past_key_values=past, **fields)
            out.append(model.generate(torch.cat([first, ids[1:, :6]], dim=1), past_key_values=past, **fields))
            found.append(out)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_looks_at_keys_gets_them(policy: Tiers) -> None:
    """Methods that look at every key; masks that are not plain; a dtype that autocast asks for."""
    ids = tokens(1)
    model = tiny()
    hole = torch.ones_like(ids)
    hole[:, 9] = 0
    best = []
    for kept in ("keep", policy):
        with enable(model, "dense", cache=kept, decode=OracleTopK(budget=8, dense_layers=0)) as handle:
            best.append(decoded(model, handle.new_cache(), ids, torch.ones_like(ids), PROMPT, 1, 1))
            assert all(layer.sparse_steps == 2 for layer in handle.stats())
    torch.testing.assert_close(best[1], best[0], rtol=1e-4, atol=1e-5)
    found = []
    for kept in ("keep", policy):
        with enable(model, "dense", cache=kept) as handle:
            found.append(decoded(model, handle.new_cache(), ids, hole, PROMPT, 1, 1))
            with torch.autocast("cpu", torch.bfloat16):
                found.append(decoded(model, handle.new_cache(), ids, torch.ones_like(ids), PROMPT, 1, 1))
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[3].float(), found[1].float(), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("decode", ["quest", "lserve", "retro_infer", "magicpig"])
def test_steps_under_autocast(policy: Tiers, decode: str) -> None:
    """Keys are in fp32 there and values are not."""
    few: dict[str, dict[str, Any]] = {
        "quest": {"budget": 16, "page": 4, "dense_layers": 0},
        "lserve": {"budget": 12, "page": 4, "logical": 4},
        "retro_infer": {"least": 1, "segment": 16, "size": 4, "local": 4, "sinks": 1},
        "magicpig": {"buffer": 4, "local": 4, "dense_layers": ()},
    }
    ids, model, found = tokens(1), tiny(), []
    fields = {name: value for name, value in few[decode].items() if name in class_of(decode).__dataclass_fields__}
    for kept in ("keep", policy):
        with enable(model, "dense", cache=kept, decode=create(decode, **fields)) as handle:
            with torch.autocast("cpu", torch.bfloat16):
                found.append(decoded(model, handle.new_cache(), ids, torch.ones_like(ids), PROMPT, *[1] * STEPS))
            assert handle.stats().layers[-1].sparse_steps > 0
    torch.testing.assert_close(found[1].float(), found[0].float(), rtol=5e-2, atol=5e-2)


def test_a_full_disk_stops_a_model_between_two_tokens(tmp_path: Path) -> None:
    """All layers have the same tokens then, and go on when there is room again."""
    code = f"""
        import resource, signal, torch
        from test_transformers_evictions import decoded, left_padded, tiny, tokens
        from gossamer import enable
        from gossamer.cache import Tiers
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        model, ids = tiny(), tokens(1, 120)
        mask = torch.ones_like(ids)
        with enable(model, "dense", cache="keep") as handle:
            expected = decoded(model, handle.new_cache(), ids, mask, *[1] * 120)
        policy = Tiers(block=4, hot=6, resident=8, folder={str(tmp_path)!r})
        with enable(model, "dense", cache=policy) as handle, torch.no_grad():
            past, logits, refused = handle.new_cache(), [], 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 4096, hard))
            while len(logits) < 120:
                n = len(logits)
                given = {{"position_ids": torch.tensor([[n]]), "past_key_values": past}}
                try:
                    logits.append(model(ids[:, n : n + 1], **given).logits[:, -1])
                except OSError as error:
                    assert "has no room for" in str(error), error
                    assert {{layer.length for layer in past.layers}} == {{n}}
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                    refused += 1
        torch.testing.assert_close(torch.stack(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
        print(refused)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
