"""How much an answer's loss changes when a pair is not attended: MoA's gradient influence (2406.14909, section 4.1).

To first order, removing key j from row i of the attention A, whose other weights are then renormalised, changes the
loss by ``E[i, j] = | A[i, j] * (g[i, j] - sum_n g[i, n] A[i, n]) / (1 - A[i, j]) |`` with ``g = dL/dA``; in a row that
sees one key alone, ``| A g |``. Since ``g = dL/dO @ v^T`` and ``sum_n g A = dL/dO . O``, the gradient of a layer's
output says all: A and g are made tile by tile when the backward pass comes by, and are never held.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gossamer.backends.torch.attend import wide
from gossamer.backends.torch.tiles import RowMass, key_pieces, query_pieces
from gossamer.call import AttentionCall
from gossamer.integrations.transformers import Observation, enable
from gossamer.methods import Method
from gossamer.oracle import log_sum_exp
from gossamer.plan import Grid

__all__ = ["answer_loss", "block_influence", "influence", "mean_influence", "with_answer"]

_EPSILON = 1e-6


@torch.no_grad()
def block_influence(call: AttentionCall, out: Tensor, gradient: Tensor, grid: Grid) -> Tensor:
    """Influence of each block: summed over its pairs.

    Args:
        out: of dense attention, ``[B, H, S, Dv]``; gradient: of the loss with respect to it.

    Returns:
        fp32 ``[B, H, M, N]``.

    Raises:
        ValueError: attention that is not causal.
    """
    if not call.extent.causal:
        raise ValueError("influence is for causal attention")
    lse = log_sum_exp(call)
    found = torch.zeros(call.batch, call.heads, grid.query_blocks, grid.key_blocks, device=call.device)
    for row in range(call.batch):
        tiles = RowMass(call, lse, row)
        shift = int(call.extent.query_start[row])  # position of query row 0
        begin = int(call.extent.key_start[row])
        for queries in query_pieces(grid, row, range(grid.query_blocks), tiles.most_queries):
            rows = slice(queries.tokens.start - shift, queries.tokens.stop - shift)
            slope, kept = wide(gradient[row, :, rows]), wide(out[row, :, rows])
            mean = (slope * kept).sum(-1, keepdim=True)
            position = torch.arange(queries.tokens.start, queries.tokens.stop, device=call.device)[:, None]
            alone = (position == 0) | (call.extent.limit == 1)
            for keys in key_pieces(grid, row, tiles.most_keys):
                mass = tiles.mass(queries.tokens, keys.tokens)
                if mass is None:
                    continue
                v = wide(call.values[row, :, begin + keys.tokens.start : begin + keys.tokens.stop])
                g = (slope.reshape(call.groups, -1, v.shape[-1]) @ v.transpose(-1, -2)).view_as(mass)
                change = torch.where(alone, mass * g, mass * (g - mean) / (1 - mass + _EPSILON)).abs()
                part = keys.sums(queries.sums(change, -2), -1)
                m, n = queries.first_block, keys.first_block
                found[row, :, m : m + part.shape[1], n : n + part.shape[2]] += part
    return found


def influence(model: Any, input_ids: Tensor, answer_from: int, *, block: int = 64) -> Tensor:
    """Influence of every block of every head on the loss of an answer, in one forward and one backward pass.

    Memory is that of a training step with frozen weights, so lengths are modest: the authors take 2K to 8K tokens.

    Args:
        model: as for `gossamer.enable`; it is given back as it was.
        input_ids: a prompt and its answer, ``[1, S]``, the same tokens that the model itself would go on with (see
            `with_answer`).
        answer_from: the index of the answer's first token.

    Returns:
        fp32 ``[layers, H, M, N]`` on the CPU, layers in the order of the model's indices.

    Raises:
        ValueError: a prompt of another shape, or no layer's attention came here.
    """
    found: dict[int, Tensor] = {}

    def visit(observed: Observation) -> None:
        call, out = observed.call, observed.out

        def keep(gradient: Tensor) -> None:
            grid = Grid(call.extent, block, block)
            found[call.layer or 0] = block_influence(call, out, gradient, grid)[0].cpu()

        out.register_hook(keep)

    _check(input_ids, answer_from)
    with enable(model, "dense", min_tokens=0) as handle, torch.enable_grad():
        handle.observe(visit)
        embedded = model.get_input_embeddings()(input_ids.to(model.device)).detach().requires_grad_()
        loss = _loss(model, input_ids, answer_from, inputs_embeds=embedded)
        torch.autograd.grad(loss, embedded)
    if not found:
        raise ValueError(f"no attention of {type(model).__name__} could be profiled: none with a plain causal mask")
    return torch.stack([found[layer] for layer in sorted(found)])


def mean_influence(model: Any, samples: Iterable[tuple[Tensor, int]], *, block: int = 64) -> Tensor:
    """The mean of `influence` over samples of one length, each tokens and where its answer begins.

    Raises:
        ValueError: no samples, or of different lengths.
    """
    total, count, length = torch.zeros((), device="cpu"), 0, None
    for input_ids, answer_from in samples:
        if length not in (None, input_ids.shape[-1]):
            raise ValueError(f"samples must have one length, got {length} and {input_ids.shape[-1]} tokens")
        length = input_ids.shape[-1]
        total, count = total + influence(model, input_ids, answer_from, block=block), count + 1
    if not count:
        raise ValueError("mean_influence needs at least one sample")
    return total / count


def with_answer(model: Any, prompt: Tensor, new_tokens: int) -> tuple[Tensor, int]:
    """A prompt ``[1, S]`` with what the dense model answers, greedily; and where the answer begins."""
    with torch.inference_mode(), enable(model, "dense"):
        ids = model.generate(
            input_ids=prompt.to(model.device),
            attention_mask=torch.ones_like(prompt, device=model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
    return ids.clone(), prompt.shape[1]


@torch.no_grad()
def answer_loss(model: Any, input_ids: Tensor, answer_from: int, method: str | Method = "dense") -> float:
    """Mean cross-entropy of an answer under a method: what chooses among spans, at a length that was not profiled.

    Raises:
        ValueError: a prompt of another shape.
    """
    _check(input_ids, answer_from)
    with enable(model, method, min_tokens=0, max_density=2.0):
        return float(_loss(model, input_ids, answer_from, input_ids=input_ids.to(model.device)))


def _check(input_ids: Tensor, answer_from: int) -> None:
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not 1 <= answer_from < input_ids.shape[1]:
        raise ValueError(
            f"a sample is one prompt with its answer, [1, S], and 1 <= answer_from < S; got {tuple(input_ids.shape)} "
            f"and {answer_from}"
        )


def _loss(model: Any, tokens: Tensor, answer_from: int, **inputs: Tensor) -> Tensor:
    answer = tokens[0, answer_from:].to(model.device)
    logits = model(**inputs, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, answer)
