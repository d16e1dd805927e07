"""Prints digests of plans and outputs, one a line: what test_thread_counts.py runs under each OMP_NUM_THREADS."""

import hashlib

import torch
from test_conformance import METHODS, method_id

from gossamer import methods
from gossamer.backends import cpu
from gossamer.testing import SITUATIONS, Case, make_case, random_plan

DTYPES = (torch.float32, torch.bfloat16)


def digest(*tensors: torch.Tensor) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def conformance() -> None:
    for entry in METHODS:
        method = methods.create(entry[0], **entry[1])
        for dtype in DTYPES:
            for situation in SITUATIONS:
                for length in (65, 900):
                    case = make_case(situation, length=length, heads=4, groups=2, dim=64, dtype=dtype)
                    plan = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
                    out, lse = cpu.execute(case.q, case.k, case.v, plan, scale=case.scale)
                    lists = digest(plan.block_indptr, plan.block_indices, plan.column_indptr, plan.column_indices)
                    pairs = int(plan.count_pairs().sum())
                    print(method_id(entry), dtype, situation, length, lists, pairs, digest(out, lse))


def executor() -> None:
    for seed in range(12):
        lengths = [(1, 3000), (5, 1500), (130, 333), (700, 700)][seed % 4]
        plan = random_plan(seed, batch=2, heads=[2, 4][seed % 2], query_len=lengths[0], key_len=lengths[1], padded=True)
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(2, 4, lengths[0], 80, generator=generator)
        k, v = (torch.randn(2, 2, lengths[1], 80, generator=generator) for _ in range(2))
        for dtype in DTYPES:
            case = Case(q.to(dtype), k.to(dtype), v.to(dtype), plan.extent, 0.1)
            print("random plan", seed, dtype, digest(*cpu.execute(case.q, case.k, case.v, plan, scale=case.scale)))


if __name__ == "__main__":
    print(torch.get_num_threads(), "threads")
    conformance()
    executor()
