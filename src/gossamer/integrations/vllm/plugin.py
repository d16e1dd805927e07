"""The plug-in's side of vLLM: what is registered, and where requests, workers and metrics come by.

Touches vLLM in four places, each inert on a server that was not asked for gossamer: the CPU backend's class, the door
through which requests come in (a policy that a request names is checked there), that of the scheduler's process (the
request's cache salt), and the runner (it says whose rows a step has).
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import importlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gossamer.backends import cpu
from gossamer.integrations.vllm.counters import FOLDER, METRICS, announce, collected
from gossamer.integrations.vllm.decoding import check_pages, check_sizes
from gossamer.integrations.vllm.engine import Engine, logger, salt_of
from gossamer.integrations.vllm.limits import connectors, fills_unseen, shares_pages, why_not
from gossamer.integrations.vllm.settings import Settings, check_model
from gossamer.policy import Policy

__all__ = ["KEY", "engine_of", "install", "policies_of", "requests_of", "settings_of"]

KEY = "gossamer"
"""Where a request names its policy: ``SamplingParams(extra_args={"gossamer": ...})``, ``vllm_xargs`` over HTTP."""
CPU_BACKEND = "gossamer.integrations.vllm.cpu.SparseCPUBackend"
GPU_BACKEND = "gossamer.integrations.vllm.gpu.SparseTritonBackend"

_settings: dict[int, tuple[Any, Settings | None]] = {}
_engines: dict[int, tuple[Any, Engine | None]] = {}


def install() -> None:
    """Register the backends, and wrap what is named above. A second call does nothing.

    Raises:
        ImportError, AttributeError: a vLLM that is not as expected.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.metrics import prometheus
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if current_platform.is_cpu():  # vLLM would load it for servers that were not asked too
        importlib.import_module(CPU_BACKEND.rpartition(".")[0])
    wrapped = (
        (InputProcessor, "process_inputs", _checked),
        (EngineCore, "preprocess_add_request", _salted),
        (GPUModelRunner, "initialize_metadata_builders", _introduced),
    )
    for owner, name in [(owner, name) for owner, name, _ in wrapped] + [(prometheus, "get_prometheus_registry")]:
        getattr(owner, name)
    register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
    register_backend(AttentionBackendEnum.CUSTOM, GPU_BACKEND)
    for owner, name, wrapper in wrapped:
        former = getattr(owner, name)
        if not hasattr(former, "__gossamer__"):
            setattr(owner, name, _marked(wrapper(former), former))
    announce()
    _show_metrics()


def settings_of(config: Any) -> Settings | None:
    """What a server of this `VllmConfig` was asked for, all ranks together; None for nothing.

    Raises:
        ValueError: something that cannot be done, or a profile for another model.
    """
    if config is None:
        return None
    known = _settings.get(id(config))
    if known is None:
        settings = Settings.read(config.additional_config)
        # A draft model's layers run, as far as they can, what the server was asked for: no profile is made for them.
        if settings is not None and getattr(config.model_config, "runner_type", None) != "draft":
            remark = settings.for_model(config.model_config.hf_config)
            if remark is not None:
                logger.warning("gossamer: %s", remark)
        known = _settings[id(config)] = (config, settings)
    return known[1]


