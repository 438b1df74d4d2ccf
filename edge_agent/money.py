"""Money: whole micro-dollars wherever it is reckoned, US dollars where people read or write it."""

from __future__ import annotations

from decimal import Decimal

MAX_MICRO_USD = 2**63 - 1
"""Amounts are signed 64-bit integers on the wire and in the ledger."""


def dollars(micro_usd: int) -> str:
    """Micro-dollars for people: 1_250_000 is "$1.25", 40 is "$0.00004"."""
    whole, fraction = divmod(micro_usd, 1_000_000)
    digits = f"{fraction:06d}".rstrip("0")
    return f"${whole}.{digits:0<2}"


def parse_dollars(text: str) -> int:
    """Micro-dollars of an amount in US dollars, such as 0.04. Raises ValueError."""
    try:
        micro = Decimal(text.strip().removeprefix("$")) * 1_000_000
        if "_" not in text and micro == micro.to_integral_value() and 0 <= micro <= MAX_MICRO_USD:
            return int(micro)
    except (ArithmeticError, ValueError):
        pass
    raise ValueError(f"{text!r} is not an amount of US dollars with at most six decimals, such as 0.04")
