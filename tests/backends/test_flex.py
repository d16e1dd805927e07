"""The FlexAttention executor against the definition: on a CUDA device where there is one, else uncompiled."""

import math

import pytest
import torch
from executor_checks import draw

from gossamer import Extent, SparsePlan, methods
from gossamer.backends import flex
from gossamer.backends import torch as reference
from gossamer.testing import SITUATIONS, Case, assert_accurate, make_case, random_plan

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS: list[tuple[str, dict]] = [
    ("dense", {}),
    ("a_shape", {"sink": 9, "window": 50}),
    ("vertical_slash", {"vertical_size": 40, "slash_size": 100}),
    ("max_relative", {"alpha": 0.3, "sink_blocks": 1, "window_blocks": 1, "last_rows": 64}),
]


def run(q, k, v, plan, **options):
    options["sinks"] = None if options.get("sinks") is None else options["sinks"].to(DEVICE)
    q, k, v = (t.to(DEVICE) for t in (q, k, v))
    out, lse = flex.execute(q, k, v, plan, **options)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("seed", range(8))
def test_random_plans(seed: int) -> None:
    """Blocks, columns, bands, overlaps and empty rows; padding with NaN in it, sinks, soft-cap, windows."""
    plan = random_plan(
        seed,
        batch=2,
        heads=[2, 4][seed % 2],
        query_len=130,
        key_len=[130, 200][seed % 2],
        block_q=[64, 32][seed // 2 % 2],
        block_k=[64, 128][seed % 2],
        padded=seed % 2 == 0,
        causal=seed != 4,
        limit=50 if seed in (3, 4) else None,
    )
    q, k, v = draw(plan, heads=4, groups=2, dim=32, value_dim=48 if seed == 5 else None, seed=seed)
    options = {
        "scale": 0.2,
        "sinks": torch.randn(4) if seed in (1, 4) else None,
        "softcap": 5.0 if seed in (2, 4) else None,
    }
    out, lse = run(q, k, v, plan, **options)
    expected, expected_lse = reference.execute(q.double(), k.double(), v.double(), plan, **options)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("entry", METHODS, ids=[name for name, _ in METHODS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_methods(entry, situation: str, dtype: torch.dtype) -> None:
    case = make_case(situation, length=300, heads=4, groups=2, dim=64, dtype=dtype)
    plan = methods.create(entry[0], **entry[1]).plan(case.q, case.k, scale=case.scale, extent=case.extent)
    out, lse = run(case.q, case.k, case.v, plan, scale=case.scale)
    assert_accurate(case, plan, out, lse)


@pytest.mark.parametrize("dim", [320, 512])
def test_head_dimensions_that_only_flex_has(dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case("left padding", length=150, heads=2, groups=1, dim=dim, dtype=dtype)
        plan = methods.create("max_relative", alpha=0.3, sink_blocks=1, window_blocks=1, last_rows=64).plan(
            case.q, case.k, scale=case.scale, extent=case.extent
        )
        assert_accurate(case, plan, *run(case.q, case.k, case.v, plan, scale=case.scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256, 320, 512])
@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (64, 128), (128, 128), (16, 48), (1024, 80)])
def test_tiles_divide_blocks_and_fit_shared_memory(block_q: int, block_k: int, dim: int, dtype: torch.dtype) -> None:
    """FlexAttention refuses others: "Q and KV block size must be divisible by BLOCK_M and BLOCK_N"."""
    options = flex.kernel_options(block_q, block_k, dim, dtype)
    rows, keys = options["BLOCK_M"], options["BLOCK_N"]
    assert (block_q % rows, block_k % keys) == (0, 0)
    assert min(rows, keys) >= 16
    assert max(rows, keys) <= 64
    assert {rows & (rows - 1), keys & (keys - 1)} == {0}
    width = 1 << (dim - 1).bit_length()
    stages = options.get("num_stages", 3)  # torch's own number
    assert (rows + 2 * stages * keys) * width * dtype.itemsize <= 227 << 10


@pytest.mark.parametrize(("block_q", "block_k"), [(8, 64), (64, 17), (40, 64)])
def test_blocks_that_no_tile_divides_are_named(block_q: int, block_k: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 16 tokens, got block_q={block_q} and block_k={block_k}"):
        flex.kernel_options(block_q, block_k, 64, torch.bfloat16)


def test_cuda_tensors_get_the_tiles(monkeypatch) -> None:
    """Whatever the device: what the compiled kernel is called with."""
    case = make_case("no padding", length=130, heads=2, groups=1, dim=320)
    plan = methods.create("a_shape", sink=4, window=30).plan(case.q, case.k, scale=case.scale, extent=case.extent)
    seen = []

    def attend(*arguments, kernel_options, **options):
        seen.append(kernel_options)
        return flex._uncompiled(*arguments, **options)

    monkeypatch.setattr(flex, "_compiled", lambda: attend)
    monkeypatch.setattr(flex, "_on_cuda", lambda q: True)
    out, lse = run(case.q, case.k, case.v, plan, scale=case.scale)
    assert seen == [flex.kernel_options(64, 64, 320, torch.float32)]
    assert_accurate(case, plan, out, lse)


def test_no_keys_and_no_queries() -> None:
    plan = SparsePlan.dense(1, 3, 0, Extent([0], [0], [0]))
    out, lse = run(torch.randn(1, 2, 3, 16), torch.randn(1, 1, 0, 16), torch.randn(1, 1, 0, 16), plan, scale=1.0)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"permuted": True}, ValueError, "permute q, k and v"),
        ({"dtype": torch.float64}, TypeError, "convert q, k and v"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    plan = random_plan(0, batch=1, heads=1, query_len=64, key_len=64, permuted=change.get("permuted", False))
    case = make_case("no padding", length=64, heads=1, groups=1, dim=16)
    q, k, v = (t.to(change.get("dtype", torch.float32)) for t in (case.q, case.k, case.v))
    with pytest.raises(error, match=message):
        run(q, k, v, plan, scale=1.0, softcap=change.get("softcap"))


def test_a_wrong_plan_shows() -> None:
    """The comparison can fail."""
    case = make_case("no padding", length=200, heads=2, groups=1, dim=32)
    plan = methods.create("a_shape", sink=4, window=30).plan(case.q, case.k, scale=case.scale, extent=case.extent)
    other = methods.create("a_shape", sink=4, window=31).plan(case.q, case.k, scale=case.scale, extent=case.extent)
    out, lse = run(case.q, case.k, case.v, other, scale=case.scale)
    with pytest.raises(AssertionError):
        assert_accurate(Case(case.q, case.k, case.v, case.extent, case.scale), plan, out, lse)
