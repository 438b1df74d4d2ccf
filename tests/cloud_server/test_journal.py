"""The journal charges once, keeps images for as long as it should, and tells a crash from a failure."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cloud_server.errors import AlreadyExists, JournalError, JournalNotReady, StartRefused
from cloud_server.journal import APPLICATION_ID, KEEP_ROWS_S, NOTE_CLOCK_EVERY_S, Finished, Journal, State
from cloud_server.request import Spec

SPEC = Spec(prompt="", negative_prompt="", seed=1, width=64, height=64, steps=4, guidance_scale=3.0)
FINISHED = Finished(charged_micro_usd=5, sha256="ab", model_digest="cd", spec=SPEC, image=b"png")
PROMPTS = {
    "prompt": "a secret cat",
    "negative_prompt": "a secret dog " * 150,
}  # what lies on pages of its own, too


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal(tmp_path: Path, clock: Clock) -> Journal:
    return opened(tmp_path, clock)


def opened(tmp_path: Path, clock: Clock, wall: Clock | None = None) -> Journal:
    return Journal.open(
        tmp_path / "state" / "j.sqlite", keep_images_s=60.0, monotonic=clock, clock=wall or Clock()
    )


def state(journal: Journal, request_id: str) -> State | None:
    entry = journal.find("t", request_id)
    return entry.state if entry else None


def test_what_is_finished_is_told_with_its_image(journal: Journal) -> None:
    assert journal.find("t", "r") is None
    journal.begin("t", "r", "f")
    assert state(journal, "r") is State.RUNNING
    journal.finish("t", "r", FINISHED)
    entry = journal.find("t", "r")
    assert entry is not None
    assert (entry.state, entry.fingerprint, entry.finished) == (State.FINISHED, "f", FINISHED)
    assert journal.find("other", "r") is None


def test_an_image_is_kept_from_when_it_was_finished(journal: Journal, clock: Clock) -> None:
    journal.begin("t", "r", "f")
    clock.now += 100.0  # in the queue, for longer than images are kept
    journal.finish("t", "r", FINISHED)
    clock.now += 59.0
    assert not journal.prune()
    entry = journal.find("t", "r")
    assert entry is not None and entry.finished == FINISHED


def test_an_id_is_charged_once_whatever_comes_after(journal: Journal) -> None:
    journal.begin("t", "r", "f")
    with pytest.raises(AlreadyExists):
        journal.begin("t", "r", "f")
    journal.finish("t", "r", FINISHED)
    with pytest.raises(JournalError):
        journal.finish("t", "r", FINISHED)
    journal.end("t", "r", State.CANCELLED)  # a cancellation that comes too late
    assert state(journal, "r") is State.FINISHED
    with pytest.raises(AlreadyExists):
        journal.begin("t", "r", "f")


def test_an_id_that_came_to_nothing_cannot_be_charged_but_may_begin_again(journal: Journal) -> None:
    for end in (State.FAILED, State.CANCELLED):
        journal.begin("t", "r", "f")
        journal.end("t", "r", end)
        assert state(journal, "r") is end
        with pytest.raises(JournalError):
            journal.finish("t", "r", FINISHED)


def test_what_ran_when_the_process_died_has_failed(journal: Journal, tmp_path: Path, clock: Clock) -> None:
    journal.begin("t", "r", "f")
    journal.close()
    reopened = opened(tmp_path, clock)
    assert state(reopened, "r") is State.FAILED
    reopened.begin("t", "r", "f")
    assert state(reopened, "r") is State.RUNNING


def test_what_could_not_begin_after_a_crash_is_not_said_to_run(
    journal: Journal, tmp_path: Path, clock: Clock
) -> None:
    journal.begin("t", "r", "f")
    journal.close()
    reopened = opened(tmp_path, clock)
    for statement in (  # makes the commit itself fail, as a disk does
        "PRAGMA foreign_keys = ON",
        "CREATE TABLE none (id INTEGER PRIMARY KEY)",
        "CREATE TABLE orphans (id INTEGER REFERENCES none DEFERRABLE INITIALLY DEFERRED)",
        "CREATE TRIGGER orphan AFTER INSERT ON generations BEGIN INSERT INTO orphans VALUES (1); END",
    ):
        reopened._connection.execute(statement)
    with pytest.raises(JournalError):
        reopened.begin("t", "r", "f")
    assert state(reopened, "r") is State.FAILED
    reopened._connection.execute("DROP TRIGGER orphan")
    reopened.begin("t", "r", "f")
    assert state(reopened, "r") is State.RUNNING


def test_an_image_is_dropped_after_its_time_and_its_charge_is_not(
    journal: Journal, clock: Clock, tmp_path: Path
) -> None:
    journal.begin("t", "r", "f")
    journal.finish("t", "r", FINISHED)
    clock.now += 61.0
    entry = journal.find("t", "r")
    assert entry is not None
    assert entry.finished is not None
    assert entry.finished.image is None
    assert entry.finished.charged_micro_usd == 5
    assert journal.prune() and not journal.prune()
    kept = journal._connection.execute("SELECT COUNT(image) FROM generations").fetchone()
    assert kept == (0,), "its bytes are gone from the file as well"


def test_the_time_counts_for_which_a_server_ran_without_making_an_image(
    journal: Journal, tmp_path: Path, clock: Clock
) -> None:
    journal.begin("t", "r", "f")
    journal.finish("t", "r", FINISHED)
    for _ in range(2):  # runs that are shorter than images are kept
        clock.now += 40.0
        journal.close()
        journal = opened(tmp_path, clock)
    assert journal.prune()


def test_of_a_server_that_is_killed_an_hour_at_most_does_not_count(
    journal: Journal, tmp_path: Path, clock: Clock
) -> None:
    journal.begin("t", "r", "f")
    journal.finish("t", "r", FINISHED)
    clock.now += NOTE_CLOCK_EVERY_S
    journal.prune()
    clock.now += NOTE_CLOCK_EVERY_S - 1.0
    journal.prune()
    journal._connection.close()  # as kill -9 leaves it
    assert 0.0 <= clock.now - 1_000.0 - opened(tmp_path, clock)._ran() < NOTE_CLOCK_EVERY_S


def test_tenants_who_choose_the_same_id_have_an_image_and_an_end_each(
    journal: Journal, clock: Clock, tmp_path: Path
) -> None:
    journal.begin("other", "r", "f")
    journal.finish("other", "r", FINISHED)
    journal.begin("other", "cut off", "f")
    clock.now += 61.0
    journal.begin("t", "r", "f")
    journal.finish("t", "r", FINISHED)
    assert journal.prune() and not journal.prune()
    entry = journal.find("t", "r")
    assert entry is not None and entry.finished == FINISHED
    journal.close()
    reopened = opened(tmp_path, clock)
    reopened.begin("t", "cut off", "f")
    other = reopened.find("other", "cut off")
    assert other is not None and other.state is State.FAILED


def test_what_ended_is_not_said_to_run_where_its_end_cannot_be_written(journal: Journal) -> None:
    """Until the disk is well again its caller would wait for nothing, and its edge count it as spent."""
    journal.begin("t", "r", "f")
    full = "BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
    journal._connection.execute(f"CREATE TEMP TRIGGER full BEFORE UPDATE ON generations {full}")
    with pytest.raises(JournalError):
        journal.end("t", "r", State.CANCELLED)
    assert state(journal, "r") is State.FAILED
    journal._connection.execute("DROP TRIGGER full")
    journal.begin("t", "r", "f")


def test_a_charge_that_the_disk_may_have_taken_is_not_said_to_have_come_to_nothing(journal: Journal) -> None:
    """After a failed fsync and a crash it may be there: an edge that was told so would have given the money back."""
    journal.begin("t", "r", "f")
    full = "BEGIN SELECT RAISE(FAIL, 'disk I/O error'); END"
    journal._connection.execute(f"CREATE TEMP TRIGGER full BEFORE UPDATE ON generations {full}")
    with pytest.raises(JournalError):
        journal.finish("t", "r", FINISHED)
    with pytest.raises(JournalError):
        journal.end("t", "r", State.FAILED)
    assert state(journal, "r") is State.RUNNING
    journal._connection.execute("DROP TRIGGER full")
    assert state(journal, "r") is State.FAILED, "and it is said as soon as the disk is well again"
    journal.begin("t", "r", "f")
    journal.finish("t", "r", FINISHED)
    assert state(journal, "r") is State.FINISHED


def test_a_disk_that_fails_again_after_it_was_well_is_in_the_log_again(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    full = "BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
    for times in (1, 2):
        journal._connection.execute(f"CREATE TEMP TRIGGER full BEFORE INSERT ON generations {full}")
        for _ in range(2):
            with pytest.raises(JournalError, match="disk is full"):
                journal.begin("t", f"r{times}", "f")
        assert [record.message for record in caplog.records] == ["journal"] * times
        journal._connection.execute("DROP TRIGGER full")
        journal.begin("t", f"r{times}", "f")


def test_a_charge_is_on_the_disk_before_anybody_is_told(journal: Journal) -> None:
    """Or a power cut would take it back."""
    names = ("synchronous", "journal_mode")
    settings = [journal._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]
    assert settings == [2, "wal"]


@pytest.mark.posix
def test_the_folder_is_for_its_owner_alone(tmp_path: Path, clock: Clock) -> None:
    opened(tmp_path, clock)
    assert oct((tmp_path / "state").stat().st_mode)[-3:] == "700"


def test_an_image_that_is_no_longer_kept_is_in_no_file_once_it_is_pruned(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where SQLite was not built to overwrite what is deleted."""

    def connect(*arguments: Any, **named: Any) -> sqlite3.Connection:
        connection = sqlite3.Connection(*arguments, **named)
        connection.execute("PRAGMA secure_delete = OFF")
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect)
    journal = opened(tmp_path, clock)

    def files_with_it() -> list[str]:
        return [file.name for file in (tmp_path / "state").iterdir() if b"secret" in file.read_bytes()]

    for number in range(3):
        journal.begin("t", f"old {number}", "f")
        journal.finish("t", f"old {number}", replace(FINISHED, image=b"secret" * 20_000))
    assert files_with_it()
    clock.now += 61.0
    assert [journal.prune() for _ in range(4)] == [True] * 3 + [False]  # one at a time
    assert not files_with_it()
    journal.close()
    assert not journal.prune()  # as a thread that comes too late


