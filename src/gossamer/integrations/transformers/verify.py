"""`verify`: one short random prompt through a model as it is and through gossamer at full budget, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.integrations.transformers.handle import Handle, enable

__all__ = ["SITUATIONS", "Check", "Verification", "verify"]

# At full budget every pair is computed, by the sparse path.
FULL_BUDGET: dict[str, Any] = {"alpha": 0.0, "block_q": 16, "block_k": 16, "min_tokens": 0, "max_density": 2.0}
# Of the largest logit, by bytes of an element: rounding alone, on two orders of summation through all layers.
TOLERANCE = {8: 1e-6, 4: 1e-3, 2: 0.1}


@dataclass(frozen=True, slots=True)
class Check:
    """One situation.

    Fields:
        difference: the largest difference of two logits of live tokens; None if either side failed.
        largest: the largest logit, as it should be.
        sparse_calls, reasons: what gossamer did: attention calls by plans, and dense ones by reason.
        failure: what was raised, by whom.
    """

    situation: str
    difference: float | None
    largest: float
    tolerance: float
    sparse_calls: int
    reasons: dict[str, int]
    failure: str | None = None

    @property
    def ok(self) -> bool | None:
        """Whether both sides agree; None where the model by itself can't do what the situation asks."""
        if self.difference is None:
            return None if (self.failure or "").startswith("stock") else False
        return self.difference <= self.tolerance * max(self.largest, 1.0)


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found; prints as a table."""

    model: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks) and any(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {"situation": check.situation, "ok": check.ok, "difference": check.difference, "largest": check.largest}
            | {"sparse_calls": check.sparse_calls, "reasons": check.reasons, "failure": check.failure}
            for check in self.checks
        ]
        return {"model": self.model, "ok": self.ok, "checks": rows}

    def __str__(self) -> str:
        verdict = "the same as without gossamer" if self.ok else "NOT the same as without gossamer"
        if all(check.ok is None for check in self.checks):
            verdict = "NOT compared: the model by itself can't run a prompt of text"
        lines = [f"{self.model}: {verdict}"]
        lines.append(f"{'situation':<28} {'':<5} {'difference':>10} {'of':>8} {'sparse':>6}  dense because")
        for check in self.checks:
            state = {True: "ok", False: "WRONG", None: "-"}[check.ok]
            why = check.failure or ", ".join(f"{reason} x{count}" for reason, count in check.reasons.items())
            difference = "-" if check.difference is None else f"{check.difference:.1e}"
            lines.append(
                f"{check.situation:<28} {state:<5} {difference:>10} {check.largest:>8.2f} {check.sparse_calls:>6}  "
                f"{why}".rstrip()
            )
        return "\n".join(lines)


def verify(model: Any, *, length: int = 80, seed: int = 0) -> Verification:
    """Whether a model computes the same with gossamer as without, where gossamer leaves nothing out.

    A random prompt of two rows runs through the model as it is and enabled at full budget: alone, padded left and
    right, in chunks on a cache, as a second turn after a padded one, and one token on a cache. What still differs then
    is a mask or an argument that gossamer does not understand. The model is given back as it was.

    Args:
        model: a transformers model, not enabled.
        length: tokens of a row, at least 16.

    Raises:
        TypeError, ValueError: as `enable`: what it refuses can't be verified.
        ValueError: a length below 16, or a model without a vocabulary.
    """
    if length < 16:
        raise ValueError(f"verify needs at least 16 tokens to cut a prompt into chunks, got {length}")
    enable(model, "max_relative", **FULL_BUDGET).disable()  # refuses before anything runs
    ids = _prompt(model, length, seed)
    were_training = [module for module in model.modules() if module.training]  # parts may differ
    model.eval()
    try:
        checks = tuple(_check(model, name, run, ids) for name, run in SITUATIONS.items())
    finally:
        for module in were_training:
            module.training = True
    return Verification(type(model).__name__, checks)


def _check(model: Any, name: str, run: Callable[[Any, Tensor], Tensor], ids: Tensor) -> Check:
    tolerance = TOLERANCE[next(model.parameters()).element_size()]
    with torch.no_grad():
        try:
            expected = run(model, ids).double()
        except Exception as error:
            return Check(name, None, 0.0, tolerance, 0, {}, f"stock: {_line(error)}")
        with enable(model, "max_relative", **FULL_BUDGET) as handle:
            try:
                got = run(model, ids).double()
            except Exception as error:
                return Check(name, None, float(expected.abs().max()), tolerance, *_did(handle), _line(error))
            difference = float((got - expected).abs().nan_to_num(nan=torch.inf).max())
            return Check(name, difference, float(expected.abs().max()), tolerance, *_did(handle))


def _did(handle: Handle) -> tuple[int, dict[str, int]]:
    stats = handle.stats()
    return sum(row.sparse_calls for row in stats), stats.fallbacks()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _prompt(model: Any, length: int, seed: int) -> Tensor:
    """Random tokens ``[2, length]``, none of which means anything to the model, on its device."""
    config = model.config.get_text_config(decoder=True)
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise ValueError(
            f"{type(model).__name__} has no vocabulary, and verify runs a prompt of tokens; compare its outputs on "
            "inputs of its own, with gossamer.enable and without"
        )
    special = {value for part in (model.config, config) for value in _token_ids(part)}
    usable = torch.tensor([token for token in range(config.vocab_size) if token not in special], device="cpu")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(usable), (2, length), generator=generator, device="cpu")
    return usable[chosen].to(model.device)


def _token_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if "token_id" in name or "token_index" in name:
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


def _logits(model: Any, ids: Tensor, mask: Tensor | None = None, source: Tensor | None = None, **more: Any) -> Any:
    """A forward pass; of an encoder-decoder the prompt is the decoder's, and a source's first tokens the encoder's.

    A cache keeps what was encoded: all calls on it need the same source.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        source = (ids if source is None else source)[:, :16]
        return model(input_ids=source, decoder_input_ids=ids, decoder_attention_mask=mask, **more)
    return model(input_ids=ids, attention_mask=mask, **more)


