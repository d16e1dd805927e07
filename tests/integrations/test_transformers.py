"""`enable`, its handle, and what it does at the edges: training, compiled decoding, composite models, odd arguments."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_transformers import ALWAYS_SPARSE, FULL, LENGTH, WINDOW, forward, generate, padding, pair, prompt, tiny_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DeepseekV32Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.masking_utils import sliding_window_causal_mask_function

from gossamer import methods
from gossamer.attention import sparse_attention
from gossamer.integrations.transformers import NAME, LayerStats, compact_mask, enable, hf_attention, register
from gossamer.integrations.transformers.owners import owner_of
from gossamer.policy import Policy
from gossamer.profiles import Profile

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


class TestHandle:
    def test_observe_shows_every_layers_tensors(self) -> None:
        model = tiny_llama()
        seen: list[Any] = []
        with enable(model, "a_shape", sink=1, window=3, **ALWAYS_SPARSE) as handle:
            handle.observe(seen.append)
            forward(model, prompt())
            assert [one.call.layer for one in seen] == list(range(model.config.num_hidden_layers))
            call = seen[0].call
            again = sparse_attention(call.q, call.k, call.v, handle.policy, scale=call.scale, extent=call.extent)
            assert torch.equal(again, seen[0].out)
            handle.observe(None)
            forward(model, prompt())
            assert len(seen) == model.config.num_hidden_layers
        with pytest.raises(ValueError, match="disabled"):
            handle.observe(seen.append)

    def test_disable_restores_the_model(self) -> None:
        model = tiny_llama()
        before = forward(model, prompt())
        handle = enable(model, "a_shape", sink=1, window=3, **ALWAYS_SPARSE)
        assert handle.enabled
        assert not torch.equal(forward(model, prompt()).logits, before.logits)
        handle.disable()
        handle.disable()
        assert not handle.enabled
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(forward(model, prompt()).logits, before.logits)
        assert all(owner_of(module) is None for module in model.modules())

    def test_context_manager_disables_after_an_error(self) -> None:
        model = tiny_llama()
        with pytest.raises(KeyError), enable(model):
            raise KeyError
        assert model.config._attn_implementation == "sdpa"

    def test_stats_count_layers_and_reasons(self) -> None:
        model = tiny_llama()
        with enable(model, "a_shape", sink=1, window=5, **ALWAYS_SPARSE) as handle:
            generate(model, prompt(), new=4)
            stats = handle.stats()
            rows = list(stats)
            assert [row.layer for row in rows] == [0, 1]
            assert [(row.calls, row.sparse_calls, row.dense_calls) for row in rows] == [(4, 1, 3)] * 2
            assert [row.fallbacks for row in rows] == [{"decode": 3}] * 2
            assert stats.fallbacks() == {"decode": 6}
            assert sum(rows[0].executors.values()) == 4
            assert rows[0].plan_seconds > 0
            assert rows[0].attention_seconds > 0
            length = prompt().shape[1]
            pairs = sum(min(i + 1, 5) + (i >= 5) for i in range(length))
            assert rows[0].density == pytest.approx(pairs / (length * (length + 1) / 2))
            assert "decode x3" in str(stats)
            handle.reset()
            assert len(handle.stats()) == 0
            assert len(stats) == 2
            assert "no attention" in str(handle.stats())

    def test_a_layer_begins_with_nothing(self) -> None:
        row = LayerStats(3)
        assert (row.calls, row.plan_seconds, row.attention_seconds, row.density) == (0, 0.0, 0.0, 1.0)

    def test_short_prompts_run_dense_by_default(self) -> None:
        model = tiny_llama()
        with enable(model) as handle:
            assert handle.policy == Policy(methods.create("minference"), training=False)
            forward(model, prompt())
            assert handle.stats().fallbacks() == {"short prompt": 2}

    def test_two_models_have_two_policies(self) -> None:
        first, second = tiny_llama(), tiny_llama()
        with (
            enable(first, "a_shape", sink=1, window=3, **ALWAYS_SPARSE) as narrow,
            enable(second, "a_shape", sink=1, window=30, **ALWAYS_SPARSE) as wide,
        ):
            forward(first, prompt())
            forward(second, prompt())
            forward(second, prompt())
            one, two = next(iter(narrow.stats())), next(iter(wide.stats()))
            assert (one.calls, two.calls) == (1, 2)
            assert one.density < two.density < 1

    def test_a_handle_does_not_keep_its_model(self) -> None:
        model = tiny_llama()
        handle = enable(model)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        handle.disable()
        assert "gone" in repr(handle)

    def test_an_enabled_model_can_be_copied(self) -> None:
        model = tiny_llama()
        with enable(model, "a_shape", **FULL) as handle:
            twin = copy.deepcopy(model)
            torch.testing.assert_close(
                forward(twin, prompt()).logits, forward(model, prompt()).logits, atol=1e-5, rtol=1e-4
            )
            assert all(row.calls == 1 for row in handle.stats())

    def test_modules_without_a_layer_index_share_a_row(self) -> None:
        model = tiny_llama()
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                del module.layer_idx
        with enable(model, "a_shape", **FULL) as handle:
            forward(model, prompt(), use_cache=False)
            (row,) = handle.stats()
            assert (row.layer, row.calls) == (None, 2)
            assert str(handle.stats()).splitlines()[1].split()[0] == "-"


class TestEnable:
    def test_method_fields_and_thresholds_make_the_policy(self) -> None:
        model = tiny_llama()
        with enable(model, "a_shape", sink=3, window=9, min_tokens=5, max_density=0.5) as handle:
            expected = Policy(
                methods.create("a_shape", sink=3, window=9), min_tokens=5, max_density=0.5, training=False
            )
            assert handle.policy == expected
        with enable(model, methods.create("a_shape", sink=2, window=8)) as handle:
            assert handle.policy == Policy(methods.create("a_shape", sink=2, window=8), training=False)
        with enable(model, expected, min_tokens=7) as handle:
            assert handle.policy == Policy(expected.method, min_tokens=7, max_density=0.5, training=False)

    @pytest.mark.parametrize("as_path", [True, False])
    def test_a_profile_decides_head_by_head(self, as_path: bool, tmp_path: Any) -> None:
        narrow, dense = methods.AShape(1, 4), methods.Dense()
        profile = Profile(((narrow,) * 4, (dense,) * 4))
        path = tmp_path / "profile.json"
        profile.save(path)
        model = tiny_llama()
        with enable(model, profile=path if as_path else profile, **ALWAYS_SPARSE) as handle:
            forward(model, prompt())
            first, second = handle.stats()
            assert first.density < 0.4
            assert second.density == pytest.approx(1.0)
            assert ("profile.json" if as_path else "per_head") in repr(handle)

    def test_twice_is_an_error(self) -> None:
        model = tiny_llama()
        with enable(model) as handle:
            with pytest.raises(ValueError, match="enabled already"):
                enable(model)
            with pytest.raises(ValueError, match="enabled already"):
                enable(model.model)
            assert handle.enabled
            assert model.config._attn_implementation == NAME
        with enable(model):
            pass

    def test_errors_leave_the_model_alone(self) -> None:
        model = tiny_llama()
        with pytest.raises(ValueError, match="unknown method 'fast'"):
            enable(model, "fast")
        with pytest.raises(ValueError, match="no field 'size'"):
            enable(model, "a_shape", size=3)
        with pytest.raises(ValueError, match="window given beside a finished AShape"):
            enable(model, methods.create("a_shape"), window=3)
        with pytest.raises(ValueError, match="a profile names a method for each head"):
            enable(model, "a_shape", profile=Profile.uniform(2, 4, methods.Dense()))
        with pytest.raises(TypeError, match="got Linear"):
            enable(nn.Linear(2, 2))
        assert model.config._attn_implementation == "sdpa"

    def test_a_model_that_cannot_switch_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_llama()
        monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
        monkeypatch.setattr(type(model.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
        with pytest.raises(ValueError, match="does not let its attention implementation be changed"):
            enable(model)
        assert model.config._attn_implementation == "sdpa"
        assert all(owner_of(module) is None for module in model.modules())

    def test_register_again_changes_nothing(self) -> None:
        register()
        model = tiny_llama()
        with enable(model, "a_shape", **FULL):
            register()
            forward(model, prompt())

    def test_only_the_text_part_of_a_composite_model_changes(self) -> None:
        text = LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
        )
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
        config: Any = LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
        config._attn_implementation = {"text_config": "eager", "vision_config": "sdpa"}
        model: Any = LlavaForConditionalGeneration(config).eval()

        def implementations() -> list[str]:
            return [part._attn_implementation for part in (model.config, config.text_config, config.vision_config)]

        before = implementations()
        expected = forward(model, prompt())
        with enable(model, "a_shape", **FULL) as handle:
            assert implementations() == [before[0], NAME, before[2]]
            got = forward(model, prompt())
            assert all(row.sparse_calls == 1 for row in handle.stats())
            assert len(handle.stats()) == 2
        assert implementations() == before
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)

    def test_loaded_by_name_runs_the_default_policy(self, caplog: pytest.LogCaptureFixture) -> None:
        stock = tiny_llama()
        model = tiny_llama()
        model.set_attn_implementation(NAME)
        with caplog.at_level(logging.WARNING, logger="gossamer"):
            got = forward(model, prompt())
        assert torch.equal(got.tokens, forward(stock, prompt()).tokens)
        with enable(model, "a_shape", **FULL) as handle:
            forward(model, prompt())
            assert all(row.sparse_calls == 1 for row in handle.stats())
        assert model.config._attn_implementation == NAME


class TestUnusualArguments:
    @pytest.mark.parametrize("additive", [False, True])
    def test_a_mask_of_the_callers_own(self, additive: bool) -> None:
        stock, model = pair("llama")
        length = prompt().shape[1]
        own = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(1)) < 0.5
        own |= torch.eye(length, dtype=torch.bool)
        mask = torch.where(own, 0.3, torch.finfo(torch.float32).min) if additive else own
        expected = stock(input_ids=prompt(), attention_mask=mask).logits
        with enable(model, "a_shape", **FULL) as handle:
            got = model(input_ids=prompt(), attention_mask=mask).logits
            assert handle.stats().fallbacks() == {"mask is not plain": 2}
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("family", ["llama", "mistral-window"])
    def test_packed_sequences_named_by_lengths_stay_apart(self, family: str) -> None:
        """Without positions that restart transformers hands no mask; the lengths alone must do."""
        stock, model = pair(family)
        lengths = torch.tensor([0, 20, LENGTH])
        positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
        one = forward(stock, prompt(rows=1)[:, 20:]).logits
        with enable(model, "a_shape", **FULL) as handle:
            got = forward(model, prompt(rows=1), position_ids=positions, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
            assert handle.stats().fallbacks() == {"packed sequences": 2}
            with pytest.raises(ValueError, match="one row"):
                forward(model, prompt(rows=2), cu_seq_lens_q=lengths)
        torch.testing.assert_close(got.logits[:, 20:], one, atol=1e-4, rtol=1e-4)

    def test_bidirectional_attention_runs_dense(self) -> None:
        stock, model = (copy.deepcopy(model) for model in pair("llama"))
        for one in (stock, model):
            one.config.is_causal = False
            for layer in one.model.layers:
                layer.self_attn.is_causal = False
        expected = forward(stock, prompt(), padding(left=(0, 9)))
        with enable(model, "a_shape", **FULL) as handle:
            got = forward(model, prompt(), padding(left=(0, 9)))
            assert handle.stats().fallbacks() == {"not causal": 2}
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)

    def test_cross_attention_runs_dense(self) -> None:
        module = nn.Module()
        q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
        out, weights = hf_attention(module, q, k, v, None, is_causal=False)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert weights is None
        torch.testing.assert_close(out, expected.transpose(1, 2))

    @pytest.mark.parametrize("causal", [True, False])
    def test_a_position_bias_is_added(self, causal: bool) -> None:
        q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
        bias = torch.randn(1, 2, 9, 9)
        out, _ = hf_attention(nn.Module(), q, k, v, None, position_bias=bias, is_causal=causal)
        added = bias.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf) if causal else bias
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added)
        torch.testing.assert_close(out, expected.transpose(1, 2))

    def test_bidirectional_dropout_hides_no_keys(self) -> None:
        q, k = (torch.randn(1, 2, 9, 8) for _ in range(2))
        values = torch.eye(9).expand(1, 2, 9, 9)
        out, _ = hf_attention(nn.Module(), q, k, values, None, dropout=0.01, is_causal=False)
        assert (out[:, 0, :, 1:] > 0).any()

    @pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.18"),
        reason="DeepSeek-V3.2 needs the whole mask but does not ask for it before 5.18",
    )
    def test_trained_sparse_indices_are_followed(self) -> None:
        config = DeepseekV32Config(
            vocab_size=96, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
            topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
            index_n_heads=2, index_head_dim=16, index_topk=6, initializer_range=0.2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        mask = padding(left=(0, 9))
        expected = forward(model, prompt(), mask)
        with enable(model, "a_shape", **FULL) as handle:
            got = forward(model, prompt(), mask)
            assert handle.stats().fallbacks() == {"keys chosen by the model": 2}
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)

    def test_what_cannot_run_says_so(self) -> None:
        q = torch.randn(1, 2, 4, 8)
        with pytest.raises(NotImplementedError, match="generate_batch"):
            hf_attention(nn.Module(), q, q, q, None, cache=object())
        with pytest.raises(NotImplementedError, match="MiniMax"):
            hf_attention(nn.Module(), q, q, q, None, block_indices=torch.zeros(1))

    def test_unknown_keywords_are_refused(self) -> None:
        q = torch.randn(1, 2, 4, 8)
        module: Any = nn.Module()
        module.layer_idx = 3
        with pytest.raises(NotImplementedError, match="Module of layer 3 gives its attention sinks, wavelength"):
            hf_attention(module, q, q, q, None, wavelength=3, sinks=q, nothing=None, position_ids=q)
        hf_attention(module, q, q, q, None, nothing=None, position_ids=q)

    def test_the_window_of_the_mask_comes_before_the_keyword(self) -> None:
        length = 3 * WINDOW
        q, k, v = (torch.randn(1, 2, length, 8) for _ in range(3))
        mask = compact_mask(1, length, length, mask_function=sliding_window_causal_mask_function(WINDOW))
        pairs = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - WINDOW)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=pairs).transpose(1, 2)
        for given in (mask, None):
            out, _ = hf_attention(nn.Module(), q, k, v, given, sliding_window=WINDOW if given is None else 7)
            torch.testing.assert_close(out, expected)

    def test_weights_are_asked_for_in_vain_and_said_so(self, caplog: pytest.LogCaptureFixture) -> None:
        model = tiny_llama()
        with enable(model, "a_shape", **FULL), caplog.at_level(logging.WARNING, logger="gossamer"), torch.no_grad():
            model(input_ids=prompt(), output_attentions=False)
            assert not caplog.records
            for _ in range(2):
                model(input_ids=prompt(), output_attentions=True)
        assert [record.getMessage().split(":")[0] for record in caplog.records] == ["output_attentions=True"]


def test_a_profile_of_another_model_is_refused_and_nothing_is_enabled() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"the profile is for 3 layers of 4 heads, but this model has \d+ layers of"):
        enable(model, profile=Profile.uniform(3, 4, methods.Dense()))
    enable(model, "dense").disable()
