from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from export.errors import ExportError
from export.routerbench import routers, tune
from export.routerbench.routers import TUNED, NearestNeighbours
from tests.export.routing_world import write_bundle, write_labels

TABLE = Path(tune.__file__).parents[2] / "docs" / "tuning.csv"


@pytest.mark.parametrize("kind", TUNED, ids=lambda kind: kind.name)
def test_every_router_has_the_same_budget_and_its_own_setting_in_it(kind: type[routers.Tuned]) -> None:
    settings = tune.settings_of(kind)
    assert settings == tune.settings_of(kind)
    assert kind.settings[0] in settings
    assert len(settings) == len({json.dumps(setting) for setting in settings}) == tune.TRIALS
    for setting in settings:
        assert setting.keys() == kind.space.keys()
        assert all(value in kind.space[name] for name, value in setting.items())


@pytest.mark.parametrize("kind", TUNED, ids=lambda kind: kind.name)
def test_the_setting_that_a_router_has_is_the_best_of_the_table(kind: type[routers.Tuned]) -> None:
    table = [row for row in rows(TABLE) if row["router"] == kind.name]
    assert len(table) == tune.TRIALS
    best = max(table, key=lambda row: float(row["validation"]) + float(row["calibration"]))
    assert [json.loads(best["setting"])] == list(kind.settings)
    assert {row["setting"] for row in table} == {json.dumps(one) for one in tune.settings_of(kind)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("world")
    digest = write_bundle(folder / "bundle").model_digest
    facts = {"edge_digest": digest, "cloud_digest": "cloud"}
    labels = write_labels(folder / "labels.parquet", 200, facts=facts)
    return ["--labels", str(labels), "--bundle", str(folder / "bundle"), "--cache", str(folder / "cache")]


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_an_interrupted_tuning_goes_on_and_the_best_of_all_is_named(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuning.csv"
    command = [str(out), *world, "--router", "kNN", "--processes", "1"]
    assert tune.main(command) == 0
    whole = rows(out)
    wanted = [json.dumps(setting) for setting in tune.settings_of(NearestNeighbours)]
    assert sorted(row["setting"] for row in whole) == sorted(wanted)
    best = max(whole, key=lambda row: float(row["validation"]) + float(row["calibration"]))
    assert f"kNN: {best['setting']} of 24" in " ".join(capsys.readouterr().err.split())
    assert float(best["validation"]) > np.median([float(row["validation"]) for row in whole])

    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:9]))
    assert tune.main(command) == 0
    assert sorted(out.read_text().splitlines(keepends=True)) == sorted(lines)
    assert out.read_text().splitlines(keepends=True)[:9] == lines[:9]


def test_what_is_no_table_of_tuning_is_not_added_to(world: list[str], tmp_path: Path) -> None:
    other, header = tmp_path / "other.csv", ",".join(tune.COLUMNS)
    for text, said in (
        ("router,rate\nours,0.5\n", "router, setting"),
        ("a line of one's own", "router, setting"),
        (header + "\n0123,kNN,{},0.5,0.5\n", "other labels"),
        (header + "\n0123,kNN,{},0.5\n", "line 2 is not whole"),
        (header + '\n0123,kNN,"{', "no table"),
    ):
        other.write_text(text)
        with pytest.raises(ExportError, match=rf"other.csv.*{said}"):
            tune.main([str(other), *world, "--router", "kNN"])
        assert other.read_text() == text
