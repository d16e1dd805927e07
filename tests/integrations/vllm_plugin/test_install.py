"""A vLLM whose interface is another one runs as it would without the plug-in. On stubs of its classes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from stub_vllm import installed

from gossamer.integrations.vllm import register
from gossamer.integrations.vllm.counters import FOLDER


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What the plug-in finds of vLLM, and ``registered``: what it has put there."""
    monkeypatch.setitem(os.environ, FOLDER, "/nowhere")
    registered: dict[Any, str] = {}
    door, core, runner = (type(name, (), {}) for name in ("InputProcessor", "EngineCore", "GPUModelRunner"))
    door.process_inputs = core.preprocess_add_request = runner.initialize_metadata_builders = lambda self: None  # type: ignore[attr-defined]
    metrics = ModuleType("vllm.v1.metrics.prometheus")
    vars(metrics)["get_prometheus_registry"] = lambda: None
    more: dict[str, dict[str, Any]] = {
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": SimpleNamespace(CPU_ATTN="CPU_ATTN", CUSTOM="CUSTOM"),
            "register_backend": registered.__setitem__,
        },
        "vllm.v1.engine": {},
        "vllm.v1.engine.core": {"EngineCore": core},
        "vllm.v1.engine.input_processor": {"InputProcessor": door},
        "vllm.v1.worker": {},
        "vllm.v1.worker.gpu_model_runner": {"GPUModelRunner": runner},
        "vllm.v1.metrics": {"prometheus": metrics},
    }
    stubs = installed()
    next(stubs)
    vars(sys.modules["vllm.platforms"])["current_platform"] = SimpleNamespace(device_type="cpu", is_cpu=lambda: True)
    for name, content in more.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, metrics.__name__, metrics)
    yield SimpleNamespace(registered=registered, core=core, metrics=metrics)
    next(stubs, None)


def test_backends_are_registered_once(vllm: SimpleNamespace) -> None:
    former = vllm.core.preprocess_add_request
    register()
    wrapped = vllm.core.preprocess_add_request
    register()
    assert set(vllm.registered) == {"CPU_ATTN", "CUSTOM"}
    assert vllm.core.preprocess_add_request is wrapped is not former


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionMetadataBuilder"),
        ("vllm.model_executor.layers.attention", "Attention"),
        ("vllm.v1.metrics.prometheus", "get_prometheus_registry"),
        ("vllm.v1.engine.core", "EngineCore"),
    ],
)
def test_where_a_name_is_missing_nothing_is_changed(
    vllm: SimpleNamespace, module: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    former = vllm.core.preprocess_add_request
    delattr(sys.modules[module], name)
    with caplog.at_level(logging.WARNING, "vllm.gossamer"):
        register()
    assert not vllm.registered
    assert vllm.core.preprocess_add_request is former
    assert "gossamer does not know this vLLM, which runs without it" in caplog.text
    assert name in caplog.text
