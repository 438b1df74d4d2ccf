"""Tables in Markdown, line by line."""

from __future__ import annotations


def head(*names: str) -> list[str]:
    """The two lines above a table's rows."""
    return [row(*names), "|" + "---|" * len(names)]


def row(*cells: str) -> str:
    """One of a table's lines."""
    return "| " + " | ".join(cells) + " |"
