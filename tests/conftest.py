"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Models in miniature are too small to share: threads that wait for each other cost more than they save. Set before
# torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def miniature_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of Stable Diffusion 1.5's shape in miniature, 64 x 64 pixels, 4 or 8 steps. Only to be read."""
    # Here, because importing torch takes seconds that tests without a bundle need not wait for.
    from export.diffusion_onnx import export_bundle
    from tests.miniature import miniature_pipeline

    folder = tmp_path_factory.mktemp("miniature") / "bundle"
    export_bundle(
        miniature_pipeline(), folder, steps=(4, 8), guidance=5.0, name="miniature", licence="Apache-2.0"
    )
    return folder


@pytest.fixture
def bundle_copy(miniature_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the miniature bundle that a test may damage."""
    return Path(shutil.copytree(miniature_bundle, tmp_path / "bundle"))
