"""The route follows the caller's wish, then calibration, PRS, the cloud's health and the quota."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from edge_agent.errors import PolicyConflict
from edge_agent.policy import Reason, decide
from edge_agent.request import Privacy, Routing

WORTH_IT: dict[str, Any] = {
    "prs": 0.3,
    "alpha": 0.4,
    "routing": Routing.AUTO,
    "privacy": Privacy.NORMAL,
    "cloud_available": True,
    "quota_allows": True,
}


@pytest.mark.parametrize(
    ("change", "route", "reason"),
    [
        ({}, "cloud", Reason.PARETO_CLOUD),
        ({"prs": 0.4}, "edge", Reason.PARETO_EDGE),
        ({"prs": 0.41}, "edge", Reason.PARETO_EDGE),
        ({"prs": float("nan")}, "edge", Reason.PARETO_EDGE),  # it costs nothing
        ({"quota_allows": False}, "edge", Reason.QUOTA_EXHAUSTED),
        ({"cloud_available": False}, "edge", Reason.CLOUD_UNAVAILABLE),
        ({"cloud_available": None}, "edge", Reason.CLOUD_UNAVAILABLE),
        ({"cloud_available": False, "quota_allows": False}, "edge", Reason.CLOUD_UNAVAILABLE),
        ({"prs": 0.4, "cloud_available": False}, "edge", Reason.PARETO_EDGE),
        ({"alpha": None}, "edge", Reason.UNCALIBRATED),
        ({"prs": None, "alpha": None}, "edge", Reason.UNCALIBRATED),
        ({"routing": Routing.LOCAL_ONLY}, "edge", Reason.LOCAL_ONLY),
        ({"privacy": Privacy.LOCAL_ONLY}, "edge", Reason.LOCAL_ONLY),
        ({"privacy": Privacy.LOCAL_ONLY, "alpha": None}, "edge", Reason.LOCAL_ONLY),
        ({"routing": Routing.CLOUD_ONLY}, "cloud", Reason.CLOUD_ONLY),
        ({"routing": Routing.CLOUD_ONLY, "prs": 0.9}, "cloud", Reason.CLOUD_ONLY),
        ({"routing": Routing.CLOUD_ONLY, "quota_allows": False}, "cloud", Reason.CLOUD_ONLY),
        ({"routing": Routing.CLOUD_ONLY, "cloud_available": False}, "cloud", Reason.CLOUD_ONLY),
        ({"routing": Routing.CLOUD_ONLY, "alpha": None}, "cloud", Reason.CLOUD_ONLY),
    ],
)
def test_each_reason_has_its_place_in_the_order(change: dict[str, Any], route: str, reason: Reason) -> None:
    assert decide(**{**WORTH_IT, **change}) == (route, reason)


def test_a_cloud_only_without_a_cloud_is_a_conflict_that_says_what_to_do() -> None:
    with pytest.raises(PolicyConflict, match="--cloud"):
        decide(**{**WORTH_IT, "routing": Routing.CLOUD_ONLY, "cloud_available": None})


def test_whatever_else_holds_a_private_prompt_never_goes_to_the_cloud() -> None:
    switches = product(Routing, (True, False), (True, False, None), (True, False))
    for routing, calibrated, available, quota in switches:
        facts = {
            "routing": routing,
            "alpha": 0.4 if calibrated else None,
            "cloud_available": available,
            "quota_allows": quota,
            "privacy": Privacy.LOCAL_ONLY,
        }
        assert decide(**{**WORTH_IT, **facts}) == ("edge", Reason.LOCAL_ONLY)
