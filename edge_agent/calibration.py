"""The calibration: what turns predicted qualities into a threshold for the two models it was made for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from edge_agent.errors import BundleError
from edge_agent.superiority import Superiority, largest_alpha


@dataclass(frozen=True)
class Calibration:
    """Scales, weights and the scores of the calibration prompts, with the digests of both models.

    M metrics, in the order of `edge_agent.superiority.METRICS`.
    """

    edge_digest: str  # `Bundle.model_digest` of the edge model
    cloud_digest: str
    metrics: tuple[tuple[str, str, str], ...]  # M of (name, positive text, negative text)
    scale: tuple[float, ...]  # M, above zero: the quality gap that counts as one
    weights: tuple[float, ...]  # M, not below zero, adding up to 1
    scores: tuple[float, ...]  # PRS of the calibration prompts, ascending
    created: str  # ISO 8601
    # Ids of the tokens that the predictor has met in training; empty where that is not known.
    familiar: tuple[int, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    calibration_id: str = ""  # first 16 hex digits of the file's sha256; set by `load` and `save`

    def alpha(self, rho: float) -> float:
        """The largest alpha <= 1/2 that sends at most the share `rho` of the calibration prompts away."""
        return float(largest_alpha(self.scores, rho))

    def save(self, path: str | os.PathLike[str]) -> Calibration:
        """Write JSON and return the calibration with its id. Raises BundleError when it is inconsistent."""
        document = asdict(self)
        del document["calibration_id"]
        text = json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"
        calibration = _parse(text, Path(path))
        Path(path).write_bytes(text)
        return calibration

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a calibration. Raises BundleError, naming the file and what is wrong in it."""
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        return _parse(text, Path(path))


def _parse(text: bytes, path: Path) -> Calibration:
    try:
        document = json.loads(text)
        calibration = Calibration(
            edge_digest=str(document["edge_digest"]),
            cloud_digest=str(document["cloud_digest"]),
            metrics=tuple((str(name), str(good), str(bad)) for name, good, bad in document["metrics"]),
            scale=tuple(map(float, document["scale"])),
            weights=tuple(map(float, document["weights"])),
            scores=tuple(map(float, document["scores"])),
            created=str(document["created"]),
            familiar=tuple(map(int, document.get("familiar", ()))),  # earlier versions did not say
            recipe=dict(document["recipe"]),
            calibration_id=hashlib.sha256(text).hexdigest()[:16],
        )
    # OverflowError: an integer that no float can hold.
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        names = ", ".join(entry.name for entry in fields(Calibration) if entry.name != "calibration_id")
        raise BundleError(f"{path} is not a calibration ({names}): {error!r}") from error
    for name in ("edge_digest", "cloud_digest"):  # which are shown on terminals and sent to apps
        if not getattr(calibration, name).isprintable():
            raise BundleError(f"{path}: {name} must be printable text on one line")
    if not len(calibration.metrics) == len(calibration.scale) == len(calibration.weights) > 0:
        raise BundleError(f"{path}: metrics, scale and weights must have the same length")
    try:
        Superiority(calibration.scale, calibration.weights)
        largest_alpha(calibration.scores, 1.0)
    except ValueError as error:
        raise BundleError(f"{path}: {error}") from error
    if list(calibration.scores) != sorted(calibration.scores):
        raise BundleError(f"{path}: scores must be in ascending order")
    return calibration
