"""Simulate what a month's budget buys: spent as prompts come, paced, and as it would be in hindsight.

    edge-export budget LABELS BUNDLE [--budget 1,2,5,10] [--price 0.01] [--prompts-a-day 100] [--out budget.json]
                         [--picture budget.png]

Prompts are drawn from the test split and come from 8 to 22 o'clock of every day. The daemon's own code decides, with
the bundle's predictor and calibration; what a cloud image is worth was measured on the labels: its mean quality above
the edge's. Quality won is the share that is won of what all prompts in the cloud would win. *As it comes* every prompt
below alpha goes to the cloud while there is money; *paced* is `edge-agent serve --pace-budget true` in its first month;
*in hindsight* as many images go to the prompts with the lowest PRS of the whole month. Intervals hold 95 % of the
simulated months.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from edge_agent.budget import Budget, BudgetState
from edge_agent.bundle import Bundle
from edge_agent.calibration import Calibration
from edge_agent.money import dollars, parse_dollars
from edge_agent.pacing import DAY_H, HOUR_S, Pacing
from edge_agent.recent import Recent
from edge_agent.superiority import relative_superiority
from export.bootstrap import Estimate, Floats
from export.calibrate import predicted
from export.errors import ExportError
from export.evaluate import TABLE_WIDTH, held_out, things_said
from export.output import check_output, default_output, replacing, write_output
from export.terminal import console, progress

PICTURES = (".png", ".svg", ".pdf")
OUT, BEGINS = "budget.json", '{\n "price_micro_usd":'
DAYS, OPENS_H, CLOSES_H = 30, 8, 22
NOVEMBER = 1_793_491_200  # its first moment in 2026, UTC: a month of 30 days


@dataclass(frozen=True)
class Month:
    """Prompts in the order in which they came: when, in seconds since 1970, PRS, and what the cloud gains; all [N]."""

    times: Floats
    prs: Floats
    gains: Floats

    @classmethod
    def drawn(cls, prs: Floats, gains: Floats, a_day: float, draw: np.random.Generator) -> Month:
        """Of these prompts, about `a_day` every day."""
        hours = [
            day * DAY_H + np.sort(draw.uniform(OPENS_H, CLOSES_H, draw.poisson(a_day))) for day in range(DAYS)
        ]
        times = NOVEMBER + np.concatenate(hours) * HOUR_S
        rows = draw.integers(0, len(prs), len(times))
        return cls(times, prs[rows], gains[rows])

    def bought(self, calibration: Calibration, routing_rate: float, images: int, *, paced: bool) -> Floats:
        """Which of them go to the cloud, [N] of 0 and 1, when there is money for so many images in all."""
        budget = Budget("month", "month", images)  # each costs one of its units
        pacing, recent = Pacing([budget]), Recent(calibration, routing_rate, follow=paced)
        chosen, left = np.zeros(len(self.prs)), images
        for row, (now, prs) in enumerate(zip(self.times.tolist(), self.prs.tolist(), strict=True)):
            if not left:
                break
            rate = 1.0
            if paced:
                state = BudgetState(budget.name, budget.window, images, images - left, 0, left)
                rate = pacing.rate([state], 1, now)
            if prs < (recent.alpha if rate >= routing_rate else recent.alpha_for(rate)):
                chosen[row], left = 1, left - 1
            pacing.add("", now)
            recent.add(prs)
        return chosen

    def in_hindsight(self, alpha: float, images: int) -> Floats:
        """The same for the prompts with the lowest PRS, of those below alpha."""
        chosen = np.zeros(len(self.prs))
        rows = np.argsort(self.prs, kind="stable")[:images]
        chosen[rows] = self.prs[rows] < alpha
        return chosen

    def won_by_day(self, chosen: Floats) -> Floats:
        """What the chosen prompts, [N] of 0 and 1, win until the end of each day, [DAYS]; a share of what all would."""
        days = ((self.times - NOVEMBER) // (DAY_H * HOUR_S)).astype(int)
        return np.cumsum(np.bincount(days, chosen * self.gains, DAYS)) / self.gains.sum()


@dataclass(frozen=True)
class Row:
    """What one budget buys, with the months' 95 % interval."""

    budget_micro_usd: int
    images: int
    lasts_days: Estimate
    """Until it is spent as prompts come."""
    as_it_comes: Estimate
    paced: Estimate
    in_hindsight: Estimate
    as_it_comes_by_day: list[float]
    """What is won by the end of each day, [DAYS], as a mean over the months."""
    paced_by_day: list[float]


def simulate(
    months: Sequence[Month], calibration: Calibration, routing_rate: float, budget_micro_usd: int, images: int
) -> Row:
    """What a budget for so many images buys in these months."""
    alpha = calibration.alpha(routing_rate)
    lasts_days, won = [], {name: [] for name in ("as_it_comes", "paced", "in_hindsight")}
    for month in months:
        ways: Mapping[str, Floats] = {
            "as_it_comes": month.bought(calibration, routing_rate, images, paced=False),
            "paced": month.bought(calibration, routing_rate, images, paced=True),
            "in_hindsight": month.in_hindsight(alpha, images),
        }
        for way, chosen in ways.items():
            won[way].append(month.won_by_day(chosen))
        unpaced = ways["as_it_comes"]
        last = np.flatnonzero(unpaced)[-1] if unpaced.sum() == images else -1
        lasts_days.append((month.times[last] - NOVEMBER) / (DAY_H * HOUR_S) if last >= 0 else DAYS)
    by_day = {way: np.mean(days, axis=0).tolist() for way, days in won.items()}
    return Row(
        budget_micro_usd,
        images,
        lasts_days=_of_months(lasts_days),
        as_it_comes_by_day=by_day["as_it_comes"],
        paced_by_day=by_day["paced"],
        **{way: _of_months([days[-1] for days in found]) for way, found in won.items()},
    )


