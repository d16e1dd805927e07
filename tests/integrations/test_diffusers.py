"""At full budget a denoising transformer computes the same with gossamer as without, and each call says what it is."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
from diffusers.models.attention_dispatch import _AttentionBackendRegistry  # noqa: E402
from tiny_diffusers import FAMILIES, TEXT, inputs_of, noise, tiny  # noqa: E402

import gossamer  # noqa: E402
from gossamer.integrations.diffusers import Handle, enable  # noqa: E402
from gossamer.integrations.stats import Observation  # noqa: E402
from gossamer.layout import DenoisingStep, TokenLayout  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:gossamer runs its torch reference path:RuntimeWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
)
ALWAYS: dict[str, Any] = {"min_tokens": 0, "max_density": 2.0}
WHOLE: dict[str, Any] = {"method": "a_shape", "window": 1 << 20} | ALWAYS
NARROW: dict[str, Any] = {"method": "a_shape", "sink": 0, "window": 3} | ALWAYS
SMALL = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = _AttentionBackendRegistry.list_backends()
    yield
    assert _AttentionBackendRegistry.list_backends() == before


def run(model: nn.Module, name: str, batch: int = 3, time: float = 500.0, **changes: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(name, batch, time * FAMILIES[name].scale) | changes)[0]


@pytest.mark.parametrize("kernel", ["torch", "gossamer"])
def test_dense_attention_runs_where_it_is_told_to(kernel: str) -> None:
    model = tiny("wan")
    expected = run(model, "wan")
    with enable(model, "dense", kernel=kernel, min_tokens=0) as handle:
        got = run(model, "wan")
        executors = {name for row in handle.stats() if row.layer is not None for name in row.executors}
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (executors == {"native"}) is (kernel == "torch")


@pytest.mark.parametrize("name", FAMILIES)
def test_parity_at_full_budget(name: str) -> None:
    """Several videos in a batch, with text, padded where the model takes a mask; and not by doing nothing."""
    model, family = tiny(name), FAMILIES[name]
    expected = run(model, name)
    seen: list[Observation] = []
    with enable(model, **WHOLE) as handle:
        handle.observe(seen.append)
        got = run(model, name)
        stats = handle.stats()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    rows = [row for row in stats if row.layer is not None]
    assert [row.layer for row in rows] == list(range(family.layers))
    assert all((row.sparse_calls, row.dense_calls, row.density) == (1, 0, 1.0) for row in rows)
    live = [TEXT - 2 * (row + 1) for row in range(3)] if family.pads else [TEXT] * 3
    before = tuple(live) if family.text == "first" else (0, 0, 0)
    for observed in seen:
        layout = TokenLayout(before, *family.grid)
        assert observed.call.layout == layout
        assert not observed.call.extent.causal
        words = live if family.text else [0] * 3
        assert observed.call.extent.key_count.tolist() == [layout.patches + n for n in words]
    others = {"wan": {"cross-attention": 2}, "ltx-video": {"cross-attention": 2}, "wan-images": {"cross-attention": 4}}
    alone = {"hunyuan-video": {"not all of the image or video": 1}}
    assert stats.fallbacks() == (others | alone).get(name, {})
    with enable(model, **NARROW):
        assert (run(model, name) - expected).abs().max() > 0.1 * expected.std()
    assert torch.equal(run(model, name), expected)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_disabling_gives_each_module_its_own_processor_back(name: str) -> None:
    model = tiny(name)
    before = model.attn_processors
    signatures = [inspect.signature(processor.__call__) for processor in before.values()]
    handle = enable(model, **WHOLE)
    assert [inspect.signature(processor.__call__) for processor in model.attn_processors.values()] == signatures
    assert handle.enabled
    assert all(
        type(a).__name__ == type(b).__name__
        for a, b in zip(before.values(), model.attn_processors.values(), strict=True)
    )
    handle.disable()
    handle.disable()
    assert not handle.enabled
    assert all(model.attn_processors[place] is processor for place, processor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_modules_that_share_a_processor_are_told_apart() -> None:
    model = tiny("wan")
    shared = next(iter(model.attn_processors.values()))
    model.set_attn_processor(shared)
    expected = run(model, "wan")
    with enable(model, **WHOLE) as handle:
        torch.testing.assert_close(run(model, "wan"), expected, atol=1e-4, rtol=1e-4)
        assert [row.layer for row in handle.stats()] == [0, 1, None]
    assert all(processor is shared for processor in model.attn_processors.values())


def test_what_the_user_sets_meanwhile_stays() -> None:
    model = tiny("wan")
    handle = enable(model, **NARROW)
    former = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        model.set_attention_backend("_native_math")
        assert not handle.enabled
        handle.disable()
        assert {p._attention_backend.value for p in model.attn_processors.values()} == {"_native_math"}
    finally:
        _AttentionBackendRegistry.set_active_backend(former)


def test_dense_calls_use_the_backend_that_the_model_had() -> None:
    model = tiny("wan")
    for processor in model.attn_processors.values():
        processor._attention_backend = "_native_math"
    expected = run(model, "wan")
    with enable(model, "dense") as handle:
        assert torch.equal(run(model, "wan"), expected)
        assert all(set(row.executors) == {"_native_math"} for row in handle.stats())


def test_a_deep_copy_of_an_enabled_model_runs_as_it_did_before() -> None:
    model = tiny("wan")
    expected = run(model, "wan")
    with enable(model, **NARROW) as handle:
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin, "wan"), expected)
        assert not len(handle.stats())


def test_a_deleted_model_leaves_no_backend() -> None:
    model = tiny("wan")
    handle = enable(model, **WHOLE)
    del model
    assert not handle.enabled  # and `nothing_is_left`


def test_context_parallelism_is_left_to_diffusers() -> None:
    model, given = tiny("flux"), []

    class Parallel:
        context_parallel_config = None

    former = _AttentionBackendRegistry._backends["native"]

    def native(query: Tensor, key: Tensor, value: Tensor, _parallel_config: Any = None, **rest: Any) -> Tensor:
        given.append(_parallel_config)
        return former(query, key, value, **{k: v for k, v in rest.items() if k != "return_lse"})

    names = _AttentionBackendRegistry._supported_arg_names["native"]
    expected = run(model, "flux")
    parallel = Parallel()
    with enable(model, **NARROW) as handle:
        for processor in model.attn_processors.values():
            processor._parallel_config = parallel
        try:
            _AttentionBackendRegistry._backends["native"] = native
            assert torch.equal(run(model, "flux"), expected)
        finally:
            _AttentionBackendRegistry._backends["native"] = former
        assert handle.stats().fallbacks() == {"context parallelism": 2}
    assert given == [parallel] * 2
    assert "_parallel_config" in names


def test_models_in_training_run_dense_unless_asked() -> None:
    model = tiny("wan")
    for training, calls in ((False, 0), (True, 2)):
        with enable(model, **WHOLE, training=training) as handle:
            model(**inputs_of("wan", 1, 500.0))[0].sum().backward()
            assert sum(row.sparse_calls for row in handle.stats()) == calls


AGAIN: dict[str, dict[str, Any]] = {
    "attention_tile": {"frames": 1, "block": 8},
    "adaspa": {"search": (1, 3), "block": 8},
    "sparsed": {"skip": 0.0, "share": 0.2, "block": 8},
    "paro": {"density": 0.2, "block": 8},
}


@pytest.mark.parametrize("method", AGAIN)
def test_a_gradient_that_runs_layers_again_plans_them_alike(method: str) -> None:
    """Checkpoints run a layer a second time in the backward pass, outside of the model's forward.

    Step 1 is the one in which `adaspa` and `sparsed` choose, and run dense.
    """
    found = []
    for again in (False, True):
        model = tiny("wan")
        if again:
            model.enable_gradient_checkpointing()
        with enable(model.train(), method, **AGAIN[method], training=True, steps=4, min_tokens=0) as handle:
            with torch.no_grad():
                model(**inputs_of("wan", 1, 900.0))
            handle.reset()
            model(**inputs_of("wan", 1, 500.0))[0].sum().backward()
            rows = [row for row in handle.stats() if row.layer is not None]
        dense = method in ("adaspa", "sparsed")
        assert [row.dense_calls if dense else row.sparse_calls for row in rows] == [1 + again] * 2
        found.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_branches_of_sequential_guidance_are_apart_and_samplings_too() -> None:
    fields = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}
    scheduler = diffusers.UniPCMultistepScheduler(**fields, flow_shift=3.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipe = diffusers.WanPipeline(**parts, transformer=tiny("wan"), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": noise(1, TEXT, 8), "negative_prompt_embeds": noise(1, TEXT, 8, seed=2)}
    size = {"height": 64, "width": 96, "num_frames": 9, "guidance_scale": 3.0}

    def sample() -> Tensor:
        return pipe(**SMALL, **text, **size, generator=torch.Generator().manual_seed(0))[0]

    expected = sample()
    seen: list[Any] = []
    handle: Any = gossamer.enable(pipe, **WHOLE)
    with handle:
        handle.observe(lambda observed: seen.append(observed.call))
        for _ in range(2):
            torch.testing.assert_close(sample(), expected, atol=1e-3, rtol=1e-3)
        assert handle.steps == [0, 1, 2, 3]
        assert [row.calls for row in handle.stats(step=2) if row.layer is not None] == [4, 4]
    steps = [DenoisingStep(n, 4, branch) for n in range(4) for branch in range(2) for _ in range(2)]
    assert [call.step for call in seen] == steps * 2
    kept = {(n // 16, call.layer, call.step.branch): id(call.state[0]) for n, call in enumerate(seen)}
    assert len(set(kept.values())) == 8
    assert all(id(call.state[0]) == kept[n // 16, call.layer, call.step.branch] for n, call in enumerate(seen))


def test_two_transformers_of_a_pipeline_share_the_steps() -> None:
    fields = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer_2": tiny("wan"), "boundary_ratio": 0.8}
    scheduler = diffusers.UniPCMultistepScheduler(**fields, flow_shift=3.0)
    pipe = diffusers.WanPipeline(**parts, transformer=tiny("wan"), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": noise(1, TEXT, 8), "negative_prompt_embeds": noise(1, TEXT, 8, seed=2)}
    seen: list[Any] = []
    handle: Any = gossamer.enable(pipe, **WHOLE)
    with handle:
        handle.observe(lambda observed: seen.append((observed.call.step.number, observed.call.layer)))
        pipe(**SMALL, **text, height=64, width=96, num_frames=9, guidance_scale=3.0)
    first = sum(float(time) >= 800 for time in scheduler.timesteps)
    assert 0 < first < 4
    assert seen == [
        (step, layer) for step in range(4) for _ in range(2) for layer in ((0, 1) if step < first else (2, 3))
    ]


def test_a_unet_runs_without_a_layout() -> None:
    """Its images shrink from layer to layer: methods that need no layout run, the others say what they lack."""
    torch.manual_seed(0)
    model: Any = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8, attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8,
    ).eval()  # fmt: skip
    given = noise(2, 4, 16, 16), torch.tensor(500), noise(2, TEXT, 8, seed=1)
    with torch.no_grad():
        expected = model(*given)[0]
        with enable(model, **WHOLE) as handle:
            torch.testing.assert_close(model(*given)[0], expected, atol=1e-4, rtol=1e-4)
            assert sum(row.sparse_calls for row in handle.stats()) == 4
            assert handle.stats().fallbacks() == {"cross-attention": 4}
        with enable(model, "adaspa", min_tokens=0) as handle:
            assert torch.equal(model(*given)[0], expected)
            assert handle.stats().fallbacks() == {"adaspa needs layout": 4, "cross-attention": 4}


def test_branches_of_batched_guidance_are_rows() -> None:
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipe = diffusers.CogVideoXPipeline(
        **parts, transformer=tiny("cogvideox"), scheduler=diffusers.CogVideoXDDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": noise(1, TEXT, 8), "negative_prompt_embeds": noise(1, TEXT, 8, seed=2)}
    size = {"height": 64, "width": 96, "num_frames": 9, "guidance_scale": 3.0}
    seen: list[Any] = []
    with gossamer.enable(pipe, **WHOLE) as handle:
        assert isinstance(handle, Handle)
        handle.observe(lambda observed: seen.append(observed.call))
        pipe(**SMALL, **text, **size)
    assert [(len(call.state), call.step) for call in seen] == [(2, DenoisingStep(n, 4)) for n in range(4) for _ in "ab"]
    assert len({id(row) for call in seen for row in call.state}) == 4


def test_a_transformer_alone_counts_its_timesteps() -> None:
    model, seen = tiny("wan"), []
    with enable(model, **WHOLE, steps=3) as handle:
        handle.observe(lambda observed: seen.append((observed.call.step, observed.call.state)))
        for time in (900.0, 900.0, 500.0, 500.0, 900.0):
            run(model, "wan", batch=1, time=time)
    steps = [DenoisingStep(*numbers) for numbers in ((0, 3, 0), (0, 3, 1), (1, 3, 0), (1, 3, 1), (0, 3, 0))]
    assert [step for step, _ in seen[::2]] == steps
    assert seen[0][1] is seen[4][1]
    assert seen[0][1] is not seen[8][1]


PADDED: dict[str, dict[str, Any]] = {
    "a_shape": {"window": 30, "sink": 2},
    "adaspa": {"search": (0, 5), "block": 8},
    "paro": {"density": 0.3, "order": "FWH", "block": 8},
}


@pytest.mark.parametrize("method", PADDED)
def test_padding_between_text_and_image_changes_nothing_but_its_order(method: str) -> None:
    """Padded text stands in the middle: a sample in a padded batch is what it is by itself."""
    model, times = tiny("qwen-image"), (0.9, 0.5)
    with enable(model, method, **PADDED[method], **ALWAYS, steps=9), torch.no_grad():
        both = [run(model, "qwen-image", batch=2, timestep=torch.full((2,), time)) for time in times]
        given = inputs_of("qwen-image", 2, 0.5)
        for row in range(2):
            words = int(given["encoder_hidden_states_mask"][row].sum())
            one = {
                "hidden_states": given["hidden_states"][row : row + 1],
                "encoder_hidden_states": given["encoder_hidden_states"][row : row + 1, :words],
                "encoder_hidden_states_mask": None,
                "img_shapes": given["img_shapes"][:1],
            }
            for time, expected in zip(times, both, strict=True):
                alone = model(**one, timestep=torch.full((1,), time), return_dict=False)[0]
                torch.testing.assert_close(expected[row : row + 1], alone, atol=1e-4, rtol=1e-4)


class Bare(nn.Module):
    processor = None


@pytest.mark.parametrize(
    ("give", "fields", "error", "message"),
    [
        (lambda: Bare(), {}, TypeError, "needs a pipeline or a model of diffusers, got Bare"),
        (lambda: tiny("wan"), {"text": "left"}, ValueError, "text must be 'first', 'last' or None, got 'left'"),
        (lambda: tiny("wan"), {"steps": 0}, ValueError, "steps must be a number of steps from 1 on, or None, got 0"),
        (
            lambda: tiny("wan"),
            {"method": "seer_attention"},
            ValueError,
            "seer_attention looks at q and k before their rotary embedding",
        ),
        (lambda: tiny("wan"), {"method": "quest"}, ValueError, "quest plans no prompt"),
    ],
)
def test_what_is_refused(give: Any, fields: dict[str, Any], error: type[Exception], message: str) -> None:
    fields = {"method": "a_shape"} | fields
    with pytest.raises(error, match=message):
        enable(give(), **fields)


def test_a_model_is_enabled_once_and_knows_its_steps() -> None:
    model = tiny("wan")
    with enable(model, **WHOLE) as handle:
        with pytest.raises(ValueError, match="is enabled already"):
            gossamer.enable(model, "a_shape")
        with pytest.raises(ValueError, match="there is no record of step 7; there are records of none"):
            handle.stats(step=7)
        assert repr(handle) == "<gossamer a_shape on WanTransformer3DModel, enabled>"
    with pytest.raises(ValueError, match="disabled"):
        handle.observe(None)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_compiled_models_break_their_graph_at_each_layer_and_run(name: str) -> None:
    model = tiny(name)
    expected = run(model, name)
    with enable(model, **WHOLE) as handle:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            for time in (500.0, 400.0):
                got = compiled(**inputs_of(name, 3, time))[0]
                if time == 500.0:
                    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert [row.sparse_calls for row in handle.stats() if row.layer is not None] == [2, 2]
        assert handle.steps == [0, 1]
    torch._dynamo.reset()
    gc.collect()  # graphs hold the names of backends
