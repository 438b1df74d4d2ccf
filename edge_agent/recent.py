"""The prompts this device was lately asked for, as their PRS: what share of them alpha sends to the cloud.

A calibration's prompts are somebody else's. Where a device's own are harder or worded otherwise, more of them lie below
alpha than the wanted routing rate says. Alpha may follow them: it is then the largest that sends at most the wanted
share away of the calibration's scores and the recent ones together. Of prompts that come again and again it may be much
less: a score goes as a whole or not at all. Only scores are kept, no prompts.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path

import numpy as np

from edge_agent.calibration import Calibration
from edge_agent.log import events
from edge_agent.superiority import ALPHA_BOUND, largest_alpha, realised_rate

log = events(__name__)

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

SAVED_EVERY = 20
"""Scores. What a crash loses is soon there again."""


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
        self._calibration = calibration
        self._follow = follow
        self._file = folder / f"recent-{calibration.calibration_id}.json" if folder else None
        self._scores: deque[float] = deque(_read(self._file) if self._file else (), KEPT)
        places = (np.arange(WEIGHT) + 0.5) / WEIGHT
        self._prior = np.quantile(calibration.scores, places, method="inverted_cdf").tolist()
        self.alpha = self._alpha()
        # Each counted by one thread at a time: how many were added, and how many of them the file has.
        self._added = self._saved = 0
        self._writing = threading.Lock()

    @property
    def calibration_id(self) -> str:
        """Of the calibration that gives the scores their meaning."""
        return self._calibration.calibration_id

    def add(self, prs: float) -> bool:
        """One more prompt that the policy was free to send anywhere. Returns whether it is time to `save`."""
        self._scores.append(prs)
        if self._follow:
            self.alpha = self._alpha()
        self._added += 1
        return self._file is not None and (self._added - self._saved) % SAVED_EVERY == 0

    def save(self) -> None:
        """To the file, where there is one; waits for the disk, in any thread. A disk that takes nothing is told of in
        the log alone: only time is lost.
        """
        with self._writing:
            added, scores = self._added, list(self._scores)
            if self._file is None or added == self._saved:
                return
            part = self._file.with_name(self._file.name + ".part")
            try:
                part.write_text(json.dumps(scores) + "\n")
                os.replace(part, self._file)
                self._saved = added
            except OSError as error:
                with suppress(OSError):
                    part.unlink(missing_ok=True)
                failure = f"{self._file} cannot be written: {error.strerror or error}"
                log.warning("recent", error=failure)

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
        chance = 3 * math.sqrt(spread * (1 / count + 1 / len(self._calibration.scores)))
        if abs(apart) <= max(chance, APART) or (apart < 0 and self.alpha >= ALPHA_BOUND):
            return ""
        return (
            f"of the last {count} prompts {share:.0%} were worth the cloud and {self.routing_rate:.0%} are wanted: "
            "they are unlike those that the bundle was calibrated with. Start with --follow-prompts true, which "
            "moves alpha, or calibrate with prompts of your own"
        )

    def _alpha(self) -> float:
        if not self.routing_rate:  # below the lowest score known, others can come
            return 0.0
        if not self._follow or not self._scores:
            return self._calibration.alpha(self.routing_rate)
        return float(largest_alpha([*self._prior, *self._scores], self.routing_rate))


def _read(file: Path) -> list[float]:
    """The scores in the file; none where it cannot be read, which costs no more than some time."""
    try:
        scores = [float(score) for score in json.loads(file.read_text())]
    # OverflowError: an integer that no float can hold.
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return []
    return [score for score in scores if math.isfinite(score)]
