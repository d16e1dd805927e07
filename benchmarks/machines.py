"""Which machine this is, and where its results stand: in a folder of its own, so that none overwrites another's."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gossamer.backends import cpu

RESULTS = Path(__file__).parent / "results"
# Instruction sets from the best; an emulated one is none.
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
# Of Intel's family 6, by model.
_INTEL = {
    63: "Haswell",
    79: "Broadwell",
    85: "Skylake",
    106: "Ice Lake",
    143: "Sapphire Rapids",
    173: "Granite Rapids",
    207: "Emerald Rapids",
}


def machine() -> dict[str, Any]:
    """Processor, cores, instruction sets, versions."""
    info = _cpuinfo()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "generation": generation(info),
        "cores": os.cpu_count(),
        "isas": cpu.supported_isas(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_flags() -> set[str]:
    """What Linux says that the processor can do, in its names: ``avx512_vnni``, ``amx_int8``."""
    return set(_cpuinfo().get("flags", "").split())


def generation(info: Mapping[str, str]) -> str | None:
    """Of a processor by its family and model, which tell machines apart whose names hide it; None if not known."""
    try:
        family, model = int(info["cpu family"]), int(info["model"])
    except (KeyError, ValueError):
        return None
    if info.get("vendor_id") == "GenuineIntel" and family == 6:
        return _INTEL.get(model)
    if info.get("vendor_id") != "AuthenticAMD":
        return None
    if family == 25:
        return "Zen 4" if 0x10 <= model <= 0x1F or 0x60 <= model <= 0xAF else "Zen 3"
    return {23: "Zen 2" if model >= 0x30 else "Zen", 26: "Zen 5"}.get(family)


def folder_name(about: Mapping[str, Any]) -> str:
    """``amd-epyc-zen5-2-cores-avx512-bf16`` from a `machine`, ``nvidia-h200`` from that of a GPU benchmark."""
    if "device" in about:
        return _slug(about["device"])
    name = re.sub(r"\((R|TM|C)\)|\b(CPU|Processor|\d+-Core)\b|@.*|\bwith\b.*", " ", about["cpu"], flags=re.IGNORECASE)
    best = next((isa for isa in ISAS if isa in about["isas"]), "")
    known = (about.get("generation") or "").replace("Zen ", "Zen")
    return _slug(f"{name} {known} {about['cores']} cores {best}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def results(name: str, about: Mapping[str, Any] | None = None) -> Path:
    """A file of results of this machine, or of the one that is described."""
    return RESULTS / folder_name(machine() if about is None else about) / name


def measured(name: str) -> list[Path]:
    """The files of that name of all machines, in the order of their folders."""
    return sorted(RESULTS.glob(f"*/{name}"))
