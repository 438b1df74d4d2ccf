"""The prompts this device was lately asked for, as their PRS: what share of them alpha sends to the cloud.

A calibration's prompts are somebody else's. Where a device's own are harder or worded otherwise, more of them lie below
alpha than the wanted routing rate says. Alpha may follow them: it is then the largest that sends the wanted share away
of the calibration's scores and the recent ones together. Only scores are kept, no prompts.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from pathlib import Path

import numpy as np

from edge_agent.calibration import Calibration
from edge_agent.superiority import ALPHA_BOUND, largest_alpha, realised_rate

log = logging.getLogger(__name__)

KEPT = 1000
"""Scores: enough to keep the share within three percent of the wanted one, few enough to follow a change."""

WEIGHT = 50
"""As many recent scores all the calibration's weigh together. Of the starter's held-out wordings 70 % lie below the
alpha for half of the prompts. With 50, 62 % of the first hundred go to the cloud and 53 % of the next two hundred; with
200, 67 and 61 %."""

ENOUGH = 100
"""Scores from which on a share that is not the wanted one is spoken of."""

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
        file: Path | None = None,
    ) -> None:
        """Scores that the file holds of another calibration are not comparable, and forgotten."""
        self.routing_rate = routing_rate
        self._follow = follow
        self._calibration = calibration
        self._file = file
        self._scores: deque[float] = deque(_read(file, calibration.calibration_id) if file else (), KEPT)
        places = (np.arange(WEIGHT) + 0.5) / WEIGHT
        self._prior = np.quantile(calibration.scores, places, method="inverted_cdf").tolist()
        self.alpha = self._alpha()
        self._unsaved = 0

    def add(self, prs: float) -> None:
        """One more prompt that the policy was free to send anywhere."""
        self._scores.append(prs)
        if self._follow:
            self.alpha = self._alpha()
        self._unsaved += 1
        if self._unsaved >= SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """To the file, where there is one. A disk that takes nothing is told of in the log alone: only time is lost."""
        if self._file is None or not self._unsaved:
            return
        self._unsaved = 0
        document = {"calibration_id": self._calibration.calibration_id, "prs": list(self._scores)}
        part = self._file.with_name(self._file.name + ".part")
        try:
            part.write_text(json.dumps(document) + "\n")
            os.replace(part, self._file)
        except OSError as error:
            log.warning(
                "recent", extra={"fields": {"error": f"{self._file} cannot be written: {error.strerror}"}}
            )

    @property
    def advice(self) -> str:
        """What to do where the share below alpha is not the wanted one, beyond chance; empty where it is."""
        count = len(self._scores)
        if count < ENOUGH or self._follow:  # then alpha is on its way
            return ""
        share = realised_rate(list(self._scores), self.alpha)
        apart = share - self.routing_rate
        expected = 2 * math.sqrt(self.routing_rate * (1 - self.routing_rate) / count)
        if abs(apart) <= expected or (apart < 0 and self.alpha >= ALPHA_BOUND):
            return ""
        return (
            f"of the last {count} prompts {share:.0%} were worth the cloud and {self.routing_rate:.0%} are wanted: "
            "they are unlike those that the bundle was calibrated with. Start with --follow-prompts true, which moves "
            "alpha, or calibrate with prompts of your own"
        )

    def _alpha(self) -> float:
        if not self._follow or not self._scores:
            return self._calibration.alpha(self.routing_rate)
        return float(largest_alpha([*self._prior, *self._scores], self.routing_rate))


def _read(file: Path, calibration_id: str) -> list[float]:
    """The scores in the file; none where it cannot be read, which costs no more than some time."""
    try:
        document = json.loads(file.read_text())
        if document["calibration_id"] != calibration_id:
            return []
        scores = [float(score) for score in document["prs"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [score for score in scores if math.isfinite(score)]
