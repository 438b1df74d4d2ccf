"""Score the calibration prompts with the bundle's predictor, so that every routing rate has its threshold alpha.

    edge-export calibrate LABELS BUNDLE [--cloud-digest HEX] [--gamma 1] [--weights spread|equal]

Writes predictor/calibration.json. The scales come from the training split, the scores from the calibration split.

A PRS of metrics that weigh the same counts a gap in units of each metric's own spread, so that a metric on which the
models hardly ever differ votes as loudly as one on which they differ much. Weighing each by its spread, PRS is near 1/2
a straight line in the *expected gain in quality*: PRS - 1/2 = sum_i gap_i / (4 sum_j scale_j). That is the default.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.stats import spearmanr

from edge_agent.bundle import Bundle, put_file
from edge_agent.calibration import Calibration
from edge_agent.errors import quoted
from edge_agent.manifest import CALIBRATION, PREDICTOR
from edge_agent.predictor import Predictor
from edge_agent.superiority import (
    ALPHA_BOUND,
    METRICS,
    SD_FLOOR,
    paper_scale,
    realised_rate,
    relative_superiority,
)
from edge_agent.tokens import Tokenizer, Tokens
from export.bootstrap import Floats
from export.errors import ExportError
from export.metrics import load_metrics
from export.outcomes import CLOUD_DIGEST, JUDGE_DIGEST, WHOSE, Outcomes, unlike
from export.states import encode
from export.terminal import console

FAMILIAR = 3
"""Training prompts that a token must have been in to count as known."""

WEIGHTS = ("spread", "equal")
"""How the metrics weigh in PRS, the default first; see `weights_of`."""

CHANCE = 0.05
"""How seldom chance alone may rank the calibration prompts as well, before the predictor counts as no better."""

Qualities = NDArray[np.float32]


def predicted(bundle: Bundle, prompts: Sequence[str]) -> tuple[Qualities, Qualities]:
    """Predicted qualities of edge and cloud, [N, M] each, by the graphs that the daemon runs."""
    if bundle.predictor is None:
        raise ExportError(f"{bundle.folder} has no predictor; write one with `edge-export predictor`")
    predictor = Predictor.load(bundle.predictor, bundle.manifest.text_hidden)
    predictions = [predictor.predict(*read) for read in encode(bundle, prompts)]
    return np.stack([p.edge for p in predictions]), np.stack([p.cloud for p in predictions])


def scale_of(train: Outcomes, gamma: float) -> Floats:
    """Each metric's scale [M] from the training split; ExportError for a metric on which no two images ever differ."""
    gap = train.edge.astype(np.float64) - train.cloud
    scale = paper_scale(gap.mean(0), gap.std(0, ddof=1), gamma)
    if flat := [name for name, size in zip(METRICS, scale, strict=True) if size <= 0]:
        raise ExportError(
            f"on {', '.join(flat)} edge and cloud are equal on every training prompt: nothing to learn"
        )
    return scale


def familiar(train: Sequence[Tokens]) -> tuple[int, ...]:
    """Ids of the tokens that at least FAMILIAR of the training prompts have, ascending."""
    ids, counts = np.unique(
        np.concatenate([np.unique(one.ids[0][one.own]) for one in train]), return_counts=True
    )
    return tuple(ids[counts >= FAMILIAR].tolist())


def weights_of(scale: Floats, kind: str) -> Floats:
    """Each metric's weight [M] in PRS: `equal`, the paper's, or in proportion to its `spread`, ``scale`` [M].

    With the labels of the starter's first judge predicted PRS of validation prompts followed the realised one better
    with `spread` (rank correlation 0.33 against 0.17) and captured more headroom at every rate tried (0.49 against
    0.38 at 50 %).
    """
    weights = scale if kind == "spread" else np.ones(len(scale))
    return weights / weights.sum()


