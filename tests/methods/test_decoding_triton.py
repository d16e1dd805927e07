"""Plans of decode steps, attended in Triton."""

from dataclasses import replace

import pytest
import torch
from test_decoding import METHODS, step
from triton_support import DEVICE, MARKS, moved

from gossamer.backends import torch as definition
from gossamer.backends import triton
from gossamer.methods import Method

pytestmark = MARKS


# Tables of channels are of heads of 8 channels, which Triton has none of.
@pytest.mark.parametrize("method", [m for m in METHODS if not getattr(m, "channels", ())], ids=str)
def test_plans_attend_what_they_name(method: Method) -> None:
    call = step(110, dim=16, share=2)
    plan = method.plan(call)
    out, lse = triton.attend(moved(call), plan.to(DEVICE))
    wide = replace(call, q=call.q.double(), k=call.k.double().nan_to_num(), v=call.values.double().nan_to_num())
    expected, expected_lse = definition.attend(wide, plan)
    assert torch.allclose(out.cpu().double(), expected, atol=1e-4)
    assert torch.allclose(lse.cpu().double(), expected_lse.double(), atol=1e-4)
