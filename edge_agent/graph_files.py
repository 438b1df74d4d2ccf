"""A graph's files as they were when they were checked, and whether they still are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from edge_agent.disk import READ_BYTES
from edge_agent.errors import BundleError


class FileState(NamedTuple):
    """What tells whether a file was replaced, and its SHA-256 in hex where that was checked, which tells by what."""

    inode: int
    bytes: int
    changed_ns: int
    sha256: str = ""

    @classmethod
    def of(cls, file: Path) -> FileState:
        """As it is now. Raises OSError."""
        state = file.stat()
        return cls(state.st_ino, state.st_size, state.st_mtime_ns)

    def replaced(self, now: FileState) -> bool:
        """Whether it is another file `now`, though perhaps of the same bytes."""
        return self[:3] != now[:3]


class GraphFiles:
    """A graph and its weights. `states` are theirs from when they were checked (`Bundle.files_of`).

    Some file systems number a file anew once memory was short, and a copy of the same bytes is none to be refused: so
    one that was replaced is read again, and goes for the one it was where it has the bytes that were checked.
    """

    def __init__(self, graph: Path, states: Mapping[Path, FileState]) -> None:
        self.graph = graph
        self.states = states  # replaced as a whole: any thread may look
        self._refused: dict[Path, FileState] = {}  # files with other bytes, which are read but once
        self._faulty = False  # whether they were others when last they were checked

    @property
    def bytes(self) -> int:
        """What they take together."""
        return sum(state.bytes for state in self.states.values())

    @property
    def fault(self) -> str:
        """Why the graph cannot be loaded again, where that was tried; empty once its files are as they were, or are new
        ones, whose bytes the next load looks at. Reads nothing.
        """
        if not self._faulty:
            return ""
        lost, replaced = self._changes()
        return self._explained(
            lost, changed=any(self._refused.get(file) == now for file, now in replaced.items())
        )

    def check(self) -> None:
        """Raises BundleError unless they are those that were checked, or of the same bytes; reads what was replaced."""
        lost, replaced = self._changes()
        changed = not lost and not all(self._renewed(file, now) for file, now in replaced.items())
        fault = self._explained(lost, changed=changed)
        self._faulty = bool(fault)
        if fault:
            raise BundleError(fault)

    def _changes(self) -> tuple[list[Path], dict[Path, FileState]]:
        """The files that are gone, and those that were replaced, as they are now."""
        found = file_states(self.states)
        lost = sorted(self.states.keys() - found.keys())
        return lost, {file: now for file, now in found.items() if self.states[file].replaced(now)}

    def _renewed(self, file: Path, now: FileState) -> bool:
        """Whether a file that was replaced has the bytes that were checked, so that its state is the checked one."""
        known = self.states[file]
        if self._refused.get(file) == now:
            return False
        with suppress(OSError):
            now = FileState.of(file)  # before it is read, so that what changes later shows
            if known.sha256 and now.bytes == known.bytes and sha256_of(file) == known.sha256:
                self.states = {**self.states, file: now._replace(sha256=known.sha256)}
                return True
            self._refused[file] = now
        return False

    def _explained(self, lost: list[Path], *, changed: bool) -> str:
        if lost:
            return f"{lost[0]} is gone: put it back, or choose another model with `edge-agent models use`"
        if changed:
            return (
                f"{self.graph} has changed since the bundle was checked: restart edge-agent, or take the model up anew "
                "with `edge-agent models use`"
            )
        return ""


def file_states(files: Iterable[Path]) -> dict[Path, FileState]:
    """What tells later whether they are still the same. A file that is not there has none."""
    found = {}
    for file in files:
        with suppress(OSError):
            found[file] = FileState.of(file)
    return found


def sha256_of(path: Path) -> str:
    """In hex. Raises BundleError where the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
