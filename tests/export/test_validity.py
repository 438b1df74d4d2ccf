import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edge_agent.superiority import METRICS
from export import validity
from export.errors import ExportError
from export.outcomes import Outcomes
from export.quality import Judge
from export.starter.damage import damage, render_samples
from export.starter.foreign_damage import foreign_damage
from export.starter.shipped import STARTER_JUDGE
from export.starter.world import sample_scenes
from tests.export.routing_world import write_labels


@pytest.fixture
def short(monkeypatch):
    """A report of few pictures and resamples."""
    monkeypatch.setattr(validity, "PICTURES", 4)
    monkeypatch.setattr(validity, "FRESH", 4)
    monkeypatch.setattr(validity, "RESAMPLES", 20)


def always(_judge, _spoil, _samples, _severity=validity.SEVERITY):
    """In the place of `validity.falls`, where what the damages do is not what is looked at."""
    return np.ones((len(METRICS), len(METRICS)))


def test_a_metric_falls_under_its_own_damage_and_not_under_none():
    samples = render_samples(sample_scenes("inspector", 12, seed=0), np.random.default_rng(0))
    judge = Judge()
    shares = validity.falls(judge, damage, samples)
    assert shares.shape == (len(METRICS), len(METRICS))
    for name in ("clarity", "sharpness", "color"):
        assert shares[METRICS.index(name), METRICS.index(name)] == 1
    assert not validity.falls(judge, lambda sample, *_: sample.picture, samples).any()


def test_a_metric_falls_less_often_under_less_of_its_damage(monkeypatch):
    monkeypatch.setattr(validity, "SEVERITIES", (0.05, 1.0))
    samples = render_samples(sample_scenes("test", 12, seed=0), np.random.default_rng(0))
    judge = Judge()
    shares = validity.own_falls(judge, foreign_damage, samples)
    assert shares.shape == (2, len(METRICS))
    assert (shares[1] == validity.falls(judge, foreign_damage, samples, 1.0).diagonal()).all()
    assert shares[0].mean() < shares[1].mean()


def test_what_the_inspector_passes_is_compared_within_each_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(validity, "RESAMPLES", 20)
    labels = write_labels(tmp_path / "labels.parquet", 24)
    table = pq.read_table(labels)
    ids, layout = table["prompt_id"].to_numpy(), table["layout"].to_numpy()
    passes = [float(layout[row] > layout[ids == ids[row]].mean()) for row in range(len(ids))]
    if "inspected" in table.column_names:
        table = table.drop_columns("inspected")
    pq.write_table(table.append_column("inspected", pa.array(passes)), labels)
    cells, prompts = validity.preferred(labels)
    assert prompts == len(set(ids.tolist()))
    assert cells["any two"][METRICS.index("layout")] == "1.00 [1.00, 1.00]"
    assert not cells["any two"][METRICS.index("color")].startswith("1.00")


def test_where_there_are_no_two_verdicts_there_is_no_agreement(short, tmp_path, monkeypatch):
    """As where `edge-export inspect` was shown the images of one model alone, or passes all."""
    monkeypatch.setattr(validity, "falls", always)
    labels = write_labels(tmp_path / "labels.parquet", 24)
    table = pq.read_table(labels)
    cloud, layout = np.array(table["model"].to_pylist()) == "cloud", table["layout"].to_numpy()
    for edge in (np.nan, 1.0):
        passed = pa.array(np.where(cloud, layout > np.median(layout[cloud]), edge))
        pq.write_table(table.append_column("inspected", passed), labels)
        found = validity.agreement(labels)
        assert np.isnan(found["edge"]).all() and not np.isnan(found["cloud"]).any()
    row = re.search(r"^\| layout \|  \| (0\.\d\d) \|$", validity.report(Judge(), labels), re.M)
    assert row is not None and float(row[1]) > 0.5


