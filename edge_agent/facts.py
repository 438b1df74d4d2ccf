"""What the commands print with --json of an image, a decision and a budget."""

from __future__ import annotations

from typing import Any

from edge_agent.budget import BudgetState
from edge_agent.client import Received
from edge_agent.policy import Decision
from edge_agent.superiority import METRICS


def image_facts(decision: Decision, received: Received, file: str) -> dict[str, Any]:
    """Of `generate`; `file` is where the image was written."""
    return {
        "request_id": received.request_id,
        "route": decision.route,
        "served_by": received.served_by,
        "reason": decision.reason.value,
        "fallback": received.fallback_error or None,
        "prs": decision.prs,
        "alpha": decision.alpha,
        "seed": received.seed,
        "width": received.width,
        "height": received.height,
        "file": file,
        "sha256": received.sha256,
        "cost_micro_usd": received.cost_micro_usd,
        "timings_ms": received.timings_ms,
    }


def decision_facts(prompt: str, decision: Decision) -> dict[str, Any]:
    """Of `route`."""

    def metrics(values: tuple[float, ...]) -> dict[str, float]:
        return dict(zip(METRICS, values, strict=False))  # empty where no predictor ran

    return {
        "prompt": prompt,
        "route": decision.route,
        "reason": decision.reason.value,
        "prs": decision.prs,
        "alpha": decision.alpha,
        "edge_quality": metrics(decision.edge_quality),
        "cloud_quality": metrics(decision.cloud_quality),
        "tokens": [
            {"text": token.text, "pull": metrics(token.pull), "prs_without": token.prs_without}
            for token in decision.tokens
        ],
        "quota": {budget.name: budget_facts(budget) for budget in decision.quota},
        "timings_ms": dict(decision.timings_ms),
        "unfamiliar": list(decision.unfamiliar),
    }


def budget_facts(budget: BudgetState) -> dict[str, Any]:
    """Of `quota`, and of each decision."""
    return {
        "name": budget.name,
        "window": budget.window,
        "cap_micro_usd": budget.cap_micro_usd,
        "spent_micro_usd": budget.spent_micro_usd,
        "reserved_micro_usd": budget.reserved_micro_usd,
        "remaining_micro_usd": budget.remaining_micro_usd,
    }
