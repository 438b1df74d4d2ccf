"""Whatever happens, the spend of a window stays within its cap and no request id is paid for twice."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_agent.budget import Budget, BudgetState, Rate, RateState, Window, window_bounds
from edge_agent.errors import DuplicateRequest, LedgerError, QuotaExhausted
from edge_agent.quota import Ledger, Reservation, uptime

NOON = datetime(2026, 11, 23, 12, 30, tzinfo=timezone.utc).timestamp()
DAY = Budget("daily", "day", 100)


class Clock:
    """A clock that a test moves."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "quota.sqlite"


@pytest.fixture
def open_ledger(path: Path) -> Iterator[Callable[..., Ledger]]:
    """Opens the ledger at `path`, closing the one opened before: as a restart does."""
    opened: list[Ledger] = []

    def open_(*limits: Budget | Rate, clock: Callable[[], float] = Clock()) -> Ledger:  # noqa: B008
        if opened:
            opened[-1].close()
        budgets = tuple(limit for limit in limits if isinstance(limit, Budget))
        rates = tuple(limit for limit in limits if isinstance(limit, Rate))
        opened.append(Ledger.open(path, budgets, rates, clock=clock))
        return opened[-1]

    yield open_
    if opened:
        opened[-1].close()


Open = Callable[..., Ledger]


def remaining(ledger: Ledger) -> list[int]:
    return [state.remaining_micro_usd for state in ledger.states()]


def test_the_account_is_at_hand_until_a_window_begins_also_when_a_reservation_was_refused(
    open_ledger: Open,
) -> None:
    clock = Clock()
    ledger = open_ledger(Budget("daily", "day", 100), clock=clock)
    ledger.states()
    ledger.reserve("a", "app", 60)
    assert ledger.at_hand
    with pytest.raises(QuotaExhausted):
        ledger.reserve("b", "app", 60)
    with pytest.raises(LedgerError):
        ledger.settle("never reserved", 1)
    with pytest.raises(DuplicateRequest):
        ledger.reserve("a", "app", 1)
    assert ledger.at_hand
    assert remaining(ledger) == [40]
    clock.now += 86_400
    assert not ledger.at_hand


# A call's life


def test_reserved_money_is_gone_until_what_was_charged_is_known(open_ledger: Open) -> None:
    ledger = open_ledger(DAY)
    reservation = Reservation("r", "app", 40, NOON, "cloud:1", NOON + 30)
    ledger.reserve("r", "app", 40, "cloud:1", 30.0)
    assert ledger.unresolved() == [reservation]
    assert ledger.states() == (BudgetState("daily", "day", 100, 0, 40, 60),)
    ledger.settle("r", 25)
    assert ledger.states() == (BudgetState("daily", "day", 100, 25, 0, 75),)


def test_a_released_call_costs_nothing_and_its_id_may_be_used_again(open_ledger: Open) -> None:
    ledger = open_ledger(DAY)
    ledger.reserve("r", "app", 40)
    ledger.release("r")
    ledger.release("r")
    assert remaining(ledger) == [100]
    ledger.reserve("r", "app", 90)
    assert remaining(ledger) == [10]


def test_a_call_that_would_exceed_the_cap_is_refused_with_budget_time_and_amounts(open_ledger: Open) -> None:
    ledger = open_ledger(DAY)
    ledger.reserve("a", "app", 61)
    assert ledger.allows("app", 39)
    assert not ledger.allows("app", 40)
    with pytest.raises(QuotaExhausted, match=r"'daily' \(day\) has \$0.000039 left of \$0.0001,") as refused:
        ledger.reserve("b", "app", 40)
    assert refused.value.budget == "daily"
    assert [call.request_id for call in ledger.unresolved()] == ["a"]
    ledger.settle("a", 61)
    with pytest.raises(QuotaExhausted, match=r"cost \$0.00004$") as refused:
        ledger.reserve("b", "app", 40)
    assert refused.value.retry_after_s == 11.5 * 3600


@pytest.mark.parametrize("window", get_args(Window))
def test_what_only_calls_under_way_keep_out_may_come_back_soon(open_ledger: Open, window: Window) -> None:
    ledger = open_ledger(Budget("all", window, 100))
    ledger.reserve("a", "app", 61)
    with pytest.raises(QuotaExhausted, match=r"\$0.000061 is set aside for other calls") as refused:
        ledger.reserve("b", "app", 40)
    assert refused.value.retry_after_s == 5
    ledger.settle("a", 60)
    ledger.reserve("b", "app", 40)


def test_what_is_left_is_told_while_a_write_waits_for_the_disk(open_ledger: Open) -> None:
    """A slow disk must not hold up decisions: they read what the last write left, from memory."""
    ledger = open_ledger(DAY, Rate("rate", 2, 60))
    ledger.reserve("a", "app", 61)
    with ThreadPoolExecutor(1) as reader, ledger._transaction():
        assert reader.submit(remaining, ledger).result(timeout=10) == [39]
        assert reader.submit(ledger.allows, "app", 39).result(timeout=10)
        assert reader.submit(ledger.rates).result(timeout=10)[0].calls == 1


