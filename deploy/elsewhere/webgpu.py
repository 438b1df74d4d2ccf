"""A machine with a GPU, without the GPU: onnxruntime's WebGPU build on SwiftShader, which is Vulkan in software.

All that a provider for GPUs does is done: it compiles shaders, moves tensors, and has the CPU run what it lacks. Only
the arithmetic is a CPU's, and slow. Another Vulkan driver, a real GPU's or Mesa's llvmpipe from version 24 on, is taken
where VK_ICD_FILENAMES names it.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tarfile
from pathlib import Path

from machine import ROOT, CannotPrepare, Machine, new, run, uv

ONNXRUNTIME = "onnxruntime-webgpu==1.27.0"

SWIFTSHADER = "@sparticuz/chromium@147.0.0"
"""The package from npm that brings SwiftShader's library, 66 MB; Debian has none."""

_DRIVER = "vk_swiftshader_icd.json"

_UNPACK = """
const {brotliDecompressSync} = require('zlib'), {readFileSync, writeFileSync} = require('fs');
writeFileSync('driver.tar', brotliDecompressSync(readFileSync('package/bin/swiftshader.tar.br')));
"""


def prepare(folder: Path) -> Machine:
    """Download and unpack into `folder` what is not there yet. Raises CannotPrepare."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        raise CannotPrepare("SwiftShader's library is there for Linux on x86-64 alone")
    packages, driver = _packages(folder), _driver(folder)
    return Machine(
        "WebGPU, in software",
        (sys.executable,),
        {
            "PYTHONPATH": os.pathsep.join(map(str, (packages, ROOT, ROOT / "protos"))),
            "LD_LIBRARY_PATH": str(driver),  # with the loader of Vulkan drivers
            "VK_ICD_FILENAMES": os.environ.get("VK_ICD_FILENAMES", str(driver / _DRIVER)),
        },
        ("--providers", "webgpu,cpu"),
    )


def _packages(folder: Path) -> Path:
    """Onnxruntime alone: it comes before that of the environment here, which has the rest."""
    packages, done = folder / "packages", folder / "packages.done"
    if not done.exists() or done.read_text() != ONNXRUNTIME:
        print(f"webgpu: fetching {ONNXRUNTIME}", flush=True)
        target = ("--quiet", "--no-deps", "--target", str(new(packages)), "--python", sys.executable)
        run(uv(), "pip", "install", *target, ONNXRUNTIME, need=ONNXRUNTIME)
        done.write_text(ONNXRUNTIME)
    return packages


def _driver(folder: Path) -> Path:
    driver, done = folder / "driver", folder / "driver.done"
    if not done.exists() or done.read_text() != SWIFTSHADER:
        print(f"webgpu: fetching {SWIFTSHADER}", flush=True)
        shutil.rmtree(driver, ignore_errors=True)
        run("npm", "pack", "--silent", SWIFTSHADER, folder=new(driver), need=SWIFTSHADER)
        (archive,) = driver.glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(driver, filter="data")
        run("node", "-e", _UNPACK, folder=driver, need="SwiftShader out of it")
        with tarfile.open(driver / "driver.tar") as packed:
            packed.extractall(driver, filter="data")
        done.write_text(SWIFTSHADER)
    return driver
