"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnxruntime

from plan import cores

PACKAGES = ("numpy", "tokenizers", "grpcio", "torch", "diffusers", "optimum", "optimum-onnx")


def facts() -> dict[str, Any]:
    """Processor, cores, memory, load before the run, system, and the versions that matter."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
    versions |= {name: _version(name) for name in PACKAGES}
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores_used": cores(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: found for name, found in versions.items() if found},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
