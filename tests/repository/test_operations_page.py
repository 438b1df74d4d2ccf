"""docs/operations.md names every event that the two programs log."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
LOGGED = re.compile(r'(?:\blog\.\w+|events\(\w+\)\.\w+)[(,]\s*"([^"]+)"|"msg": "([^"]+)"')
EVENTS = {
    found[1] or found[2]
    for package in ("edge_agent", "cloud_server")
    for file in (ROOT / package).rglob("*.py")
    for found in LOGGED.finditer(file.read_text(encoding="utf-8"))
}


def test_the_events_are_found() -> None:
    assert {"call", "cloud failing", "journal", "log lines dropped", "clock", "advice"} < EVENTS


@pytest.mark.parametrize("event", sorted(EVENTS))
def test_the_page_names_it(event: str) -> None:
    said = max(event.split("%s"), key=len).strip(" ,:;")  # one is a sentence with numbers in it
    assert re.search(rf"`{re.escape(said)}(?: …)?`", PAGE)