def test_images_that_are_no_longer_kept_need_the_room_of_one_of_them_to_be_removed(
    journal: Journal, clock: Clock, tmp_path: Path
) -> None:
    """In the log, where what is overwritten goes first: on a disk half full there is no room for all."""
    one = 200_000
    for number in range(20):
        journal.begin("t", f"r{number}", "f")
        journal.finish("t", f"r{number}", replace(FINISHED, image=bytes(one)))
    journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    clock.now += 61.0
    sizes: list[int] = []
    log = tmp_path / "state" / "j.sqlite-wal"
    journal._connection.set_trace_callback(lambda _statement: sizes.append(log.stat().st_size))
    journal.begin("t", "another", "f")
    assert [journal.prune() for _ in range(21)] == [True] * 20 + [False]
    assert one < max(sizes) < 2 * one


@pytest.mark.posix  # elsewhere such a file cannot be removed
def test_nothing_is_charged_where_the_file_is_removed_beneath_the_journal(
    journal: Journal, tmp_path: Path
) -> None:
    journal.begin("t", "r", "f")
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    with pytest.raises(JournalError, match="removed or replaced beneath this server; restart cloud-server"):
        journal.begin("t", "next", "f")
    journal.finish("t", "r", FINISHED)  # what it has begun it ends
    (tmp_path / "elsewhere").rename(tmp_path / "state")
    journal.begin("t", "next", "f")


