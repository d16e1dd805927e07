"""The model of associative recall: embeddings, a few layers that mix tokens, and the embeddings again as the output."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gossamer.evaluate.mqar.data import Variant
from gossamer.evaluate.mqar.mixers import Mixer

__all__ = ["RecallModel"]

_EMBEDDED = 0.02


class RecallModel(nn.Module):
    """A causal language model as Zoology's (its repository, ``model.py``): pre-norm, tied embeddings.

    Args:
        variant: whose tokens it reads.
        mixer: of the layers.
        width: E.
        layers: how many.
        mlp: width of the MLP behind each mixer, in multiples of E; 0 for none.
        dropout: of the embeddings, and of the weights of attention where a mixer has that.
        spread: standard deviation of linear maps at first, of those that add to the stream divided by the root of how
            many add; None: the root of one over the numbers that go in, of all of them. Zoology's is 0.02, which leaves
            the first logits of a narrow model near 0.

    Deviation: without an MLP nothing stands in its place. There an identity does, which adds the normalised stream to
    the stream once more.
    """

    def __init__(
        self,
        variant: Variant,
        mixer: Mixer,
        width: int,
        *,
        layers: int = 2,
        mlp: int = 0,
        dropout: float = 0.0,
        spread: float | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(variant.vocabulary, width)
        self.join = nn.Linear(variant.parts * width, width) if variant.parts > 1 else None
        self.places = nn.Embedding(variant.length, width) if mixer.positions else None
        self.dropout = nn.Dropout(dropout)
        self.norms = nn.ModuleList(
            nn.Identity() if mixer.whole(index) else nn.LayerNorm(width) for index in range(layers)
        )
        self.whole = [mixer.whole(index) for index in range(layers)]
        self.mixers = nn.ModuleList(mixer.build(index, width, variant.length, dropout) for index in range(layers))
        self.mlps = nn.ModuleList(_MLP(width, mlp) for _ in range(layers if mlp else 0))
        self.last = nn.LayerNorm(width)
        self._start(spread, layers * (2 if mlp else 1))

    def _start(self, spread: float | None, residuals: int) -> None:
        own = tuple(f"mixers.{index}." for index, whole in enumerate(self.whole) if whole)
        for name, module in self.named_modules():
            if own and name.startswith(own):
                continue
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=_EMBEDDED)
            if isinstance(module, nn.Linear):
                into = name.endswith(("o_proj", "down")) and spread is not None  # what adds to the stream
                std = module.in_features**-0.5 if spread is None else spread
                nn.init.normal_(module.weight, std=std / math.sqrt(residuals) if into else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def stream(self, tokens: Tensor) -> Tensor:
        """What the last norm makes of tokens ``[B, T]`` or ``[B, T, parts]``: ``[B, T, E]``."""
        x = self.embedding(tokens)
        if self.join is not None:
            x = self.join(x.flatten(2))
        if self.places is not None:
            x = x + self.places.weight[: x.shape[1]]
        x = self.dropout(x)
        for index, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            x = mixer(x) if self.whole[index] else x + mixer(norm(x))
            if self.mlps:
                x = x + self.mlps[index](x)
        return self.last(x)

    def forward(self, tokens: Tensor, where: Tensor | None = None) -> Tensor:
        """Logits ``[.., V]``, of all places or of those where a bool ``[B, T]`` holds, ``[asked, V]``."""
        x = self.stream(tokens)
        return (x if where is None else x[where]) @ self.embedding.weight.T


class _MLP(nn.Module):
    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, factor * width), nn.Linear(factor * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
