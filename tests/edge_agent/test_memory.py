"""What the machine has left, as Linux says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent import memory


def test_what_is_left_is_memory_and_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text(
        "MemTotal: 9 kB\nMemAvailable:  5 kB\nSwapFree: 2 kB\nHugePages_Total: 0\n"
    )
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    assert memory.available_bytes() == 7 * 1024


@pytest.mark.parametrize("text", ["", "MemTotal: 9 kB\n", "MemAvailable\n", None])
def test_a_system_that_says_nothing_of_use_has_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    assert memory.available_bytes() is None