def test_the_calls_of_years_are_counted_once_a_write_and_never_to_read(open_ledger: Open) -> None:
    """With a million of them and the window `total`, each count takes a tenth of a second."""
    ledger = open_ledger(DAY)
    ledger.reserve("a", "app", 1)
    statements: list[str] = []
    ledger._connection.set_trace_callback(statements.append)
    ledger.unresolved(), ledger.ahead(), ledger.states()
    assert sum("SUM(" in statement for statement in statements) == 0
    ledger.reserve("b", "app", 1)
    ledger.settle("b", 1)
    assert sum(statement.count("SUM(") == 2 for statement in statements) == 2


def test_a_window_that_begins_is_read_from_the_file(open_ledger: Open) -> None:
    clock = Clock()
    ledger = open_ledger(DAY, Rate("rate", 2, 60), clock=clock)
    ledger.reserve("a", "app", 61)
    clock.now += 86_400
    assert (remaining(ledger), ledger.rates()[0].calls) == ([100], 0)
    clock.now -= 86_400  # set back: what was counted then counts again
    assert (remaining(ledger), ledger.rates()[0].calls) == ([39], 1)


def test_a_price_above_the_whole_cap_does_not_ask_to_wait(open_ledger: Open) -> None:
    with pytest.raises(QuotaExhausted) as refused:
        open_ledger(DAY).reserve("a", "app", 101)
    assert refused.value.retry_after_s is None


def test_a_budget_of_nothing_refuses_also_what_costs_nothing(open_ledger: Open) -> None:
    ledger = open_ledger(Budget("none", "day", 0, "kiosk"))
    assert not ledger.allows("kiosk", 0)
    with pytest.raises(QuotaExhausted, match="'none'") as refused:
        ledger.reserve("a", "kiosk", 0)
    assert refused.value.retry_after_s is None  # tomorrow is no better
    assert ledger.allows("other", 0)


def test_what_costs_nothing_fits_into_a_budget_that_is_used_up(open_ledger: Open) -> None:
    ledger = open_ledger(DAY)
    ledger.reserve("a", "app", 100)
    assert ledger.allows("app", 0)
    ledger.reserve("b", "app", 0)


def test_a_second_reserve_of_the_same_request_is_refused_before_and_after_settling(open_ledger: Open) -> None:
    ledger = open_ledger(DAY)
    ledger.reserve("r", "app", 10)
    with pytest.raises(DuplicateRequest, match="reserved already"):
        ledger.reserve("r", "app", 10)
    ledger.settle("r", 10)
    with pytest.raises(DuplicateRequest, match="settled already"):
        ledger.reserve("r", "other", 10)
    assert remaining(ledger) == [90]


def test_what_a_call_was_charged_is_known_of_its_own_cloud_once_it_is_settled(open_ledger: Open) -> None:
    ledger = open_ledger(DAY)
    for request_id, charged in (("paid", 7), ("free", 0), ("open", None)):
        ledger.reserve(request_id, "app", 10, "here:1", asked="cat")
        if charged is not None:
            ledger.settle(request_id, charged)
    ledger.reserve("back", "app", 10, "here:1", asked="cat")
    ledger.release("back")
    ids = ("paid", "free", "open", "back", "other")
    assert [ledger.charged(request_id, "here:1", "cat") for request_id in ids] == [7, 0, None, None, None]
    assert ledger.charged("paid", "there:1", "cat") is None
    assert ledger.charged("paid", "here:1", "dog") is None


def test_settling_twice_counts_once_and_at_another_amount_is_refused(open_ledger: Open) -> None:
    ledger = open_ledger(DAY)
    ledger.reserve("r", "app", 10)
    ledger.settle("r", 7)
    ledger.settle("r", 7)
    with pytest.raises(LedgerError, match=r"settled at \$0.000007"):
        ledger.settle("r", 8)
    with pytest.raises(LedgerError, match="cannot be released"):
        ledger.release("r")
    assert remaining(ledger) == [93]


