"""Captured headroom: what the routing is worth on held-out prompts, as `edge-export evaluate` measured it.

That compares the shipped predictor with few routers, none of which learns; `edge-export routerbench` has the others.
"""

from __future__ import annotations

import json
from typing import Any

from edge_agent.bundle import Bundle
from errors import BenchError
from estimate import Estimate
from plan import Plan
from row import Row

GROUP = "headroom"
PERCENT = 85.0  # target
OWN, LIMITS = "predictor", ("random", "oracle")  # every other router of the evaluation is a baseline


def rows(plan: Plan) -> list[Row]:
    """One row; met when the predictor captures enough and is ahead of every baseline of the evaluation."""
    how = f"make it with `edge-export evaluate LABELS {plan.bundle} --out {plan.evaluation}`"
    try:
        record: dict[str, Any] = json.loads(plan.evaluation.read_text(encoding="utf-8"))
        headroom = {router["router"]: router["headroom"] for router in record["routers"]}
        made_for = record["edge_digest"]
    except OSError:
        raise BenchError(f"no {plan.evaluation}; {how}") from None
    except (ValueError, KeyError, TypeError):
        raise BenchError(f"{plan.evaluation} is no evaluation; {how}") from None
    if made_for != Bundle.open(plan.bundle, verify=False).model_digest:
        raise BenchError(f"{plan.evaluation} was made for another edge model than {plan.bundle}; {how}")
    if headroom[OWN] is None:
        raise BenchError(
            f"{plan.evaluation} says nothing of headroom, which its prompts are too few for: label more, and {how}"
        )
    own = Estimate(*(100 * headroom[OWN][name] for name in ("value", "low", "high")), record["prompts"])
    baselines = {name: 100 * found["value"] for name, found in headroom.items() if name not in (OWN, *LIMITS)}
    beside = ", ".join(f"{name} {value:.1f} %" for name, value in baselines.items())
    ahead = all(own.value > value for value in baselines.values())
    return [
        Row(
            GROUP,
            f"captured headroom of the bundle's predictor at a routing rate of {record['rate']:.0%}",
            "%",
            f">= {PERCENT:g} %, ahead of: {', '.join(baselines)}",
            own,
            own.value >= PERCENT and ahead,
            note=f"{record['prompts']} held-out prompts, {record['seeds']} seeds; {beside}; not compared "
            "with routers that learn, which docs/routerbench.md has",
        )
    ]
