"""Where what the starter ships lies: its models, the bundle that the edge runs, and the labels of both."""

from __future__ import annotations

from pathlib import Path

from cloud_server import settings as cloud
from edge_agent import settings as edge

WEIGHTS = Path(__file__).parent / "weights"
STARTER_EDGE = WEIGHTS / "edge"
STARTER_BUNDLE = edge.STARTER
STARTER_CLOUD = cloud.STARTER
STARTER_JUDGE = WEIGHTS / "judge"
STARTER_INSPECTOR = WEIGHTS / "inspector"
STARTER_LABELS = WEIGHTS / "labels.parquet"
