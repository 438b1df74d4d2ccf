"""PRS and alpha follow their definitions, also where floating point and ties make it hard."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.superiority import (
    METRICS,
    Superiority,
    largest_alpha,
    paper_scale,
    realised_rate,
    relative_superiority,
)

SCALE = np.full(len(METRICS), 0.1)
WEIGHTS = np.full(len(METRICS), 1 / len(METRICS))


def test_equal_qualities_are_worth_exactly_one_half() -> None:
    quality = np.linspace(0.1, 0.9, len(METRICS))
    assert relative_superiority(quality, quality, SCALE, WEIGHTS) == pytest.approx(0.5, abs=1e-12)


def test_prs_is_the_weighted_sum_of_sigmoids() -> None:
    edge, cloud = np.array([0.6, 0.4]), np.array([0.5, 0.7])
    expected = 0.25 / (1 + np.exp(-(0.1 / 0.2))) + 0.75 / (1 + np.exp(0.3 / 0.5))
    assert relative_superiority(edge, cloud, [0.2, 0.5], [0.25, 0.75]) == pytest.approx(expected, abs=1e-12)


def test_a_batch_gives_what_each_row_gives() -> None:
    edge, cloud = np.random.default_rng(0).random((2, 4, 3, len(METRICS)))
    batch = relative_superiority(edge, cloud, SCALE, WEIGHTS)
    assert batch.shape == (4, 3)
    assert batch[2, 1] == pytest.approx(relative_superiority(edge[2, 1], cloud[2, 1], SCALE, WEIGHTS))


def test_swapping_edge_and_cloud_mirrors_prs_at_one_half() -> None:
    edge, cloud = np.random.default_rng(1).random((2, len(METRICS)))
    there = relative_superiority(edge, cloud, SCALE, WEIGHTS)
    back = relative_superiority(cloud, edge, SCALE, WEIGHTS)
    assert there + back == pytest.approx(1.0)


def test_gaps_many_scales_wide_saturate_without_a_warning() -> None:
    with np.errstate(all="raise"):
        ones, zeros, tiny = np.ones(2), np.zeros(2), np.full(2, 1e-6)
        assert relative_superiority(ones, zeros, tiny, [0.5, 0.5]) == 1.0
        assert relative_superiority(zeros, ones, tiny, [0.5, 0.5]) == 0.0


def test_prompt_by_prompt_it_is_what_it_is_for_all_of_them() -> None:
    edge, cloud = np.random.default_rng(2).random((2, 50, len(METRICS)))
    weights = np.arange(1, len(METRICS) + 1) / 55
    one_by_one = [Superiority(SCALE, weights).of(*map(list, pair)) for pair in zip(edge, cloud, strict=True)]
    np.testing.assert_allclose(
        one_by_one, relative_superiority(edge, cloud, SCALE, weights), rtol=0, atol=1e-15
    )


def test_a_metric_of_no_weight_counts_for_nothing() -> None:
    assert Superiority([0.1, 0.1], [1.0, 0.0]).of([0.5, 0.9], [0.5, 0.1]) == 0.5


@pytest.mark.parametrize(
    ("edge", "scale", "weights", "says"),
    [
        ([0.5], [0.0], [1.0], "scale"),
        ([0.5], [0.1], [0.9], "weights"),
        ([0.5], [float("nan")], [1.0], "scale"),
        ([float("nan")], [0.1], [1.0], "finite"),
    ],
)
def test_a_scale_weights_or_quality_that_cannot_be_are_refused(
    edge: list[float], scale: list[float], weights: list[float], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        relative_superiority(edge, [0.5], scale, weights)
    with pytest.raises(ValueError, match=says):
        Superiority(scale, weights).of(edge, [0.5])


def test_the_scale_follows_the_mean_gap_until_the_noise_floor_is_larger() -> None:
    assert paper_scale([-0.2, 0.01], [0.1, 0.1], gamma=1.0) == pytest.approx([0.2, 0.1])
    assert paper_scale([-0.2, 0.01], [0.1, 0.1], gamma=2.0) == pytest.approx([0.4, 0.1])


@given(
    scores=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.9]), min_size=1, max_size=40),
    rho=st.one_of(st.floats(0, 1), st.integers(0, 100).map(lambda percent: percent / 100)),
)
def test_alpha_keeps_the_rate_and_no_larger_alpha_would(scores: list[float], rho: float) -> None:
    alpha = largest_alpha(scores, rho)
    assert alpha <= 0.5
    assert realised_rate(scores, alpha) <= rho
    if alpha < 0.5:
        assert realised_rate(scores, np.nextafter(alpha, 1)) > rho


def test_a_rate_whose_product_rounds_down_is_still_reached() -> None:
    scores = np.linspace(0.0, 0.49, 100)
    assert 0.29 * 100 < 29
    assert realised_rate(scores, largest_alpha(scores, 0.29)) == 0.29


def test_alpha_is_one_half_at_rate_one_and_lets_nothing_through_at_rate_zero() -> None:
    scores = [0.2, 0.3, 0.7]
    assert largest_alpha(scores, 1.0) == 0.5
    assert realised_rate(scores, largest_alpha(scores, 0.0)) == 0.0


@pytest.mark.parametrize(
    ("scores", "rho"),
    [([], 0.5), ([[0.1, 0.2]], 0.5), ([0.1, float("nan")], 0.5), ([0.1], -0.1), ([0.1], 1.1)],
)
def test_alpha_without_scores_or_with_a_rate_that_cannot_be_is_refused(scores: list[Any], rho: float) -> None:
    with pytest.raises(ValueError, match=r"score|rate"):
        largest_alpha(scores, rho)