def _of_months(values: Sequence[float]) -> Estimate:
    low, high = np.quantile(values, (0.025, 0.975))
    return Estimate(float(np.mean(values)), float(low), float(high))


def table(rows: Sequence[Row]) -> Table:
    """For a terminal or a pipe."""
    made = Table(box=SIMPLE)
    for name in ("a month", "images", "spent after", "as it comes, %", "paced, %", "in hindsight, %"):
        made.add_column(name, no_wrap=True, justify="right")
    for row in rows:
        shares = (row.as_it_comes, row.paced, row.in_hindsight)
        lasts = f"{row.lasts_days.value:.0f} days" if row.lasts_days.value < DAYS else ""
        made.add_row(
            dollars(row.budget_micro_usd), str(row.images), lasts, *(f"{one.percent:.1f}" for one in shares)
        )
    return made


def draw(rows: Sequence[Row], file: Path) -> None:
    """How much of the quality is won by the end of each day, paced and as prompts come."""
    from export.figure import figure  # slow to import

    with figure(file, "quality won so far; 1: every prompt in the cloud") as axes:
        axes.set_xlabel("day of the month")
        for row in rows:
            budget = dollars(row.budget_micro_usd)
            (line,) = axes.plot(range(DAYS + 1), [0.0, *row.paced_by_day], label=f"{budget} a month, paced")
            axes.plot(
                range(DAYS + 1),
                [0.0, *row.as_it_comes_by_day],
                color=line.get_color(),
                linestyle="--",
                label=f"{budget}, as prompts come",
            )
        axes.set_xlim(0, DAYS)
        axes.set_ylim(0)


def _budgets(text: str) -> list[int]:
    try:
        found = [parse_dollars(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return found


def _picture(text: str) -> Path:
    if not text.lower().endswith(PICTURES):
        raise argparse.ArgumentTypeError(f"must end in {', '.join(PICTURES)}, not {text!r}")
    return Path(text)


def _price(text: str) -> int:
    try:
        if price := parse_dollars(text):
            return price
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    raise argparse.ArgumentTypeError("a budget lasts for ever where images cost nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = argparse.ArgumentParser("edge-export budget", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("labels", type=Path, help="labels.parquet of `edge-export label`")
    parser.add_argument("bundle", type=Path, help="bundle with predictor and calibration")
    parser.add_argument(
        "--budget", type=_budgets, default="1,2,5,10", help="US dollars a month (default: %(default)s)"
    )
    parser.add_argument(
        "--price", type=_price, default="0.01", help="of an image, US dollars (default: %(default)s)"
    )
    parser.add_argument("--prompts-a-day", type=float, default=100.0, help="default: %(default)g")
    parser.add_argument(
        "--rate",
        type=float,
        default=0.5,
        help="the routing rate, which pacing never exceeds (default: %(default)s)",
    )
    parser.add_argument("--months", type=int, default=40, help="to simulate (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"default: {OUT}")
    parser.add_argument(
        "--picture", type=_picture, metavar="FILE", help="also draw it, as .png, .svg or .pdf"
    )
    options = parser.parse_args(argv)
    if not 0 < options.rate <= 1:
        parser.error("--rate must lie above 0, and not above 1")
    if min(options.budget) < options.price:
        parser.error("--budget must pay for one image at least, at --price")
    if not 1 <= options.prompts_a_day <= 100_000:
        parser.error("--prompts-a-day must lie between 1 and 100000")
    if not 2 <= options.months <= 10_000:
        parser.error("--months must lie between 2 and 10000")

    out = options.out or default_output(OUT, BEGINS)
    if options.picture and options.picture.resolve() == out.resolve():
        parser.error("--picture must not name the file of --out")
    check_output(out, options.labels)
    if options.picture:
        check_output(options.picture, options.labels, option="--picture")
    bundle = Bundle.open(options.bundle)
    test, scenes, calibration = held_out(options.labels, bundle)
    things_said(scenes)
    prs = relative_superiority(*predicted(bundle, test.prompts), calibration.scale, calibration.weights)
    gains = (test.cloud.astype(np.float64) - test.edge).mean(axis=1)
    if not gains.sum() > 0:
        raise ExportError(
            "on these test prompts the cloud's images are not better, so that there is nothing to buy"
        )
    generator = np.random.default_rng(0)
    months = [Month.drawn(prs, gains, options.prompts_a_day, generator) for _ in range(options.months)]
    with progress() as bars:
        rows = [
            simulate(months, calibration, options.rate, budget, budget // options.price)
            for budget in bars.track(options.budget, description="simulating months")
        ]
    record = {
        "price_micro_usd": options.price,
        "prompts_a_day": options.prompts_a_day,
        "routing_rate": options.rate,
        "months": options.months,
        "calibration_id": calibration.calibration_id,
        "rows": [asdict(row) for row in rows],
    }
    write_output(out, json.dumps(record, indent=1, allow_nan=False) + "\n")
    if options.picture:
        with replacing(options.picture) as file:
            draw(rows, file)
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table(rows))
    written = f"{out} and {options.picture}" if options.picture else out
    console.print(f"quality won, of what all prompts in the cloud would win; written to {written}")
    return 0
