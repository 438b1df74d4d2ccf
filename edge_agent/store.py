"""The store: a folder with the models one has, and which of them is chosen.

    NAME/            an installed bundle; it appears by one rename, once every byte of it is verified
    .current         the name of the chosen one; without this file that is the starter
    .partial/NAME/   what a pull has so far, with the lock .NAME.lock beside it

A folder, or a link to one, that somebody puts there by hand is a model like any other. The starter lies elsewhere, is
always there, and cannot be removed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from edge_agent.bundle import Bundle, mode_of
from edge_agent.disk import DISK_FULL, lock_file, patiently, sync, unlock_file, write_durably
from edge_agent.errors import Busy, StoreError
from edge_agent.manifest import MANIFEST

STARTER_NAME = "starter"
RESERVED = (STARTER_NAME, "edge", "cloud")
"""What `models show` takes for something else than an installed model."""

MAX_NAME_CHARS = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NAME_RULE = (
    "a name has letters from a to z, digits, dots, dashes and underscores, "
    f"at most {MAX_NAME_CHARS}, begins with a letter or digit and does not end with a dot"
)

_CURRENT = ".current"
_PARTIAL = ".partial"
_REMOVED = ".removed-"
_LOCK = ".lock"
_CHOOSING = ".choosing.lock"


class Store:
    """The models in `folder`, which need not exist before something is installed. Every method raises StoreError."""

    def __init__(self, folder: Path, starter: Path) -> None:
        self.folder = folder
        self._starter = starter

    def names(self) -> list[str]:
        """The starter, then what is installed, by name. Whether it is whole is for `Bundle.open` to say."""
        with self.explained("read"):
            if not self.there:
                return [STARTER_NAME]
            return [STARTER_NAME, *sorted(path.name for path in self.folder.iterdir() if _is_model(path))]

    @property
    def there(self) -> bool:
        """Whether the folder exists. Only a pull makes it."""
        with self.explained("read"):
            return bool(mode_of(self.folder))

    def misnamed(self) -> list[str]:
        """Folders that somebody put there under names that no model can have."""
        with self.explained("read"):
            found = sorted(self.folder.iterdir()) if self.there else []
            return [
                path.name
                for path in found
                if path.is_dir() and not path.name.startswith(".") and not _is_model(path)
            ]

    def path(self, name: str) -> Path:
        """The bundle folder of the model called `name`."""
        if name == STARTER_NAME:
            return self._starter
        # By the list and not by a look at its folder: where file systems tell no capitals from small letters, that is
        # also another name's.
        if name not in self.names():
            if not self.there:
                raise self._nowhere(name)
            if name in self.unfinished():
                raise StoreError(
                    f"{name} is not pulled to its end; the same `edge-agent models pull` goes on with it, "
                    f"`edge-agent models remove {name}` throws it away"
                )
            if name in self.misnamed():
                raise StoreError(f"{self.folder / name} is no model: {_NAME_RULE}; rename the folder")
            raise StoreError(
                f"there is no model {name[:MAX_NAME_CHARS]!r} in {self.folder}; there are {', '.join(self.names())}. "
                "Get others with `edge-agent models pull`"
            )
        return self.folder / name

    @property
    def current(self) -> str:
        """The name of the chosen model. It may have been deleted since; `current_folder` looks."""
        with self.explained("read"):
            file = self.folder / _CURRENT
            try:
                text = patiently(file.read_text, encoding="utf-8", errors="replace")
            except FileNotFoundError:
                if self.folder.is_file():  # Windows finds nothing below a file, either
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), file) from None
                return STARTER_NAME
        name = text.strip()
        if not _is_name(name):
            raise StoreError(
                f"{self.folder / _CURRENT} holds no model's name; choose one with `edge-agent models use NAME`"
            )
        return name

    @property
    def current_folder(self) -> Path:
        """The bundle folder of the chosen model."""
        name = self.current
        with self.explained("read"):
            there = name == STARTER_NAME or (self.folder / name).is_dir()
        if not there:
            raise StoreError(
                f"the chosen model {name!r} is not in {self.folder} any more; choose another with `edge-agent models "
                f"use NAME` ({STARTER_NAME} is always there)"
            )
        return self.path(name)

    @contextmanager
    def choosing(self, name: str) -> Iterator[None]:
        """Makes `name` the chosen model when the block, which may try it, ends well: in one step that cannot be seen
        half-done. Whatever else ends it leaves the choice as it was. No model is removed meanwhile.

        Raises Busy when another process is choosing, and BundleError when a file of the model is missing or not of its
        size, or its calibration cannot be read.
        """
        if name == STARTER_NAME and not self.there:  # it is the chosen one
            yield
            return
        with self._undisturbed(name):
            bundle = Bundle.open(self.path(name), verify=False)
            _ = bundle.advice  # a calibration that cannot be read would keep the daemon from starting
            yield
            with self._exclusive(name), self.explained("written"):
                if name == STARTER_NAME:
                    (self.folder / _CURRENT).unlink(missing_ok=True)
                else:
                    write_durably(self.folder / _CURRENT, name + "\n")

    def choose(self, name: str) -> None:
        """Makes `name` the chosen model. Raises what `choosing` raises."""
        with self.choosing(name):
            pass

    def remove(self, name: str) -> int:
        """Deletes an installed model, or what an unfinished pull of it left; returns the bytes that this freed.

        Whether a daemon serves it is for the caller to ask. A link goes, and what it leads to stays. A folder without a
        manifest was never installed here, and may be all that somebody has of it.
        """
        if name == STARTER_NAME:
            raise StoreError("the starter comes with the project and cannot be removed")
        with self._undisturbed(name), self._exclusive(name):
            if name not in self.names() and name in self.unfinished():
                with self.pulling(name):
                    return self._delete(self.partial(name))
            folder = self.path(name)
            if self.current == name:  # after what cannot be the chosen one, be the choice damaged
                raise StoreError(
                    f"{name} is the chosen model; choose another before: edge-agent models use {STARTER_NAME}"
                )
            if not folder.is_symlink() and not (folder / MANIFEST).exists():
                raise StoreError(
                    f"{folder} has no {MANIFEST}, so it is no model; delete it yourself if you mean it"
                )
            return self._delete(folder)

    def partial(self, name: str) -> Path:
        """The folder of what a pull of `name` has so far."""
        return self.folder / _PARTIAL / name

    def unfinished(self) -> dict[str, int]:
        """The pulls that have not come to an end, each with the bytes it has so far."""
        with self.explained("read"):
            folder = self.folder / _PARTIAL
            found = sorted(folder.iterdir()) if folder.is_dir() else []
            return {path.name: _bytes_in(path) for path in found if _is_name(path.name) and path.is_dir()}

    @property
    def free_bytes(self) -> int:
        """What the disk of the folder, which has to be there, has left for this user. Raises OSError."""
        return shutil.disk_usage(self.folder).free

    @contextmanager
    def pulling(self, name: str) -> Iterator[Path]:
        """Holds the lock on the pull of `name`, and hands out the folder for its files, which need not exist yet. What
        a new model may be called is for `check_name` to say.

        Raises Busy when another process is pulling it.
        """
        folder = self.partial(name)
        lock = folder.with_name(f".{name}.lock")  # a name that no model has
        with self.explained("written"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = lock_file(lock, wait=False)
            except BlockingIOError:
                raise Busy(f"another pull of {name} is under way; wait for it, or stop it") from None
        try:
            yield folder
        finally:
            # Installed, removed or never begun: nothing is left to be locked.
            unlock_file(lock, descriptor, remove=not os.path.lexists(folder))

    def must_be_free(self, name: str) -> None:
        """Raises StoreError when something lies where the model `name` would be installed."""
        if os.path.lexists(self.folder / name):  # a rename would put it in the place of an empty folder
            raise StoreError(
                f"{self.folder / name} is there already; remove it, or pull under another --name"
            )

    def install(self, name: str) -> Bundle:
        """Makes the complete folder `partial(name)` the model `name`, by one rename. Only while `pulling` it.

        Raises BundleError when it is not complete after all.
        """
        partial, target = self.partial(name), self.folder / name
        bundle = Bundle.open(partial, verify=False)
        _ = bundle.advice  # a calibration that cannot be read would keep the daemon from starting
        with self._exclusive(name), self.explained("written"):
            self.must_be_free(name)
            for folder, _, _ in os.walk(partial):
                sync(Path(folder))
            patiently(os.replace, partial, target)
            sync(self.folder)
        return Bundle.open(target, verify=False)

    def _nowhere(self, name: str) -> StoreError:
        return StoreError(
            f"there is no model {name[:MAX_NAME_CHARS]!r}: the folder {self.folder} is not there. Get models with "
            "`edge-agent models pull`, or name another folder with --models"
        )

    def _delete(self, path: Path) -> int:
        with self.explained("written"):
            if path.is_symlink():
                path.unlink()
                return 0
            freed = _bytes_in(path)
            _make_writable(path)
            # Out of sight first: a model that is half deleted must not be seen.
            for left in self.folder.glob(_REMOVED + "*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)  # what it left is no reason to keep another model
            away = self.folder / f"{_REMOVED}{secrets.token_hex(8)}"
            patiently(os.replace, path, away)  # not into a folder made for it: on a full disk none can be
            # Windows keeps files that a program still has mapped; the next removal takes them.
            shutil.rmtree(away, ignore_errors=os.name == "nt")
            return freed

    def _undisturbed(self, name: str) -> AbstractContextManager[None]:
        """One process at a time tries a model, which may take a daemon minutes, or removes one. Raises Busy."""
        return self._locked(name, _CHOOSING, wait=False)

    def _exclusive(self, name: str) -> AbstractContextManager[None]:
        """One process at a time chooses, installs or removes, which takes moments."""
        return self._locked(name, _LOCK, wait=True)

    @contextmanager
    def _locked(self, name: str, lock: str, *, wait: bool) -> Iterator[None]:
        """A store's folder that is not there, as one misspelt, is not made: `pulling` makes it."""
        if not self.there:
            raise self._nowhere(name)
        with self.explained("written"):
            self.folder.mkdir(exist_ok=True)  # which says so where it is no folder
            try:
                descriptor = lock_file(self.folder / lock, wait=wait)
            except BlockingIOError:
                raise Busy(
                    "another `edge-agent models use` or `remove` is under way; wait for it, or stop it"
                ) from None
        try:
            yield
        finally:
            unlock_file(self.folder / lock, descriptor, remove=True)

    @contextmanager
    def explained(self, done: str) -> Iterator[None]:
        """Turns an OSError into a StoreError that says what could not be `done`, read or written, and the cure."""
        try:
            yield
        except OSError as error:
            place = error.filename or self.folder
            cure = "choose another folder with --models, or mend this one"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                cure = "allow more open files (ulimit -n)"
            elif error.errno in DISK_FULL:
                cure = "make room, or choose another folder with --models"
            elif os.name == "nt" and isinstance(error, PermissionError):  # also of what is in use
                cure = "stop the program that has it open, or choose another folder with --models"
            # A folder that was to be made: "File exists" would say the opposite of what is wrong.
            why = "it is no folder" if isinstance(error, FileExistsError) else error.strerror or error
            raise StoreError(f"{place} cannot be {done}: {why}; {cure}") from error


