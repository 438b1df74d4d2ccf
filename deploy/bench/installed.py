"""What installing the edge alone puts on a disk: the wheel and all that it needs, without Python itself."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from errors import BenchError
from estimate import Estimate
from plan import Plan
from row import Row

GROUP = "installed"
MEGABYTES = 250.0  # target
NAME, EXTRA = "routet2i", "cpu"
ROOT = Path(__file__).resolve().parents[2]


def rows(_plan: Plan) -> list[Row]:
    """One row: the files of the distributions in this environment that the edge asks for, itself included."""
    megabytes = {name: size / 1e6 for name, size in _sizes().items()}
    largest = sorted(megabytes, key=lambda name: -megabytes[name])[:3]
    beside = ", ".join(f"{name} {megabytes[name]:.0f}" for name in largest)
    return [
        Row.at_most(
            GROUP,
            "installed size of the edge, without Python",
            Estimate.exact(sum(megabytes.values())),
            "MB",
            MEGABYTES,
            note=f"{len(megabytes)} distributions, the largest {beside} MB",
            details=megabytes,
        )
    ]


def _sizes() -> dict[str, int]:
    """Bytes of every distribution that `pip install routet2i[cpu]` brings, by name."""
    sizes = {NAME: _wheel()}
    waiting = [(NAME, frozenset({EXTRA}))]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            found = distribution(name)
        except PackageNotFoundError:
            raise BenchError(f"the edge needs {name}, which is not installed; run `make env`") from None
        if name != NAME:
            sizes[name] = _files(found)
        for text in found.requires or ():
            wanted = Requirement(text)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": one}) for one in extras | {""}):
                further = (wanted.name.lower().replace("_", "-"), frozenset(wanted.extras))
                if further not in seen:
                    seen.add(further)
                    waiting.append(further)
    return sizes


def _wheel() -> int:
    """Bytes of our own files, from a wheel built here: an editable install holds none of them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (built,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(built) as archive:
            return sum(info.file_size for info in archive.infolist())


def _files(found: Distribution) -> int:
    return sum(_bytes(Path(str(found.locate_file(file)))) for file in found.files or ())


def _bytes(path: Path) -> int:
    compiled = path.suffix == ".pyc"  # Python makes these itself, some installers at once and some never
    return path.stat().st_size if path.is_file() and not compiled else 0
