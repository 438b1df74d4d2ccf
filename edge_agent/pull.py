"""Pulls a bundle into the store, from a folder, a web server or the hub.

    for event in pull(source_of("https://example.com/my-model", os.environ), store):
        ...  # Fetched, again and again, and at the end Pulled

What arrives is hashed on its way into the store's partial folder, and never more of it taken than the manifest
promises. Whatever ends a pull, the next one goes on where it stopped; the bundle shows among the installed ones when
all of it is verified, and not before.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edge_agent.bundle import Bundle
from edge_agent.disk import READ_BYTES, patiently, settle
from edge_agent.errors import (
    BundleError,
    NewerBundle,
    NotABundle,
    PullFailed,
    RouteT2IError,
    SourceLied,
    SourceUnreachable,
    StoreError,
)
from edge_agent.manifest import MANIFEST, MAX_MANIFEST_BYTES, FileEntry, Manifest, parse_manifest
from edge_agent.source import Source
from edge_agent.store import Store, check_name, name_from

WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Pauses before a file that broke off is asked for again."""

LONGEST_WAIT_S = 60.0
"""A server that wants to be left alone for longer is left to the next pull."""

WORTH_BYTES = 1 << 20
"""An attempt that brought this much counts as none, however it ended, and a pull that was refused leaves no less."""

SPARE_BYTES = 16 << 20
"""What a pull leaves free on the disk."""


@dataclass(frozen=True)
class Fetched:
    """How far a pull is: bytes of the whole bundle, and the file they now belong to."""

    file: str
    done_bytes: int
    total_bytes: int
    trouble: str = ""  # why the file is asked for again


@dataclass(frozen=True)
class Pulled:
    """The end of a pull. `fetched_bytes` came this time; none where it `was_installed` already."""

    name: str
    bundle: Bundle
    fetched_bytes: int
    was_installed: bool


def pull(
    source: Source, store: Store, name: str | None = None, waits_s: Sequence[float] = WAITS_S
) -> Iterator[Fetched | Pulled]:
    """Brings the bundle into the store as `name`, or as what its manifest calls it. Closing the iterator stops it.

    Raises:
        PullFailed: the source did not deliver.
        BundleError: what it has is no bundle that this program reads.
        StoreError: the name is taken by another bundle, or the disk is full.
        Busy: another process is pulling it.
    """
    if name is not None:
        check_name(name)
    text = source.manifest()
    manifest = parse_manifest(text, f"{source.place}/{MANIFEST}")
    name = name_from(manifest.name) if name is None else name
    with store.pulling(name) as partial:
        if installed := _installed(store, name, text):
            yield Pulled(name, installed, 0, was_installed=True)
            return
        with store.explained("written"):
            kept = _kept(partial, manifest)
            there = sum(min(_size(partial / path), manifest.files[path].bytes) for path in kept)
            thrown_away = store.unfinished().get(name, 0) - there
            _check_room(store, manifest.total_bytes - there, manifest, store.free_bytes + thrown_away)
            _prepare(partial, text, kept)
        fetched = done = 0
        try:
            with store.explained("written"):
                for path, entry in manifest.files.items():
                    for size, new, trouble in _fetch(source, path, entry, partial / path, waits_s):
                        fetched += new
                        yield Fetched(path, done + size, manifest.total_bytes, trouble)
                    done += entry.bytes
        except (PullFailed, StoreError) as error:
            raise type(error)(f"{error.message}{_left(partial, manifest, name, error)}") from error
        try:
            bundle = store.install(name)
        except BundleError as error:
            raise type(error)(f"{error.message}{_left(partial, manifest, name, error)}") from error
    yield Pulled(name, bundle, fetched, was_installed=False)


def _installed(store: Store, name: str, text: bytes) -> Bundle | None:
    """The bundle called `name` if it is the one with this manifest. Raises StoreError when it is another."""
    if name not in store.names():
        store.must_be_free(name)
        return None
    try:
        bundle = Bundle.open(store.path(name))  # whole: who pulls again may do so for its being damaged
    except NewerBundle as error:
        raise StoreError(
            f"{name} is installed and cannot be compared: {error.message}, or pull this one under a name of its own "
            "with --name"
        ) from error
    except NotABundle as error:
        raise StoreError(f"{error.message}: pull this one under another --name") from error
    except BundleError as error:
        raise StoreError(
            f"{name} is installed and not whole ({error.message}): `edge-agent models remove {name}`, then pull again"
        ) from error
    if bundle.digest != hashlib.sha256(text).hexdigest():
        raise StoreError(
            f"{name} is installed and is another bundle than this one; pull this one under a name of its own with "
            f"--name, or `edge-agent models remove {name}` first"
        )
    return bundle


def _kept(partial: Path, manifest: Manifest) -> set[str]:
    """The manifest's files that what lies there was to hold too, be it another version of the bundle."""
    path = partial / MANIFEST
    if partial.is_symlink() or not 0 < _size(path) <= MAX_MANIFEST_BYTES:
        return set()
    try:
        before = parse_manifest(path.read_bytes(), path).files
    except BundleError:
        return set()
    return {name for name, entry in manifest.files.items() if before.get(name) == entry}