def test_a_charge_above_the_agreed_ceiling_counts_as_the_ceiling_and_is_logged(
    open_ledger: Open, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = open_ledger(DAY)
    ledger.reserve("r", "app", 10)
    ledger.settle("r", 1_000_000)
    assert remaining(ledger) == [90]
    assert "above the agreed $0.00001" in caplog.text


def test_what_was_never_reserved_or_was_released_cannot_be_settled(open_ledger: Open) -> None:
    ledger = open_ledger(DAY)
    with pytest.raises(LedgerError, match="nothing was ever reserved"):
        ledger.settle("nobody", 1)
    with pytest.raises(LedgerError, match="nothing was ever reserved"):
        ledger.release("nobody")
    ledger.reserve("r", "app", 10)
    ledger.release("r")
    with pytest.raises(LedgerError, match="released"):
        ledger.settle("r", 10)


def test_a_ledger_of_an_earlier_version_gets_an_id_and_its_open_calls_are_found_without_reading_all(
    open_ledger: Open, path: Path
) -> None:
    ledger = open_ledger(DAY)
    ledger.reserve("r", "app", 10)
    ledger.close()
    with sqlite3.connect(path) as earlier:
        earlier.execute("DROP TABLE device")
        earlier.execute("DROP INDEX calls_open")
        earlier.execute("ALTER TABLE calls DROP COLUMN asked")
    earlier.close()
    ledger = open_ledger(DAY)
    assert remaining(ledger) == [90] and len(ledger.device) == 32
    assert open_ledger(DAY).device == ledger.device
    statements: list[str] = []
    reopened = open_ledger(DAY)
    reopened._connection.set_trace_callback(statements.append)
    assert [left.request_id for left in reopened.unresolved()] == ["r"]
    (query,) = [statement for statement in statements if "expires_at" in statement]
    (*_, plan), *_ = reopened._connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
    assert "calls_open" in plan


@pytest.mark.parametrize("amount", [-1, 2**63])
def test_an_amount_that_is_no_money_is_a_mistake(open_ledger: Open, amount: int) -> None:
    ledger = open_ledger(DAY)
    for call in (lambda: ledger.reserve("r", "app", amount), lambda: ledger.settle("r", amount)):
        with pytest.raises(ValueError, match="micro-dollars"):
            call()


# Budgets, windows and rates


def test_a_call_must_fit_every_budget_that_applies_or_is_booked_in_none(open_ledger: Open) -> None:
    ledger = open_ledger(Budget("all", "total", 100), Budget("camera's", "day", 30, app="camera"))
    ledger.reserve("a", "camera", 30)
    with pytest.raises(QuotaExhausted, match="camera's"):
        ledger.reserve("b", "camera", 1)
    ledger.reserve("c", "notes", 70)
    assert remaining(ledger) == [0, 0]
    assert [state.name for state in ledger.states("notes")] == ["all"]
    assert [state.name for state in ledger.states("camera")] == ["all", "camera's"]


@pytest.mark.parametrize(
    ("window", "last_moment", "next_moment"),
    [
        ("hour", "2026-11-23 12:59:59.999", "2026-11-23 13:00:00"),
        ("day", "2026-11-23 23:59:59.999", "2026-11-24 00:00:00"),
        ("month", "2026-11-30 23:59:59.999", "2026-12-01 00:00:00"),
        ("month", "2026-11-30 23:59:59.999", "2027-01-01 00:00:00"),
    ],
)
def test_a_budget_is_full_again_when_its_window_ends_and_not_before(
    open_ledger: Open, window: str, last_moment: str, next_moment: str
) -> None:
    def utc(text: str) -> float:
        return datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp()

    clock = Clock()
    ledger = open_ledger(Budget("b", window, 100), clock=clock)  # type: ignore[arg-type]
    ledger.reserve("a", "app", 100)
    clock.now = utc(last_moment)
    assert remaining(ledger) == [0]
    clock.now = utc(next_moment)
    assert remaining(ledger) == [100]


def test_a_call_settled_in_the_next_window_counts_in_the_one_it_was_reserved_in(open_ledger: Open) -> None:
    clock = Clock()
    ledger = open_ledger(DAY, Budget("all", "total", 200), clock=clock)
    ledger.reserve("late", "app", 100)
    clock.now += 86_400
    ledger.settle("late", 80)
    assert remaining(ledger) == [100, 120]


def test_a_clock_set_back_does_not_give_the_budget_a_second_time(open_ledger: Open) -> None:
    clock = Clock()
    ledger = open_ledger(DAY, clock=clock)
    ledger.reserve("a", "app", 100)
    clock.now = 0.0  # a board without a battery boots in 1970
    assert not ledger.allows("app", 1)


class Machine(Clock):
    """A machine's clock, which may be wrong, and its uptime, which is not."""

    up = 1_000.0

    def pass_time(self, seconds: float) -> None:
        self.up += seconds
        self.now += seconds

    def open(self, path: Path, *limits: Budget | Rate) -> Ledger:
        budgets = tuple(limit for limit in limits if isinstance(limit, Budget))
        rates = tuple(limit for limit in limits if isinstance(limit, Rate))
        return Ledger.open(path, budgets, rates, clock=self, uptime=lambda: self.up)


@pytest.mark.parametrize("window", ["hour", "day", "month"])
def test_calls_made_before_the_clock_was_put_right_count_from_when_they_were_made(
    path: Path, window: Window
) -> None:
    """As on a board without a battery, which hears of the time once it has a network."""
    machine = Machine(0.0)
    ledger = machine.open(path, Budget("one", window, 100), Rate("rate", 2, 60.0))
    ledger.reserve("a", "app", 60, timeout_s=30.0)
    machine.pass_time(10)
    machine.now = NOON
    assert not ledger.at_hand
    assert remaining(ledger) == [40]
    assert ledger.rates()[0].calls == 1
    (call,) = ledger.unresolved()
    assert (call.reserved_at, call.expires_at) == (NOON - 10, NOON + 20)
    machine.now -= 86_400 * 40  # and put back and on again: what was made before stays where it is
    ledger.reserve("b", "app", 40)
    assert remaining(ledger) == [0]
    machine.pass_time(5)
    machine.now += 86_400 * 40
    assert [call.reserved_at for call in ledger.unresolved()] == [NOON - 10, NOON]
    assert remaining(ledger) == [0]
    ledger.close()
    ledger = machine.open(path, Budget("one", window, 100))
    assert remaining(ledger) == [0]
    machine.now += 86_400 * 40  # what an earlier process did is no longer known to be recent
    assert remaining(ledger) == [100]
    ledger.close()


def test_a_clock_that_is_put_on_and_back_leaves_the_dates_as_they_were(path: Path) -> None:
    machine = Machine()
    ledger = machine.open(path, DAY)
    ledger.reserve("before", "app", 10)
    machine.now += 86_400 * 400
    assert remaining(ledger) == [90]
    ledger.reserve("ahead", "app", 10)
    machine.now -= 86_400 * 400
    assert remaining(ledger) == [80]
    ledger.reserve("after", "app", 10)
    assert {call.request_id: call.reserved_at for call in ledger.unresolved()} == {
        "before": NOON,
        "ahead": NOON + 86_400 * 400,
        "after": NOON,
    }
    machine.pass_time(86_400)
    assert remaining(ledger) == [90]
    ledger.close()


def test_a_clock_that_is_put_right_as_the_ledger_closes_or_its_last_row_is_made_anew_moves_the_dates_too(
    path: Path,
) -> None:
    machine = Machine(0.0)
    ledger = machine.open(path, DAY)
    ledger.reserve("a", "app", 100)
    ledger.release("a")
    ledger.close()
    ledger = machine.open(path, DAY)
    ledger.reserve("a", "app", 100)  # takes the place of the one before
    machine.now = NOON
    ledger.close()
    ledger = machine.open(path, DAY)
    assert remaining(ledger) == [0]
    ledger.close()


def test_time_that_passes_and_a_clock_that_slips_move_no_dates(path: Path) -> None:
    machine = Machine()
    ledger = machine.open(path, DAY)
    ledger.reserve("a", "app", 100)
    for slip in (30, -60, 20):
        machine.pass_time(3_600)
        machine.now += slip
        assert ledger.unresolved()[0].reserved_at == NOON
    machine.pass_time(86_400)
    assert remaining(ledger) == [100]
    ledger.close()


def test_a_disk_that_takes_nothing_when_the_clock_is_put_right_is_tried_again(path: Path) -> None:
    machine = Machine(0.0)
    ledger = machine.open(path, DAY)
    ledger.reserve("a", "app", 100)
    machine.now = NOON
    # In the midst of the transaction, as a full disk does.
    ledger._connection.execute(
        "CREATE TEMP TRIGGER full BEFORE UPDATE ON calls BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
    )
    with pytest.raises(LedgerError):
        ledger.allows("app", 1)
    ledger._connection.execute("DROP TRIGGER full")
    assert not ledger.allows("app", 1)
    ledger.close()


def test_the_uptime_goes_on() -> None:
    assert 0 < uptime() <= uptime()


def test_calls_of_a_clock_that_was_ahead_are_told_apart(open_ledger: Open) -> None:
    clock = Clock()
    ledger = open_ledger(DAY, clock=clock)
    for request_id in ("settled", "released", "now"):
        ledger.reserve(request_id, "app", 10)
    ledger.settle("settled", 10)
    ledger.release("released")
    assert ledger.ahead() == (0, 0.0)
    clock.now = NOON - 1
    assert ledger.ahead() == (0, 0.0)  # as small a step as a clock that is kept right makes
    clock.now = NOON - 86_400
    assert ledger.ahead() == (2, NOON)


def test_december_ends_in_january_and_a_total_never(open_ledger: Open) -> None:
    december = datetime(2026, 12, 31, tzinfo=timezone.utc).timestamp()
    assert window_bounds("month", december)[1] == datetime(2027, 1, 1, tzinfo=timezone.utc).timestamp()
    assert window_bounds("total", december)[1] is None


def test_a_rate_lets_calls_through_again_as_the_earlier_ones_grow_old(open_ledger: Open) -> None:
    clock = Clock()
    ledger = open_ledger(Rate("burst", 2, 60.0), clock=clock)
    ledger.reserve("a", "app", 5)
    clock.now += 20
    ledger.reserve("b", "app", 5)
    clock.now += 10
    with pytest.raises(QuotaExhausted, match="2 cloud calls in 60 s") as refused:
        ledger.reserve("c", "app", 5)
    assert (refused.value.budget, refused.value.retry_after_s) == ("burst", 30)
    assert ledger.rates() == (RateState("burst", 2, 60.0, 2),)
    clock.now += 30
    ledger.reserve("c", "app", 5)
    assert not ledger.allows("app", 5)


def test_a_rate_over_a_month_is_told_in_whole_seconds(open_ledger: Open) -> None:
    with pytest.raises(QuotaExhausted, match="0 cloud calls in 2592000 s"):
        open_ledger(Rate("monthly", 0, 2_592_000.0)).reserve("a", "app", 5)


def test_a_rate_that_was_lowered_says_when_all_but_as_many_calls_have_grown_old(open_ledger: Open) -> None:
    clock = Clock()
    ledger = open_ledger(Rate("burst", 3, 60.0), clock=clock)
    for request_id in "abc":
        ledger.reserve(request_id, "app", 5)
        clock.now += 10
    ledger = open_ledger(Rate("burst", 2, 60.0), clock=clock)
    with pytest.raises(QuotaExhausted, match="and there were 3") as refused:
        ledger.reserve("d", "app", 5)
    assert refused.value.retry_after_s == 40
    clock.now += 40
    ledger.reserve("d", "app", 5)


def test_a_rate_of_no_calls_refuses_all_of_them_and_does_not_ask_to_wait(open_ledger: Open) -> None:
    ledger = open_ledger(Rate("none", 0, 60.0))
    assert not ledger.allows("app", 0)
    with pytest.raises(QuotaExhausted, match="allows 0 cloud calls") as refused:
        ledger.reserve("a", "app", 0)
    assert refused.value.retry_after_s is None


def test_a_call_that_never_ran_does_not_count_in_the_rate(open_ledger: Open) -> None:
    ledger = open_ledger(Rate("burst", 1, 60.0))
    ledger.reserve("a", "app", 5)
    ledger.release("a")
    assert ledger.allows("app", 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget("b", "week", 1),  # type: ignore[arg-type]
        lambda: Budget("b", "day", -1),
        lambda: Rate("r", 1, 0),
    ],
)
def test_limits_that_cannot_be_are_refused_by_name(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"'b'|'r'"):
        make()


