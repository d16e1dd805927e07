"""``gossamer doctor``: what runs here, and why anything is off; and whether a model is the same with gossamer."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from gossamer import AttentionCall, __version__, backends
from gossamer.backends import cpu
from gossamer.backends import torch as definition
from gossamer.cli.common import BadInput, add_command, first_line, one_line, print_json
from gossamer.cli.machine import DTYPES, examine_cpu, fast_dtype
from gossamer.evaluate.records import label_of
from gossamer.methods import AShape, from_dict
from gossamer.policy import Policy
from gossamer.profiles.costs import MIN_TOKENS, Costs, at_hand

__all__ = ["add_parser", "examine"]

_ENVIRONMENT = (
    "GOSSAMER_BACKEND",
    "GOSSAMER_CACHE",
    "GOSSAMER_CHECK",
    "GOSSAMER_COST_MODEL",
    "GOSSAMER_CPU_ISA",
    "GOSSAMER_PLANNER",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PACKAGES = {
    "transformers": "gossamer.enable and `gossamer run` need it: pip install 'gossamer[cli]'",
    "tqdm": "progress bars need it: pip install 'gossamer[cli]'",
    "gguf": "models as GGUF files need it, and accelerate: pip install 'gossamer[gguf]'",
    "triton": "CUDA devices need it: pip install 'gossamer[triton]'",
}


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "doctor", execute, "say what runs on this machine, and why anything is off")
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        help="folder or GGUF file of a model: run a short random prompt through it with gossamer and without, nothing "
        "left out, and compare; the exit code is 1 if they differ",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the model; differences show best in float32, the default",
    )


def execute(arguments: argparse.Namespace) -> int:
    report = examine()
    verification = None if arguments.model is None else _verify(arguments.model, arguments.dtype)
    if arguments.json:
        print_json(report if verification is None else report | {"model": verification.to_dict()})
    else:
        print(_format(report))
        if verification is not None:
            print(f"\n{verification}")
    return 0 if verification is None or verification.ok else 1


def _verify(path: Path, dtype: str) -> Any:
    from gossamer.cli.generation import check_weights, load_model
    from gossamer.cli.inputs import check_environment
    from gossamer.cli.pretrained import model_folder
    from gossamer.integrations.transformers import verify

    check_environment()
    path = model_folder(path)
    model = load_model(path, dtype, progress=sys.stderr.isatty())
    check_weights(model, path)  # NaN differs from NaN
    try:
        return verify(model)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: {first_line(error)}") from error


def examine() -> dict[str, Any]:
    """What the machine has, what is chosen, and what is off and why; plain JSON types."""
    chosen, tests = {}, {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in _DTYPES:
            name = str(dtype).removeprefix("torch.") + ("" if device == "cpu" else f" on {device}")
            try:
                call = _small_call(dtype, device)
                chosen[name] = backends.name_of(call)
                tests[name] = _self_test(call)
            except (ValueError, TypeError, RuntimeError) as error:
                chosen[name] = tests[name] = f"error: {first_line(error)}"
    found, where = at_hand()
    packages = {"torch": torch.__version__} | {name: _version(name) for name in _PACKAGES}
    report = {
        "gossamer": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": examine_cpu(),
        "kernels": {
            "available": cpu.is_available(),
            "why_unavailable": cpu.why_unavailable(),
            "instruction_sets": list(cpu.supported_isas()),
        },
        "backend": chosen,
        "dtype_auto": _fast_dtypes(),
        "self_test": tests,
        "cost_model": {"found": found is not None, "where": where},
        "min_tokens": {"default": MIN_TOKENS, "measured": [] if found is None else _measured(found)},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": packages,
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }
    return report | {"off": _what_is_off(report)}


def _fast_dtypes() -> dict[str, dict[str, str]]:
    """What ``--dtype auto`` takes on each device, and why."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    taken = {device: fast_dtype(device) for device in devices}
    return {device: {"dtype": str(d).removeprefix("torch."), "because": why} for device, (d, why) in taken.items()}


