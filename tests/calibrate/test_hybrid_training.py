"""LongGen's hybrids: what runs is the profile, training mends, and what was stopped goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_llama, tokens
from torch import Tensor

import gossamer
from gossamer.calibrate.hybrid import PROFILE, hybrid_loss, hybrid_of, save_hybrid, train_hybrid
from gossamer.calibrate.training import Schedule
from gossamer.integrations.transformers import Observation
from gossamer.methods import LongGen
from gossamer.profiles import Profile

LENGTH = 160
PATTERNS = {"sink": LongGen(sink=1, recent=2, block=16), "stride": LongGen(sink=0, recent=1, stride=3, block=16)}


def model() -> Any:
    return tiny_llama(num_hidden_layers=3)


def of_mask(observed: Observation, head: int, mask: Tensor) -> Tensor:
    """A head's attention to the pairs of a mask ``[S, T]``, by its definition: fp64 ``[S, Dv]``."""
    call = observed.call
    k, v = (x[0, head // call.share].double() for x in (call.k, call.values))
    logits = call.q[0, head].double() @ k.T * call.scale
    return logits.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("name", PATTERNS)
def test_the_forward_executes_the_profile(name: str) -> None:
    own, pattern = model(), PATTERNS[name]
    profile = hybrid_of(own, (1,), pattern)
    found: dict[int | None, Observation] = {}
    with gossamer.enable(own, profile=profile, min_tokens=0) as handle:
        handle.observe(lambda observed: found.__setitem__(observed.call.layer, observed))
        with torch.no_grad():
            own(input_ids=tokens(LENGTH), use_cache=False)
        stats = {layer.layer: layer for layer in handle.stats()}
    assert stats[1].dense_calls == 1
    assert stats[1].sparse_calls == 0
    for layer in (0, 2):
        assert stats[layer].sparse_calls == 1
        masks = [method.plan(found[layer].call).to_mask()[0, 0] for method in profile.layers[layer]]
        causal = torch.ones(LENGTH, LENGTH).tril().sum()
        assert stats[layer].density == pytest.approx(float(torch.stack(masks).sum() / causal / len(masks)))
        for head, mask in enumerate(masks):
            expected = of_mask(found[layer], head, mask)
            torch.testing.assert_close(found[layer].out[0, head].double(), expected, atol=1e-5, rtol=1e-4)
            every = of_mask(found[layer], head, torch.ones(LENGTH, LENGTH).tril().bool())
            assert float((expected - every).abs().max()) > 1e-2


def test_all_layers_full_is_the_dense_model_exactly() -> None:
    own, ids = model(), tokens(LENGTH)
    with torch.no_grad():
        with gossamer.enable(own, "dense", kernel="gossamer", min_tokens=0):
            dense = own(input_ids=ids, use_cache=False).logits
        with gossamer.enable(own, profile=hybrid_of(own, (0, 1, 2), LongGen()), min_tokens=0):
            hybrid = own(input_ids=ids, use_cache=False).logits
    assert torch.equal(hybrid, dense)


@pytest.mark.parametrize("distil", [False, True])
def test_training_lowers_the_loss(distil: bool) -> None:
    own, before = model(), model()
    profile = hybrid_of(own, (1,), PATTERNS["sink"])
    text = tokens(LENGTH)
    training = train_hybrid(own, profile, lambda step: text, Schedule(12, 5e-3), teacher=before if distil else None)
    assert not own.training
    assert len(training.losses) == 12
    assert training.losses[-1] < 0.8 * training.losses[0]
    with gossamer.enable(own, profile=profile, min_tokens=0), torch.no_grad():
        assert float(hybrid_loss(own, text, before if distil else None)) < training.losses[-1]


def test_training_runs_sparse_backward_too() -> None:
    """A key that no later query of its layer sees gets no gradient from them."""
    own = model()
    profile = hybrid_of(own, (), LongGen(sink=0, recent=1, block=16))
    counted = []
    kept = own.model.layers[0].register_forward_hook(lambda *_: counted.append(own.training))
    train_hybrid(own, profile, lambda step: tokens(LENGTH), Schedule(1, 1e-3))
    kept.remove()
    assert counted == [True]
    embedded = own.model.embed_tokens(tokens(LENGTH)).detach().requires_grad_()
    with gossamer.enable(own.train(), profile=profile, min_tokens=0, training=True):
        own(inputs_embeds=embedded, use_cache=False).logits[0, -1].sum().backward()
    assert embedded.grad is not None
    assert float(embedded.grad[0, : LENGTH - 16].abs().max()) == 0.0
    assert float(embedded.grad[0, LENGTH - 16].abs().max()) > 0


def test_the_loss_of_a_teacher_is_its_divergence() -> None:
    own, other, ids = model(), model(), tokens(20)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        one, two = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (own, other))
    expected = float((two.exp() * (two - one)).sum(-1).mean())
    assert hybrid_loss(own, ids, other).item() == pytest.approx(expected, rel=1e-4)
    assert hybrid_loss(own, ids, own).item() == pytest.approx(0, abs=1e-6)


def stopping(after: int) -> Any:
    def progress(step: int, loss: float) -> None:
        if step == after:
            raise KeyboardInterrupt

    return progress


def test_what_was_stopped_ends_as_what_was_not(tmp_path: Path) -> None:
    def train(own: Any, **more: Any) -> Any:
        profile = hybrid_of(own, (1,), PATTERNS["stride"])
        return train_hybrid(own, profile, lambda step: tokens(96, step), Schedule(4, 1e-3), **more)

    whole, stopped, path = model(), model(), tmp_path / "partial"
    losses = train(whole).losses
    with pytest.raises(KeyboardInterrupt):
        train(stopped, path=path, progress=stopping(2))
    again = model()
    assert train(again, path=path).losses == losses
    for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    other_profile = hybrid_of(again, (0,), PATTERNS["stride"])
    with pytest.raises(ValueError, match="another profile"):
        train_hybrid(model(), other_profile, lambda step: tokens(96, step), Schedule(4, 1e-3), path=path)


class Saver:
    """Stands for a tokenizer."""

    def __init__(self, fail: bool = False) -> None:
        self.fail = fail

    def save_pretrained(self, folder: Path) -> None:
        if self.fail:
            raise OSError(28, "No space left on device")
        (folder / "tokenizer.json").write_text("{}")


def test_a_hybrid_is_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    own, folder, ids = model(), tmp_path / "hybrid", tokens(LENGTH)
    profile = hybrid_of(own, (1,), PATTERNS["stride"], name="tiny")
    save_hybrid(own, Saver(), profile, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["hybrid"]
    assert Profile.load(folder / PROFILE) == profile
    assert Profile.load(folder / PROFILE).provenance == profile.provenance
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    logits = []
    for each, given in ((own, profile), (loaded, folder / PROFILE)):
        with gossamer.enable(each, profile=given, min_tokens=0), torch.no_grad():
            logits.append(each(input_ids=ids, use_cache=False).logits)
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="but this model has 2 layers"):
        gossamer.enable(tiny_llama(), profile=folder / PROFILE)


def test_nothing_is_left_of_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    own = model()
    profile = hybrid_of(own, (1,), PATTERNS["sink"])
    with pytest.raises(OSError, match="No space"):
        save_hybrid(own, Saver(fail=True), profile, tmp_path / "hybrid")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "hybrid").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        save_hybrid(own, Saver(), profile, tmp_path / "hybrid")


def test_the_tiny_model_has_the_vocabulary_of_its_tokens() -> None:
    assert int(tokens(LENGTH).max()) < VOCAB
