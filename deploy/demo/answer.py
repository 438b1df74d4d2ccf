"""One prompt answered: what was decided, who made the image, and the line that records it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from edge_agent.client import Received
from edge_agent.money import dollars
from edge_agent.policy import Decision


@dataclass(frozen=True)
class Answer:
    """The image of prompt `number` (from 1) in phase `phase` (1, 2 or 3), and where its file lies."""

    phase: int
    number: int
    prompt: str
    app: str
    decision: Decision
    received: Received
    file: str

    @property
    def prs(self) -> str:
        """To three decimals; empty where the prompt was not scored."""
        return rounded(self.decision.prs)

    @property
    def alpha(self) -> str:
        """To three decimals; empty where the prompt was not scored."""
        return rounded(self.decision.alpha)

    @property
    def route(self) -> str:
        """Where it was made; with the way it took where the cloud failed."""
        fell_back = self.decision.route != self.received.served_by
        return f"{self.decision.route} → {self.received.served_by}" if fell_back else self.received.served_by

    @property
    def cost(self) -> str:
        """In dollars; empty for what cost nothing."""
        return dollars(self.received.cost_micro_usd) if self.received.cost_micro_usd else ""

    def to_json(self) -> str:
        """One line of record.jsonl. Money in micro-dollars, times in milliseconds."""
        facts = {
            "phase": self.phase,
            "number": self.number,
            "prompt": self.prompt,
            "app": self.app,
            "request_id": self.received.request_id,
            "route": self.decision.route,
            "reason": self.decision.reason.value,
            "served_by": self.received.served_by,
            "fallback": self.received.fallback_error or None,
            "prs": self.decision.prs,
            "alpha": self.decision.alpha,
            "seed": self.received.seed,
            "width": self.received.width,
            "height": self.received.height,
            "file": self.file,
            "sha256": self.received.sha256,
            "cost_micro_usd": self.received.cost_micro_usd,
            "quota": [budget._asdict() for budget in self.decision.quota],
            "timings_ms": self.received.timings_ms,
        }
        return json.dumps(facts, ensure_ascii=False)


def rounded(value: float | None) -> str:
    """To three decimals; empty for None."""
    return "" if value is None else f"{value:.3f}"