def _measured(costs: Costs) -> list[dict[str, Any]]:
    """The least prompts of methods that a policy without a number of its own takes from the cost model."""
    rows = []
    for point in costs.break_even:
        try:
            method = from_dict(dict(point.method))
        except (ValueError, TypeError):  # none that this version could be asked for
            continue
        tokens = costs.pays_from(point.method, point.kernel)
        row = {"method": label_of(Policy(method)), "kernel": str(point.kernel), "min_tokens": tokens}
        rows += [row] if row not in rows else []  # measured for several numbers of heads
    return rows


def _small_call(dtype: torch.dtype, device: str) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 200, 64, generator=generator).to(device, dtype) for heads in (2, 1, 1))
    return AttentionCall(q, k, v)


def _self_test(call: AttentionCall) -> str:
    """Run a small plan on the chosen backend against the definition."""
    plan = AShape(sink=8, window=48).plan(call)
    out, _ = backends.attend(call, plan)
    q, k, v = (tensor.cpu().double() for tensor in (call.q, call.k, call.values))
    exact = AttentionCall(q, k, v)
    expected, _ = definition.attend(exact, plan.to("cpu"))
    # The output is rounded to the dtype, and so may be the weights on the way.
    error, bound = float((out.cpu().double() - expected).abs().max()), 8 * torch.finfo(call.q.dtype).eps
    return "ok" if error <= bound else f"WRONG: off by {error:.1e}, more than {bound:.1e}"


def _what_is_off(report: dict[str, Any]) -> list[str]:
    off = []
    if not report["kernels"]["available"]:
        off.append(
            f"C++ kernels: {report['kernels']['why_unavailable']}; sparse attention on the CPU runs on the torch "
            "backend, which is slower than dense"
        )
    for dtype, result in report["self_test"].items():
        if result != "ok":
            off.append(f"backend for {dtype}: {result}")
    if not report["gpus"]:
        off.append("GPU: none that torch can use")
    off += [f"{name}: not installed; {why}" for name, why in _PACKAGES.items() if report["packages"][name] is None]
    return off


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _format(report: dict[str, Any]) -> str:
    machine, kernels = report["cpu"], report["kernels"]
    rows = [
        ("gossamer", f"{report['gossamer']}, Python {report['python']}, {report['system']}"),
        (
            "cpu",
            f"{machine['model']}, {machine['usable_cores']} usable cores, {machine['torch_threads']} torch threads",
        ),
        ("features", " ".join(machine["features"]) or "unknown"),
        ("kernels", " ".join(kernels["instruction_sets"]) if kernels["available"] else "not available"),
    ]
    for dtype, backend in report["backend"].items():
        tested = report["self_test"][dtype]
        rows.append((dtype, backend if tested == backend else f"{backend} (self-test: {tested})"))
    costs = report["cost_model"]
    rows.append(("cost model", costs["where"] if costs["found"] else f"none: {costs['where']}"))
    for device, auto in report["dtype_auto"].items():
        where = "" if device == "cpu" else f" on {device}"
        rows.append((f"--dtype auto{where}", f"{auto['dtype']}: {auto['because']}"))
    least = report["min_tokens"]
    rows += [
        ("min tokens", one_line(f"{row['min_tokens']} for {row['method']} on {row['kernel']}, from the cost model"))
        for row in least["measured"]
    ]
    others = "all else" if least["measured"] else "every method"
    rows.append(("min tokens", f"{least['default']} for {others}, a constant"))
    rows.append(("gpu", ", ".join(report["gpus"]) or "none"))
    rows += [(name, version or "not installed") for name, version in report["packages"].items()]
    rows += list(report["environment"].items())
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    return "\n".join([*lines, "", "off here:", *(f"  - {line}" for line in report["off"])])
