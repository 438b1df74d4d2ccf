"""What has come about since the daemon started, as its status tells it."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_agent.errors import CloudError, CloudRefused, CloudUnavailable
from edge_agent.log import events
from edge_agent.policy import Route

log = events(__name__)


@dataclass(frozen=True)
class CloudFailure:
    """How a cloud call failed. Not its error, whose traceback would keep the models and all else of that call."""

    message: str
    check: str  # where the cause may be
    shut_out: bool  # whether it did not connect, or was refused before anything ran

    @classmethod
    def of(cls, error: CloudError) -> CloudFailure:
        """What is kept of `error`."""
        answered = isinstance(error, CloudUnavailable) and error.answered
        if isinstance(error, CloudRefused):
            check = "--cloud, --max-price, --cloud-token and the cloud server's own settings"
        elif answered:  # it cannot at the moment, or in the time that it had
            check = "the cloud server's log, and whether more is asked of it than it can do"
        else:
            check = "--cloud, --cloud-ca and whether the cloud server runs"
        return cls(error.message, check, shut_out=error.never_ran and not answered)


@dataclass
class Tally:
    """Whichever models the daemon used for it."""

    served: dict[Route, int] = field(default_factory=lambda: {"edge": 0, "cloud": 0})
    fallbacks: int = 0
    cloud_digest: str = ""  # what the cloud server last said it is
    price_micro_usd: int | None = None  # what the last image from the cloud cost
    # Of the last call, where no image has come from the cloud since.
    cloud_failure: CloudFailure | None = None

    def failed(self, error: CloudError) -> None:
        """Take note of a failed cloud call. The log hears of the first, and of one with another cause."""
        before, failure = self.cloud_failure, CloudFailure.of(error)
        self.cloud_failure = failure
        if before is None or before.check != failure.check:
            log.warning("cloud failing", error=failure.message, check=failure.check)

    def delivered(self, price_micro_usd: int | None) -> None:
        """Take note of an image from the cloud, and what it cost; None of one that was bought before."""
        if price_micro_usd is not None:
            self.price_micro_usd = price_micro_usd
        if self.cloud_failure is not None:
            log.info("cloud delivers again")
        self.cloud_failure = None
