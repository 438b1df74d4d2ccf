"""The journal of generations: what each request id came to, and what it was charged. Survives kill -9.

One SQLite file. An image and its charge are written in one transaction, so an image that was charged can be
sent again (while it is kept), and one that was not written was not charged.
"""

from __future__ import annotations

import enum
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cloud_server.errors import AlreadyExists, JournalError, StartRefused
from cloud_server.request import Spec

APPLICATION_ID = 0x52543243  # "RT2C"
SCHEMA_VERSION = 1
KEEP_ROWS_S = 400 * 86_400.0  # a year and a bit: longer than any budget window an edge still asks about

_TABLE = """
CREATE TABLE generations (
    tenant TEXT NOT NULL,
    request_id TEXT NOT NULL,
    fingerprint TEXT NOT NULL,            -- of what was asked for; see service._fingerprint
    state TEXT NOT NULL,                  -- a value of State
    began REAL NOT NULL,                  -- seconds since the epoch
    charged_micro_usd INTEGER NOT NULL DEFAULT 0,
    sha256 TEXT NOT NULL DEFAULT '',
    model_digest TEXT NOT NULL DEFAULT '',
    spec TEXT NOT NULL DEFAULT '',        -- JSON of request.Spec
    image BLOB,                           -- PNG; NULL before it is finished and once it is no longer kept
    PRIMARY KEY (tenant, request_id)
) WITHOUT ROWID
"""
_INDEX = "CREATE INDEX generations_began ON generations (began)"


