"""The quota ledger: what the cloud may cost, and what it has cost, in a file that survives crashes.

A cloud call is *reserved* at its price ceiling before the stream opens, *settled* at what was charged when
the image has arrived, *released* when the cloud certainly never ran it. A reservation whose outcome is
unknown counts as spent until it is resolved. So, whatever crashes, the spend of a window never exceeds its
cap, and no request id is paid for twice.

Money is whole micro-dollars. A call counts in the window in which it was reserved. Calls that bear a later date than
now (the clock was set back, or a board without a battery booted in 1970) count in the current window too, so that a
clock that is wrong or set back makes the ledger stricter. Calls made while the clock is behind bear too early a date:
once it is put right they get the right one, where the process that made them still runs and its `uptime` tells how long
ago that was. Those of an earlier process keep it, and the window then current knows nothing of them: there the ledger
is more generous. Only a budget with the window `total` counts them all the same.
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edge_agent.budget import Budget, BudgetState, Rate, RateState, window_bounds
from edge_agent.errors import DuplicateRequest, LedgerError, QuotaExhausted, RouteT2IError, printable
from edge_agent.log import events
from edge_agent.money import MAX_MICRO_USD, dollars

log = events(__name__)

APPLICATION_ID = 0x52543249  # "RT2I"
SCHEMA_VERSION = 1
_SCHEMA = (
    """
    CREATE TABLE calls (
        request_id TEXT PRIMARY KEY,
        app TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('reserved', 'settled', 'released')),
        ceiling_micro_usd INTEGER NOT NULL,
        cost_micro_usd INTEGER NOT NULL, -- what counts: the ceiling, then what was charged, or 0
        reserved_at REAL NOT NULL,       -- seconds since 1970, UTC
        cloud TEXT NOT NULL,             -- `CloudClient.identity` of the only one that knows what became of it
        expires_at REAL NOT NULL,        -- until then the call may still be on its way to that cloud
        asked TEXT NOT NULL DEFAULT ''   -- tells what was asked for from what another call asks for; no prompt
    )
    """,
    "CREATE INDEX calls_by_time ON calls (reserved_at, app, state, cost_micro_usd)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

_ADDED = (
    "CREATE INDEX IF NOT EXISTS calls_open ON calls (reserved_at) WHERE state = 'reserved'",
    "CREATE TABLE IF NOT EXISTS device (id TEXT NOT NULL)",
    "INSERT INTO device SELECT lower(hex(randomblob(16))) WHERE NOT EXISTS (SELECT * FROM device)",
)
"""What later versions have added to a ledger of this schema; the first ones do not mind."""
_ADDED_COLUMN = "ALTER TABLE calls ADD COLUMN asked TEXT NOT NULL DEFAULT ''"

_LOCK_WAIT_S = 1.0
"""How long opening waits for another process to let go of the file: enough for one that is just closing."""

_CLOCK_SLIPS_S = 60.0
"""How far a clock that is kept right may be put back, or on."""

_EFFECTIVE_IDS = os.access in os.supports_effective_ids

_LAST_ROW = 2**63 - 1
"""The highest number that SQLite gives a row."""

_ADVICE = (
    ("not a database", "is not a quota ledger: move it away, or name another state folder with --state"),
    (
        "malformed",
        "is damaged: stop edge-agent and move it away, with the -wal beside it, which forgets what was spent",
    ),
    (
        "readonly",
        "cannot be written: check the permissions of the file and its folder, or use another --state",
    ),
    ("is full", "cannot grow because the disk is full: free some space and try again"),
    ("disk I/O", "cannot be read or written: check the disk (full, failing, removed?) and try again"),
    (
        "no longer the file",
        "was removed or replaced beneath this edge-agent: restart it, which goes by what lies there now",
    ),
    ("locked", "is in use by another edge-agent: stop that one, or use another --state"),
    ("unable to open", "cannot be opened: check the path and its permissions, or use another --state"),
    ("File exists", "has no folder: what lies in its place is a file; name a folder with --state"),
    ("Not a directory", "has no folder: what lies in its place is a file; name a folder with --state"),
    ("Permission denied", "cannot be reached: check the permissions of its folder, or use another --state"),
    (
        "Read-only file system",
        "cannot be made: its file system is read-only; name a folder elsewhere with --state",
    ),
    ("No such file or directory", "cannot be made: no folder can be made there; name another with --state"),
    ("File name too long", "cannot be made: its path is too long; name another folder with --state"),
)
"""SQLite's words, and the system's of the folder, and what to do about each. By text, because SQLite's error codes came
with Python 3.11 only."""


OUTCOME_RETRY_S = 1.0
"""When to ask again about a call that broke off: until then the cloud is asked what became of it."""


@dataclass(frozen=True)
class Reservation:
    """Money set aside for one call of `cloud`, which ends at `expires_at`; times are in seconds since 1970."""

    request_id: str
    app: str
    ceiling_micro_usd: int
    reserved_at: float
    cloud: str
    expires_at: float


@dataclass(frozen=True)
class _Account:
    """What counts, as the ledger stood after its last write: from `as_of`, seconds since 1970, until a window ends."""

    as_of: float
    until: float
    states: tuple[BudgetState, ...]
    recent: tuple[tuple[float, ...], ...]  # for each rate: when its calls were reserved, ascending


class Ledger:
    """The ledger on disk. One process holds it open at a time; its methods may be called from any thread.

    Every method may wait for the disk (some milliseconds): call them in a worker thread. `allows`, `states` and
    `rates` seldom do: since nobody else can write the file, what the last write left is kept in memory, and only a
    window that begins asks the file again. Every method raises LedgerError, saying what to do, when the file cannot
    be used.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: Path,
        budgets: tuple[Budget, ...],
        rates: tuple[Rate, ...],
        clock: Callable[[], float],
        uptime: Callable[[], float] | None,
    ) -> None:
        self._connection = connection
        self.path = path
        # Drawn with the file: what tells this device's calls from those of others that use the same cloud.
        (self.device,) = connection.execute("SELECT id FROM device").fetchone()
        self.budgets = budgets
        self._rates = rates
        self.clock = clock
        self._uptime = uptime
        self._zero = self._zero_now()
        # The row after which this process's calls begin, and what `_zero` was when they were made; then the same for
        # each time that the clock was set.
        self._made = [(_last_row(connection), self._zero)]
        self._file = path.stat()
        # SQLite before 3.51.3 can corrupt a write-ahead log that two connections use: there is one, and one
        # lock.
        self._lock = threading.Lock()
        self._closed = False
        self.failure = ""  # why the file could not be used, where it has not been written since
        self._account: _Account | None = None  # replaced as a whole, so that it can be read without the lock

    @classmethod
    def open(
        cls,
        path: Path | str,
        budgets: tuple[Budget, ...],
        rates: tuple[Rate, ...] = (),
        *,
        clock: Callable[[], float] = time.time,
        uptime: Callable[[], float] | None = None,
    ) -> Ledger:
        """Open the ledger at `path`; begin a new one where there is none. `clock` gives seconds since 1970, `uptime`
        seconds since whenever, which nobody sets; without it the clock is taken for right.

        Raises LedgerError when the file is no ledger, damaged, not writable or in use by another process, and
        ValueError when two budgets or rates share a name.
        """
        path = Path(path)
        names = [budget.name for budget in budgets] + [rate.name for rate in rates]
        if len(set(names)) < len(names):
            raise ValueError(f"budgets and rates need names of their own: {', '.join(names)}")
        connection = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite opens such a file for reading and then calls the lock it cannot take an I/O error.
            if path.exists() and not os.access(path, os.W_OK, effective_ids=_EFFECTIVE_IDS):
                raise PermissionError("the file is readonly")
            connection = sqlite3.connect(
                path, timeout=_LOCK_WAIT_S, isolation_level=None, check_same_thread=False
            )
            _prepare(connection, path)
            return cls(connection, path, tuple(budgets), tuple(rates), clock, uptime)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, (OSError, sqlite3.Error)):
                raise _explained(path, error) from error
            raise

    def reserve(
        self,
        request_id: str,
        app: str,
        ceiling_micro_usd: int,
        cloud: str = "",
        timeout_s: float = 0.0,
        asked: str = "",
    ) -> None:
        """Set aside `ceiling_micro_usd` for this call in every budget that applies, or in none.

        `cloud` is who is to be asked what became of the call, which ends after `timeout_s` seconds. `asked` is a digest
        of what was asked for.

        Raises QuotaExhausted, naming the budget or rate without room, and DuplicateRequest when this
        request id is reserved or settled already: with `retry_after_s` where it went to this `cloud`, which soon
        tells what became of it, or sends again what was `asked`. A released one may be reserved again: it never ran.
        """
        _check_money(ceiling_micro_usd)
        with self._transaction() as connection:
            if not self._is_there():
                raise sqlite3.OperationalError("no longer the file that was opened")
            now = self.clock()
            earlier = connection.execute(
                "SELECT state, cloud, asked FROM calls WHERE request_id = ?", (request_id,)
            ).fetchone()
            if earlier is not None and earlier[0] != "released":
                soon = earlier in {("reserved", cloud, earlier[2]), ("settled", cloud, asked)}
                raise DuplicateRequest(
                    f"the request id {request_id!r} is {earlier[0]} already; use a new one for a new image",
                    retry_after_s=OUTCOME_RETRY_S if soon else None,
                )
            account = self._remembered(now) or self._counted(connection, now)
            refusal = self._refusal(account, app, ceiling_micro_usd, now)
            if refusal is not None:
                raise refusal
            # SQLite gives its row the highest number yet, also where it replaces that of a released call.
            connection.execute(
                "INSERT OR REPLACE INTO calls (request_id, app, state, ceiling_micro_usd, cost_micro_usd, "
                "reserved_at, cloud, expires_at, asked) VALUES (?, ?, 'reserved', ?, ?, ?, ?, ?, ?)",
                (request_id, app, ceiling_micro_usd, ceiling_micro_usd, now, cloud, now + timeout_s, asked),
            )

    def settle(self, request_id: str, charged_micro_usd: int) -> None:
        """Record what a reserved call was charged.

        Never more counts than the reserved ceiling, because more was never agreed to: a higher charge is
        logged as an error and counted as the ceiling. Settling again at the same amount changes nothing.

        Raises LedgerError when the call was never reserved, was released, or was settled at another amount.
        """
        _check_money(charged_micro_usd)
        with self._transaction() as connection:
            state, ceiling, cost = self._call(connection, request_id)
            counted = min(charged_micro_usd, ceiling)
            if state == "settled" and cost == counted:
                return
            if state != "reserved":
                raise LedgerError(
                    f"request {request_id!r} cannot be settled at {dollars(charged_micro_usd)}: "
                    f"it is {state} at {dollars(cost)}"
                )
            if charged_micro_usd > ceiling:
                log.error(
                    "request %s: the cloud says it charged %s, above the agreed %s; counting what was agreed",
                    request_id,
                    dollars(charged_micro_usd),
                    dollars(ceiling),
                )
            connection.execute(
                "UPDATE calls SET state = 'settled', cost_micro_usd = ? WHERE request_id = ?",
                (counted, request_id),
            )

    def release(self, request_id: str) -> None:
        """Give back what was reserved for a call that certainly never ran. Releasing again changes nothing.

        Raises LedgerError when the call was never reserved, or was settled.
        """
        with self._transaction() as connection:
            state, _, cost = self._call(connection, request_id)
            if state == "settled":
                raise LedgerError(
                    f"request {request_id!r} cannot be released: it is settled at {dollars(cost)}"
                )
            connection.execute(
                "UPDATE calls SET state = 'released', cost_micro_usd = 0 WHERE request_id = ?", (request_id,)
            )

    def unresolved(self) -> list[Reservation]:
        """The reservations neither settled nor released, oldest first: in flight, or cut short by a crash."""
        with self._alone() as connection:
            rows = connection.execute(
                "SELECT request_id, app, ceiling_micro_usd, reserved_at, cloud, expires_at FROM calls "
                "WHERE state = 'reserved' ORDER BY reserved_at, request_id"
            ).fetchall()
        return [Reservation(*row) for row in rows]

    def charged(self, request_id: str, cloud: str, asked: str) -> int | None:
        """What `cloud` was paid for what was `asked` under this id, in micro-dollars; None where it was paid nothing
        that is known of.
        """
        with self._alone() as connection:
            found = connection.execute(
                "SELECT cost_micro_usd FROM calls "
                "WHERE request_id = ? AND cloud = ? AND asked = ? AND state = 'settled'",
                (request_id, cloud, asked),
            ).fetchone()
        return None if found is None else found[0]

    def is_open(self, request_id: str) -> bool:
        """Whether it is reserved, and neither settled nor released."""
        with self._alone() as connection:
            found = connection.execute(
                "SELECT 1 FROM calls WHERE request_id = ? AND state = 'reserved'", (request_id,)
            ).fetchone()
        return found is not None

    def ahead(self) -> tuple[int, float]:
        """How many of the calls that count bear a date in the future, and the last of these dates (0 for none).

        A clock that was ahead has left them there: see above for why they count all the same.
        """
        with self._alone() as connection:
            row = connection.execute(
                "SELECT count(*), COALESCE(MAX(reserved_at), 0.0) FROM calls "
                "WHERE reserved_at > ? AND state != 'released'",
                (self.clock() + _CLOCK_SLIPS_S,),
            ).fetchone()
        return cast("tuple[int, float]", row)

    def allows(self, app: str, ceiling_micro_usd: int) -> bool:
        """Whether `reserve` would find room at this moment. A snapshot: nothing is set aside."""
        _check_money(ceiling_micro_usd)
        now = self.clock()
        return self._refusal(self._account_at(now), app, ceiling_micro_usd, now) is None

    @property
    def at_hand(self) -> bool:
        """Whether `allows` and `states` answer from memory now, without waiting for the file or another thread."""
        return self._remembered(self.clock()) is not None

    @property
    def idle(self) -> bool:
        """Whether no thread reads or writes the file now, so that looking a call up waits for nobody."""
        return not self._lock.locked()

    def states(self, app: str | None = None) -> tuple[BudgetState, ...]:
        """The budgets in their current windows: those that apply to `app`, or all of them when it is None."""
        states = self._account_at(self.clock()).states
        return tuple([state for state in states if app is None or state.app in (None, app)])

    def rates(self) -> tuple[RateState, ...]:
        """The rates, and what they count now."""
        now = self.clock()
        return tuple(
            RateState(rate.name, rate.max_calls, rate.per_seconds, len(rate.recent(reserved_at, now)))
            for rate, reserved_at in zip(self._rates, self._account_at(now).recent, strict=True)
        )

    def close(self) -> None:
        """Close the file. Closing again does nothing; every other method raises LedgerError from then on."""
        with self._lock:
            with suppress(sqlite3.Error):
                self._follow_clock()
            self._closed, self._account = True, None
            self._connection.close()

    @contextmanager
    def _alone(self) -> Iterator[sqlite3.Connection]:
        """The connection, alone. What SQLite cannot do is explained, kept in `failure` and, where it is new, logged."""
        with self._lock:
            if self._closed:
                raise LedgerError(f"the quota ledger {self.path} is closed")
            try:
                self._follow_clock()
                yield self._connection
            except sqlite3.Error as error:
                explained = _explained(self.path, error)
                if explained.message != self.failure:
                    log.error("ledger", error=explained.message)
                self.failure = explained.message
                raise explained from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection, alone, in a transaction that is durable when the block is left without an error."""
        with self._alone() as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                account = self._counted(connection, self.clock())
                connection.execute("COMMIT")
                self._account = account
                if self._is_there():
                    self.failure = ""
            except BaseException as error:
                if not isinstance(error, RouteT2IError):  # a refusal leaves the file as the account has it
                    self._account = None  # after anything else it has to be asked again
                # After a failed COMMIT it is open whether the change is durable. Either way is safe: what
                # was to be reserved then counts until it is resolved, what was to be settled or released
                # was so in truth.
                with suppress(sqlite3.Error):
                    connection.rollback()
                raise

    def _is_there(self) -> bool:
        """Whether the file still lies where it was opened. SQLite goes on with one that was removed, in whose place
        another process may have begun another ledger.
        """
        try:
            return os.path.samestat(self.path.stat(), self._file)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # which says nothing of the file
            return True

    def _zero_now(self) -> float:
        """What the clock says less the uptime: it moves where the clock is set."""
        return self.clock() - self._uptime() if self._uptime is not None else 0.0

    def _clock_was_set(self) -> bool:
        return abs(self._zero_now() - self._zero) > _CLOCK_SLIPS_S

    def _follow_clock(self) -> None:
        """Where the clock was set, the calls of this process get the dates it would have given them: the later of that
        which it gave them and that which it would give them as it goes now. Which of both was right nobody knows, and
        the later one is stricter.
        """
        if not self._clock_was_set():
            return
        before, now = self._zero, self._zero_now()
        ends = [row for row, _ in self._made[1:]] + [_LAST_ROW]
        moves = [
            (max(zero, now) - max(zero, before), row, end)
            for (row, zero), end in zip(self._made, ends, strict=True)
        ]
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany(
                "UPDATE calls SET reserved_at = reserved_at + ?, expires_at = expires_at + ? "
                "WHERE rowid > ? AND rowid <= ?",
                [(by, by, row, end) for by, row, end in moves if by],
            )
            last = _last_row(self._connection)
            self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._connection.rollback()
            raise
        self._zero, self._account = now, None
        self._made = [(row, zero) for row, zero in self._made if row < last] + [(last, now)]
        log.warning("clock", set_by_s=round(now - before))

    def _call(self, connection: sqlite3.Connection, request_id: str) -> tuple[str, int, int]:
        """State, ceiling and cost of a call."""
        row = connection.execute(
            "SELECT state, ceiling_micro_usd, cost_micro_usd FROM calls WHERE request_id = ?", (request_id,)
        ).fetchone()
        if row is None:
            raise LedgerError(f"nothing was ever reserved for request {request_id!r}")
        return cast("tuple[str, int, int]", row)

    def _account_at(self, now: float) -> _Account:
        """What counts at `now`: from memory, or from the file where a window has begun or the clock was set back."""
        account = self._remembered(now)
        if account is None:
            with self._alone() as connection:
                account = self._account = self._counted(connection, now)
        return account

    def _remembered(self, now: float) -> _Account | None:
        account = self._account
        if account is None or self._clock_was_set():
            return None
        return account if account.as_of <= now < account.until else None

    def _counted(self, connection: sqlite3.Connection, now: float) -> _Account:
        """What counts at `now`, from the file."""
        windows = [window_bounds(budget.window, now) for budget in self.budgets]
        states = tuple(
            _state(connection, budget, start)
            for budget, (start, _) in zip(self.budgets, windows, strict=True)
        )
        until = min((end for _, end in windows if end is not None), default=math.inf)
        recent = [
            tuple(
                reserved_at
                for (reserved_at,) in connection.execute(
                    "SELECT reserved_at FROM calls WHERE reserved_at > ? AND state != 'released' ORDER BY 1",
                    (now - rate.per_seconds,),
                )
            )
            for rate in self._rates
        ]
        return _Account(now, until, states, tuple(recent))

    def _refusal(
        self, account: _Account, app: str, ceiling_micro_usd: int, now: float
    ) -> QuotaExhausted | None:
        """Why there is no room for one more call of `app` at this ceiling; None when there is."""
        for state in account.states:
            if state.app in (None, app) and (refusal := state.refusal(ceiling_micro_usd, now)):
                return refusal
        for rate, reserved_at in zip(self._rates, account.recent, strict=True):
            if refusal := rate.refusal(reserved_at, now):
                return refusal
        return None


def uptime() -> float:
    """Seconds since this machine was started, those it slept included where the system counts them."""
    clock = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
    return time.clock_gettime(clock) if clock is not None else time.monotonic()


def _last_row(connection: sqlite3.Connection) -> int:
    """The highest number of a row: calls made later have higher ones."""
    last: int = connection.execute("SELECT COALESCE(MAX(rowid), 0) FROM calls").fetchone()[0]
    return last


def _state(connection: sqlite3.Connection, budget: Budget, start: float) -> BudgetState:
    """What has come of `budget` since `start`."""
    spent, reserved = connection.execute(
        "SELECT COALESCE(SUM(cost_micro_usd) FILTER (WHERE state = 'settled'), 0), "
        "COALESCE(SUM(cost_micro_usd) FILTER (WHERE state = 'reserved'), 0) "
        "FROM calls WHERE reserved_at >= ? AND (? IS NULL OR app = ?)",
        (start, budget.app, budget.app),
    ).fetchone()
    cap = budget.cap_micro_usd
    remaining = max(0, cap - spent - reserved)  # below zero when the cap was lowered within the window
    return BudgetState(budget.name, budget.window, cap, spent, reserved, remaining, budget.app)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Check that the file is a ledger (an empty file becomes one) and hold it. Foreign files stay as is."""
    # First of all: it keeps other processes out, and does away with the shared memory that a WAL else needs.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    application_id, version, tables = (
        connection.execute(query).fetchone()[0]
        for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if tables and application_id != APPLICATION_ID:
        raise LedgerError(f"{path} is another program's database: name another state folder with --state")
    if version > SCHEMA_VERSION:
        raise LedgerError(
            f"{path} has schema {version} and this edge-agent knows {SCHEMA_VERSION}: update edge-agent"
        )
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(f"database disk image is malformed: {found}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    # Or macOS leaves in the drive's cache what it has synchronized.
    connection.execute("PRAGMA fullfsync = ON")
    # Fails here, at start, when the file cannot be written or another process has it.
    connection.execute("BEGIN EXCLUSIVE")
    if not tables:
        for statement in _SCHEMA:
            connection.execute(statement)
    for statement in _ADDED:
        connection.execute(statement)
    if "asked" not in {name for _, name, *_ in connection.execute("PRAGMA table_info(calls)")}:
        connection.execute(_ADDED_COLUMN)
    connection.execute("COMMIT")


def _explained(path: Path, error: Exception) -> LedgerError:
    # Windows has words of its own, in the language of its user.
    said = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    for words, advice in _ADVICE:
        if words in said:
            return LedgerError(f"the quota ledger {path} {advice} ({printable(str(error))})")
    return LedgerError(f"the quota ledger {path} cannot be used: {error}")


def _check_money(micro_usd: int) -> None:
    if not 0 <= micro_usd <= MAX_MICRO_USD:
        raise ValueError(f"not an amount of micro-dollars: {micro_usd}")
