from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from export import evaluate as evaluation
from export.bootstrap import resampled
from export.errors import ExportError
from export.evaluate import evaluate, oracle_gain, paired_gaps, routed, spearman

RATE = 0.5


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "RESAMPLES", 200)


def world(prompts: int = 400, seeds: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """What each prompt would truly gain in the cloud, [N], and what was measured."""
    draw = np.random.default_rng(0)
    truth = draw.normal(0.05, 0.1, prompts)
    return truth, truth[:, None, None] + draw.normal(0, 0.02, (prompts, seeds, 10))


def test_the_lowest_scores_go_to_the_cloud_and_ties_share_what_is_left() -> None:
    np.testing.assert_array_equal(routed(np.array([4.0, 1.0, 3.0, 2.0]), 0.5), [0, 1, 0, 1])
    np.testing.assert_allclose(routed(np.array([1.0, 2.0, 2.0, 2.0]), 0.5), [1, 1 / 3, 1 / 3, 1 / 3])
    np.testing.assert_allclose(routed(np.array([1.0, 2.0, 3.0]), 0.5), [1, 0.5, 0])
    for rate in (0.05, 0.3, 0.99):
        assert routed(np.random.default_rng(0).integers(0, 4, 57).astype(float), rate).sum() == pytest.approx(
            rate * 57
        )


def test_rank_correlation_is_scipys_also_with_ties() -> None:
    from scipy.stats import spearmanr

    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 4, 100).astype(float), draw.normal(size=100)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(a, np.ones(100)) == 0


def test_headroom_is_nothing_for_random_all_for_the_truth_and_ordered_between() -> None:
    truth, paired = world()
    draw = np.random.default_rng(1)
    scores = {"truth": -truth, "noisy": -truth + draw.normal(0, 0.1, truth.size), "backwards": truth}
    rows = {row.router: row for row in evaluate(scores, -truth, paired, RATE, np.arange(truth.size))}
    assert list(rows) == ["random", *scores, "oracle"]
    assert rows["random"].headroom.value == 0
    assert rows["oracle"].headroom.value == 1
    assert rows["truth"].headroom.value == pytest.approx(1, abs=0.01)
    assert 0.3 < rows["noisy"].headroom.value < 0.95
    assert rows["backwards"].headroom.value == pytest.approx(-1, abs=0.05)
    assert rows["truth"].rank_correlation is not None
    assert rows["truth"].rank_correlation.value == pytest.approx(1)
    for row in rows.values():
        assert row.headroom.low <= row.headroom.value <= row.headroom.high


def test_pooled_dp_of_cloud_only_and_of_half_at_random() -> None:
    _, paired = world()
    everything = np.ones(len(paired))
    (random, *_) = evaluate({}, everything, paired, RATE, np.arange(len(everything)))
    assert random.pooled_dp.value == pytest.approx(50)  # every metric's mean gap is positive here


def test_pooled_dp_is_a_share_of_what_lies_between_the_models_on_each_metric() -> None:
    """Also where one is better by one metric and the other by another."""
    gaps = np.repeat([[[0.2, -0.1]]], 40, axis=0) + np.random.default_rng(0).normal(0, 1e-3, (40, 2, 2))
    (random, *_) = evaluate({}, np.ones(40), gaps, 0.25, np.arange(40))
    assert random.pooled_dp.value == pytest.approx(100 * 0.25 * 0.05 / 0.15, rel=0.02)


def test_one_image_of_each_prompt_makes_no_oracle() -> None:
    with pytest.raises(ExportError, match="the oracle needs two seeds of every test prompt on both models"):
        paired_gaps(SimpleNamespace(common_seeds=lambda: 1))  # type: ignore[arg-type]


def alike() -> np.ndarray:
    """Prompts that gain the same but for what rounding makes of it, [N, S, M]."""
    return 0.1 + np.random.default_rng(0).normal(0, 1e-9, (49, 3, 7))


@pytest.mark.parametrize(
    ("gaps", "why"),
    [
        (np.zeros((20, 2, 3)), "$"),
        (np.full((20, 2, 3), 0.25), "; for each of the 20 the cloud's images are better"),
        (-alike(), "; for each of the 49 the edge's images are better"),
    ],
)
def test_where_there_is_nothing_to_choose_between_there_is_no_headroom(gaps: np.ndarray, why: str) -> None:
    with pytest.raises(ExportError, match=f"the oracle wins what random wins: label more prompts{why}"):
        evaluate({}, np.ones(len(gaps)), gaps, RATE, np.arange(len(gaps)))


def test_what_is_won_over_random_is_told_where_headroom_is_not() -> None:
    """Of few noisy prompts the oracle chooses hardly better than chance, and a share of nothing has any sign."""
    draw = np.random.default_rng(0)
    truth = draw.normal(0.02, 0.02, 100)
    paired = truth[:, None, None] + draw.normal(0, 0.06, (100, 4, 1))
    scores = {"truth": -truth, "luck": draw.normal(size=100)}
    rows = {row.router: row for row in evaluate(scores, -truth, paired, RATE, np.arange(100))}
    assert [row.headroom for row in rows.values()] == [None] * 4
    assert rows["truth"].over_random.low > 0 > rows["luck"].over_random.low
    assert rows["random"].over_random.value == 0


def test_the_oracle_is_not_paid_for_luck() -> None:
    """Where all prompts are alike, an oracle that had seen the images it is paid for would gain by their noise."""
    noise = np.random.default_rng(0).normal(0, 1, (2000, 4))
    gain = noise.mean(1)
    assert routed(-gain, RATE) @ gain / len(gain) > 0.15
    assert abs(oracle_gain(noise, RATE)) < 0.05


def test_resamples_hold_no_copies_of_all_that_was_measured() -> None:
    """A thousand of them took a gigabyte of the starter's labels."""
    _, paired = world(seeds=16)
    scores = {"some": np.arange(len(paired), dtype=float)}
    tracemalloc.start()
    try:
        evaluate(scores, scores["some"], paired, RATE, np.arange(len(paired)))
        assert tracemalloc.get_traced_memory()[1] < 10 * paired.nbytes
    finally:
        tracemalloc.stop()


def test_prompts_of_one_scene_are_drawn_together() -> None:
    scenes = np.array([0, 1, 0, 2, 1, 0])
    every, *drawn = resampled(scenes, 50)
    np.testing.assert_array_equal(every, np.arange(6))
    for rows in drawn:
        counts = np.bincount(rows, minlength=6)
        assert counts[0] == counts[2] == counts[5]
        assert counts[1] == counts[4]
        assert counts[0] + counts[1] + counts[3] == 3