def test_two_limits_of_one_name_are_refused(open_ledger: Open) -> None:
    with pytest.raises(ValueError, match="names of their own"):
        open_ledger(DAY, Rate("daily", 1, 1.0))


# Many at once


def reserve_at_once(ledger: Ledger, request_ids: list[str], ceiling: int) -> int:
    """Reserve from as many threads as there are ids, all at once; the number that got through."""
    gate = threading.Barrier(len(request_ids))

    def reserve(request_id: str) -> bool:
        gate.wait()
        try:
            ledger.reserve(request_id, "app", ceiling)
        except (QuotaExhausted, DuplicateRequest):
            return False
        return True

    with ThreadPoolExecutor(len(request_ids)) as threads:
        return sum(threads.map(reserve, request_ids))


def test_of_32_at_once_a_budget_for_5_lets_exactly_5_through(open_ledger: Open) -> None:
    ledger = open_ledger(Budget("five", "day", 5 * 40_000 + 39_999))
    assert reserve_at_once(ledger, [f"r{n}" for n in range(32)], 40_000) == 5
    for call in ledger.unresolved():
        ledger.settle(call.request_id, 40_000)
    assert ledger.states()[0].spent_micro_usd == 200_000


def test_of_32_at_once_with_one_request_id_one_is_reserved(open_ledger: Open) -> None:
    ledger = open_ledger(DAY)
    assert reserve_at_once(ledger, ["same"] * 32, 1) == 1
    assert remaining(ledger) == [99]