def test_the_report_says_at_which_severities_and_under_which_damages_a_metric_falls_too_seldom(
    short, tmp_path, monkeypatch
):
    seen = []

    def falls(_, spoil, samples, severity=validity.SEVERITY):
        seen.append((spoil, severity, [sample.picture.tobytes() for sample in samples]))
        shares = np.full((len(METRICS), len(METRICS)), 0.99)
        if spoil is damage:
            shares[METRICS.index("realism"), METRICS.index("realism")] = 0.84
        if severity < 0.5:
            shares[METRICS.index("layout"), METRICS.index("layout")] = 0.947 - severity
        return shares

    monkeypatch.setattr(validity, "FRESH", 5)
    monkeypatch.setattr(validity, "falls", falls)
    text = validity.report(Judge(), write_labels(tmp_path / "labels.parquet", 24))
    said = " ".join(text.split())
    assert "one damage a metric and of severity 0.6 alone" in said
    assert "in fewer than 95 % of its pictures: none." in said
    assert "at 0.2 layout (74.7); at 0.4 layout (54.7); at 0.6 none; at 0.8 none; at 1.0 none." in said
    assert "trained on, in the first table: realism (84.0)." in said
    assert "| layout | 75 | 55 | 99 | 99 | 99 |" in text
    assert [len(pictures) for _, _, pictures in seen] == [4, 4, 5, 5, 5, 5, 5]
    assert all(spoil is foreign_damage for spoil, _, _ in seen[2:])
    assert not set(seen[2][2]) & set(seen[0][2])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_reliability_is_the_share_of_the_variance_that_lies_between_prompts(share):
    rng = np.random.default_rng(0)
    prompts, seeds = 4000, 4
    between = np.sqrt(share) * rng.normal(size=(prompts, 1, 1))
    within = np.sqrt(1 - share) * rng.normal(size=(prompts, seeds, 1))
    assert validity.reliability(between + within)[0] == pytest.approx(share, abs=0.04)


def test_an_interval_draws_scenes_so_saying_one_in_more_sentences_tells_no_more():
    values = np.random.default_rng(0).normal(size=(40, 2))
    once, often = values, values.repeat(8, axis=0)
    scenes = np.arange(40)
    expected = validity.with_interval(lambda rows: once[rows].mean(0), scenes)
    assert validity.with_interval(lambda rows: often[rows].mean(0), scenes.repeat(8)) == expected
    assert validity.with_interval(lambda rows: often[rows].mean(0), np.arange(320)) != expected


def test_the_report_s_intervals_are_over_the_scenes_that_prompts_say(short, tmp_path, monkeypatch):
    monkeypatch.setattr(validity, "falls", always)
    labels = write_labels(tmp_path / "labels.parquet", 24)
    (scene,) = sample_scenes("test", 1, seed=0)
    monkeypatch.setattr(
        "export.outcomes.scenes_by_text", lambda *_: dict.fromkeys(Outcomes.read(labels).prompts, scene)
    )
    text = validity.report(Judge(), labels)
    rows = text.split("## Reliability")[1].split("## Adherence")[0].splitlines()[-len(METRICS) - 1 :]
    cells = [cell.strip() for row in rows for cell in row.split("|")[2:-1]]
    # One scene: every sample of it is all of it.
    assert cells and all(re.fullmatch(r"(\S+) \[\1, \1\]", cell) for cell in cells)


def test_sentences_with_something_wrong_are_counted_by_the_scene_that_they_are_of():
    scenes = sample_scenes("inspector", 3, seed=0)
    samples = render_samples([*scenes, scenes[0]], np.random.default_rng(0))
    told = validity.tells_apart(Judge(), [*scenes, scenes[0]], samples)
    for right, of in told.values():
        assert len(right) == len(of)
        assert set(of.tolist()) <= {0, 1, 2}
    objects = told["object"][1].tolist()
    assert objects.count(0) == 2 * len(scenes[0].groups)


def test_the_report_says_it_all(short, tmp_path):
    labels, out = write_labels(tmp_path / "labels.parquet", 24), tmp_path / "metrics.md"
    assert validity.main([str(labels), "--out", str(out)]) == 0
    text = out.read_text()
    assert all(text.count(f"| {name} |") >= 3 for name in METRICS)
    assert "inspector finds" not in text
    assert f"Made by `edge-export validity {labels.as_posix()}` with the starter judge.\n" in text


def test_labels_of_another_judge_are_refused_and_of_the_same_are_not(short, tmp_path, monkeypatch):
    """Half of the report is of the judge and half of the labels."""
    monkeypatch.setattr(validity, "falls", always)
    judge = Judge()
    labels = write_labels(tmp_path / "labels.parquet", 24, facts={"judge_digest": judge.digest})
    assert validity.report(judge, labels)
    labels = write_labels(tmp_path / "labels.parquet", 24, facts={"judge_digest": "50ft"})
    with pytest.raises(ExportError, match=r"labels are from judge 50ft, and .* name with --judge the CLIP"):
        validity.report(judge, labels)


def test_the_report_names_the_judge_that_was_asked_for_and_the_labels_from_where_one_works(
    short, tmp_path, monkeypatch
):
    monkeypatch.setattr(validity, "falls", always)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STARTER_JUDGE, tmp_path / "mine")
    labels = write_labels(tmp_path / "labels.parquet", 24)
    assert validity.main([str(labels), "--judge", "mine"]) == 0
    text = (tmp_path / "metrics.md").read_text()
    assert "Made by `edge-export validity labels.parquet` with the judge `mine`.\n" in text
    assert "Damages that the starter judge was trained on" in text
