"""Fixtures that several packages' tests share."""

from __future__ import annotations

import codecs
import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Models in miniature are too small to share: threads that wait for each other cost more than they save. Set before
# torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A proxy of the person's own must not stand between two processes of this machine.
for variable in ("no_proxy", "no_grpc_proxy"):
    others = [host for host in (os.environ.get(variable), "127.0.0.1", "localhost", "::1") if host]
    os.environ[variable] = ",".join(others)

# A shell that runs the tests in the background has them ignore Ctrl-C, as what they start and interrupt then would.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Has no collection of garbage look through all that importing made, which takes it a third of a second."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what the markers `posix` and `linux` say has nothing to test here."""
    if os.name != "posix" and item.get_closest_marker("posix"):
        pytest.skip("POSIX only")
    if sys.platform != "linux" and item.get_closest_marker("linux"):
        pytest.skip("Linux only")


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


@pytest.fixture(scope="session")
def cloud_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cloud model in miniature: a diffusers folder that `cloud-server serve --model` takes. Only to be read."""
    from tests.miniature import save_miniature

    folder = save_miniature(tmp_path_factory.mktemp("cloud") / "cloud-miniature", seed=1)
    card = {"name": "cloud-miniature", "licence": "Apache-2.0", "steps": 4, "guidance_scale": 3.0}
    (folder / "routet2i.json").write_text(json.dumps(card))
    return folder


@pytest.fixture(scope="session")
def routed_bundle(
    tmp_path_factory: pytest.TempPathFactory, miniature_bundle: Path, cloud_model: Path
) -> Path:
    """The miniature bundle with a predictor of random weights, calibrated for `cloud_model`. Only to be read.

    It can also take `routed.SLOW_STEPS` steps, for tests that have to find an image in the making.
    """
    from tests.routed import make_routed

    folder = tmp_path_factory.mktemp("routed") / "bundle"
    shutil.copytree(miniature_bundle, folder)
    make_routed(folder, cloud_model)
    return folder


@pytest.fixture(scope="session")
def sized_bundle(tmp_path_factory: pytest.TempPathFactory, routed_bundle: Path) -> Path:
    """The calibrated miniature, also for images of 96 x 64 and 64 x 96 pixels. Only to be read."""
    from edge_agent.bundle import write_manifest

    folder = Path(shutil.copytree(routed_bundle, tmp_path_factory.mktemp("sized") / "bundle"))
    write_manifest(folder, other_sizes=[(96, 64), (64, 96)])
    return folder


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Permissions bind: as root, become nobody for the length of a test."""
    if sys.platform == "win32":
        pytest.skip("POSIX only")
    if os.geteuid() != 0:
        yield
        return
    codecs.lookup("utf-8-sig")  # which nobody cannot import where Python lies in root's own folder
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)
