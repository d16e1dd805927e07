"""The gradients through every method's plans, on the CPU backend, against dense fp64 attention."""

import math

import pytest
import torch
from gradients import NAMES, assert_near, reaching
from listed import LISTED, Listed

from gossamer import backends
from gossamer.testing import SITUATIONS, make_call

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
every_method = pytest.mark.parametrize("listed", LISTED, ids=lambda listed: listed.id)


@every_dtype
@every_method
@pytest.mark.usefixtures("poisoned_memory")
def test_every_method_trains(listed: Listed, dtype: torch.dtype) -> None:
    turn = LISTED.index(listed)
    share = (1, 2, 4)[turn % 3]
    for situation in SITUATIONS[turn % 3 :: 3]:
        call = make_call(situation, length=200, heads=4, groups=4 // share, dim=16, dtype=dtype, seed=turn)
        method = listed.create(4)
        if method.lacks(call) is not None:
            continue
        plan = method.plan(call)
        plan = plan.with_attributes(pruned_mean=plan.pruned_mean) if plan.skip is not None else plan
        given = reaching(call, lse=False)
        given.out.masked_fill_(~call.extent.live_queries(call.query_len)[:, None, :, None], math.nan)
        out, lse = backends.attend(call, plan)
        found = dict(zip(NAMES, backends.attend_backward(call, plan, out, lse, *given), strict=True))
        assert_near(call, plan, given, found)