def engine_of(config: Any) -> Engine | None:
    """The plug-in of this worker; None on a server that was not asked for it. Inside a worker alone.

    Raises:
        ValueError: as `settings_of`; heads that do not divide.
    """
    known = _engines.get(id(config))
    if known is None:
        settings, engine = settings_of(config), None
        if settings is not None:
            from vllm.distributed import get_tensor_model_parallel_rank
            from vllm.platforms import current_platform

            model, ranks = config.model_config, config.parallel_config.tensor_parallel_size
            rank = get_tensor_model_parallel_rank() if ranks > 1 else 0
            heads, groups = model.hf_text_config.num_attention_heads, model.get_total_num_kv_heads()
            mine = settings.of_rank(rank, ranks, heads, groups)
            for policy in (mine.policy, *mine.policies.values()):
                _check_decode(policy, config)
            size, device = model.get_head_size(), current_platform.device_type
            like = torch.empty(1, heads // ranks, 1, size, dtype=model.dtype, device=device)
            drafts = getattr(getattr(config, "speculative_config", None), "num_speculative_tokens", None) or 0
            engine = Engine(mine, like, rank, 1 + drafts)
            _tell(mine, config)
        known = _engines[id(config)] = (config, engine)
    return known[1]


def _tell(settings: Settings, config: Any) -> None:
    reason = why_not(config)
    if reason is None:
        logger.info("gossamer: rows of %d queries and more run %s", settings.min_queries, settings.policy)
        if fills_unseen(config) and any(one.decode for one in (settings.policy, *settings.policies.values())):
            logger.warning("gossamer: decoding reads the whole cache, since its pages may change unseen here")
        return
    of = f"{reason} ({', '.join(connectors(config))})" if reason == "KV connector" else reason
    logger.warning("gossamer: vLLM's own kernel runs all rows of this server: %s", of)


def _check_decode(policy: Policy, config: Any) -> None:
    """That a policy's ``decode`` can choose on this server.

    Raises:
        ValueError: it cannot, and why.
    """
    if policy.decode is None:
        return
    from vllm.platforms import current_platform

    if current_platform.device_type != "cpu":
        raise ValueError(f"decode: {policy.decode.name} chooses what decoding reads on CPUs alone so far; leave it out")
    if not cpu.is_available():
        raise ValueError(f"decode: {policy.decode.name} needs gossamer's C++ kernels: {cpu.why_unavailable()}")
    page = getattr(getattr(config, "cache_config", None), "block_size", None)
    if page is not None:
        check_pages(policy.decode, page)


def policies_of(builder: Any, engine: Engine, rows: int) -> list[Policy] | None:
    """The policy of each row of a step; None where all have the server's."""
    runner = builder.runner() if getattr(builder, "runner", None) is not None else None
    if runner is None:
        return None
    ids = runner.input_batch.req_ids[:rows]
    named = [_named(runner.requests[one].sampling_params) if one in runner.requests else None for one in ids]
    if not any(one is not None for one in named):
        return None
    return [engine.policy_of(one) for one in named] + [engine.default] * (rows - len(named))


def requests_of(builder: Any, rows: int) -> list[str] | None:
    """The requests whose rows a step has; None where nobody knows."""
    runner = builder.runner() if getattr(builder, "runner", None) is not None else None
    return None if runner is None else list(runner.input_batch.req_ids[:rows])


def _named(params: Any) -> Any:
    """The policy that a request names, or None."""
    extra = getattr(params, "extra_args", None)
    return extra.get(KEY) if extra else None


def _marked(wrapper: Callable[..., Any], former: Any) -> Callable[..., Any]:
    wrapper = functools.wraps(former)(wrapper)
    wrapper.__gossamer__ = former  # type: ignore[attr-defined]
    return wrapper


def _checked(former: Callable[..., Any]) -> Callable[..., Any]:
    """The door: a policy that cannot be used is the request's error, and reaches no worker."""

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = kwargs.get("params", args[2] if len(args) > 2 else None)
        given = _named(params)
        if given is not None:
            from vllm.exceptions import VLLMValidationError

            settings = settings_of(self.vllm_config)
            if settings is None:
                raise VLLMValidationError(
                    f"the request names a policy ({KEY}), but this server was started without gossamer: see "
                    "--additional-config"
                )
            try:
                policy = settings.of_request(given)[1]
                check_model(policy, self.vllm_config.model_config.hf_config)
                _check_decode(policy, self.vllm_config)
                check_sizes(policy, settings)
            except (ValueError, TypeError) as error:
                raise VLLMValidationError(f"{KEY}: {error}") from error
            if policy != settings.policy and getattr(self.vllm_config, "use_v2_model_runner", False):
                raise VLLMValidationError(
                    f"{KEY}: vLLM's V2 model runner does not tell whose rows a step has, so a request cannot name a "
                    "policy; start the server with VLLM_USE_V2_MODEL_RUNNER=0"
                )
        return former(self, *args, **kwargs)

    return process_inputs


def _salted(former: Callable[..., Any]) -> Callable[..., Any]:
    """The door of the scheduler, whose process may have neither workers nor front: pages are shared by what it says."""

    def preprocess_add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        settings, salt = settings_of(self.vllm_config), request.cache_salt
        if settings is not None:
            given = _named(request.sampling_params)
            try:
                request.cache_salt = salt_of(settings, given, salt, shares_pages(self.vllm_config))
            except (ValueError, TypeError):  # refused at the front's; where there was none its pages are its own
                request.cache_salt = f"gossamer:{given!r}:{salt or ''}"
        try:
            return former(self, request, *args, **kwargs)
        finally:
            request.cache_salt = salt  # it may be sent once more

    return preprocess_add_request


def _introduced(former: Callable[..., Any]) -> Callable[..., Any]:
    """The runner, which alone knows whose rows a step has, becomes known to its builders."""

    def initialize_metadata_builders(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = former(self, *args, **kwargs)
        builders = [one for groups in self.attn_groups for group in groups for one in group.metadata_builders]
        ours = [one for one in builders if hasattr(one, "sparse")]
        for builder in ours:
            builder.runner = weakref.ref(self)
        if builders and not ours and settings_of(self.vllm_config) is not None:
            logger.warning(
                "gossamer: asked for, but no layer of this model runs on its backend; on GPUs that needs "
                "--attention-backend CUSTOM"
            )
        return result

    return initialize_metadata_builders


class _Collector:
    """What ``/metrics`` asks for."""

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        rows: dict[str, list[tuple[dict[str, str], float]]] = {}
        for metric, labels, value in collected(Path(os.environ.get(FOLDER, os.devnull))):
            rows.setdefault(metric, []).append((labels, value))
        for metric, found in sorted(rows.items()):
            names = sorted(found[0][0])
            family = CounterMetricFamily(metric, METRICS.get(metric, metric), labels=names)
            for labels, value in found:
                family.add_metric([labels[name] for name in names], value)
            yield family


def _show_metrics() -> None:
    """Add ours to the registry that vLLM's front shows, whichever it makes."""
    from vllm.v1.metrics import prometheus

    former = prometheus.get_prometheus_registry
    if hasattr(former, "__gossamer__"):
        return

    def get_prometheus_registry() -> Any:
        registry = former()
        if not getattr(registry, "__gossamer__", False):
            registry.register(_Collector())
            registry.__gossamer__ = True
        return registry

    marked = _marked(get_prometheus_registry, former)
    prometheus.get_prometheus_registry = marked
    for module in list(sys.modules.values()):
        # Not by `getattr`, at which modules that load late would load.
        if getattr(module, "__dict__", {}).get("get_prometheus_registry") is former:
            module.get_prometheus_registry = marked  # type: ignore[attr-defined]
