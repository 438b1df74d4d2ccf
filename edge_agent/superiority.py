"""Pareto relative superiority (PRS): two images, or two models' predicted images, compared on ten metrics.

The formulas follow *Edge-Cloud Routing for Text-to-Image Model with Token-Level Multi-Metric Prediction*
(arXiv 2411.13787). Nothing here needs more than numpy: training, calibration and the daemon share it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

METRICS = (
    "definition",
    "detail",
    "clarity",
    "sharpness",
    "harmony",
    "realism",
    "color",
    "consistency",
    "layout",
    "integrity",
)
"""The metrics in the order every array's last axis has."""

ALPHA_BOUND = 0.5
"""Above a PRS of 1/2 the edge image is expected to be the better one: no alpha may send it to the cloud."""

SD_FLOOR = 1.0
"""A metric's scale is at least this share of the paired differences' standard deviation. Ours: with a mean
gap near zero the paper's scale would turn the metric into a vote on noise. With the labels of the starter's first judge
1.0 followed realised PRS of validation and calibration prompts better than 0.25 (rank correlation 0.22 against
0.18)."""

Floats = NDArray[np.float64]

_NOT_FINITE = "the predicted qualities are not finite numbers"


def relative_superiority(edge: ArrayLike, cloud: ArrayLike, scale: ArrayLike, weights: ArrayLike) -> Floats:
    """PRS = sum_i w_i sigmoid((edge_i - cloud_i) / scale_i): above 1/2 the edge is superior, below it the
    cloud.

    `edge` and `cloud` are qualities in [0, 1] of shape [..., M]; `scale` and `weights` have shape [M], scales
    positive and weights non-negative with sum 1. Returns float64 of shape [...].

    Raises ValueError when scale or weights break those rules or the result is not finite.
    """
    twice_the_scale, half_the_weights = _halves(scale, weights)
    gap = np.asarray(edge, np.float64) - np.asarray(cloud, np.float64)
    # sigmoid(x) = (1 + tanh(x / 2)) / 2, which does not overflow for gaps many scales wide. Weights add up to 1.
    prs: Floats = 0.5 + np.tanh(gap / twice_the_scale) @ half_the_weights
    if not np.isfinite(prs).all():
        raise ValueError(_NOT_FINITE)
    return prs


class Superiority:
    """`relative_superiority` prompt by prompt: scale and weights are checked once for all of them.

    In Python's own numbers, which have ten metrics done before numpy has begun.
    """

    def __init__(self, scale: ArrayLike, weights: ArrayLike) -> None:
        """Raises ValueError unless the scale is positive and the weights are non-negative and add up to 1."""
        twice_the_scale, half_the_weights = _halves(scale, weights)
        self._terms = list(zip(twice_the_scale.tolist(), half_the_weights.tolist(), strict=True))

    def of(self, edge: Sequence[float], cloud: Sequence[float]) -> float:
        """PRS of one prompt's qualities, M each. Raises ValueError when it is not finite."""
        prs = 0.5
        for (scale, weight), ours, theirs in zip(self._terms, edge, cloud, strict=True):
            prs += weight * math.tanh((ours - theirs) / scale)
        if not math.isfinite(prs):
            raise ValueError(_NOT_FINITE)
        return prs


def _halves(scale: ArrayLike, weights: ArrayLike) -> tuple[Floats, Floats]:
    """Twice the scale and half the weights, as tanh takes them, once they are known to be such."""
    scale, weights = np.asarray(scale, np.float64), np.asarray(weights, np.float64)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError("every metric's scale must be positive and finite")
    if not ((weights >= 0).all() and abs(float(weights.sum()) - 1) < 1e-6):
        raise ValueError("the metrics' weights must be non-negative and add up to 1")
    return 2 * scale, 0.5 * weights


def paper_scale(mean_gap: ArrayLike, sd_paired: ArrayLike, gamma: float = 1.0) -> Floats:
    """Each metric's scale: max(gamma * |mean gap|, SD_FLOOR * sd), float64 of shape [M].

    `mean_gap` is the metric's mean over the edge's training images minus that over the cloud's, `sd_paired`
    the standard deviation of the paired differences; both of shape [M].
    """
    mean_gap_, sd_ = np.asarray(mean_gap, np.float64), np.asarray(sd_paired, np.float64)
    return np.maximum(gamma * np.abs(mean_gap_), SD_FLOOR * sd_)


def largest_alpha(scores: ArrayLike, rho: float) -> float:
    """The largest alpha <= 1/2 for which at most the share `rho` of `scores` lies below alpha.

    `scores` are the calibration prompts' PRS, shape [N], in any order; `rho` is the wanted routing rate in
    [0, 1]. Since alpha stops at 1/2, the realised rate can stay below rho.

    Raises ValueError without scores, with scores that are not finite, or with rho outside [0, 1].
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    if ordered.ndim != 1 or ordered.size == 0 or not np.isfinite(ordered).all():
        raise ValueError("the calibration needs at least one score, and all of them finite")
    if not 0 <= rho <= 1:
        raise ValueError(f"the routing rate must be between 0 and 1, not {rho}")
    n = ordered.size
    # How many scores may lie below alpha. The product is rounded (0.29 * 100 < 29), the quotient decides.
    allowed = int(rho * n)
    if allowed < n and (allowed + 1) / n <= rho:
        allowed += 1
    if allowed == n:
        return ALPHA_BOUND
    # Any alpha above ordered[allowed] would have at least allowed + 1 scores below it.
    return min(ALPHA_BOUND, float(ordered[allowed]))


def realised_rate(scores: ArrayLike, alpha: float) -> float:
    """The share of `scores` (shape [N]) that `alpha` sends to the cloud: those strictly below it."""
    return float(np.mean(np.asarray(scores, np.float64) < alpha))