def check_name(name: str) -> None:
    """Raises StoreError unless an installed model may be called `name`."""
    if name in RESERVED:
        raise StoreError(f"no installed model can be called {name!r}; choose another with --name")
    if not _is_name(name) or name.endswith("."):  # which Windows drops: it would be another model's
        raise StoreError(
            f"a model cannot be called {name[:MAX_NAME_CHARS]!r}: {_NAME_RULE}; choose one with --name"
        )


def name_from(text: str) -> str:
    """A name for the model that its maker calls `text`, such as sd-turbo-int8 for "sd-turbo (int8)"."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:MAX_NAME_CHARS].rstrip("-._")
    check_name(name or text)
    return name


def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and len(name) <= MAX_NAME_CHARS


def _is_model(path: Path) -> bool:
    return _is_name(path.name) and path.name not in RESERVED and (path.is_dir() or path.is_symlink())


def _bytes_in(folder: Path) -> int:
    size = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):  # another process installs or removes it meanwhile
                size += (Path(place) / name).lstat().st_size
    return size


def _make_writable(folder: Path) -> None:
    """Folders that were copied from where nothing can be written must not keep what is in them."""
    for place, _, _ in os.walk(folder):
        mode = Path(place).stat().st_mode
        if not mode & stat.S_IWUSR:
            Path(place).chmod(mode | stat.S_IRWXU)
