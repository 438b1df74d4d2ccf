"""One line an event, which people and machines can read whatever a field holds."""

from __future__ import annotations

import json
import logging
import sys

from edge_agent.log import Lines

FIELDS = {"reason": "pareto_edge", "error": 'it said "no"\nand = left', "prs": 0.5, "empty": ""}


def record(exc_info: bool = False) -> logging.LogRecord:
    made = logging.LogRecord(
        "edge_agent", logging.INFO, "", 0, "call", (), sys.exc_info() if exc_info else None
    )
    made.fields = FIELDS
    return made


def test_text_is_logfmt_on_one_line() -> None:
    line = Lines(as_json=False).format(record())
    assert "\n" not in line
    assert (
        ' level=info event=call reason=pareto_edge error="it said \\"no\\"\\nand = left" prs=0.5 empty=""'
        in line
    )


def test_a_key_has_no_space_and_no_equals_sign() -> None:
    made = record()
    made.fields = {"day@my app=1_left_micro_usd": 5}  # type: ignore[attr-defined]
    assert Lines(as_json=False).format(made).endswith(" day@my_app_1_left_micro_usd=5")


def test_json_is_one_object_on_one_line() -> None:
    line = Lines(as_json=True).format(record())
    assert "\n" not in line
    assert json.loads(line).items() >= {"level": "info", "event": "call", **FIELDS}.items()


def test_a_traceback_is_kept() -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        assert (
            "ZeroDivisionError" in json.loads(Lines(as_json=True).format(record(exc_info=True)))["traceback"]
        )
        assert "ZeroDivisionError" in Lines(as_json=False).format(record(exc_info=True))
