"""The contrastive metrics that quality is measured by, each a pair of texts (``metrics.json``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

METRICS_FILE = Path(__file__).parent / "metrics.json"


@dataclass(frozen=True)
class Metric:
    """One quality metric: a text that praises and one that blames, otherwise alike, and why these two."""

    name: str
    positive: str
    negative: str
    reason: str

    @property
    def texts(self) -> tuple[str, str, str]:
        """Its name and both texts, as labels and calibrations state it."""
        return self.name, self.positive, self.negative


def load_metrics(file: Path = METRICS_FILE) -> tuple[Metric, ...]:
    """Read metrics from a JSON file. Raises ValueError when it is not one."""
    try:
        metrics = tuple(Metric(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))["metrics"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a file of metrics: {error}") from error
    if len({metric.name for metric in metrics}) != len(metrics):
        raise ValueError(f"{file} names a metric twice")
    return metrics
