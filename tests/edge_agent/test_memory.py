"""What is left for this process, as Linux says it, and what glibc is asked for."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from edge_agent import memory


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 5 kB of memory and 2 kB of swap left, whose groups have no limits."""
    (tmp_path / "meminfo").write_text(
        "MemTotal: 9 kB\nMemAvailable:  5 kB\nSwapFree: 2 kB\nHugePages_Total: 0\n"
    )
    (tmp_path / "cgroup").write_text("4:memory:/of/version/1\n0::/system.slice/edge.service\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    limit(tmp_path / "groups/system.slice/edge.service", "max", used=4000)
    limit(tmp_path / "groups/system.slice", "max", used=4000)
    return tmp_path


def limit(group: Path, most: str, *, used: int, **swap: str) -> None:
    """A group as Linux 6.1 shows it, 300 bytes of whose use are cached files. The system's own has no such files."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(most + "\n")
    (group / "memory.high").write_text("max\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text("anon 3000\nfile 700\nshmem 400\ninactive_file 200\nactive_file 100\n")
    for name, value in swap.items():
        (group / f"memory.swap.{name}").write_text(value + "\n")


@pytest.mark.usefixtures("system")
def test_what_is_left_is_memory_and_swap() -> None:
    assert memory.available_bytes() == 7 * 1024


def test_a_unit_can_take_what_its_limit_leaves_and_the_machines_swap(system: Path) -> None:
    limit(system / "groups/system.slice/edge.service", "5000", used=4000)
    assert memory.available_bytes() == 1000 + 300 + 2048


@pytest.mark.parametrize(("most", "swap"), [("max", 2048), ("0", 0), ("1500", 500), ("900", 0)])
def test_of_swap_a_unit_can_take_what_its_own_limit_leaves(system: Path, most: str, swap: int) -> None:
    limit(system / "groups/system.slice/edge.service", "5000", used=4000, max=most, current="1000")
    assert memory.available_bytes() == 1000 + 300 + swap


@pytest.mark.parametrize(("high", "left"), [("4600", 600), ("9000", 1000)])
def test_a_unit_that_would_be_slowed_down_before_its_limit_can_take_no_more_than_that(
    system: Path, high: str, left: int
) -> None:
    group = system / "groups/system.slice/edge.service"
    limit(group, "5000", used=4000)
    (group / "memory.high").write_text(high + "\n")
    assert memory.available_bytes() == left + 300 + 2048


def test_the_narrowest_group_decides(system: Path) -> None:
    limit(system / "groups/system.slice/edge.service", "9000", used=4000)
    limit(system / "groups/system.slice", "4500", used=4000)
    assert memory.available_bytes() == 500 + 300 + 2048


@pytest.mark.parametrize("name", ["/", "/docker/1f3a", "/../elsewhere"])
def test_in_a_container_the_outermost_group_is_its_own(system: Path, name: str) -> None:
    (system / "cgroup").write_text(f"0::{name}\n")
    limit(system / "groups", "4100", used=4000)
    assert memory.available_bytes() == 100 + 300 + 2048


def test_a_system_without_control_groups_has_what_the_machine_has(system: Path) -> None:
    (system / "cgroup").unlink()
    assert memory.available_bytes() == 7 * 1024


@pytest.mark.parametrize("text", ["", "MemTotal: 9 kB\n", "MemAvailable\n", None])
def test_a_system_that_says_nothing_of_use_has_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    assert memory.available_bytes() is None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the C library is asked for, in order, and what is collected."""
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(memory, "_of_libc", lambda name: lambda *given: calls.append((name, *given)))
    monkeypatch.setattr(gc, "collect", lambda: calls.append(("collect",)))
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    return calls


def test_all_threads_share_one_heap_unless_a_person_chose(
    asked: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.share_one_heap()
    assert asked == [("mallopt", -8, 1)]  # M_ARENA_MAX
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    memory.share_one_heap()
    assert len(asked) == 1


def test_what_is_garbage_is_collected_before_free_memory_goes_back(asked: list[tuple[object, ...]]) -> None:
    memory.give_back()
    assert asked == [("collect",), ("malloc_trim", 0)]


def test_a_c_library_that_keeps_nothing_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As musl."""
    monkeypatch.setattr(memory, "_of_libc", lambda _: None)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    memory.share_one_heap()
    memory.give_back()
