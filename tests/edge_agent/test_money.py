"""Money is whole micro-dollars, and dollars where people read or write it."""

from __future__ import annotations

import pytest

from edge_agent.money import dollars, parse_dollars


@pytest.mark.parametrize(
    ("micro_usd", "text"), [(0, "$0.00"), (40, "$0.00004"), (1_250_000, "$1.25"), (3_000_000, "$3.00")]
)
def test_money_reads_as_dollars(micro_usd: int, text: str) -> None:
    assert dollars(micro_usd) == text


@pytest.mark.parametrize(
    ("text", "micro_usd"), [("1", 1_000_000), ("0.01", 10_000), ("$0.000001", 1), ("0", 0), ("1e-3", 1_000)]
)
def test_dollars_become_whole_micro_dollars(text: str, micro_usd: int) -> None:
    assert parse_dollars(text) == micro_usd
