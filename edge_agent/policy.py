"""Where a prompt's image is made, and the account of why. Pure: numbers in, route and reason out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Literal, NamedTuple

from edge_agent.budget import BudgetState
from edge_agent.errors import PolicyConflict
from edge_agent.request import Privacy, Routing

Route = Literal["edge", "cloud"]


class Reason(Enum):
    """Why a prompt goes where it goes."""

    PARETO_EDGE = "pareto_edge"
    """PRS >= alpha: the cloud's image is not expected to be enough better."""
    PARETO_CLOUD = "pareto_cloud"
    """PRS < alpha, and the quota allows the call."""
    QUOTA_EXHAUSTED = "quota_exhausted"
    """PRS < alpha, but a budget or rate has no room."""
    CLOUD_UNAVAILABLE = "cloud_unavailable"
    """PRS < alpha, but no cloud is configured, or it was lately not reached, or lately asked for a higher price or
    refused the size."""
    LOCAL_ONLY = "local_only"
    """The caller keeps the prompt on the device."""
    CLOUD_ONLY = "cloud_only"
    """The caller asks for the cloud."""
    ALREADY_PAID = "already_paid"
    """The caller repeats a request whose image the cloud has made and been paid for: it is sent again, for nothing."""
    UNCALIBRATED = "uncalibrated"
    """The models in use are not those the calibration was made for: PRS and alpha would mean nothing."""


class TokenPull(NamedTuple):  # made a dozen times a decision, in half of a dataclass's time
    """How much one token pulls each metric's predicted gap, cloud minus edge, in METRICS order.

    `prs_without` is the PRS without the token of what was read of the prompt, where that was measured.
    """

    text: str
    pull: tuple[float, ...]
    prs_without: float | None = None


class Decision(NamedTuple):
    """A route that explains itself.

    `prs` and `alpha` are None where no calibration gives them a meaning. The qualities are in [0, 1], in
    METRICS order. `timings_ms` maps each stage of the decision to its milliseconds. `prompt_truncated`: the prompt
    has more tokens than the model reads. `unfamiliar` are those of its own tokens that the predictor has not met in
    training, so that what it says of the prompt is a guess.
    """

    route: Route
    reason: Reason
    prs: float | None
    alpha: float | None
    edge_quality: tuple[float, ...] = ()
    cloud_quality: tuple[float, ...] = ()
    tokens: tuple[TokenPull, ...] = ()
    quota: tuple[BudgetState, ...] = ()
    timings_ms: Mapping[str, float] = MappingProxyType({})
    prompt_truncated: bool = False
    unfamiliar: tuple[str, ...] = ()

    def explained(self, prs_without: Sequence[float | None]) -> Decision:
        """The same with what PRS would be without each of its tokens, in their order."""
        tokens = [
            token._replace(prs_without=prs) for token, prs in zip(self.tokens, prs_without, strict=True)
        ]
        return self._replace(tokens=tuple(tokens))


def decide(
    prs: float | None,
    alpha: float | None,
    *,
    routing: Routing,
    privacy: Privacy,
    cloud_available: bool | None,
    quota_allows: bool,
) -> tuple[Route, Reason]:
    """The route and its reason. What comes first below wins over what comes later. `cloud_available` is None where no
    cloud is configured.

    Someone who asks for `cloud_only` wants the cloud's own answer, so health and quota do not turn that
    wish down here: the call, or the ledger's refusal of it, does, and says more. Nor does a calibration for
    other models: nothing is compared.

    Raises PolicyConflict for a `cloud_only` where no cloud is configured.
    """
    if routing is Routing.LOCAL_ONLY or privacy is Privacy.LOCAL_ONLY:
        return "edge", Reason.LOCAL_ONLY
    if routing is Routing.CLOUD_ONLY:
        if cloud_available is None:
            raise PolicyConflict(
                "cloud_only was asked, but no cloud is configured; start the daemon with --cloud"
            )
        return "cloud", Reason.CLOUD_ONLY
    if prs is None or alpha is None:
        return "edge", Reason.UNCALIBRATED
    if not prs < alpha:
        return "edge", Reason.PARETO_EDGE
    if not cloud_available:
        return "edge", Reason.CLOUD_UNAVAILABLE
    if not quota_allows:
        return "edge", Reason.QUOTA_EXHAUSTED
    return "cloud", Reason.PARETO_CLOUD
