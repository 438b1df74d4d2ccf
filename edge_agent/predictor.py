"""From a prompt's tokens and their states to the predicted quality of the edge's image and of the cloud's."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_agent.diffusion.sessions import Runtime, Session
from edge_agent.errors import BundleError, GenerationFailed
from edge_agent.graph_files import FileState
from edge_agent.manifest import MAX_TEXT_TOKENS
from edge_agent.superiority import METRICS

INPUTS = ("states", "mask", "ids")
OUTPUTS = ("edge", "cloud", "pull")

# A few million multiply-adds: waking a second thread would cost more than it saves.
_ONE_THREAD = Runtime(threads=1)

_TRUE, _FALSE = np.ones((1, MAX_TEXT_TOKENS), np.bool_), np.zeros((1, 1), np.bool_)


class Prediction(NamedTuple):
    """What the two models' images are expected to be worth. M metrics, in the order of METRICS.

    In Python's own numbers, as everything that is done with so few of them is quicker than in numpy's.
    """

    edge: list[float]  # [M], qualities in [0, 1]
    cloud: list[float]  # [M], qualities in [0, 1]
    pull: list[list[float]]
    """[T, M], what each of the prompt's own T tokens adds to the predicted gap, logit(cloud) - logit(edge); above zero
    it pulls to the cloud.

    Summed over the tokens it is the gap less the model's own bias; without a token's term the gap is smaller by just
    that.
    """


class Predictor:
    """A mixture of experts, one a metric, that read a selection of the tokens (RouteT2I). `session` is its graph."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        width: int | None = None,
        files: Mapping[Path, FileState] | None = None,
    ) -> Predictor:
        """Open the graph at `path`. `width` is the size of the token states it will get, where that is known. For
        `files` see `Session`.

        Raises:
            BundleError: naming the file, when it is not a predictor of these metrics for states of that size.
        """
        try:
            session = Session(Path(path), INPUTS, OUTPUTS, _ONE_THREAD, files)
        except BundleError as error:
            raise BundleError(
                f"{error.message}; a predictor of an earlier version is made anew with `edge-export train`, "
                "`edge-export predictor` and `edge-export calibrate`, on labels of `edge-export label`"
            ) from error
        session.expect({"states": (None, None, None), "edge": (None, None)})
        own_width, metrics = session.shapes["states"][-1], session.shapes["edge"][-1]
        if metrics != len(METRICS):
            raise BundleError(f"{path} predicts {metrics} metrics; this version compares {len(METRICS)}")
        if width is not None and own_width != width:
            raise BundleError(
                f"{path} reads token states of size {own_width}; this bundle's have size {width}"
            )
        return cls(session)

    def predict(self, states: NDArray[np.float32], own: Sequence[int], ids: NDArray[np.int64]) -> Prediction:
        """Predict from the `states` [1, L, d] and `ids` [1, L] of a prompt, whose `own` tokens have these T positions.

        Raises:
            GenerationFailed: the states have another size than the graph reads, an id is none of its vocabulary, or
                what the graph gives is not a finite number for each metric and token.
        """
        # As in training: only the prompt's own tokens, the first in the first place. Of none, one that does not count.
        read = own or (0,)
        first, count = read[0], len(read)
        # Side by side, as they nearly always are, nothing has to be copied.
        place = slice(first, first + count) if read[-1] < first + count else list(read)
        mask = _TRUE[:, :count] if own else _FALSE
        inputs = {"states": states[:, place], "mask": mask, "ids": ids[:, place]}
        edge, cloud, pull = self.session.run(inputs)
        metrics = len(METRICS)
        shapes = (1, metrics), (1, metrics), (1, count, metrics)
        if (edge.shape, cloud.shape, pull.shape) != shapes:  # which a graph need not tell before, nor keep to
            raise GenerationFailed(
                f"{self.session.path} gave the shapes {edge.shape}, {cloud.shape} and {pull.shape} in the place of "
                f"{shapes}; make the predictor again"
            )
        found = Prediction(edge[0].tolist(), cloud[0].tolist(), pull[0].tolist())
        # The sum is not finite where a number is not; of a few numbers Python's is the quicker one.
        if not math.isfinite(sum(found.edge) + sum(found.cloud) + sum(map(sum, found.pull))):
            raise GenerationFailed(
                f"{self.session.path} gave numbers that are not finite; make the predictor again"
            )
        return found if own else found._replace(pull=[])