@pytest.mark.posix
def test_the_images_are_for_nobody_else_also_in_a_folder_that_others_read(
    tmp_path: Path, clock: Clock
) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    before = os.umask(0o022)
    journal = opened(tmp_path, clock)
    os.umask(before)
    journal.begin("t", "r", "f")
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "state").iterdir()} == {0o600}


def work(journal: Journal, request_id: str) -> int:
    """SQLite's instructions for a generation that begins."""
    count = 0

    def one() -> None:
        nonlocal count
        count += 1

    journal._connection.set_progress_handler(one, 1)
    journal.begin("t", request_id, "f")
    journal._connection.set_progress_handler(None, 1)
    return count


def test_beginning_costs_as_much_after_many_images_as_after_few(journal: Journal, clock: Clock) -> None:
    costs = []
    for images in (10, 300):
        for number in range(images):
            journal.begin("t", f"{number} of {images}", "f")
            journal.finish("t", f"{number} of {images}", FINISHED)
        clock.now += 61.0
        work(journal, f"clears {images}")
        costs.append(work(journal, f"after {images}"))
    assert costs[0] == costs[1]


@pytest.mark.parametrize(("before", "after"), [(1e3, 1.8e9), (1.8e9, 1e3), (1.8e9, 4e9)])
def test_a_wall_clock_that_jumps_forgets_no_charge_and_stops_no_call(
    tmp_path: Path, clock: Clock, before: float, after: float
) -> None:
    wall = Clock()
    wall.now = before
    journal = opened(tmp_path, clock, wall)
    journal.begin("t", "paid", "f")
    journal.finish("t", "paid", FINISHED)
    journal.begin("t", "running", "f")
    wall.now = after
    for request_id in ("next", "after a restart"):
        journal.begin("t", request_id, "f")
        if request_id == "next":
            journal.finish("t", "running", FINISHED)
        for charged in ("paid", "running"):
            entry = journal.find("t", charged)
            assert entry is not None
            assert entry.finished == FINISHED, "its image is kept for as long as it should, too"
            with pytest.raises(AlreadyExists):
                journal.begin("t", charged, "f")
        journal.close()
        journal = opened(tmp_path, clock, wall)