def _prepare(partial: Path, text: bytes, kept: set[str]) -> None:
    """Makes the folder for the files of this manifest. Of those of another all but the `kept` ones are thrown away."""
    if _size(partial / MANIFEST) == len(text) and (partial / MANIFEST).read_bytes() == text:
        return  # the same one, which goes on
    if not kept and partial.exists():
        shutil.rmtree(partial)
    for folder, folders, files in os.walk(partial, topdown=False):
        for path in (Path(folder) / name for name in (*folders, *files)):
            if path.is_symlink() or not path.is_dir():
                if path.relative_to(partial).as_posix() not in {*kept, MANIFEST}:
                    path.unlink()
            elif not any(path.iterdir()):  # a file may take its place
                path.rmdir()
    partial.mkdir(exist_ok=True)
    new = partial / f"{MANIFEST}.new"  # one that is half written would throw away what is kept
    with new.open("wb") as file:
        file.write(text)
        _settle(file)
    patiently(os.replace, new, partial / MANIFEST)


def _left(partial: Path, manifest: Manifest, name: str, error: RouteT2IError) -> str:
    """What `error` says of what has come so far. Nothing is not kept, nor what is soon fetched again of a pull that was
    refused, as the small files come first.
    """
    goes_on = isinstance(error, (SourceUnreachable, StoreError))
    if sum(_size(partial / path) for path in manifest.files) < (1 if goes_on else WORTH_BYTES):
        shutil.rmtree(partial, ignore_errors=True)
        return ""
    if goes_on:
        return ". What has come so far is kept: the same command goes on where this one stopped"
    return f". What has come so far is kept for another try; `edge-agent models remove {name}` throws it away"


def _check_room(store: Store, needed: int, manifest: Manifest, free: int) -> None:
    if needed + SPARE_BYTES > free:
        raise StoreError(
            f"{megabytes(needed)} of {megabytes(manifest.total_bytes)} are still to come and {store.folder} has room "
            f"for {megabytes(max(0, free - SPARE_BYTES))}; make room, or choose another folder with --models"
        )


def _fetch(
    source: Source, name: str, entry: FileEntry, path: Path, waits_s: Sequence[float]
) -> Iterator[tuple[int, int, str]]:
    """Completes and verifies one file. Yields the bytes there are of it, those among them that are new, and what
    went wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        digest, size = _hashed(file, entry)
        started_over = False
        failures = 0
        whole = False  # whether all of it is asked for; what is there stays until that comes
        most = size  # that there have been; a server that begins anew each time has brought nothing before it has more
        yield size, 0, ""
        while True:
            pieced = size > 0
            unanswered = size < entry.bytes
            try:
                if unanswered:
                    start, blocks = source.read(name, entry, 0 if whole else size)
                    unanswered = whole = False
                    with closing(blocks):  # type: ignore[type-var]  # it is a generator
                        if start != size:
                            digest, size, pieced = _emptied(file), 0, False
                        for block in blocks:
                            file.write(block)
                            digest.update(block)
                            size += len(block)
                            yield size, len(block), ""
            except SourceUnreachable as error:
                file.flush()
                failures = 1 if size - most >= WORTH_BYTES else failures + 1
                most = max(most, size)
                if failures > len(waits_s) or (error.retry_after_s or 0.0) > LONGEST_WAIT_S:
                    raise
                yield size, 0, error.message
                time.sleep(max(waits_s[failures - 1], error.retry_after_s or 0.0))
                continue
            except SourceLied as error:
                lie = error
            else:
                if digest.hexdigest() == entry.sha256:
                    break
                lie = SourceLied(
                    f"{source.place}: {name} does not match its sha256 in {MANIFEST}, so it was altered on the way or "
                    "at its source; nothing was installed: pull again, or have it exported again"
                )
            if unanswered:  # with this file; perhaps by another server, as where people log in to a network
                whole = True
            else:
                digest, size = _emptied(file), 0
                most = 0
            # Pieces may not belong together: the power can have gone, or the file was another in between.
            if started_over or not pieced:
                raise lie
            started_over = True
        _settle(file)


def _hashed(file: IO[bytes], entry: FileEntry) -> tuple[Any, int]:
    """The sha256 so far, and the size, of what is there; a file that is too long is emptied."""
    if os.fstat(file.fileno()).st_size > entry.bytes:
        return _emptied(file), 0
    file.seek(0)
    digest, size = hashlib.sha256(), 0
    while block := file.read(READ_BYTES):
        digest.update(block)
        size += len(block)
    return digest, size


def _emptied(file: IO[bytes]) -> Any:
    file.truncate(0)
    return hashlib.sha256()


def _settle(file: IO[bytes]) -> None:
    file.flush()
    settle(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def megabytes(count: int) -> str:
    """Such as "12.8 MB"."""
    return f"{count / 1e6:,.1f} MB"
