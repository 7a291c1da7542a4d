"""Which machine a speed was measured on: facts for the report, and a short name for the file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

import qvd_core

# What narrows the instructions that libraries may use; part of the result's name.
ISA_VARIABLES = ("QVD_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
AVX2_ONLY = dict(zip(ISA_VARIABLES, ("avx2", "avx2", "AVX2", "AVX2"), strict=True))
"""Environment in which PyTorch, oneDNN, MKL and QVD behave as on a CPU that has nothing beyond AVX2."""


def facts(device: torch.device) -> dict[str, str]:
    """What a reader must know of the machine to compare."""
    known = {
        "device": device_name(device),
        "torch": torch.__version__,
        "qvd": qvd_core.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        memory = torch.cuda.get_device_properties(device).total_memory
        known |= {"capability": f"sm_{major}{minor}", "memory": f"{memory / 2**30:.0f} GiB"}
        known |= {"cuda": torch.version.cuda or "?"}
    else:
        known |= {"instructions": instructions(), "threads": str(torch.get_num_threads())}
        known |= {name: value for name in ISA_VARIABLES if (value := os.environ.get(name))}
    return known


def slug(device: torch.device) -> str:
    """Lower-case name of the machine for a file name: `amd-epyc-avx512-vnni-1t`, `nvidia-h200-sm90`."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        parts = [device_name(device), f"sm{major}{minor}"]
    else:
        parts = [device_name(device), instructions(), f"{torch.get_num_threads()}t"]
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-")


def device_name(device: torch.device) -> str:
    """The GPU's or CPU's name, without words that say nothing."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = next((line.partition(":")[2] for line in _cpu_lines() if line.startswith("model name")), "")
    name = re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b|\d+-Core", "", name or platform.processor() or "cpu")
    return " ".join(name.split())


def instructions() -> str:
    """The widest vectors PyTorch uses, and the int8 products that the CPU has: "avx512-vnni", "avx2", ..."""
    widest = torch.backends.cpu.get_cpu_capability().lower()
    flags = next((set(line.split()) for line in _cpu_lines() if line.startswith("flags")), set())
    if widest.startswith("avx512"):
        extra = {"amx": "amx_int8", "vnni": "avx512_vnni"}
    else:
        extra = {"vnni": "avx_vnni"}
    if os.environ.get("QVD_CPU_ISA") == "avx2":
        extra = {}
    return "-".join([widest, *(name for name, flag in extra.items() if flag in flags)])


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions; what is missing is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def multiplies_in_16_bits() -> bool:
    """Whether this CPU, as far as the libraries may use it, has 16-bit products."""
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    limited = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() == "AVX2"
    return not limited and any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "avx512_fp16", "bf16"))