# Crashes

CHILD = """
import sys, threading
from edge_agent.budget import Budget
from edge_agent.quota import Ledger

ledger = Ledger.open(sys.argv[1], (Budget("all", "total", 1_000_000),))

def work(name):
    for n in range(100_000):
        request_id = f"{name}{n}"
        ledger.reserve(request_id, "app", 10)
        sys.stdout.write(f"reserved {request_id}\\n"); sys.stdout.flush()
        if n % 2:
            ledger.settle(request_id, 7)
            sys.stdout.write(f"settled {request_id}\\n"); sys.stdout.flush()

for name in "ab":
    threading.Thread(target=work, args=(name,)).start()
"""


def test_what_a_killed_process_had_been_promised_is_still_there(path: Path, open_ledger: Open) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(30)]
    with pytest.raises(LedgerError, match="in use by another edge-agent"):
        open_ledger()
    child.kill()
    lines += child.stdout.read().splitlines(keepends=True)
    child.wait()
    child.stdout.close()
    said = [line.split() for line in lines if line.endswith("\n")]
    reserved = {request_id for what, request_id in said if what == "reserved"}
    settled = {request_id for what, request_id in said if what == "settled"}
    assert len(settled) > 3

    ledger = open_ledger(Budget("all", "total", 1_000_000))
    unresolved = {call.request_id for call in ledger.unresolved()}
    state = ledger.states()[0]
    assert state.reserved_micro_usd == 10 * len(unresolved)
    # Each of the two threads may have been cut between the commit and the line that tells of it.
    assert 0 <= state.spent_micro_usd // 7 - len(settled) <= 2
    assert not settled & unresolved
    assert reserved - settled <= unresolved | {line for line in reserved if int(line[1:]) % 2}
    for request_id in reserved:
        with pytest.raises(DuplicateRequest):
            ledger.reserve(request_id, "app", 10)


