"""The demo, as a person runs it: `python deploy/demo`, two real servers, three phases."""

from __future__ import annotations

import hashlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from rich.console import Console

from tests.running import STOP, STOPPABLE

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
PRICE_MICRO_USD = 10_000
PROMPTS = (
    "a red cat on the beach",
    "the moon",
    "two dogs and a cat",
    "of the [red] 🦀 and on",
    "a cat, two dogs and the moon on the beach",
    "the the the the",
)


@pytest.fixture
def command(tmp_path: Path, routed_bundle: Path, cloud_model: Path) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# six of them\n\n" + "\n".join(PROMPTS) + "\n", encoding="utf-8")
    models = ["--bundle", str(routed_bundle), "--model", str(cloud_model), "--routing-rate", "1"]
    out = ["--prompts", str(prompts), "--out", str(tmp_path / "out")]
    return [sys.executable, str(DEMO), *models, *out]


def test_the_demo_answers_every_prompt_in_every_phase_within_its_budget(
    command: Sequence[str], tmp_path: Path
) -> None:
    # Settings of the person's own must not reach the demo's servers.
    environment = os.environ | {"EDGE_AGENT_BUDGET": "nonsense", "CLOUD_SERVER_MODEL": "/nowhere"}
    (images := tmp_path / "out" / "images").mkdir(parents=True)
    theirs, old = images / "2-2024-holiday.png", images / "1-77-edge.png"
    theirs.touch()
    old.touch()
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (theirs.exists(), old.exists()) == (True, False)
    out = tmp_path / "out"
    record = [json.loads(line) for line in (out / "record.jsonl").read_text(encoding="utf-8").splitlines()]

    by_phase = defaultdict(list)
    for line in record:
        by_phase[line["phase"]].append(line)
    for phase in (1, 2, 3):
        assert [line["prompt"] for line in by_phase[phase]] == list(PROMPTS)
    for line in record:
        assert hashlib.sha256((out / line["file"]).read_bytes()).hexdigest() == line["sha256"]

    wanted = _reasons(by_phase[1]).count("pareto_cloud")
    assert wanted > 1
    assert set(_reasons(by_phase[1])) <= {"pareto_edge", "pareto_cloud"}, "phase 1 fits the budget"
    assert _reasons(by_phase[2]).count("pareto_cloud") == wanted // 2
    assert _reasons(by_phase[2]).count("quota_exhausted") == wanted - wanted // 2
    assert all(line["served_by"] == "edge" for line in by_phase[3])
    fallback, *others = [line for line in by_phase[3] if line["reason"] != "pareto_edge"]
    assert (fallback["route"], fallback["cost_micro_usd"]) == ("cloud", 0) and fallback["fallback"]
    assert all(line["reason"] == "cloud_unavailable" or line["fallback"] for line in others)

    for phases, app in (((1, 2), "gallery"), ((3,), "kiosk")):
        asked = [line for phase in phases for line in by_phase[phase]]
        budgets = [budget for line in asked for budget in line["quota"]]
        assert {budget["app"] for budget in budgets} == {None, app}
        (cap,) = {budget["cap_micro_usd"] for budget in budgets if budget["app"]}
        assert all(budget["spent_micro_usd"] <= budget["cap_micro_usd"] for budget in budgets)
        cost = sum(line["cost_micro_usd"] for line in asked)
        assert cost == PRICE_MICRO_USD * sum(line["served_by"] == "cloud" for line in asked) <= cap

    with Image.open(out / "contact-sheet.png") as sheet:
        sheet.load()
        assert (sheet.format, sheet.mode) == ("PNG", "RGB") and min(sheet.size) > 500
        colours = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert {(0x2F, 0x6F, 0xB7), (0xE0, 0x7B, 0x1A)} <= colours, "edge and cloud have a colour each"
    assert str(out / "contact-sheet.png") in done.stdout
    assert f"gallery spent ${(wanted + wanted // 2) / 100:.2f} " in done.stdout


def test_ctrl_c_stops_both_servers_and_leaves_no_traceback(command: Sequence[str], tmp_path: Path) -> None:
    record = tmp_path / "out" / "record.jsonl"
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        creationflags=STOPPABLE,
    ) as demo:
        while not record.exists():
            assert demo.poll() is None, demo.communicate()
            time.sleep(0.05)
        servers = psutil.Process(demo.pid).children()
        assert len(servers) == 2
        demo.send_signal(STOP if os.name == "nt" else signal.SIGINT)  # a group gets no Ctrl-C there
        _, complaint = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert complaint == "demo: stopped; both servers are down\n"
    assert not any(server.is_running() for server in servers)


@pytest.mark.linux
def test_a_terminal_that_is_closed_takes_both_servers_along(command: Sequence[str], tmp_path: Path) -> None:
    record = tmp_path / "out" / "record.jsonl"
    terminal, end = os.openpty()
    demo = subprocess.Popen(["setsid", "--ctty", *command], stdin=end, stdout=end, stderr=end)
    os.close(end)
    while not record.exists():
        assert demo.poll() is None
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65_536)
    servers = psutil.Process(demo.pid).children()
    assert len(servers) == 2
    os.close(terminal)
    demo.wait(60)
    _, left = psutil.wait_procs(servers, timeout=30)
    for server in left:
        server.kill()
    assert left == []


@pytest.mark.parametrize("width", [30, 44, 60, 66, 80, 200])
def test_a_figure_is_shown_whole_or_not_at_all_however_narrow_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(DEMO)
    from board import Board

    console = Console(file=io.StringIO(), width=width)
    board = Board(console, "title", PROMPTS)
    board._add(
        "a cat, two dogs and the moon", "0.465", "0.486", "cloud → edge", "quota_exhausted", "123456", "$0.01"
    )
    console.print(board._table())
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    (row,) = lines[1:]
    figures = {word for word in row.split() if word[0] in "0123456789$"}
    assert "123456" in figures and figures <= {"0.465", "0.486", "123456", "$0.01"}


def test_a_server_that_does_not_come_up_is_named_with_the_end_of_its_log(
    command: list[str], tmp_path: Path
) -> None:
    missing = tmp_path / "no-model"
    command[command.index("--model") + 1] = str(missing)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    assert "cloud-server ended with exit code 2" in done.stderr
    assert f"there is no model folder {missing}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--prompts", "/nowhere.txt", "cannot read the prompts"),
        ("--bundle", "/nowhere", str(Path("/nowhere"))),
    ],
)
def test_what_the_demo_cannot_use_is_refused_in_words(
    command: list[str], option: str, value: str, complaint: str
) -> None:
    command[command.index(option) + 1] = value
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2
    assert complaint in done.stderr and "Traceback" not in done.stderr


def _reasons(lines: Sequence[dict[str, Any]]) -> list[str]:
    return [line["reason"] for line in lines]
