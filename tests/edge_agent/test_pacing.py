"""A paced budget lasts until its window ends, and goes to the prompts that gain most."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edge_agent.budget import Budget, BudgetState, window_bounds
from edge_agent.bundle import Bundle
from edge_agent.calibration import Calibration
from edge_agent.errors import QuotaExhausted
from edge_agent.notes import SAVED_EVERY
from edge_agent.pacing import DAY_H, HOUR_S, KEPT_H, Arrivals, Pacing
from edge_agent.quota import Ledger
from edge_agent.recent import Recent
from routet2i.edge.v1 import edge_pb2
from routet2i.image.v1 import image_pb2
from tests.edge_agent.test_calibration import CALIBRATION
from tests.running import CLOUD_PROMPT, EDGE_PROMPT, daemon_here, scripted_cloud

DAY_S = DAY_H * HOUR_S
MONDAY = 20_000 * DAY_S  # seconds since 1970, at midnight
NOON = MONDAY + DAY_S / 2
PRICE = 5_000
ALL, KIOSK = Budget("day", "day", 1_000_000), Budget("kiosk", "day", 100_000, app="kiosk")


def state(budget: Budget, remaining_micro_usd: int) -> BudgetState:
    spent = budget.cap_micro_usd - remaining_micro_usd
    return BudgetState(
        budget.name, budget.window, budget.cap_micro_usd, spent, 0, remaining_micro_usd, budget.app
    )


def days_of(count: int, hours: dict[int, int]) -> Arrivals:
    """So many days before MONDAY with that many prompts in these hours of the day."""
    first = MONDAY // HOUR_S - count * DAY_H
    return Arrivals(
        [(first + day * DAY_H + hour, here) for day in range(count) for hour, here in hours.items()]
    )


@pytest.mark.parametrize(
    ("after_h", "left"),
    [(0, 90), (9, 90), (9.5, 75), (12, 60), (20.25, 45), (21, 0), (23.9, 0)],
)
def test_the_rest_of_the_day_is_expected_to_be_as_on_the_days_before(after_h: float, left: float) -> None:
    arrivals = days_of(3, {9: 30, 20: 60})
    assert arrivals.expected(MONDAY + after_h * HOUR_S, MONDAY + DAY_S) == pytest.approx(left)


def test_a_month_is_expected_to_be_as_its_days_and_an_hour_as_itself() -> None:
    arrivals = days_of(2, {9: 30, 20: 60})
    assert arrivals.expected(MONDAY, MONDAY + 30 * DAY_S) == pytest.approx(30 * 90)
    assert arrivals.expected(MONDAY + 9.75 * HOUR_S, MONDAY + 10 * HOUR_S) == pytest.approx(7.5)


def test_days_that_differ_are_averaged_and_hours_without_a_prompt_count() -> None:
    friday = MONDAY // HOUR_S - 3 * DAY_H
    arrivals = Arrivals([(friday + 9, 40), (friday + DAY_H + 9, 20)])  # and none on Sunday
    assert arrivals.expected(MONDAY, MONDAY + DAY_S) == pytest.approx(20)


def test_on_the_first_day_the_hours_to_come_are_expected_to_be_as_those_that_passed() -> None:
    arrivals = Arrivals()
    assert arrivals.expected(NOON, MONDAY + DAY_S) == 0
    for minute in (0, 1, 2):
        arrivals.add(NOON + 60 * minute)
    # Not three in three minutes: what begins with a few prompts need not go on like that.
    assert arrivals.expected(NOON + 120, MONDAY + DAY_S) == pytest.approx(3 * 12, rel=0.01)
    assert arrivals.expected(NOON + 2 * HOUR_S, MONDAY + DAY_S) == pytest.approx(1.5 * 10)


@pytest.mark.parametrize("off_h", [-KEPT_H - 1, 1, 10**6])
def test_what_is_too_old_or_of_a_clock_that_was_ahead_counts_no_more(off_h: int) -> None:
    hour = int(NOON // HOUR_S)
    arrivals = Arrivals([(hour + off_h, 1_000), (hour, 6)])
    assert arrivals.expected(NOON, MONDAY + DAY_S) == pytest.approx(6 * 12)
    arrivals.add(NOON + HOUR_S)
    assert dict(arrivals.by_hour) == {hour: 6, hour + 1: 1} | ({hour + 1: 1_001} if off_h == 1 else {})


def test_a_share_is_what_the_money_left_pays_for_of_what_is_to_come() -> None:
    pacing = Pacing([ALL])
    for _ in range(200):  # of one hour, and eleven are to come
        pacing.add("any", NOON)
    now = NOON + HOUR_S
    assert pacing.rate([state(ALL, 220 * PRICE)], PRICE, now) == pytest.approx(0.1)
    assert pacing.rate([state(ALL, 110 * PRICE)], PRICE, now) == pytest.approx(0.05)
    assert pacing.rate([state(ALL, 110 * PRICE)], PRICE // 2, now) == pytest.approx(0.1)
    assert pacing.rate([state(ALL, 0)], PRICE, now) == 0
    assert pacing.rate([state(ALL, 10_000 * PRICE)], PRICE, now) == 1
    assert pacing.rate([state(ALL, PRICE)], 0, now) == 1, "what costs nothing need not be spared"


def test_what_a_call_needs_room_for_and_does_not_cost_pays_for_none() -> None:
    pacing = Pacing([ALL])
    for _ in range(200):
        pacing.add("any", NOON)
    now, ceiling = NOON + HOUR_S, 10 * PRICE
    # The last of eleven begins with room for ten.
    assert pacing.rate([state(ALL, 20 * PRICE)], PRICE, now, ceiling) == pytest.approx(11 / 2_200)
    assert pacing.rate([state(ALL, 10 * PRICE)], PRICE, now, ceiling) == pytest.approx(1 / 2_200)
    assert pacing.rate([state(ALL, 9 * PRICE)], PRICE, now, ceiling) == 0
    assert pacing.rate([state(ALL, 20 * PRICE)], PRICE, now, PRICE) == pytest.approx(20 / 2_200)


def test_the_budget_that_is_shortest_counts_and_one_that_never_ends_does_not() -> None:
    endless, hourly = Budget("total", "total", PRICE), Budget("hour", "hour", PRICE)
    pacing = Pacing([ALL, endless, hourly])
    for _ in range(40):
        pacing.add("any", NOON)
    now = NOON + HOUR_S
    both = [state(ALL, 110 * PRICE), state(endless, PRICE), state(hourly, PRICE)]
    assert pacing.rate(both, PRICE, now) == pytest.approx(1 / 40)
    assert pacing.rate(both[:2], PRICE, now) == pytest.approx(0.25)


def test_an_apps_budget_is_for_its_own_prompts() -> None:
    pacing = Pacing([ALL, KIOSK])
    for app in ("kiosk", *["other"] * 99):
        pacing.add(app, NOON)
    now = NOON + HOUR_S
    assert pacing.rate([state(KIOSK, 5 * PRICE)], PRICE, now) == pytest.approx(5 / 11)
    assert pacing.rate([state(ALL, 110 * PRICE)], PRICE, now) == pytest.approx(0.1)


def test_what_came_outlives_the_process_for_each_app(tmp_path: Path) -> None:
    before = Pacing([ALL, KIOSK], tmp_path)
    due = [before.add("kiosk" if number % 2 else "other", NOON) for number in range(SAVED_EVERY + 5)]
    assert [number for number, now in enumerate(due, 1) if now] == [SAVED_EVERY]
    before.save()
    after, states = Pacing([KIOSK, ALL], tmp_path), [state(ALL, 20 * PRICE), state(KIOSK, 20 * PRICE)]
    for chosen in (states, states[:1], states[1:]):
        assert after.rate(chosen, PRICE, NOON) == before.rate(chosen, PRICE, NOON) < 1
    assert after.rate(states[:1], PRICE, NOON) < after.rate(states[1:], PRICE, NOON)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "3",
        "[3]",
        "[[null, 3]]",
        '[[null, [["a", 1]]]]',
        "[[null, [[1e999, 1]]]]",
        f"[[null, [[{NOON // HOUR_S:.0f}, 1{'0' * 400}]]]]",
        f"[[null, [[{NOON // HOUR_S:.0f}, -7], [{'9' * 400}, 7]]]]",
        "[" * 100_000,
        "[[[], []]]",
    ],
)
def test_a_damaged_file_costs_no_more_than_what_it_held(tmp_path: Path, content: str) -> None:
    (tmp_path / "arrivals.json").write_text(content)
    pacing = Pacing([ALL], tmp_path)
    pacing.add("any", NOON)
    assert pacing.rate([state(ALL, 6 * PRICE)], PRICE, NOON) == pytest.approx(0.5)


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    scores = tuple(np.linspace(0.1, 0.6, 400).tolist())
    return replace(CALIBRATION, scores=scores).save(tmp_path / "calibration.json")


@pytest.mark.parametrize("busy", [(0, 24), (8, 18)])
def test_a_paced_budget_lasts_and_wins_more_than_one_that_goes_to_whoever_is_first(
    calibration: Calibration, tmp_path: Path, busy: tuple[int, int]
) -> None:
    """Two days, money for one prompt in ten of each, and a real ledger."""
    calls, prompts = 12, 120
    draw = np.random.default_rng(0)
    scores = draw.choice(calibration.scores, (2, prompts)).tolist()
    times = [MONDAY + day * DAY_S + np.sort(draw.uniform(*busy, prompts)) * HOUR_S for day in range(2)]
    recent, budget = Recent(calibration, 0.5), Budget("day", "day", calls * PRICE)
    won, last = {}, {}
    for paced in (False, True):
        now = float(MONDAY)
        ledger = Ledger.open(tmp_path / f"{paced}.sqlite3", (budget,), clock=lambda: now)  # noqa: B023
        pacing = Pacing([budget])
        bought: list[tuple[float, float]] = []
        for day in range(2):
            for number, (now, prs) in enumerate(zip(times[day].tolist(), scores[day], strict=True)):
                pacing.add("any", now)
                rate = pacing.rate(ledger.states("any"), PRICE, now) if paced else 1.0
                if prs < (recent.alpha_for(rate) if rate < 0.5 else recent.alpha):
                    try:
                        ledger.reserve(f"{day}-{number}", "any", PRICE)
                    except QuotaExhausted:
                        continue
                    ledger.settle(f"{day}-{number}", PRICE)
                    bought.append((now, prs))
        ledger.close()
        second = [(now, prs) for now, prs in bought if now >= MONDAY + DAY_S]
        assert len(second) <= calls
        won[paced] = sum(0.5 - prs for _, prs in second)
        last[paced] = max(now for now, _ in second)
        share = len(second) / calls
        assert share > 0.8, f"{share} of the money was of use"
    opening, closing = (MONDAY + DAY_S + hour * HOUR_S for hour in busy)
    assert (last[False] - opening) / (closing - opening) < 0.35, "soon spent"
    assert (last[True] - opening) / (closing - opening) > 0.8, "it lasts"
    assert won[True] > 1.25 * won[False]


@pytest.mark.parametrize("power", [3, 0.5], ids=["harder", "easier"])
def test_it_lasts_among_prompts_unlike_the_calibrations_where_alpha_follows_them(
    calibration: Calibration, power: float
) -> None:
    """A month with 1,500 prompts and money for 50."""
    images, draw = 50, np.random.default_rng(0)
    start, end = window_bounds("month", MONDAY)
    assert end is not None
    passed = np.sort(draw.random(1_500))  # of the month, when each comes
    scores = 0.1 + 0.5 * draw.random(1_500) ** power
    budget, bought = Budget("month", "month", images * PRICE), {}
    for follow in (False, True):
        recent, pacing, at = Recent(calibration, 0.5, follow=follow), Pacing([budget]), list[float]()
        for share, prs in zip(passed.tolist(), scores.tolist(), strict=True):
            now = start + share * (end - start)
            rate = pacing.rate([state(budget, (images - len(at)) * PRICE)], PRICE, now)
            if len(at) < images and prs < recent.alpha_for(min(rate, 0.5)):
                at.append(share)
            recent.add(prs)
            pacing.add("any", now)
        bought[follow] = at
    assert len(bought[True]) == images
    assert 0.3 < np.median(bought[True]) < 0.7, "half of the money by about half of the month"
    assert np.median(bought[False]) < 0.2 or len(bought[False]) < 0.9 * images


@pytest.fixture
def at_noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """For daemons it is noon: late in the evening what is left pays for all that is still to come."""
    monkeypatch.setattr("edge_agent.daemon.Ledger.open", partial(Ledger.open, clock=lambda: NOON))


def busy_days(state: Path) -> None:
    """Notes of so many prompts an hour that no budget here pays for many."""
    hour = int(NOON // HOUR_S)
    notes = [[None, [[hour - back, 10**8] for back in range(DAY_H)]]]
    (state / "arrivals.json").write_text(json.dumps(notes))


@pytest.mark.usefixtures("at_noon")
async def test_the_daemon_sends_what_gains_most_while_there_is_money_and_says_why_when_there_is_none(
    routed_bundle: Path, tmp_path: Path
) -> None:
    calibration = Bundle.open(routed_bundle).calibration
    assert calibration is not None
    most_urgent = calibration.scores[0]
    async with scripted_cloud(calibration.cloud_digest) as cloud:
        found = {}
        for name, how in {
            "as it comes": {"budget": "1"},
            "paced": {"budget": "1", "pace_budget": "true"},
            "spent": {"budget": "0.001", "pace_budget": "true"},
            "busy": {"budget": "1", "pace_budget": "true", "rate": "0/60"},
        }.items():
            (state := tmp_path / name).mkdir()
            busy_days(state)
            how |= {"cloud": cloud.address, "routing_rate": "1"}
            async with daemon_here(routed_bundle, state, **how) as here:
                routed = await here.app.route(EDGE_PROMPT)
                answer = await here.app.generate(EDGE_PROMPT)
                assert answer.decision is not None
                assert (routed.reason, routed.alpha) == (answer.decision.reason, answer.decision.alpha)
                found[name] = answer.reason, answer.decision.alpha, await here.app.status()
                assert found[name][2].alpha == answer.decision.alpha
    reason, alpha, status = found["as it comes"]
    assert (reason, alpha) == ("pareto_cloud", 0.5)
    assert not status.HasField("paced_rate")
    reason, alpha, status = found["paced"]
    assert (reason, alpha) == ("pareto_edge", pytest.approx(most_urgent))
    assert 0 < status.paced_rate < 0.01
    reason, alpha, status = found["spent"]
    assert (reason, alpha) == ("quota_exhausted", 0.5), "it is worth the cloud all the same"
    reason, alpha, status = found["busy"]
    assert (reason, alpha) == ("pareto_edge", pytest.approx(most_urgent)), (
        "there is money, and others gain more"
    )
    assert len(cloud.received) == 1


@pytest.mark.usefixtures("at_noon")
async def test_what_an_image_cost_says_what_the_budget_pays_for(routed_bundle: Path, tmp_path: Path) -> None:
    """Before the first one it is the most that one may cost."""
    calibration = Bundle.open(routed_bundle).calibration
    assert calibration is not None
    busy_days(tmp_path)
    async with scripted_cloud(calibration.cloud_digest) as cloud:
        how = {"cloud": cloud.address, "budget": "100", "max_price": "0.5", "pace_budget": "true"}
        async with daemon_here(routed_bundle, tmp_path, **how) as here:
            before = (await here.app.status()).paced_rate
            answer = await here.app.generate(CLOUD_PROMPT, routing=edge_pb2.ROUTING_CLOUD_ONLY)
            assert answer.result is not None
            assert answer.result.cost_micro_usd == cloud.PRICE == 5_000
            after = (await here.app.status()).paced_rate
    # Half a dollar a call; then half a cent, but for the last half dollar, which has room for one.
    assert after == pytest.approx(before / 200 * 19_900)


async def test_prompts_are_counted_that_may_go_anywhere_by_the_budgets_that_they_concern(
    routed_bundle: Path, tmp_path: Path
) -> None:
    how = {"budget": "1,0.2/day@kiosk", "pace_budget": "true"}
    async with daemon_here(routed_bundle, tmp_path, **how) as here:
        for app in ("kiosk", "other"):
            await here.app.generate("a red moon", app=app)
            await here.app.generate("a red moon", app=app, routing=edge_pb2.ROUTING_LOCAL_ONLY)
            await here.app.generate("a red moon", app=app, privacy=image_pb2.PRIVACY_LOCAL_ONLY)
            await here.app.route("a red moon", app=app)
        await here.app.generate("a red moon", app="kiosk")
    counted = json.loads((tmp_path / "arrivals.json").read_text())
    assert {app: sum(count for _, count in hours) for app, hours in counted} == {None: 3, "kiosk": 2}


async def test_a_reload_goes_on_counting_and_alpha_follows_the_prompts(
    routed_bundle: Path, tmp_path: Path
) -> None:
    async with daemon_here(routed_bundle, tmp_path, pace_budget="true") as here:
        await here.app.generate("a red moon")
        await here.daemon.reload()
        await here.app.generate("a red moon")
        assert here.daemon.agent is not None
        recent = here.daemon.agent.reader.recent
    ((_, hours),) = json.loads((tmp_path / "arrivals.json").read_text())
    assert sum(count for _, count in hours) == 2
    assert recent is not None
    assert len(json.loads((tmp_path / f"recent-{recent.calibration_id}.json").read_text())) == 2
