"""What users of diffusers do around an enabled model: copies, processors, schedulers, errors, compiled parts."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
from diffusers.models.attention_dispatch import _AttentionBackendRegistry  # noqa: E402
from tiny_diffusers import FAMILIES, TEXT, inputs_of, noise, tiny  # noqa: E402

import gossamer  # noqa: E402
from gossamer import methods  # noqa: E402
from gossamer.integrations.diffusers import enable, seats  # noqa: E402
from gossamer.layout import DenoisingStep  # noqa: E402
from gossamer.methods import PerHead  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:gossamer runs its torch reference path:RuntimeWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
)
NARROW: dict[str, Any] = {"method": "a_shape", "sink": 0, "window": 3, "min_tokens": 0, "max_density": 2.0}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = _AttentionBackendRegistry.list_backends()
    yield
    assert _AttentionBackendRegistry.list_backends() == before


def run(model: nn.Module, name: str, time: float = 500.0, **changes: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(name, 1, time * FAMILIES[name].scale) | changes)[0]


def pipeline(transformer: Any, **parts: Any) -> Any:
    fields = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}
    scheduler = diffusers.UniPCMultistepScheduler(**fields, flow_shift=3.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None} | parts
    pipe = diffusers.WanPipeline(**parts, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, steps: int, **fields: Any) -> None:
    given = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 1.0, "output_type": "latent"} | fields
    pipe(prompt_embeds=noise(1, TEXT, 8), num_inference_steps=steps, **given)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_copies_and_saved_processors_outlive_the_handle(name: str) -> None:
    model = tiny(name)
    expected = run(model, name)
    handle = enable(model, **NARROW)
    twin, saved = copy.deepcopy(model), model.attn_processors
    assert (run(model, name) - expected).abs().max() > 1e-3
    handle.disable()
    assert torch.equal(run(twin, name), expected)
    model.set_attn_processor(saved)
    assert torch.equal(run(model, name), expected)
    with enable(twin, **NARROW):
        assert (run(twin, name) - expected).abs().max() > 1e-3
    assert torch.equal(run(twin, name), expected)


def test_what_is_set_on_processors_meanwhile_stays() -> None:
    """As ``enable_parallelism`` does."""
    model, parallel = tiny("wan"), SimpleNamespace(context_parallel_config=None)
    before = list(model.attn_processors.values())
    with enable(model, **NARROW):
        for processor in model.attn_processors.values():
            processor._parallel_config = parallel
    assert list(model.attn_processors.values()) == before
    assert all(processor._parallel_config is parallel for processor in before)
    assert all(processor._attention_backend is None for processor in before)


def test_processors_made_anew_from_the_class_of_ours_are_plain() -> None:
    """As diffusers does where it loads an IP-Adapter into a UNet."""
    torch.manual_seed(0)
    model: Any = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8, attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
    ).eval()  # fmt: skip
    given = noise(1, 4, 8, 8), torch.tensor(500), noise(1, TEXT, 8, seed=1)
    with torch.no_grad():
        expected = model(*given)[0]
        handle = enable(model, **NARROW)
        model.set_attn_processor({name: own.__class__() for name, own in model.attn_processors.items()})
        with pytest.raises(RuntimeError, match="none of the attention"):
            model(*given)
        assert not handle.enabled
        handle.disable()
        assert torch.equal(model(*given)[0], expected)


def test_the_scheduler_is_the_one_that_the_pipeline_has_when_it_is_called() -> None:
    pipe = pipeline(tiny("wan"))
    with enable(pipe, **NARROW) as handle:
        sample(pipe, 2)
        assert handle.steps == [0, 1]
        handle.reset()
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        seen = []
        handle.observe(lambda observed: seen.append(observed.call.step))
        sample(pipe, 3)
        assert seen == [DenoisingStep(n, 3) for n in range(3) for _ in "ab"]


def test_schedulers_of_second_order_number_their_timesteps_once() -> None:
    model, seen = tiny("wan"), []
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    pipe = pipeline(model)
    pipe.scheduler = scheduler
    with enable(pipe, **NARROW) as handle:
        handle.observe(lambda observed: seen.append(observed.call.step))
        sample(pipe, 3)
    assert len(scheduler.timesteps) == 5
    assert seen[::2] == [DenoisingStep(n, 3) for n in (0, 1, 1, 2, 2)]


class CutOff(Exception):
    """What a user's own callback raises."""


