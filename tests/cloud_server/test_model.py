"""The model folder: its digest changes with what decides the pixels, and its card is checked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cloud_server.__main__ import main
from cloud_server.errors import StartRefused
from cloud_server.model import _model_files, open_model
from tests.hub import COMMIT, NOBODY, asked_here


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_the_digest_is_that_of_what_decides_the_pixels(folder: Path, model_folder: Path) -> None:
    first = open_model(str(folder)).digest
    assert first == open_model(str(model_folder)).digest, "where the folder lies does not matter"
    (folder / "README.md").write_text("prose")
    assert open_model(str(folder)).digest == first
    seen = {first}
    for name in ("unet/config.json", "routet2i.json", "model_index.json", "vae/config.json"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        seen.add(open_model(str(folder)).digest)
    (folder / "tokenizer" / "extra.txt").write_text("")
    seen.add(open_model(str(folder)).digest)
    assert len(seen) == 6


@pytest.mark.parametrize("name", ["/etc", "../..", "..", ".", "", "unet/../..", "a\0b"])
def test_nothing_outside_the_folder_is_read_for_the_digest(folder: Path, name: str) -> None:
    expected = sorted(_model_files(folder))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {name: ["diffusers", "UNet2DConditionModel"]})
    )
    (folder.parent / "beside.txt").write_text("not of the model")
    (folder / "README.md").write_text("prose")
    assert sorted(_model_files(folder)) == expected
    assert open_model(str(folder)).digest


@pytest.mark.linux
def test_a_file_whose_name_is_no_text_is_of_the_digest_like_others(folder: Path) -> None:
    digests = {open_model(str(folder)).digest}
    for name in (b"caf\xe8.txt", b"caf\xe9.txt"):
        file = folder / "unet" / os.fsdecode(name)
        file.write_text("")
        digests.add(open_model(str(folder)).digest)
        file.unlink()
    assert len(digests) == 3


def test_the_command_prints_the_digest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["digest", "--model", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == open_model(str(folder)).digest


def test_a_card_says_what_diffusers_leaves_open(folder: Path) -> None:
    card = {"name": "n", "licence": "MIT", "width": 64, "height": 32, "steps": 9, "guidance_scale": 2}
    (folder / "routet2i.json").write_text(json.dumps(card | {"sizes": [[64, 32], [64, 64]]}))
    model = open_model(str(folder))
    assert (model.name, model.licence) == ("n", "MIT")
    assert model.card.sizes == ((64, 32), (64, 64))
    (folder / "routet2i.json").unlink()
    assert open_model(str(folder)).name == folder.name


def test_a_model_of_the_hub_is_called_by_its_id_unless_its_card_names_it(
    model_folder: Path, tmp_path: Path
) -> None:
    """A snapshot that was downloaded before is taken without the hub."""
    repository = tmp_path / "models--owner--name"
    snapshot = Path(shutil.copytree(model_folder, repository / "snapshots" / COMMIT))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    with asked_here(NOBODY, tmp_path):
        assert open_model("owner/name").name == "miniature"
        (snapshot / "routet2i.json").unlink()
        model = open_model("owner/name")
    assert (model.name, model.folder) == ("owner/name", snapshot)
    assert open_model(str(snapshot)).name == COMMIT


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "one JSON object"),
        ('{"stepz": 3}', "unknown key 'stepz'"),
        ('{"steps": 0}', "steps cannot be 0"),
        ('{"steps": true}', "steps cannot be True"),
        ('{"guidance_scale": NaN}', "guidance_scale cannot be nan"),
        ('{"sizes": []}', "sizes cannot be"),
        ('{"sizes": [[64]]}', "sizes cannot be"),
        ('{"width": 8, "height": 8, "sizes": [[64, 64]]}', "must be one of sizes"),
    ],
)
def test_a_wrong_card_is_refused(folder: Path, content: str, words: str) -> None:
    (folder / "routet2i.json").write_text(content)
    with pytest.raises(StartRefused, match=words):
        open_model(str(folder))


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match=r"no model_index\.json"):
        open_model(str(tmp_path))


@pytest.mark.posix
def test_a_model_whose_place_cannot_be_looked_at_is_refused() -> None:
    with pytest.raises(StartRefused, match="cannot be read: File name too long"):
        open_model("x" * 5_000)