def test_a_charge_is_forgotten_when_servers_have_run_long_enough_since(
    journal: Journal, tmp_path: Path, clock: Clock
) -> None:
    journal.begin("t", "old", "f")
    journal.finish("t", "old", FINISHED)
    clock.now += KEEP_ROWS_S - 100.0
    journal.begin("t", "younger", "f")
    assert state(journal, "old") is State.FINISHED
    journal.close()
    since_boot = Clock()
    since_boot.now = 5.0
    reopened = opened(tmp_path, since_boot)
    reopened.prune()
    assert state(reopened, "old") is State.FINISHED
    since_boot.now += 101.0
    reopened.prune()
    assert state(reopened, "old") is None
    assert state(reopened, "younger") is State.FAILED


def test_no_prompt_is_written(journal: Journal, tmp_path: Path) -> None:
    journal.begin("t", "r", "f")
    journal.finish("t", "r", replace(FINISHED, spec=replace(SPEC, **PROMPTS)))
    entry = journal.find("t", "r")
    assert entry is not None
    assert entry.finished == FINISHED
    files = list((tmp_path / "state").iterdir())
    assert files
    assert not [file for file in files if b"secret" in file.read_bytes()]


def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "j.sqlite"
    file.write_text("not a database, but something of mine" * 100)
    with pytest.raises(StartRefused, match="move the file away"):
        Journal.open(file, keep_images_s=1.0)
    assert file.read_text().startswith("not a database")


@pytest.mark.parametrize(("offset", "found"), [(100, "at the start"), (4096, "by a call")])
def test_a_damaged_journal_says_what_to_move_and_what_that_forgets(
    tmp_path: Path, clock: Clock, offset: int, found: str
) -> None:
    journal = opened(tmp_path, clock)
    for number in range(300):
        journal.begin("t", f"request-{number}", "f")
    journal.close()
    with (tmp_path / "state" / "j.sqlite").open("r+b") as file:
        file.seek(offset)  # 100: after the header, which says whose the file is
        file.write(b"\xff" * 3000)
    advice = "malformed; it is damaged: .* with the -wal beside it; edges that still ask"
    if found == "at the start":
        with pytest.raises(StartRefused, match=advice):
            opened(tmp_path, clock)
        return
    damaged = opened(tmp_path, clock)
    with pytest.raises(JournalError, match=advice):
        damaged.begin("t", "another", "f")


@pytest.mark.parametrize(
    ("column", "value"), [("state", "finishe$"), ("spec", '{"seed"'), ("spec", '{"sead": 1}'), ("spec", "[]")]
)
def test_a_row_that_makes_no_sense_is_damage_and_spoils_no_other(
    tmp_path: Path, clock: Clock, column: str, value: str
) -> None:
    journal = opened(tmp_path, clock)
    for request_id in ("spoilt", "whole"):
        journal.begin("t", request_id, "f")
        journal.finish("t", request_id, FINISHED)
    journal.close()
    connection = sqlite3.connect(tmp_path / "state" / "j.sqlite")
    with connection:
        connection.execute(
            f"UPDATE generations SET {column} = ? WHERE request_id = 'spoilt'",  # noqa: S608
            (value,),
        )
    connection.close()
    damaged = opened(tmp_path, clock)
    with pytest.raises(JournalError, match=r"malformed.*; it is damaged: .* with the -wal beside it"):
        damaged.find("t", "spoilt")
    with pytest.raises(JournalError, match="malformed"):
        damaged.begin("t", "spoilt", "f")
    assert state(damaged, "whole") is State.FINISHED


