"""The bundle's own predictor beside the routers that are trained here: what ships, not what its recipe makes anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge_agent.bundle import Bundle
from edge_agent.calibration import Calibration
from edge_agent.predictor import Predictor
from export.outcomes import Outcomes
from export.routerbench.router import Floats, Prompts, Scorer
from export.routerbench.routers import NOTHING

NAME = "the bundle's predictor"


def calibrated(bundle: Bundle, outcomes: Outcomes) -> Calibration | None:
    """The bundle's calibration, where it has a predictor too and both are of the models of these labels."""
    calibration = bundle.calibration
    if bundle.predictor is None or calibration is None:
        return None
    edge = outcomes.facts.get("edge_digest", bundle.model_digest)
    cloud = outcomes.facts.get("cloud_digest", calibration.cloud_digest)
    return calibration if (edge, cloud) == (calibration.edge_digest, calibration.cloud_digest) else None


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
