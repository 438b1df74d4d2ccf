"""The journal of generations: what each request id came to, and what it was charged. Survives kill -9.

One SQLite file. An image and its charge are written in one transaction, so an image that was charged can be
sent again (while it is kept), and one that was not written was not charged.

How old a generation is, the journal tells by a clock of its own: the seconds for which servers have run with the file,
less an hour at most of each that was killed. It only goes forward, and never faster than time. So no wall clock that is
wrong, or put right, makes it forget a charge.

No prompt is written: a fingerprint is enough to tell whether a request id comes back with the same wish.
"""

from __future__ import annotations

import enum
import errno
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cloud_server.errors import AlreadyExists, JournalError, JournalNotReady, StartRefused
from cloud_server.log import events
from cloud_server.request import Spec

log = events("cloud_server")

APPLICATION_ID = 0x52543243  # "RT2C"
SCHEMA_VERSION = 2
NOTE_CLOCK_EVERY_S = 3_600.0
KEEP_ROWS_S = 400 * 86_400.0  # a year and a bit: longer than any budget window an edge still asks about

_DAMAGED = (
    "it is damaged: stop cloud-server and move the file away, with the -wal beside it; edges that still ask are then "
    "told that their calls never ran, though some were charged"
)

_REMOVED = "it was removed or replaced beneath this server"

_NO_PROMPTS = {"prompt": "", "negative_prompt": ""}

_TABLE = """
CREATE TABLE generations (
    tenant TEXT NOT NULL,
    request_id TEXT NOT NULL,
    fingerprint TEXT NOT NULL,            -- of what was asked for; see service._fingerprint
    state TEXT NOT NULL,                  -- a value of State
    began REAL NOT NULL,                  -- seconds since the epoch; for people, who may ask when
    charged_micro_usd INTEGER NOT NULL DEFAULT 0,
    sha256 TEXT NOT NULL DEFAULT '',
    model_digest TEXT NOT NULL DEFAULT '',
    spec TEXT NOT NULL DEFAULT '',        -- JSON of request.Spec, its prompts empty
    image BLOB,                           -- PNG; NULL before it is finished and once it is no longer kept
    ran REAL NOT NULL DEFAULT 0,          -- Journal._ran when it began, or was finished
    PRIMARY KEY (tenant, request_id)
) WITHOUT ROWID
"""
_INDEXES = (
    "CREATE INDEX generations_ran ON generations (ran)",
    # Without it `prune` would read all rows whose image is gone, to find those whose image is old.
    "CREATE INDEX generations_kept ON generations (ran) WHERE image IS NOT NULL",
)
_CLOCK = "CREATE TABLE IF NOT EXISTS clock (ran REAL NOT NULL)"  # its one row: Journal._ran when that was last noted
_MARKS = (f"PRAGMA user_version = {SCHEMA_VERSION}", f"PRAGMA application_id = {APPLICATION_ID}")
_UPGRADES: dict[int, tuple[str, ...]] = {
    0: (_TABLE, *_INDEXES, *_MARKS),
    1: (
        # How long servers had run is not known: what is there counts as new.
        "ALTER TABLE generations ADD COLUMN ran REAL NOT NULL DEFAULT 0",
        "DROP INDEX generations_began",
        *_INDEXES,
        # The first schema held prompts: secure_delete overwrites them in the file, too.
        "UPDATE generations SET spec = json_set(spec, '$.prompt', '', '$.negative_prompt', '') WHERE spec != ''",
        *_MARKS,
    ),
    SCHEMA_VERSION: (),
}
"""What makes a file of each schema version one of this; 0 is an empty file."""


