"""Prints digests of plans and outputs, one a line: what test_thread_counts.py runs under each OMP_NUM_THREADS."""

import hashlib
from dataclasses import replace

import torch
from listed import LISTED

from gossamer import AttentionCall
from gossamer.backends import cpu
from gossamer.testing import SITUATIONS, make_call, random_plan

DTYPES = (torch.float32, torch.bfloat16)


def digest(*tensors: torch.Tensor) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def conformance() -> None:
    for listed in LISTED:
        method = listed.create(4)
        for dtype in DTYPES:
            for situation in SITUATIONS:
                call = make_call(situation, length=600, heads=4, groups=2, dim=64, dtype=dtype)
                if method.lacks(call) is not None:
                    continue
                plan = method.plan(call)
                lists = digest(plan.block_indptr, plan.block_indices, plan.column_indptr, plan.column_indices)
                pairs = int(plan.count_pairs().sum())
                print(listed.id, dtype, situation, lists, pairs, digest(*cpu.attend(call, plan)))


def random_plans() -> None:
    for seed in range(12):
        query_len, key_len = [(1, 3000), (5, 1500), (130, 333), (700, 700)][seed % 4]
        plan = random_plan(seed, batch=2, heads=[2, 4][seed % 2], query_len=query_len, key_len=key_len, padded=True)
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(2, 4, query_len, 80, generator=generator)
        k, v = (torch.randn(2, 2, key_len, 80, generator=generator) for _ in range(2))
        call = AttentionCall(q, k, v, plan.extent, scale=0.1)
        for dtype in DTYPES:
            cast = replace(call, q=q.to(dtype), k=k.to(dtype), v=v.to(dtype))
            print("random plan", seed, dtype, digest(*cpu.attend(cast, plan)))


if __name__ == "__main__":
    print(torch.get_num_threads(), "threads")
    conformance()
    random_plans()
