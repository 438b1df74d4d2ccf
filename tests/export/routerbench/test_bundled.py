from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from export.__main__ import main
from export.outcomes import CLOUD_DIGEST, JUDGE_DIGEST
from export.routerbench import bundled, comparison
from export.routerbench.bundled import Bundled, calibrated, foreign
from export.routerbench.decision import Decider
from export.routerbench.fitting import Data, fit
from export.routerbench.routers import Random
from tests.export.routerbench.test_decision import Routed
from tests.export.routing_world import write_bundle


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Routed:
    return Routed(tmp_path_factory.mktemp("routed"))


def test_it_ranks_by_the_gain_that_the_daemon_would_predict(routed: Routed) -> None:
    data = Data.of(routed.outcomes, routed.bundle, routed.outcomes.scenes(), routed.cache)
    (found,), calibration = fit(Bundled(routed.bundle), data), routed.bundle.calibration
    assert calibration is not None
    decider = Decider(routed.bundle, calibration)
    predicted = [
        decider.decide(decider.tokenizer.encode(text))[1] for text in routed.outcomes.split("test").prompts
    ]
    gains = [np.mean(one.cloud) - np.mean(one.edge) for one in predicted]
    assert np.ptp(gains) > 0.01
    for scores in found.scores["test"]:
        np.testing.assert_allclose(scores, -np.array(gains), atol=1e-6)


def test_a_prompt_of_no_token_has_a_score_like_any_other(routed: Routed) -> None:
    data = Data.of(routed.outcomes, routed.bundle, routed.outcomes.scenes(), routed.cache)
    test = data.others["test"]
    empty = replace(test.examples, mask=test.examples.mask & False)
    scores = Bundled(routed.bundle).fit(data.train, data.validation, 0)(replace(test, examples=empty))
    assert np.isfinite(scores).all() and np.ptp(scores) == 0


def test_labels_of_another_model_or_judge_say_nothing_of_it(routed: Routed, tmp_path: Path) -> None:
    assert calibrated(routed.bundle, routed.outcomes) == routed.bundle.calibration
    assert foreign(routed.bundle, routed.outcomes) is None
    for name in ("edge_digest", CLOUD_DIGEST, JUDGE_DIGEST):
        other = replace(routed.outcomes, facts={**routed.outcomes.facts, name: "another"})
        assert calibrated(routed.bundle, other) is None
        assert f"calibrated for {name.removesuffix('_digest')}" in str(foreign(routed.bundle, other))
    unstated = replace(routed.outcomes, facts={})
    assert calibrated(routed.bundle, unstated) == routed.bundle.calibration
    assert calibrated(write_bundle(tmp_path / "bare"), routed.outcomes) is None


def test_the_report_sets_it_beside_the_routers_that_are_trained(
    routed: Routed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "ROUTERS", (Random,))
    monkeypatch.setattr(comparison, "BASELINES", (Random,))
    out = tmp_path / "out"
    arguments = ("--labels", routed.labels, "--bundle", routed.bundle.folder, "--out", out, "--seeds", 2)
    assert main(["routerbench", *map(str, arguments)]) == 0
    with (out / "results.csv").open() as file:
        at_half = {
            row["router"]: float(row["headroom"] or 0) for row in csv.DictReader(file) if row["rate"] == "0.5"
        }
    assert set(at_half) == {"random", bundled.NAME, "oracle"}
    assert at_half[bundled.NAME] > at_half["random"] + 0.2
    report = (out / "report.md").read_text()
    assert f"| {bundled.NAME} | **random** |" in report
    assert "2 fits of each router" in report


def test_why_it_is_missing_is_said(
    routed: Routed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "ROUTERS", (Random,))
    monkeypatch.setattr(comparison, "BASELINES", (Random,))
    table = pq.read_table(routed.labels)
    facts = {**(table.schema.metadata or {}), b"judge_digest": b"50ft"}
    pq.write_table(table.replace_schema_metadata(facts), labels := tmp_path / "labels.parquet")
    arguments = ("--labels", labels, "--bundle", routed.bundle.folder, "--out", tmp_path, "--seeds", 1)
    assert main(["routerbench", *map(str, arguments)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "without the bundle's predictor and its decisions" in said
    assert "calibrated for judge 1ead, and the labels are of 50ft" in said
    assert f"| {bundled.NAME} |" not in (tmp_path / "report.md").read_text()


def test_no_other_router_may_be_called_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Random, "name", bundled.NAME)
    assert main(["routerbench", "--labels", "nowhere"]) == 2
    assert 'called "the bundle\'s predictor" already' in capsys.readouterr().err