class State(enum.Enum):
    """Where a request id stands."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Finished:
    """A completed image: `charged_micro_usd` was taken for it, once. What the journal tells has no prompts."""

    charged_micro_usd: int
    sha256: str
    model_digest: str
    spec: Spec
    image: bytes | None  # PNG; None once it is no longer kept, or was not asked for


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
        self,
        connection: sqlite3.Connection,
        path: Path,
        keep_images_s: float,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._path, self._file = path, path.stat()
        self._keep_images_s = keep_images_s
        self._clock = clock
        self._monotonic = monotonic
        (ran,) = connection.execute(
            "SELECT MAX((SELECT COALESCE(MAX(ran), 0.0) FROM generations), (SELECT COALESCE(MAX(ran), 0.0) FROM clock))"
        ).fetchone()
        self._ran_from: float = monotonic() - ran
        self._noted: float = ran
        self._lock = threading.RLock()
        self._closed = False
        self._failure = ""  # what was last said of the file, where no call has been written to it since
        # Only this process can be making an image: a row that says "running" and is not here was cut off by a
        # crash.
        self._live: set[tuple[str, str]] = set()
        # Of these, what the disk would not take the charge of, and may have it after a crash: until their end is
        # written nobody is told that they came to nothing.
        self._unsure: set[tuple[str, str]] = set()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        keep_images_s: float,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> Journal:
        """Opens the file, making it and its folder (mode 0700) when absent. Both clocks give seconds.

        Raises StartRefused when it cannot be used: not writable, not a journal, or held by another server.
        """
        connection = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)  # the folder may be one that others read
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
            # One connection, and one process: whoever opens the file second is told so.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            _check(connection, path)  # before anything is written: another program's file stays as it is
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA fullfsync = ON")  # or macOS leaves it in the drive's cache
            # What is removed is overwritten in the file, also by an SQLite that was not built to do so.
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("BEGIN IMMEDIATE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in _UPGRADES:
                raise StartRefused(
                    f"{path} has schema {version} and this cloud-server knows {SCHEMA_VERSION}: update cloud-server, "
                    "or choose another --state folder"
                )
            for statement in _UPGRADES[version]:
                connection.execute(statement)
            connection.execute(_CLOCK)
            connection.execute("COMMIT")
            return cls(connection, path, keep_images_s, clock, monotonic)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, (OSError, sqlite3.Error)):
                raise _unusable(path, error) from error
            raise

    def find(self, tenant: str, request_id: str, *, with_image: bool = True) -> Entry | None:
        """What is known of a request id, with the image or without reading it; None when it was never accepted.

        An end that the disk has not taken yet is written first: an edge that asks has money set aside until it is told.
        """
        with self._lock:
            if (tenant, request_id) in self._unsure:
                with suppress(JournalError):
                    self.end(tenant, request_id, State.FAILED)
            with self._transaction():
                return self._find(tenant, request_id, with_image)

    def begin(self, tenant: str, request_id: str, fingerprint: str) -> None:
        """Records that the image is being made. An id that failed or was cancelled may begin again.

        Raises AlreadyExists when it is being made, or was made.
        """
        with self._lock:  # nobody finds the row before it is known to be live
            with self._transaction():
                if not self._is_there():
                    raise sqlite3.OperationalError(_REMOVED)
                entry = self._find(tenant, request_id, with_image=False)
                if entry is not None and entry.state in (State.RUNNING, State.FINISHED):
                    raise AlreadyExists(
                        f"request_id {request_id} is {entry.state.value}; ask LookupGeneration for its outcome",
                        facts={"state": entry.state.value},
                    )
                self._connection.execute(
                    "INSERT OR REPLACE INTO generations (tenant, request_id, fingerprint, state, began, ran) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (tenant, request_id, fingerprint, State.RUNNING.value, self._clock(), self._ran()),
                )
            self._live.add((tenant, request_id))
            self._failure = ""

    def finish(self, tenant: str, request_id: str, finished: Finished) -> None:
        """Writes the image and its charge, both or neither; only for an id that is running."""
        try:
            with self._transaction():
                changed = self._connection.execute(
                    "UPDATE generations SET state = ?, charged_micro_usd = ?, sha256 = ?, model_digest = ?, spec = ?, "
                    "image = ?, ran = ? WHERE tenant = ? AND request_id = ? AND state = ?",
                    (
                        State.FINISHED.value,
                        finished.charged_micro_usd,
                        finished.sha256,
                        finished.model_digest,
                        json.dumps(asdict(finished.spec) | _NO_PROMPTS),
                        finished.image,
                        self._ran(),  # from when it is kept: it may have waited for long
                        tenant,
                        request_id,
                        State.RUNNING.value,
                    ),
                ).rowcount
                if changed != 1:
                    raise JournalError(f"request_id {request_id} is not running, so it cannot be charged")
        except BaseException:
            self._unsure.add((tenant, request_id))
            raise
        self._live.discard((tenant, request_id))

    def end(self, tenant: str, request_id: str, state: State) -> None:
        """Records that a running id came to nothing (FAILED or CANCELLED). Leaves a finished one as it is."""
        try:
            with self._transaction():
                self._connection.execute(
                    "UPDATE generations SET state = ? WHERE tenant = ? AND request_id = ? AND state = ?",
                    (state.value, tenant, request_id, State.RUNNING.value),
                )
        except BaseException:
            if (tenant, request_id) not in self._unsure:
                self._live.discard((tenant, request_id))
            raise
        # Not before: a charge under way may still come first, and nobody may be told that it will not.
        self._live.discard((tenant, request_id))
        self._unsure.discard((tenant, request_id))

    def prune(self) -> bool:
        """Does away with one image that is no longer kept, and with rows past their time; whether there was one.

        One at a time: others come between, and what is overwritten in the file needs as much room in its log first.
        """
        with self._lock:
            if self._closed:
                return False
            with self._transaction():
                ran = self._ran()
                if ran - self._noted >= NOTE_CLOCK_EVERY_S:
                    self._note_clock(ran)
                self._connection.execute("DELETE FROM generations WHERE ran < ?", (ran - KEEP_ROWS_S,))
                removed = self._connection.execute(
                    "UPDATE generations SET image = NULL WHERE (tenant, request_id) IN "
                    "(SELECT tenant, request_id FROM generations WHERE ran < ? AND image IS NOT NULL LIMIT 1)",
                    (ran - self._keep_images_s,),
                ).rowcount
            if removed:
                with self._exclusively():
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the log has a copy of it
        return bool(removed)

    def close(self) -> None:
        """Notes the clock, where the disk takes it, and lets go of the file."""
        with self._lock:
            if not self._closed:
                with suppress(JournalError), self._transaction():
                    self._note_clock(self._ran())
            self._closed = True
            self._connection.close()

    def _find(self, tenant: str, request_id: str, with_image: bool) -> Entry | None:
        row = self._connection.execute(
            "SELECT state, fingerprint, charged_micro_usd, sha256, model_digest, spec, "
            "CASE WHEN ? AND ran >= ? THEN image END FROM generations WHERE tenant = ? AND request_id = ?",
            (with_image, self._ran() - self._keep_images_s, tenant, request_id),
        ).fetchone()
        if row is None:
            return None
        state, fingerprint, charged, sha256, model_digest, spec, image = row
        if state == State.RUNNING.value and (tenant, request_id) not in self._live:
            return Entry(State.FAILED, fingerprint)
        try:
            if state != State.FINISHED.value:
                return Entry(State(state), fingerprint)
            finished = Finished(charged, sha256, model_digest, Spec(**json.loads(spec)), image)
        except (ValueError, TypeError) as error:  # SQLite looks at pages, and not at what is in them
            raise sqlite3.DatabaseError(f"malformed row: {error}") from error
        return Entry(State.FINISHED, fingerprint, finished)

    def _note_clock(self, ran: float) -> None:
        self._connection.execute("DELETE FROM clock")
        self._connection.execute("INSERT INTO clock VALUES (?)", (ran,))
        self._noted = ran

    def _is_there(self) -> bool:
        """Whether the file still lies where it was opened. SQLite goes on with one that was removed, of which no later
        server knows anything.
        """
        try:
            return os.path.samestat(self._path.stat(), self._file)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # which says nothing of the file
            return True

    def _ran(self) -> float:
        """The journal's clock: seconds for which servers have run with the file."""
        return self._monotonic() - self._ran_from

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._exclusively():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                said = " ".join(str(error).split())
                advice = "check the disk of the state folder"
                if said == _REMOVED:
                    advice = "restart cloud-server, which goes by what lies there now"
                elif "malformed" in said:
                    advice = _DAMAGED
                failure = f"the journal of generations cannot be used: {said}; {advice}"
                if failure != self._failure:  # once, and not for every call
                    log.error("journal", error=failure)
                self._failure = failure
                raise JournalError(failure) from error


def _unusable(path: Path, error: OSError | sqlite3.Error) -> StartRefused:
    why = f"cannot use the journal {path}: {' '.join(str(error).split())}"
    said = str(error) if isinstance(error, sqlite3.Error) else ""  # the system names the file, too
    if "locked" in said:
        return JournalNotReady(f"{why}; another cloud-server uses it; give each its own --state folder")
    if "is full" in said or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return JournalNotReady(f"{why}; free some space and try again")
    if "malformed" in said:
        return StartRefused(f"{why}; {_DAMAGED}")
    return StartRefused(
        f"{why}; choose a writable --state folder, or move the file away if it is not a journal"
    )


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
