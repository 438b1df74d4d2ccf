"""An aarch64 machine without the machine: qemu's user emulation, Debian's Python, and the wheels a device gets.

Everything lies in one folder and needs no rights: packages are unpacked, not installed. What is there is kept, so that
the next run starts at once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from machine import ROOT, Machine, new, run, uv

ONNXRUNTIME = "1.23.2"
"""The newest that can be emulated: qemu 7.2 crashes while it loads 1.32. On JetPack 6 it is the one in use."""

_PLATFORM = "aarch64-manylinux_2_28"

_DEBIAN = ("python3", "libstdc++6")  # the second is what wheels expect of a system


def prepare(folder: Path) -> Machine:
    """Download and unpack into `folder` what is not there yet. Raises CannotPrepare."""
    qemu = _qemu(folder)
    root = _python_root(folder)
    version = next(
        path.name for path in sorted((root / "usr/bin").glob("python3.*")) if path.name[8:].isdigit()
    )
    packages = _packages(folder, version.removeprefix("python"))
    path = os.pathsep.join(map(str, (packages, ROOT, ROOT / "protos")))
    return Machine(
        "aarch64, emulated",
        (str(qemu), "-L", str(root), str(root / "usr/bin" / version)),
        {"PYTHONPATH": path, "PYTHONHOME": str(root / "usr"), "PYTHONDONTWRITEBYTECODE": "1"},
    )


def _qemu(folder: Path) -> Path:
    name = "qemu-aarch64-static"
    if found := shutil.which(name):
        return Path(found)
    unpacked = folder / "qemu"
    if not (unpacked / "usr/bin" / name).exists():
        _say("fetching qemu-user-static")
        run(
            "apt-get",
            "download",
            "qemu-user-static",
            folder=new(folder / "downloads"),
            need="qemu-user-static",
        )
        for package in (folder / "downloads").glob("qemu-user-static_*.deb"):
            run("dpkg", "-x", str(package), str(unpacked))
    return unpacked / "usr/bin" / name


def _python_root(folder: Path) -> Path:
    """Debian's python3 for arm64 and all it needs, from lists of its own: the system's know only its architecture."""
    root, done = folder / "debian", folder / "debian.done"
    if done.exists() and done.read_text().split() == list(_DEBIAN):
        return root
    state, cache = new(folder / "apt/state"), new(folder / "apt/cache")
    new(state / "lists/partial")
    new(cache / "archives/partial")
    (state / "status").touch()  # nothing is installed there, so that every dependency is fetched
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "Dir::State": str(state),
        "Dir::State::status": str(state / "status"),
        "Dir::Cache": str(cache),
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    _say("fetching Debian's python3 for arm64")
    run("apt-get", *options, "update", need="a Debian whose package server has arm64")
    run("apt-get", *options, "install", "--yes", "--download-only", *_DEBIAN, need="python3 for arm64")
    shutil.rmtree(root, ignore_errors=True)
    for package in sorted((cache / "archives").glob("*.deb")):
        run("dpkg", "-x", str(package), str(new(root)))
    done.write_text(" ".join(_DEBIAN))
    return root


def _packages(folder: Path, python: str) -> Path:
    packages, done = folder / f"packages-{python}", folder / f"packages-{python}.done"
    stamp = (ROOT / "pyproject.toml").read_text() + (ROOT / "constraints.txt").read_text() + ONNXRUNTIME
    if done.exists() and done.read_text() == stamp:
        return packages
    _say(f"fetching aarch64 wheels for Python {python}")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    kept = [line for line in lines if not line.startswith("onnxruntime")]
    constraints.write_text("\n".join([*kept, f"onnxruntime=={ONNXRUNTIME}"]) + "\n")
    shutil.rmtree(packages, ignore_errors=True)
    install = ("pip", "install", "--quiet", "--target", packages, "--python", ROOT / ".venv/bin/python")
    there = ("--python-version", python, "--python-platform", _PLATFORM, "--only-binary", ":all:")
    wanted = ("--constraints", constraints, "--requirements", ROOT / "pyproject.toml", "--extra", "cpu")
    need = "the aarch64 wheels; `make aarch64-wheels` says which is missing"
    run(uv(), *map(str, (*install, *there, *wanted)), need=need)
    done.write_text(stamp)
    return packages


def _say(what: str) -> None:
    print(f"aarch64: {what}", flush=True)
