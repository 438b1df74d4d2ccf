"""Another machine than this one, made on it: how the edge is run there, and how what it needs is fetched."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class CannotPrepare(Exception):
    """Something that is needed is missing; the message says what to do."""


@dataclass(frozen=True)
class Machine:
    """`command` runs its Python, which finds its packages with `environment`; `flags` are for `edge-agent serve`."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


def new(folder: Path) -> Path:
    """The folder, made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(*command: str, folder: Path | None = None, need: str = "") -> None:
    """Run what fetches `need`. Raises CannotPrepare with what it said, or where it is not there."""
    environment = dict(os.environ)
    for ours, theirs in (("UV_FIND_LINKS", "PIP_FIND_LINKS"), ("UV_DEFAULT_INDEX", "PIP_INDEX_URL")):
        if theirs in environment:
            environment.setdefault(ours, environment[theirs])
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise CannotPrepare(f"cannot get {need or command[-1]}: there is no {command[0]}") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip()[-2000:]
        raise CannotPrepare(f"cannot get {need or command[-1]}: `{' '.join(command[:2])}` said\n{words}")


def uv() -> str:
    """The command. Raises CannotPrepare where there is none."""
    # One that is found need not work: some machines have a stand-in that refuses.
    found = next((each for each in ("uv", str(ROOT / ".venv/bin/uv")) if _works(each)), None)
    if found is None:
        raise CannotPrepare("uv is needed: https://docs.astral.sh/uv/")
    return found


def _works(command: str) -> bool:
    try:
        return subprocess.run([command, "--version"], check=False, capture_output=True).returncode == 0
    except OSError:
        return False