def calibrate(
    outcomes: Outcomes, bundle: Bundle, cloud_digest: str, gamma: float, weighing: str = WEIGHTS[0]
) -> Calibration:
    """The calibration of `bundle`'s predictor. ExportError when the labels are of other models or lack their facts."""
    outcomes.must_be_of(bundle)
    judge = outcomes.facts.get(JUDGE_DIGEST, "")
    _refuse_unlearnt(bundle, {CLOUD_DIGEST: cloud_digest, JUDGE_DIGEST: judge})
    stated = json.loads(outcomes.facts.get("metrics", "[]"))
    # Labels that do not state theirs were measured by the project's own.
    metrics = tuple(map(tuple, stated)) or tuple(metric.texts for metric in load_metrics())
    if tuple(name for name, _, _ in metrics) != METRICS:
        raise ExportError(f"the labels' metrics are not {', '.join(METRICS)}")

    train, calibration = outcomes.split("train"), outcomes.split("calibration")
    scale = scale_of(train, gamma)
    weights = weights_of(scale, weighing)
    predictions = relative_superiority(*predicted(bundle, calibration.prompts), scale, weights)
    _remark_chance(predictions, relative_superiority(calibration.edge, calibration.cloud, scale, weights))
    scores = np.sort(predictions)
    tokenizer = Tokenizer.open(bundle)
    return Calibration(
        edge_digest=bundle.model_digest,
        cloud_digest=cloud_digest,
        metrics=metrics,
        scale=tuple(scale.tolist()),
        weights=tuple(weights.tolist()),
        scores=tuple(scores.tolist()),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        familiar=familiar([tokenizer.encode(prompt) for prompt in train.prompts]),
        recipe={
            "scale": f"max(gamma * |mean gap|, {SD_FLOOR} * sd of the paired differences), on the training split",
            "gamma": gamma,
            "weights": weighing,
            "train_prompts": len(train),
            "calibration_prompts": len(calibration),
            JUDGE_DIGEST: judge,
            "predictor_sha256": bundle.manifest.files[PREDICTOR].sha256,
            "largest_rate": realised_rate(scores, ALPHA_BOUND),
        },
    )


def _refuse_unlearnt(bundle: Bundle, labels: Mapping[str, str]) -> None:
    """A predictor knows the two models whose images it was trained on, as one judge saw them: of another it would
    predict the first one's. `labels` are the digests of these; empty where the labels do not say.
    """
    if bundle.predictor is None:  # which `predicted` tells
        return
    learnt = {fact.key: fact.value for fact in onnx.load(bundle.predictor).metadata_props}
    if name := unlike(labels, learnt):
        raise ExportError(
            f"the predictor learnt {WHOSE[name]} {learnt[name][:16]}, and the labels are {WHOSE[name]} "
            f"{labels[name][:16]}: run `edge-export train` and `edge-export predictor` with these labels first"
        )


def _remark_chance(predictions: Floats, measured: Floats) -> None:
    """Say where the predicted PRS [N] of the calibration prompts need not have followed the measured one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of predictions that are all the same, or of very few
        found = spearmanr(predictions, measured, alternative="greater")
    if not found.pvalue < CHANCE:
        console.print(
            f"the {len(measured)} calibration prompts do not tell the predictor from chance (rank correlation with "
            f"what was measured {np.nan_to_num(found.statistic):.2f}): see what `evaluate` says of the test prompts; "
            "with more prompts, or more images of each, it may be told"
        )


def _digest(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no digest: 64 hexadecimal digits, from `cloud-server digest`"
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = argparse.ArgumentParser("edge-export calibrate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("labels", type=Path, help="labels.parquet of `edge-export label`")
    parser.add_argument("bundle", type=Path, help="bundle with its predictor")
    parser.add_argument(
        "--cloud-digest",
        type=_digest,
        help="the cloud model's, from `cloud-server digest`, for labels that do not name it (default: the labels')",
    )
    parser.add_argument("--gamma", type=float, default=1.0, help="Gamma of the paper (default: %(default)s)")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default=WEIGHTS[0], help="of the metrics in PRS (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if not (np.isfinite(options.gamma) and options.gamma >= 0):
        parser.error("--gamma must be a number of at least 0")

    outcomes, bundle = Outcomes.read(options.labels), Bundle.open(options.bundle)
    labelled = outcomes.facts.get(CLOUD_DIGEST)
    cloud_digest = options.cloud_digest or labelled
    if labelled and cloud_digest != labelled:
        raise ExportError(
            f"the labels were measured on the cloud model {labelled}, not on {cloud_digest}: label with that one, or "
            "leave --cloud-digest out"
        )
    if not cloud_digest:
        raise ExportError(
            "the labels do not say which cloud model they were measured on; pass --cloud-digest"
        )
    calibration = calibrate(outcomes, bundle, cloud_digest, options.gamma, options.weights)
    partial = bundle.folder / f"{CALIBRATION}.partial"
    try:
        calibration = calibration.save(partial)
        put_file(bundle.folder, CALIBRATION, partial)
    finally:
        partial.unlink(missing_ok=True)
    console.print(
        f"{bundle.folder / CALIBRATION}: {calibration.calibration_id}, {len(calibration.scores)} scores; "
        f"alpha {calibration.alpha(0.5):.4f} at a routing rate of 50 %; "
        f"at most {calibration.recipe['largest_rate']:.0%} can go to the cloud"
    )
    if not calibration.recipe["largest_rate"]:
        console.print(
            "the predictor finds the edge's image as good for every calibration prompt: none will be routed"
        )
    console.print(
        f"a daemon takes it up by `edge-agent models pull {quoted(str(options.bundle))} --use` (under another --name "
        "where the bundle was pulled before), one that was started with --bundle by a restart"
    )
    return 0
