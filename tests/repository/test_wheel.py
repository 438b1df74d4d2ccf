"""What the wheel carries, read from one that is really built."""

from __future__ import annotations

import configparser
import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cloud_server.model import digest
from edge_agent.bundle import Bundle

REPOSITORY = Path(__file__).resolve().parents[2]


def build(project: Path, folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=project,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(REPOSITORY, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def cloud_starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(REPOSITORY / "deploy" / "cloud-starter", tmp_path_factory.mktemp("cloud-starter"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as an installer lays it out."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def committed(folder: str) -> set[str]:
    """What git tracks under the folder, relative to the repository, without what has just been deleted."""
    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        pytest.skip("only git knows what is committed")
    listed = subprocess.run(
        ["git", "ls-files", "-z", folder], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    return {name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()}


def test_the_wheel_holds_every_committed_file_of_the_packages_it_is_for(wheel: Path) -> None:
    wire = {name.removeprefix("protos/") for name in committed("protos/routet2i")}
    expected = (committed("edge_agent") | committed("cloud_server") | wire) - committed(
        "cloud_server/starter"
    )
    assert {"edge_agent/py.typed", "cloud_server/py.typed", "routet2i/py.typed"} <= expected
    assert expected - set(zipfile.ZipFile(wheel).namelist()) == set()


def test_the_wheel_holds_the_starter_bundle_with_every_file_its_manifest_names(installed: Path) -> None:
    bundle = Bundle.open(installed / "edge_agent" / "starter", verify=True)
    assert bundle.calibration is not None


def test_the_starter_model_of_the_cloud_is_a_wheel_of_its_own_and_complete(
    wheel: Path, cloud_starter: Path, tmp_path: Path
) -> None:
    model = committed("cloud_server/starter")
    assert model & set(zipfile.ZipFile(wheel).namelist()) == set()
    with zipfile.ZipFile(cloud_starter) as archive:
        assert model - set(archive.namelist()) == set()
        archive.extractall(tmp_path)
    assert digest(tmp_path / "cloud_server" / "starter") == digest(REPOSITORY / "cloud_server" / "starter")


def test_both_wheels_have_one_version(wheel: Path, cloud_starter: Path) -> None:
    assert wheel.name.split("-")[1] == cloud_starter.name.split("-")[1]


def test_a_cloud_server_without_its_starter_says_how_to_get_one(installed: Path, tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "cloud_server", "serve", "--listen", "127.0.0.1:0", "--state", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    assert "pip install ./deploy/cloud-starter" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_wheel_holds_nothing_that_runs_from_a_checkout(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.startswith("routet2i-")} == {
        "edge_agent",
        "cloud_server",
        "routet2i",
    }


def test_the_wheel_has_the_two_commands_and_the_licence(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    entry_points = configparser.ConfigParser()
    entry_points.read(info / "entry_points.txt", encoding="utf-8")
    assert {section: dict(entry_points[section]) for section in entry_points.sections()} == {
        "console_scripts": {
            "edge-agent": "edge_agent.__main__:main",
            "cloud-server": "cloud_server.__main__:main",
        }
    }
    assert {path.name for path in (info / "licenses").iterdir()} == {"LICENSE", "NOTICE"}


def test_what_every_install_needs_leaves_out_torch_and_the_onnx_runtime(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        needs = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []
    base = [Requirement(need).name for need in needs if "extra ==" not in need]
    assert "grpcio" in base
    for heavy in ("torch", "diffusers", "transformers", "optimum", "onnx"):
        assert not any(name.startswith(heavy) for name in base)


def test_the_packages_import_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    code = "import edge_agent.agent, routet2i.edge.v1.edge_pb2_grpc as w; print(edge_agent.__file__); print(w.__file__)"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert all(Path(line).is_relative_to(installed) for line in finished.stdout.splitlines())