class LedgerLife(RuleBasedStateMachine):
    """Random lives of a ledger, with crashes and a clock that is set back, against a plain model of it."""

    budgets = (
        Budget("hour", "hour", 60),
        Budget("day", "day", 100),
        Budget("month", "month", 150, app="a"),
        Budget("all", "total", 400),
    )
    rate = Rate("rate", 4, 1_000.0)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.generation = 0
        self.calls: dict[str, tuple[str, str, int, int, float]] = {}  # app, state, ceiling, cost, time
        self.ledger = self.open()

    def open(self) -> Ledger:
        return Ledger.open(
            self.folder / f"{self.generation}.sqlite", self.budgets, (self.rate,), clock=self.clock
        )

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)

    @staticmethod
    def window(budget: Budget, time: float) -> str:
        """The window's name: sorts by time, and shares no arithmetic with the ledger."""
        formats = {"hour": "%Y-%m-%d %H", "day": "%Y-%m-%d", "month": "%Y-%m", "total": ""}
        return datetime.fromtimestamp(time, timezone.utc).strftime(formats[budget.window])

    def counted(self, budget: Budget, state: str) -> int:
        """What this budget's current window holds in that state."""
        return sum(
            cost
            for app, its_state, _, cost, time in self.calls.values()
            if budget.app in (None, app)
            and its_state == state
            and self.window(budget, time) >= self.window(budget, self.clock.now)
        )

    def room(self, app: str, ceiling: int) -> bool:
        recent = sum(
            state != "released" and time > self.clock.now - self.rate.per_seconds
            for _, state, _, _, time in self.calls.values()
        )
        return recent < self.rate.max_calls and all(
            self.counted(budget, "settled") + self.counted(budget, "reserved") + ceiling
            <= budget.cap_micro_usd
            for budget in self.budgets
            if budget.app in (None, app)
        )

    @rule(seconds=st.sampled_from([1, 300, 1_800, 3_600, 86_400, 15 * 86_400, -1_200, -5_000, -90_000]))
    def time_passes_or_the_clock_is_set_back(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(number=st.integers(0, 11), app=st.sampled_from("ab"), ceiling=st.integers(0, 65))
    def reserve(self, number: int, app: str, ceiling: int) -> None:
        request_id = f"r{number}"
        known = self.calls.get(request_id)
        room = self.room(app, ceiling)
        assert self.ledger.allows(app, ceiling) == room
        try:
            self.ledger.reserve(request_id, app, ceiling)
        except DuplicateRequest:
            assert known is not None
            assert known[1] != "released"
        except QuotaExhausted as refused:
            assert not room
            assert refused.retry_after_s is None or refused.retry_after_s > 0
        else:
            assert room
            assert known is None or known[1] == "released"
            self.calls[request_id] = (app, "reserved", ceiling, ceiling, self.clock.now)

    @rule(number=st.integers(0, 11), charged=st.integers(0, 80))
    def settle(self, number: int, charged: int) -> None:
        request_id = f"r{number}"
        app, state, ceiling, cost, time = self.calls.get(request_id, ("", "unknown", 0, 0, 0.0))
        counted = min(charged, ceiling)
        if state == "reserved" or (state == "settled" and cost == counted):
            self.ledger.settle(request_id, charged)
            self.calls[request_id] = (app, "settled", ceiling, counted, time)
        else:
            with pytest.raises(LedgerError):
                self.ledger.settle(request_id, charged)

    @rule(number=st.integers(0, 11))
    def release(self, number: int) -> None:
        request_id = f"r{number}"
        app, state, ceiling, _, time = self.calls.get(request_id, ("", "unknown", 0, 0, 0.0))
        if state in ("reserved", "released"):
            self.ledger.release(request_id)
            self.calls[request_id] = (app, "released", ceiling, 0, time)
        else:
            with pytest.raises(LedgerError):
                self.ledger.release(request_id)

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.ledger = self.open()

    @rule()
    def crash(self) -> None:
        """The files as they lie on the disk at this moment, with nothing closed or checkpointed."""
        for file in self.folder.glob(f"{self.generation}.sqlite*"):
            shutil.copy(
                file, self.folder / file.name.replace(str(self.generation), str(self.generation + 1), 1)
            )
        self.ledger.close()
        self.generation += 1
        self.ledger = self.open()

    @invariant()
    def the_ledger_says_what_happened(self) -> None:
        for budget, state in zip(self.budgets, self.ledger.states(), strict=True):
            assert state.spent_micro_usd == self.counted(budget, "settled")
            assert state.reserved_micro_usd == self.counted(budget, "reserved")
        open_calls = {request_id for request_id, call in self.calls.items() if call[1] == "reserved"}
        assert {call.request_id for call in self.ledger.unresolved()} == open_calls

    @invariant()
    def no_window_ever_holds_more_than_its_cap(self) -> None:
        for budget in self.budgets:
            spent: dict[str, int] = {}
            for app, _, _, cost, time in self.calls.values():
                if budget.app in (None, app):
                    window = self.window(budget, time)
                    spent[window] = spent.get(window, 0) + cost
            assert all(total <= budget.cap_micro_usd for total in spent.values())


TestLedgerLife = LedgerLife.TestCase
TestLedgerLife.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


# Files that cannot be used


def test_a_file_that_is_not_a_database_is_refused_and_left_alone(path: Path, open_ledger: Open) -> None:
    path.parent.mkdir()
    path.write_bytes(b"my holiday notes, which nobody wants to lose" * 40)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"quota\.sqlite is not a quota ledger.*--state"):
        open_ledger(DAY)
    assert path.read_bytes() == before


