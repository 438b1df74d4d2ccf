"""The prompts this device was lately asked for, as their PRS: what share of them alpha sends to the cloud.

A calibration's prompts are somebody else's. Where a device's own are harder or worded otherwise, more of them lie below
alpha than the wanted routing rate says. Alpha may follow them: it is then the largest that sends at most the wanted
share away of the calibration's scores and the recent ones together. Of prompts that come again and again it may be much
less: a score goes as a whole or not at all. Only scores are kept, no prompts.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.calibration import Calibration
from edge_agent.notes import Notes
from edge_agent.superiority import ALPHA_BOUND, largest_alpha, realised_rate

KEPT = 1000
"""Scores: enough to keep the share within three percent of the wanted one, few enough to follow a change."""

WEIGHT = 50
"""As many recent scores all the calibration's weigh together. Of an earlier predictor's scores of held-out wordings
70 % lay below the alpha for half of the prompts. With 50, 62 % of the first hundred went to the cloud and 53 % of the
next two hundred; with 200, 67 and 61 %."""

ENOUGH = 100
"""Scores from which on a share that is not the wanted one is spoken of."""

APART = 0.05
"""How far that share is from the wanted one at least."""


class Recent:
    """The last scores, oldest first, and `alpha`, which may follow them."""

    def __init__(
        self,
        calibration: Calibration,
        routing_rate: float,
        *,
        follow: bool = False,
        folder: Path | None = None,
    ) -> None:
        """With a `folder` the scores outlive the process, in a file for each calibration: two do not compare."""
        self.routing_rate = routing_rate
        self.calibration_id = calibration.calibration_id  # of the one that gives the scores their meaning
        self._follow = follow
        self._notes = Notes(folder / f"recent-{self.calibration_id}.json" if folder else None)
        self._scores = deque(_scores(self._notes.read()), KEPT)
        places = (np.arange(WEIGHT) + 0.5) / WEIGHT
        self._calibrated = np.array(calibration.scores)
        self._prior = np.quantile(self._calibrated, places, method="inverted_cdf").tolist()
        self.alpha = self.alpha_for(routing_rate)

    def add(self, prs: float) -> bool:
        """One more prompt that the policy was free to send anywhere. Returns whether it is time to `save`."""
        self._scores.append(prs)
        if self._follow:
            self.alpha = self.alpha_for(self.routing_rate)
        return self._notes.changed()

    def save(self) -> None:
        """To the file, where there is one; waits for the disk, in any thread."""
        self._notes.save(lambda: list(self._scores))

    def alpha_for(self, routing_rate: float) -> float:
        """Alpha for another share than the wanted one, as far as is known now."""
        if not routing_rate:  # below the lowest score known, others can come
            return 0.0
        if not self._follow or not self._scores:
            return largest_alpha(self._calibrated, routing_rate)
        return largest_alpha([*self._prior, *self._scores], routing_rate)

    @property
    def advice(self) -> str:
        """What to do where the share below alpha is not the wanted one, beyond chance; empty where it is.

        The calibration's prompts are a sample too, and often the smaller one.
        """
        count = len(self._scores)
        if count < ENOUGH or self._follow:  # then alpha is on its way
            return ""
        share = realised_rate(list(self._scores), self.alpha)
        apart = share - self.routing_rate
        spread = self.routing_rate * (1 - self.routing_rate)
        chance = 3 * math.sqrt(spread * (1 / count + 1 / len(self._calibrated)))
        if abs(apart) <= max(chance, APART) or (apart < 0 and self.alpha >= ALPHA_BOUND):
            return ""
        return (
            f"of the last {count} prompts {share:.0%} were worth the cloud and {self.routing_rate:.0%} are wanted: "
            "they are unlike those that the bundle was calibrated with. Start with --follow-prompts true, which "
            "moves alpha, or calibrate with prompts of your own"
        )


def _scores(noted: Any) -> list[float]:
    """The scores that were noted; none where the file holds something else."""
    try:
        scores = [float(score) for score in noted]
    # OverflowError: an integer that no float can hold.
    except (ValueError, TypeError, OverflowError):
        return []
    return [score for score in scores if math.isfinite(score)]
