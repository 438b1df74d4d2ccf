import shutil

import numpy as np
import pytest

from edge_agent.superiority import METRICS
from export import validity
from export.quality import STARTER_JUDGE, Judge
from export.starter.damage import damage, render_samples
from export.starter.world import sample_scenes
from tests.export.routing_world import write_labels


def test_a_metric_falls_under_its_own_damage_and_not_under_none():
    samples = render_samples(sample_scenes("inspector", 12, seed=0), np.random.default_rng(0))
    judge = Judge()
    shares = validity.falls(judge, damage, samples)
    assert shares.shape == (len(METRICS), len(METRICS))
    for name in ("clarity", "sharpness", "color"):
        assert shares[METRICS.index(name), METRICS.index(name)] == 1
    assert not validity.falls(judge, lambda sample, *_: sample.picture, samples).any()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_reliability_is_the_share_of_the_variance_that_lies_between_prompts(share):
    rng = np.random.default_rng(0)
    prompts, seeds = 4000, 4
    between = np.sqrt(share) * rng.normal(size=(prompts, 1, 1))
    within = np.sqrt(1 - share) * rng.normal(size=(prompts, seeds, 1))
    assert validity.reliability(between + within)[0] == pytest.approx(share, abs=0.04)


def test_the_report_says_it_all(tmp_path, monkeypatch):
    monkeypatch.setattr(validity, "PICTURES", 4)
    monkeypatch.setattr(validity, "RESAMPLES", 20)
    labels, out = write_labels(tmp_path / "labels.parquet", 24), tmp_path / "metrics.md"
    assert validity.main([str(labels), "--out", str(out)]) == 0
    text = out.read_text()
    assert all(text.count(f"| {name} |") >= 3 for name in METRICS)
    assert "inspector finds" not in text
    assert f"Made by `edge-export validity {labels}` with the starter judge.\n" in text


def test_the_report_names_the_judge_that_was_asked_for_and_the_labels_from_where_one_works(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(validity, "PICTURES", 4)
    monkeypatch.setattr(validity, "RESAMPLES", 20)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STARTER_JUDGE, tmp_path / "mine")
    labels = write_labels(tmp_path / "labels.parquet", 24)
    assert validity.main([str(labels), "--judge", "mine"]) == 0
    text = (tmp_path / "metrics.md").read_text()
    assert "Made by `edge-export validity labels.parquet` with the judge `mine`.\n" in text
    assert "Damages that the starter judge was trained on" in text
