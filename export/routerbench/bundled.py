"""The bundle's own predictor beside the routers that are trained here: what ships, not what its recipe makes anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge_agent.bundle import Bundle
from edge_agent.calibration import Calibration
from edge_agent.predictor import Predictor
from export.bootstrap import Floats
from export.outcomes import CLOUD_DIGEST, EDGE_DIGEST, JUDGE_DIGEST, Outcomes, unlike
from export.routerbench.router import Prompts, Scorer
from export.routerbench.routers import NOTHING

NAME = "the bundle's predictor"


def foreign(bundle: Bundle, outcomes: Outcomes) -> str | None:
    """Why the bundle's predictor is not measured on these labels: it has none that is calibrated, or it learnt from
    others. None where it is: what the labels or the calibration do not state is taken to be the same.
    """
    calibration = bundle.calibration
    if bundle.predictor is None or calibration is None:
        return f"{bundle.folder} has no predictor with a calibration"
    learnt = {
        EDGE_DIGEST: calibration.edge_digest,
        CLOUD_DIGEST: calibration.cloud_digest,
        JUDGE_DIGEST: calibration.recipe.get(JUDGE_DIGEST),
    }
    facts = {EDGE_DIGEST: bundle.model_digest, **outcomes.facts}
    if name := unlike(learnt, facts):
        what = name.removesuffix("_digest")
        return (
            f"{bundle.folder} is calibrated for {what} {learnt[name][:16]}, and the labels are of "
            f"{facts[name][:16]}"
        )
    return None


def calibrated(bundle: Bundle, outcomes: Outcomes) -> Calibration | None:
    """The bundle's calibration, where its predictor is not `foreign` to these labels."""
    return None if foreign(bundle, outcomes) else bundle.calibration


class Bundled:
    """The graph that decides, ranked by the expected gain in quality. It has learnt before."""

    name = NAME
    settings: Sequence[Mapping[str, float]] = NOTHING

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        """Learns nothing more: each seed gives the same scores."""
        assert self.bundle.predictor is not None
        predictor = Predictor.load(self.bundle.predictor, self.bundle.manifest.text_hidden)

        def score(prompts: Prompts) -> Floats:
            examples = prompts.examples
            columns = (column.numpy() for column in (examples.states, examples.ids, examples.mask.sum(1)))
            made = [
                predictor.predict(states[None], range(own), ids[None])
                for states, ids, own in zip(*columns, strict=True)
            ]
            return np.array([np.mean(one.edge) - np.mean(one.cloud) for one in made])

        return score