def test_another_programs_database_is_refused_and_left_alone(path: Path, open_ledger: Open) -> None:
    path.parent.mkdir()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE photos (name)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="another program's database"):
        open_ledger(DAY)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_ledger_of_a_later_schema_is_refused(path: Path, open_ledger: Open) -> None:
    open_ledger(DAY).close()
    later = sqlite3.connect(path)
    later.execute("PRAGMA user_version = 2")
    later.close()
    with pytest.raises(LedgerError, match=r"schema 2 .* update edge-agent"):
        open_ledger(DAY)


def test_a_damaged_ledger_is_refused_at_opening(path: Path, open_ledger: Open) -> None:
    ledger = open_ledger(Budget("all", "total", 10**6))
    for n in range(200):
        ledger.reserve(f"request-{n}", "app", 1)
    ledger.close()
    with path.open("r+b") as file:
        file.seek(4096 * 2)
        file.write(b"\xff" * 4096)
    with pytest.raises(
        LedgerError, match=r"is damaged: .* with the -wal beside it, which forgets what"
    ) as refused:
        open_ledger(DAY)
    assert refused.value.message.isprintable()  # SQLite's own words have an end of line


@pytest.mark.usefixtures("ordinary_user")
def test_a_read_only_ledger_is_refused_at_opening() -> None:
    # Not tmp_path: its parents belong to the user who started the tests.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quota.sqlite"
        Ledger.open(path, (DAY,)).close()
        path.chmod(0o444)
        with pytest.raises(LedgerError, match="cannot be written: check the permissions"):
            Ledger.open(path, (DAY,))


@pytest.mark.usefixtures("ordinary_user")
def test_a_folder_that_cannot_be_written_is_refused_with_its_path() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        with pytest.raises(LedgerError, match=f"{folder}/state/quota.* check the permissions"):
            Ledger.open(Path(folder) / "state" / "quota.sqlite", (DAY,))
        with pytest.raises(LedgerError, match="check the path and its permissions"):
            Ledger.open(Path(folder) / "quota.sqlite", (DAY,))


@pytest.mark.posix
def test_the_folder_is_for_its_owner_alone(path: Path, open_ledger: Open) -> None:
    open_ledger(DAY)
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_file_in_place_of_the_folder_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "state"):
        with pytest.raises(LedgerError, match="what lies in its place is a file; name a folder with --state"):
            Ledger.open(folder / "quota.sqlite", (DAY,))


@pytest.mark.linux
def test_a_folder_that_cannot_be_made_is_told_with_what_to_do(tmp_path: Path) -> None:
    for folder, why in (
        ("/proc/state", "no folder can be made there"),
        (tmp_path / ("x" * 300), "is too long"),
    ):
        with pytest.raises(LedgerError, match=f"{why}; name another"):
            Ledger.open(Path(folder) / "quota.sqlite", (DAY,))


def test_a_ledger_in_use_is_refused_to_a_second_opener(path: Path, open_ledger: Open) -> None:
    open_ledger(DAY)
    with pytest.raises(LedgerError, match="in use by another edge-agent"):
        Ledger.open(path, (DAY,))


USES: list[tuple[Any, ...]] = [
    ("reserve", "r", "app", 1),
    ("settle", "r", 1),
    ("release", "r"),
    ("unresolved",),
    ("is_open", "r"),
    ("ahead",),
    ("allows", "app", 1),
    ("states",),
    ("rates",),
]