class State(enum.Enum):
    """Where a request id stands."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Finished:
    """A completed image: `charged_micro_usd` was taken for it, once."""

    charged_micro_usd: int
    sha256: str
    model_digest: str
    spec: Spec
    image: bytes | None  # PNG; None once it is no longer kept


@dataclass(frozen=True)
class Entry:
    """What the journal knows of one (tenant, request_id). `finished` is there when `state` is FINISHED."""

    state: State
    fingerprint: str
    finished: Finished | None = None


class Journal:
    """Thread-safe; every call blocks for a disk write at most, so call it from a worker thread.

    Every method raises JournalError when the file cannot be read or written.
    """

    def __init__(
        self, connection: sqlite3.Connection, keep_images_s: float, clock: Callable[[], float]
    ) -> None:
        self._connection = connection
        self._keep_images_s = keep_images_s
        self._clock = clock
        self._lock = threading.Lock()
        # Only this process can be making an image: a row that says "running" and is not here was cut off by a
        # crash.
        self._live: set[tuple[str, str]] = set()

    @classmethod
    def open(cls, path: Path, *, keep_images_s: float, clock: Callable[[], float] = time.time) -> Journal:
        """Opens the file, making it and its folder (mode 0700) when absent.

        Raises StartRefused when it cannot be used: not writable, not a journal, or held by another server.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
            # One connection, and one process: whoever opens the file second is told so.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            _check(connection, path)  # before anything is written: another program's file stays as it is
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                connection.execute(_TABLE)
                connection.execute(_INDEX)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            elif version != SCHEMA_VERSION:
                raise StartRefused(
                    f"{path} was written by another version of cloud-server (schema {version}, this is "
                    f"{SCHEMA_VERSION}); choose another --state folder"
                )
            connection.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            locked = "locked" in str(error)
            advice = (
                "another cloud-server uses it; give each its own --state folder"
                if locked
                else "choose a writable --state folder, or move the file away if it is not a journal"
            )
            raise StartRefused(f"cannot use the journal {path}: {error}; {advice}") from error
        return cls(connection, keep_images_s, clock)

    def find(self, tenant: str, request_id: str) -> Entry | None:
        """What is known of a request id; None when it was never accepted."""
        with self._transaction():
            return self._find(tenant, request_id)

    def begin(self, tenant: str, request_id: str, fingerprint: str) -> None:
        """Records that the image is being made. An id that failed or was cancelled may begin again.

        Raises AlreadyExists when it is being made, or was made.
        """
        began = False
        try:
            with self._transaction():
                self._begin(tenant, request_id, fingerprint)
                self._live.add((tenant, request_id))  # before anybody can find the row
                began = True
        except BaseException:
            if (
                began
            ):  # the disk said no at the end: a row that an earlier crash left is not running now, either
                self._live.discard((tenant, request_id))
            raise

    def finish(self, tenant: str, request_id: str, finished: Finished) -> None:
        """Writes the image and its charge, both or neither; only for an id that is running."""
        with self._transaction():
            changed = self._connection.execute(
                "UPDATE generations SET state = ?, charged_micro_usd = ?, sha256 = ?, model_digest = ?, spec = ?, "
                "image = ? WHERE tenant = ? AND request_id = ? AND state = ?",
                (
                    State.FINISHED.value,
                    finished.charged_micro_usd,
                    finished.sha256,
                    finished.model_digest,
                    json.dumps(asdict(finished.spec)),
                    finished.image,
                    tenant,
                    request_id,
                    State.RUNNING.value,
                ),
            ).rowcount
            if changed != 1:
                raise JournalError(f"request_id {request_id} is not running, so it cannot be charged")
        self._live.discard((tenant, request_id))

    def end(self, tenant: str, request_id: str, state: State) -> None:
        """Records that a running id came to nothing (FAILED or CANCELLED). Leaves a finished one as it is."""
        try:
            with self._transaction():
                self._connection.execute(
                    "UPDATE generations SET state = ? WHERE tenant = ? AND request_id = ? AND state = ?",
                    (state.value, tenant, request_id, State.RUNNING.value),
                )
        finally:  # not before: a charge under way may still come first, and nobody may be told that it will not
            self._live.discard((tenant, request_id))

    def close(self) -> None:
        """Lets go of the file."""
        with self._lock:
            self._connection.close()

    def _begin(self, tenant: str, request_id: str, fingerprint: str) -> None:
        entry = self._find(tenant, request_id)
        if entry is not None and entry.state in (State.RUNNING, State.FINISHED):
            raise AlreadyExists(
                f"request_id {request_id} is {entry.state.value}; ask LookupGeneration for its outcome",
                facts={"state": entry.state.value},
            )
        now = self._clock()
        self._connection.execute(
            "INSERT OR REPLACE INTO generations (tenant, request_id, fingerprint, state, began) VALUES (?, ?, ?, ?, ?)",
            (tenant, request_id, fingerprint, State.RUNNING.value, now),
        )
        self._prune(now)

    def _find(self, tenant: str, request_id: str) -> Entry | None:
        row = self._connection.execute(
            "SELECT state, fingerprint, charged_micro_usd, sha256, model_digest, spec, image, began "
            "FROM generations WHERE tenant = ? AND request_id = ?",
            (tenant, request_id),
        ).fetchone()
        if row is None:
            return None
        state, fingerprint, charged, sha256, model_digest, spec, image, began = row
        if state == State.RUNNING.value and (tenant, request_id) not in self._live:
            return Entry(State.FAILED, fingerprint)
        if state != State.FINISHED.value:
            return Entry(State(state), fingerprint)
        if self._clock() - began > self._keep_images_s:
            image = None
        return Entry(
            State.FINISHED,
            fingerprint,
            Finished(charged, sha256, model_digest, Spec(**json.loads(spec)), image),
        )

    def _prune(self, now: float) -> None:
        self._connection.execute(
            "UPDATE generations SET image = NULL WHERE began < ? AND image IS NOT NULL",
            (now - self._keep_images_s,),
        )
        self._connection.execute("DELETE FROM generations WHERE began < ?", (now - KEEP_ROWS_S,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise JournalError(
                    f"the journal of generations cannot be used: {error}; check the disk of the state folder"
                ) from error


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Raises StartRefused for another program's database.

    The first journals say nothing of whose they are; they are known by their table and version.
    """
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    unnamed = application_id == 0 and version == 1 and tables == {"generations"}
    if tables and application_id != APPLICATION_ID and not unnamed:
        raise StartRefused(f"{path} is another program's database; choose another --state folder")
