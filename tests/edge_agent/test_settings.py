"""Flags beat the environment, the environment beats the file, and docs/settings.md has them all."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from edge_agent.__main__ import main
from edge_agent.budget import Budget, Rate
from edge_agent.errors import StartRefused
from edge_agent.settings import (
    SOCKET_PATH_BYTES,
    Settings,
    default_address,
    flag,
    resolve,
    socket_address,
    unknown,
    variable,
)
from tests.running import ROOT, short_folder

NAMES = [setting.name for setting in fields(Settings)]


def test_flags_beat_the_environment_and_the_environment_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text('routing_rate = 0.1\nmax_queue = 1\nbudget = ["1", "20/month"]\npng_facts = false\n')
    environment = {
        "EDGE_AGENT_ROUTING_RATE": "0.2",
        "EDGE_AGENT_MAX_QUEUE": "2",
        "EDGE_AGENT_CONFIG": str(file),
    }
    settings = resolve({"routing_rate": "0.3"}, environment)
    assert (settings.routing_rate, settings.max_queue, settings.png_facts) == (0.3, 2, False)
    assert [budget.name for budget in settings.budget] == ["day", "month"]
    assert settings.grace_s == Settings().grace_s


def test_budgets_and_rates_have_one_grammar() -> None:
    settings = resolve({"budget": "1, 0.2/hour, 20/month, 0.5/day@kiosk", "rate": "10/60,2/1.5"}, {})
    assert settings.budget == (
        Budget("day", "day", 1_000_000),
        Budget("hour", "hour", 200_000),
        Budget("month", "month", 20_000_000),
        Budget("day@kiosk", "day", 500_000, "kiosk"),
    )
    assert settings.rate == (Rate("rate 10/60", 10, 60.0), Rate("rate 2/1.5", 2, 1.5))


@pytest.mark.parametrize("text", ["0", "0.0", " 0 "])
def test_zero_may_be_written_with_decimals(text: str) -> None:
    assert resolve({"keep_alive_s": text}, {}).keep_alive_s == 0


def test_a_budget_for_one_app_leaves_the_default_one_for_all_in_force() -> None:
    kiosk = Budget("day@kiosk", "day", 20_000, "kiosk")
    assert resolve({"budget": "0.02/day@kiosk"}, {}).budget == (*Settings().budget, kiosk)
    assert resolve({"budget": "5/month,0.02/day@kiosk"}, {}).budget[1:] == (kiosk,)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("listen", "0.0.0.0:50051", "loopback"),
        ("listen", "192.168.1.7:50051", "loopback"),
        ("listen", "example.com:50051", "loopback"),
        ("listen", "50051", "HOST:PORT"),
        ("listen", "localhost:http", "HOST:PORT"),
        ("listen", "unix:", "path"),
        ("listen", "::1:50051", "such as [::1]:50051"),
        ("listen", "[127.0.0.1]:50051", "and others do not"),
        ("cloud", "example.com", "HOST:PORT"),
        ("cloud", "https://example.com:443", "begins with a scheme"),
        ("listen", "http://127.0.0.1:50051", "begins with a scheme"),
        ("cloud", "::1:50052", "such as [::1]:50051"),
        ("cloud", "example.com:0", "the port 0 cannot be called"),
        ("cloud", "unix:", "path"),
        ("listen", "127.0.0.1:" + "9" * 5_000, "neither unix:PATH nor HOST:PORT"),
        ("listen", "[[::1]]:50051", "stand in brackets"),
        ("listen", "unix:/tmp/a\0b", "NUL"),
        ("cloud", "a\0b:443", "NUL"),
        ("cloud", "a\udcff:443", "must be UTF-8"),
        ("cloud", "unix:/tmp/a\udcff", "must be UTF-8"),
        ("listen", "\udcff:50051", "must be UTF-8"),
        ("threads", "1025", "from 0 to 1024"),
        ("cloud", "127.0.0.1:" + "9" * 5_000, "neither unix:PATH nor HOST:PORT"),
        ("state", "a\0b", "NUL"),
        *(
            pytest.param(*case, marks=pytest.mark.posix)
            for case in (
                ("listen", "unix:/" + "x" * 200, f"at most {SOCKET_PATH_BYTES} bytes"),
                ("listen", "unix:/tmp/a\udcff", "must be UTF-8"),
                ("listen", "unix:/tmp/a#b", "with # in it"),
                ("listen", "unix:/tmp/a%20b", "with % in it"),
                ("listen", "unix:/tmp/a?b", "with ? in it"),
                ("listen", "unix:/tmp/a,b", "with , in it"),
                ("models", "~nosuchuser/models", "~nosuchuser"),
                ("bundle", "~nosuchuser/b", "write the path out"),
            )
        ),
        ("routing_rate", "1.5", "between 0 and 1"),
        ("routing_rate", "half", "between 0 and 1"),
        ("budget", "1/week", "hour, day, month, total"),
        ("budget", "one", "US dollars"),
        ("budget", "-1", "US dollars"),
        ("budget", "", "0 keeps everything on the edge"),
        ("budget", "1/day@", "an app's name"),
        ("budget", "1e999999", "US dollars"),
        ("budget", "1,2/day", "two budgets"),
        ("budget", "0.2@kiosk/month", "such as 0.2/month@kiosk"),
        ("budget", "0.2/day@küche", "printable ASCII"),
        ("budget", "0.2/day@" + "x" * 129, "at most 128"),
        ("budget", "1_000", "such as 0.04"),
        ("max_price", "0.0000001", "six decimals"),
        ("max_price", "NaN", "US dollars"),
        ("rate", "10", "CALLS/SECONDS"),
        ("rate", "10/0", "above 0"),
        ("providers", "cuda,cuda", "given twice"),
        ("providers", "CUDAExecutionProvider", "names are like cuda"),
        ("providers", "cuda cpu", "commas between"),
        ("max_queue", "-1", "whole number"),
        ("max_queue", "1.5", "whole number"),
        ("max_queue", "9" * 5_000, "whole number"),
        ("max_prompt_characters", "0", "1 or more"),
        ("apps", "desk,kïosk", "'kïosk' is no app's name: app may hold printable ASCII"),
        ("apps", "x" * 129, "at most 128"),
        ("grace_s", "inf", "seconds"),
        ("grace_s", "9" * 400, "seconds"),
        ("keep_alive_s", "-1", "or 0 for good"),
        ("keep_alive_s", "nan", "or 0 for good"),
        ("png_facts", "perhaps", "true or false"),
        ("log_format", "xml", "text or json"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_what_it_may_be(
    name: str, value: str, words: str
) -> None:
    for flags, environment, where in (
        ({name: value}, {}, flag(name)),
        ({}, {variable(name): value}, variable(name)),
    ):
        with pytest.raises(StartRefused) as refused:
            resolve(flags, environment)
        assert where in refused.value.message and words in refused.value.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("routing-rate = 0.5", "did you mean routing_rate"),
        ("whatever = 1", "there are listen"),
        ("routing_rate = ", "cannot read"),
        ("routing_rate = {a = 1}", "routing_rate in"),
        ("max_queue = [[1]]", "max_queue in"),
        (f"grace_s = {'9' * 400}", "number of seconds"),
        (f"grace_s = 0x{'f' * 5_000}", "cannot read"),
        ("state = " + "[" * 5_000, "nested too deep"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(content)
    with pytest.raises(StartRefused, match=words):
        resolve({"config": str(file)}, {})


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text("max_queue = 3\n", encoding="utf-8-sig")
    assert resolve({"config": str(tmp_path / "edge.toml")}, {}).max_queue == 3


def test_a_budget_of_an_app_that_may_not_call_is_refused() -> None:
    with pytest.raises(StartRefused, match=r"--budget limits 'kisok'.*kiosk, desk \(EDGE_AGENT_APPS\)"):
        resolve({"budget": "0.2/day@kisok"}, {"EDGE_AGENT_APPS": "kiosk,desk"})
    assert len(resolve({"budget": "0.2/day@kiosk"}, {"EDGE_AGENT_APPS": "kiosk"}).budget) == 2
    assert len(resolve({"budget": "0.2/day@kisok"}, {}).budget) == 2


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match="cannot read"):
        resolve({"config": str(tmp_path / "none.toml")}, {})


@pytest.mark.posix
def test_the_default_socket_lies_in_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_address() == "unix:/run/user/7/edge-agent/agent.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_address() == f"unix:{tmp_path}/.local/state/routet2i/edge-agent/socket/agent.sock"


@pytest.mark.skipif(os.name == "posix", reason="Windows only")
def test_where_python_has_no_unix_sockets_it_is_a_loopback_address() -> None:
    assert Settings().address == default_address() == "127.0.0.1:50051"
    with pytest.raises(StartRefused, match=r"no Unix sockets on Windows; use a loopback address"):
        resolve({"listen": "unix:C:/agent.sock"}, {})


@pytest.mark.posix
def test_a_default_socket_whose_path_is_too_long_is_refused_saying_how_to_choose_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/" + "x" * 100)
    with pytest.raises(StartRefused, match=rf"at most {SOCKET_PATH_BYTES} bytes.*--listen"):
        assert not Settings().address


@pytest.mark.posix
@pytest.mark.parametrize("name", ["listen", "bundle", "models", "state", "cache", "config"])
def test_a_home_that_is_not_known_is_refused(name: str) -> None:
    path = "~nosuchuser/x"

    def all_folders() -> list[Path]:
        settings = resolve({name: f"unix:{path}" if name == "listen" else path}, {})
        return [settings.bundle_folder, settings.store.folder, settings.cache_folder, settings.ledger_file]

    with pytest.raises(StartRefused, match=f"{path}: no home folder"):
        all_folders()


def test_a_variable_that_is_no_setting_is_told_with_what_it_may_be() -> None:
    environment = {
        "EDGE_AGENT_BUGDET": "1",
        "EDGE_AGENT_ZZZ": "1",
        "HOME": "/",
        "EDGE_AGENT_ADDRESS": "unix:x",
    }
    assert unknown(environment | {"EDGE_AGENT_CONFIG": "x", "EDGE_AGENT_BUDGET": "1"}) == [
        "EDGE_AGENT_BUGDET is no setting: did you mean EDGE_AGENT_BUDGET?",
        "EDGE_AGENT_ZZZ is no setting",
    ]


def _rows() -> dict[str, str]:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    section = text.split("\n## edge-agent\n")[1].split("\n## ")[0]
    return {line.split("`")[1]: line for line in section.splitlines() if line.startswith("| `")}


@pytest.mark.parametrize("setting", fields(Settings), ids=NAMES)
def test_every_setting_is_documented_with_its_default(setting: Any) -> None:
    assert setting.name in _rows(), f"docs/settings.md has no row for {setting.name}"
    default = setting.metadata["default"]
    if default:
        assert _rows()[setting.name].split("|")[2].strip() == f"`{default}`"


def test_every_documented_setting_exists() -> None:
    assert list(_rows()) == NAMES


def test_help_shows_every_flag_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in NAMES if flag(name) not in text] == []
    assert "examples:" in text


@pytest.mark.posix
@pytest.mark.parametrize("more", [0, 1])
def test_the_longest_path_of_a_socket_is_this_systems_own(more: int) -> None:
    path = short_folder() / "x"
    path = path.with_name("x" * (SOCKET_PATH_BYTES + more - len(str(path.parent)) - 1))
    try:
        with socket.socket(socket.AF_UNIX) as listener, suppress(OSError):
            listener.bind(str(path))
        assert path.exists() == (more == 0)
        if more:
            with pytest.raises(ValueError, match="at most"):
                socket_address(str(path))
        else:
            assert socket_address(str(path)) == f"unix:{path}"
    finally:
        shutil.rmtree(path.parent)