def test_a_journal_that_another_server_has_may_be_had_later(tmp_path: Path, journal: Journal) -> None:
    with pytest.raises(JournalNotReady, match="another cloud-server uses it"):
        Journal.open(tmp_path / "state" / "j.sqlite", keep_images_s=1.0)


def test_a_disk_without_room_for_a_journal_may_have_some_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(sqlite3.Connection):
        def execute(self, *_: Any) -> Any:
            raise sqlite3.OperationalError("database or disk is full")

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *rest, **options: connect(*rest, **options, factory=Full))
    with pytest.raises(JournalNotReady, match="is full; free some space and try again"):
        Journal.open(tmp_path / "j.sqlite", keep_images_s=1.0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_without_room_for_the_file_itself_may_have_some_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def touch(*_: Any, **_named: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(JournalNotReady, match="free some space and try again"):
        Journal.open(tmp_path / "j.sqlite", keep_images_s=1.0)


def test_a_state_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StartRefused, match="--state"):
        Journal.open(tmp_path / "state" / "j.sqlite", keep_images_s=1.0)


def test_another_programs_database_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "generations.sqlite"
    sqlite3.connect(file).executescript("CREATE TABLE theirs (x); PRAGMA user_version = 1").close()
    before = file.read_bytes()
    with pytest.raises(StartRefused, match="another program's"):
        Journal.open(file, keep_images_s=1.0)
    assert file.read_bytes() == before


def indexes(journal: Journal) -> set[tuple[str, str]]:
    return set(journal._connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index'"))


@pytest.mark.parametrize("application_id", [APPLICATION_ID, 0], ids=["marked", "before they were marked"])
def test_a_journal_of_the_first_schema_goes_on(tmp_path: Path, clock: Clock, application_id: int) -> None:
    (tmp_path / "state").mkdir()
    first = sqlite3.connect(tmp_path / "state" / "j.sqlite", isolation_level=None)
    first.executescript(
        f"""
        CREATE TABLE generations (
            tenant TEXT NOT NULL, request_id TEXT NOT NULL, fingerprint TEXT NOT NULL, state TEXT NOT NULL,
            began REAL NOT NULL, charged_micro_usd INTEGER NOT NULL DEFAULT 0, sha256 TEXT NOT NULL DEFAULT '',
            model_digest TEXT NOT NULL DEFAULT '', spec TEXT NOT NULL DEFAULT '', image BLOB,
            PRIMARY KEY (tenant, request_id)
        ) WITHOUT ROWID;
        CREATE INDEX generations_began ON generations (began);
        PRAGMA user_version = 1;
        PRAGMA application_id = {application_id};
        """
    )
    spec = json.dumps(asdict(SPEC) | PROMPTS)
    paid = ("t", "paid", "f", "finished", 0.0, 5, "ab", "cd", spec, b"png")
    cut_off = ("t", "cut off", "f", "running", 9.0, 0, "", "", "", None)
    first.executemany("INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (paid, cut_off))
    first.close()
    new = opened(tmp_path / "new", clock)
    for _ in range(2):
        journal = opened(tmp_path, clock)
        entry = journal.find("t", "paid")
        assert entry is not None
        assert entry.finished == FINISHED
        assert state(journal, "cut off") is State.FAILED
        journal.begin("t", "next", "f")
        journal.end("t", "next", State.CANCELLED)
        assert indexes(journal) == indexes(new)
        journal.close()
        assert b"secret" not in (tmp_path / "state" / "j.sqlite").read_bytes()


def test_another_version_s_journal_is_refused(journal: Journal, tmp_path: Path) -> None:
    journal._connection.execute("PRAGMA user_version = 9")
    journal.close()
    for _ in range(2):  # a refused file is let go
        with pytest.raises(StartRefused, match=r"schema 9 .*update cloud-server"):
            Journal.open(tmp_path / "state" / "j.sqlite", keep_images_s=1.0)