def test_a_sampling_of_a_pipeline_that_was_cut_off_leaves_nothing_to_the_next() -> None:
    pipe, seen = pipeline(tiny("wan")), []

    def cut(*given: Any) -> Any:
        raise CutOff

    with enable(pipe, **NARROW) as handle:
        handle.observe(lambda observed: seen.append(observed.call))
        with pytest.raises(CutOff):
            sample(pipe, 2, callback_on_step_end=cut)
        sample(pipe, 2)
    assert [call.step.number for call in seen] == [0, 0, 0, 0, 1, 1]
    assert {call.step.branch for call in seen} == {0}
    assert seen[2].state is not seen[0].state
    assert seen[4].state is seen[2].state


def test_a_call_that_failed_leaves_nothing() -> None:
    model, seen = tiny("wan"), []

    def fail(*given: Any) -> Any:
        raise MemoryError

    with enable(model, **NARROW, steps=3) as handle:
        handle.observe(lambda observed: seen.append(observed.call))
        hook = model.blocks[1].attn1.to_out[0].register_forward_hook(fail)
        with pytest.raises(MemoryError):
            run(model, "wan", 900.0)
        hook.remove()
        assert all(seat._hidden is None and not seat._inside for seat in handle._seats)
        run(model, "wan", 900.0)
        run(model, "wan", 600.0)
    assert [(call.step.number, call.step.branch) for call in seen] == [(0, 0)] * 4 + [(1, 0)] * 2
    assert seen[2].state is not seen[0].state
    assert seen[4].state is seen[2].state
    assert all(run.observe is None for run in handle._runs)


def test_a_model_that_cannot_be_enabled_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny("wan"), []
    before, copied = model.attn_processors, seats.Seat._copied

    def third_fails(seat: Any, processor: Any) -> Any:
        made.append(seat)
        if len(made) == 3:
            raise CutOff
        return copied(seat, processor)

    monkeypatch.setattr(seats.Seat, "_copied", third_fails)
    with pytest.raises(CutOff):
        enable(model, **NARROW)
    monkeypatch.undo()
    assert all(model.attn_processors[place] is processor for place, processor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    enable(model, **NARROW).disable()


def test_models_that_share_modules_are_refused_and_left_as_they_were() -> None:
    first, second = tiny("wan"), tiny("wan")
    second.blocks[1] = first.blocks[1]
    with pytest.raises(ValueError, match="shares attention modules with another model of the pipeline"):
        enable(pipeline(first, transformer_2=second, boundary_ratio=0.5), **NARROW)
    assert not any(module._forward_hooks for model in (first, second) for module in model.modules())


def test_a_model_under_two_names_is_enabled_once() -> None:
    model = tiny("wan")
    pipe = pipeline(model, transformer_2=model, boundary_ratio=0.8)
    with enable(pipe, **NARROW) as handle:
        run(model, "wan")
        assert [row.layer for row in handle.stats()] == [0, 1, None]
        assert len(handle._seats) == 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_was_compiled_is_enabled() -> None:
    model = tiny("wan")
    expected = run(model, "wan")
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    run(compiled, "wan")
    pipe = pipeline(model)
    pipe.components["transformer"] = pipe.transformer = compiled
    with enable(pipe, **NARROW) as handle:
        got = run(compiled, "wan")
        assert [row.sparse_calls for row in handle.stats() if row.layer is not None] == [1, 1]
        assert (got - expected).abs().max() > 1e-3
    gossamer.enable(compiled, **NARROW).disable()
    torch.testing.assert_close(run(compiled, "wan"), expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
    gc.collect()  # graphs hold the names of backends


def test_layers_are_numbered_by_the_order_of_the_transformers() -> None:
    first, second = tiny("wan"), tiny("wan")
    pipe = pipeline(first, transformer_2=second, boundary_ratio=0.5)
    with enable(pipe, **NARROW) as handle:
        run(second, "wan")
        assert [row.layer for row in handle.stats()] == [2, 3, None]
        run(first, "wan")
        assert [row.layer for row in handle.stats()] == [0, 1, 2, 3, None]
    # Not every model says which of its modules attend across.
    for module in first.modules():
        if hasattr(module, "is_cross_attention"):
            del module.is_cross_attention
    method = PerHead(((methods.create("a_shape"),) * 2,) * 4)
    with enable(pipe, method, min_tokens=0), pytest.raises(ValueError, match=r"layers .* cannot be numbered"):
        run(second, "wan")