@pytest.mark.parametrize("budgets", [(DAY,), ()])
def test_a_closed_ledger_says_so_and_closes_again(
    open_ledger: Open, budgets: tuple[Budget, ...], caplog: pytest.LogCaptureFixture
) -> None:
    ledger = open_ledger(*budgets)
    ledger.states()  # which it keeps in memory
    ledger.close()
    ledger.close()
    for method, *arguments in USES:
        with pytest.raises(LedgerError, match="closed"):
            getattr(ledger, method)(*arguments)
    assert caplog.records == []


@pytest.mark.posix  # elsewhere such a file cannot be removed
def test_no_budget_is_spent_twice_where_the_file_is_removed_beneath_the_ledger(
    path: Path, open_ledger: Open, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_ledger(DAY)
    first.reserve("r1", "app", 60)
    path.parent.rename(path.parent.with_name("elsewhere"))
    for _ in range(2):
        with pytest.raises(LedgerError, match="removed or replaced beneath this edge-agent: restart it"):
            first.reserve("r2", "app", 10)
    assert "restart it" in first.failure and len(caplog.records) == 1
    second = Ledger.open(path, (DAY,))
    second.reserve("r3", "app", 60)
    with pytest.raises(LedgerError, match="removed or replaced"):
        first.reserve("r4", "app", 10)
    first.settle("r1", 50)  # what it has begun it ends
    assert "restart it" in first.failure and len(caplog.records) == 1
    second.close()

    shutil.rmtree(path.parent)
    path.parent.with_name("elsewhere").rename(path.parent)
    first.reserve("r5", "app", 50)
    assert not first.failure and first.states()[0].remaining_micro_usd == 0


DISK_FULL = """
import os, sys
from pathlib import Path
from edge_agent.errors import LedgerError
from edge_agent.budget import Budget
from edge_agent.quota import Ledger

folder = Path(sys.argv[1])
ledger = Ledger.open(folder / "quota.sqlite", (Budget("all", "total", 10**9),))
ballast = folder / "ballast"
with ballast.open("wb", buffering=0) as file:  # leaves room for a few pages only
    room = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    file.write(bytes(room - 32_768))
promised = 0
try:
    for n in range(10_000):
        ledger.reserve(f"r{n}", "app", 10)
        promised += 1
except LedgerError as error:
    assert "disk is full: free some space" in str(error), error
else:
    raise SystemExit("the disk never filled up")
state = ledger.states()[0]
assert state.reserved_micro_usd == 10 * promised, (state, promised)
ballast.unlink()
ledger.reserve("after", "app", 10)
ledger.close()
ledger = Ledger.open(folder / "quota.sqlite", (Budget("all", "total", 10**9),))
assert len(ledger.unresolved()) == promised + 1
print("held", promised)
"""


def test_a_full_disk_is_an_error_that_says_so_and_loses_nothing(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=256k tmpfs {tmp_path}"
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("needs a small tmpfs in a mount namespace of its own, which this machine does not allow")
    run = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    child = subprocess.run([*unshare, run, sys.executable, DISK_FULL], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout.split()[1]) > 0


def test_a_write_that_fails_leaves_the_ledger_as_it_was_and_usable(open_ledger: Open) -> None:
    ledger = open_ledger(Budget("all", "total", 10**6))
    ledger.reserve("before", "app", 10)
    (pages,) = ledger._connection.execute("PRAGMA page_count").fetchone()
    ledger._connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to a full disk
    promised = 1

    def fill() -> None:
        nonlocal promised
        for n in range(1_000):
            ledger.reserve(f"r{n}", "app", 10)
            promised += 1

    with pytest.raises(LedgerError, match="disk is full: free some space"):
        fill()
    assert ledger.states()[0].reserved_micro_usd == 10 * promised
    ledger.settle("before", 4)
    assert len(ledger.unresolved()) == promised - 1


def test_a_write_of_which_nobody_knows_whether_it_is_durable_counts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the disk takes it and fails as it says so."""
    faults: list[Exception] = []

    class Unsure(sqlite3.Connection):
        def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            cursor = super().execute(statement, *arguments)
            if statement == "COMMIT" and faults:
                raise faults.pop()
            return cursor

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *rest, **named: connect(*rest, **named, factory=Unsure))
    ledger = Ledger.open(path, (DAY,))
    ledger.reserve("a", "app", 10)
    faults.append(sqlite3.OperationalError("disk I/O error"))
    with pytest.raises(LedgerError, match="check the disk"):
        ledger.reserve("b", "app", 60)
    assert remaining(ledger) == [30]
    with pytest.raises(QuotaExhausted):
        ledger.reserve("c", "app", 31)
    ledger.close()


def test_what_is_written_is_on_the_disk_before_anybody_is_told(open_ledger: Open) -> None:
    """Or a power cut would take it back."""
    connection = open_ledger(DAY)._connection
    settings = [
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")
    ]
    assert settings == [2, "wal"]
