"""Goes on training the reference model at four times its length, the tokens of each sample shared by all processes.

    torchrun --nproc-per-node 2 examples/train_ring.py [--quick] [--steps N] [--plan PLAN] [--out FOLDER]

The text is this repository's own files. Each process runs the model on its tokens; attention alone talks to the others,
in a ring (`gossamer.distributed`), with every pair or with MTraining's columns and diagonals. Gradients of the weights
are summed over the processes, which so keep the same weights. ``--quick`` takes two steps of 4096 tokens, in a minute.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from reading import ROOT, repository_text
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from gossamer.distributed import Layout, RingPlan, TopP, plan_vertical_slash, ring_attention

MODEL = ROOT / "models" / "reference"
TRAINED = 32_768  # tokens of its longest samples
QUICK = 4096
RATE = 1e-4


class RingAttention:
    """The attention of all layers, as transformers calls it."""

    def __init__(self, layout: Layout, rank: int, groups: int, sparse: bool) -> None:
        self.layout, self.rank, self.sparse = layout, rank, sparse
        self.dense = RingPlan.dense(layout, rank, groups)

    def __call__(
        self, _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        scale, plan = given["scaling"], self.dense
        if self.sparse:
            selection = plan_vertical_slash(query, key, self.layout, budget=TopP(0.95), scale=scale)
            plan = RingPlan(selection, self.layout, self.rank)
        out, _ = ring_attention(query, key, value, plan, scale=scale)
        return out.transpose(1, 2).contiguous(), None


def sample(tokens: Tensor, length: int, step: int, layout: Layout, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens ``[1, S]``, the ones that follow each, and their positions."""
    start = step * length % max(1, len(tokens) - length - 1)
    part = tokens[start : start + length + 1]
    ids, following = (layout.split(x[None], rank, dim=1) for x in (part[:-1], part[1:]))
    return ids, following, layout.positions(rank)[None]


def train_step(model: Any, optimizer: torch.optim.Optimizer, given: tuple[Tensor, Tensor, Tensor], total: int) -> float:
    """The mean loss of all ranks' tokens."""
    ids, following, positions = given
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="sum") / total
    loss.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    whole = loss.detach()
    dist.all_reduce(whole)
    return float(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps of 4096 tokens")
    parser.add_argument("--length", type=int, help=f"tokens of a sample (default: {4 * TRAINED})")
    parser.add_argument("--steps", type=int, help="default: 20")
    parser.add_argument("--plan", choices=("dense", "vertical_slash"), default="vertical_slash")
    parser.add_argument("--out", type=Path, help="folder for the model")
    arguments = parser.parse_args()
    length = arguments.length or (QUICK if arguments.quick else 4 * TRAINED)
    steps = arguments.steps or (2 if arguments.quick else 20)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.to(device).train()
    layout = Layout("striped", length, ranks)
    attention = RingAttention(layout, rank, model.config.num_key_value_heads, arguments.plan != "dense")
    AttentionInterface.register("ring", attention)
    model.set_attn_implementation("ring")
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    tokens = torch.tensor(tokenizer(repository_text(), add_special_tokens=False)["input_ids"])
    tokens = tokens.repeat(1 + length // len(tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        started = time.perf_counter()
        given = sample(tokens, length, step, layout, rank)
        loss = train_step(model, optimizer, tuple(x.to(device) for x in given), length)  # pyright: ignore
        if rank == 0:
            print(f"step {step + 1}: loss {loss:.4f}, {time.perf_counter() - started:.1f} s", flush=True)
    if arguments.out is not None and rank == 0:
        model.set_attn_implementation("sdpa")
        model.save_pretrained(arguments.out)
        tokenizer.save_pretrained(arguments.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
