"""Training of DuoAttention's gates on a frozen model (2410.10819, section 2.3).

Each key/value head has a gate a in [0, 1], 1 at first; its query heads attend ``a * full + (1 - a) * streaming``. The
loss is the mean square difference between the last hidden states with these gates and those of the model itself, on
the tokens of the answers alone, and ``penalty`` times the mean gate. Heads that no answer needs lose theirs.

Deviations from the authors' recipe: Adam without decay of weights, and one device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.backends.torch import dense
from gossamer.calibrate.training import Schedule, Training
from gossamer.call import AttentionCall
from gossamer.integrations.transformers import enable
from gossamer.plan import SparsePlan

__all__ = ["PENALTY", "RECENT", "SINK", "gated_attention", "train_duo"]

SINK = 128
RECENT = 256
PENALTY = 0.05


def gated_attention(call: AttentionCall, gate: Tensor, sink: int, recent: int) -> Tensor:
    """``a * full + (1 - a) * streaming`` of a call, ``[B, H, S, Dv]``; differentiable.

    Args:
        gate: a, ``[G]``. sink, recent: of the streaming heads, exact to the token.
    """
    full = dense.dense(call)
    size: dict[str, Any] = {"query_len": call.query_len, "key_len": call.key_len, "extent": call.extent}
    band = SparsePlan(heads=1, sink=sink, window=recent, **size).to_mask().to(call.device)
    some = band.any(dim=-1, keepdim=True)
    q, k, v = (torch.where(t.isnan(), 0.0, t) for t in (call.q, call.k, call.values))  # dead ones may be anything
    streaming = dense.under_mask(q, k, v, band | ~some, call.scale, call.sinks, call.softcap)
    share = gate.to(full.dtype)[:, None].expand(-1, call.share).reshape(-1, 1, 1)
    return share * full + (1 - share) * torch.where(some, streaming, 0.0)


def train_duo(
    model: Any,
    sample: Callable[[int], tuple[Tensor, Tensor]],
    schedule: Schedule,
    *,
    sink: int = SINK,
    recent: int = RECENT,
    penalty: float = PENALTY,
    about: Mapping[str, Any] | None = None,
    path: Path | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    save_every: int = 50,
) -> tuple[list[list[float]], Training]:
    """Gates for every key/value head of a model.

    Args:
        model: as for `gossamer.enable`; it is given back as it was.
        sample: for each step token ids ``[1, S]``, and which of them are answers, bool ``[S]``.
        about, path: see `Training`.

    Returns:
        gates ``[layer][key/value head]``, and the training with its losses.

    Raises:
        ValueError: no attention came here; or see `Training`.
    """
    text = model.config.get_text_config(decoder=True)
    groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    gates = {
        f"layers.{layer}": nn.Parameter(torch.ones(groups, device=model.device))
        for layer in range(text.num_hidden_layers)
    }
    used: set[str] = set()

    def attend(call: AttentionCall) -> Tensor:
        name = f"layers.{call.layer}"
        used.add(name)
        return gated_attention(call, gates[name], sink, recent)

    def hidden(ids: Tensor) -> Tensor:
        return model.base_model(input_ids=ids.to(model.device), use_cache=False)[0][0].float()

    settings = dict(about or {}) | {"kind": "duo", "sink": sink, "recent": recent, "penalty": penalty}
    with enable(model, "dense", min_tokens=0) as handle:

        def backward(step: int) -> float:
            ids, answers = sample(step)
            handle.replace(None)
            with torch.no_grad():
                wanted = hidden(ids)[answers]
            handle.replace(attend)
            with torch.enable_grad():
                lost = (hidden(ids)[answers] - wanted).square().mean()
                if not used:
                    raise ValueError(f"no attention of {type(model).__name__} has a plain causal mask")
                loss = lost + penalty * torch.stack(list(gates.values())).abs().mean()
                loss.backward(inputs=list(gates.values()))
            return float(loss.detach())

        def clamp() -> None:
            for gate in gates.values():
                gate.clamp_(0, 1)

        training = Training(gates, backward, schedule, about=settings, path=path, after=clamp)
        training.run(progress, save_every=save_every)
    return [gates[f"layers.{layer}"].tolist() for layer in range(len(gates))], training