def _live(output: Any, mask: Tensor | None) -> Tensor:
    logits = output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
    return logits if mask is None else logits[mask[:, -logits.shape[1] :].bool()]


def _padded(ids: Tensor, left: int, right: int) -> Tensor:
    """The first row is whole, the other padded."""
    mask = torch.ones_like(ids)
    mask[1, :left] = 0
    mask[1, ids.shape[1] - right :] = 0
    return mask


def _masked(left: int, right: int) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, ids: Tensor) -> Tensor:
        mask = _padded(ids, left, right)
        return _live(_logits(model, ids, mask), mask)

    return run


def _both_right(model: Any, ids: Tensor) -> Tensor:
    mask = _padded(ids, 0, 7)
    mask[0, -3:] = 0
    return _live(_logits(model, ids, mask), mask)


def _on_cache(first: int, left: int) -> Callable[[Any, Tensor], Tensor]:
    """The tokens after the first ones, on the cache of those; ``first`` below 0 counts from the end."""

    def run(model: Any, ids: Tensor) -> Tensor:
        mask = _padded(ids, left, 0)
        begin = _logits(model, ids[:, :first], mask[:, :first], ids, use_cache=True)
        output = _logits(model, ids[:, first:], mask, ids, past_key_values=begin.past_key_values, use_cache=True)
        return _live(output, mask)

    return run


SITUATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a prompt": lambda model, ids: _live(_logits(model, ids), None),
    "left padding": _masked(9, 0),
    "right padding": _masked(0, 9),
    "right padding of all rows": _both_right,
    "a second chunk": _on_cache(10, 0),
    "a second turn, left padding": _on_cache(13, 5),
    "one token on a cache": _on_cache(-1, 5),
}
