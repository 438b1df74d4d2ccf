"""Flags beat the environment, the environment beats the file, and docs/settings.md has them all."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from cloud_server.__main__ import main
from cloud_server.credentials import Credentials
from cloud_server.errors import StartRefused
from cloud_server.settings import Settings, is_loopback, resolve, split_address, unknown
from tests.running import ROOT

NAMES = [setting.name for setting in fields(Settings)]


def test_flags_beat_the_environment_and_the_environment_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "cloud-server.toml"
    file.write_text("price_micro_usd = 1\nmax_queue = 1\nmax_steps = 1\ngrace_s = 2\n")
    environment = {
        "CLOUD_SERVER_CONFIG": str(file),
        "CLOUD_SERVER_PRICE_MICRO_USD": "2",
        "CLOUD_SERVER_MAX_QUEUE": "2",
    }
    settings = resolve({"price_micro_usd": "3"}, environment)
    assert (settings.price_micro_usd, settings.max_queue, settings.max_steps) == (3, 2, 1)
    assert settings.grace_s == 2.0
    assert settings.max_side == Settings().max_side


def test_a_model_that_is_left_empty_is_the_starter_and_not_the_working_directory() -> None:
    assert (
        resolve({}, {"CLOUD_SERVER_MODEL": ""}).model == resolve({"model": ""}, {}).model == Settings().model
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prize_micro_usd = 1", "did you mean price_micro_usd"),
        ("price_micro_usd = 1.5", "price_micro_usd in .* must be a whole number"),
        ("price_micro_usd = true", "must be a whole number"),
        ("price_micro_usd = -1", "must be a whole number from 0 to 2147483647"),
        ("grace_s = inf", "must be a number of seconds"),
        ('max_queue = "many"', "must be a whole number"),
        ('price_micro_usd = "1_0"', "must be a whole number"),
        ('grace_s = "1_0"', "must be a number of seconds"),
        ("model = 7", "model in .* must be text"),
        ('dtype = "int3"', "one of auto, float32"),
        ("max_steps = 0", "at least 1"),
        ("price_micro_usd = ", "cannot read the settings file"),
        (f"grace_s = {'9' * 400}", "grace_s in .* must be a number of seconds"),
        (f"grace_s = 0x{'f' * 5_000}", "cannot read the settings file"),
        ('state = "a\\u0000b"', "state in .* the character NUL"),
        ('tokens = "a\\u0000b"', "tokens in .* the character NUL"),
        ("state = " + "[" * 5_000, "nested too deep"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "cloud-server.toml"
    file.write_text(content)
    with pytest.raises(StartRefused, match=words):
        resolve({"config": str(file)}, {})


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "cloud-server.toml").write_text("max_queue = 3\n", encoding="utf-8-sig")
    assert resolve({"config": str(tmp_path / "cloud-server.toml")}, {}).max_queue == 3


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(StartRefused, match="CLOUD_SERVER_MAX_QUEUE must be a whole number"):
        resolve({}, {"CLOUD_SERVER_MAX_QUEUE": "x"})


def test_a_variable_that_is_no_setting_is_told_with_what_it_may_be() -> None:
    assert unknown({"CLOUD_SERVER_TOKEN": "x", "CLOUD_SERVER_CONFIG": "x", "CLOUD_SERVER_TOKENS": "x"}) == [
        "CLOUD_SERVER_TOKEN is no setting: did you mean CLOUD_SERVER_TOKENS?"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    section = text.split("\n## cloud-server\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1, f"docs/settings.md has no row for {name}"
    default = getattr(Settings(), name)
    if default != "" and name != "model":
        assert f"`{default}`" in rows[0]


def test_every_documented_setting_exists() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    section = text.split("\n## cloud-server\n")[1].split("\n## ")[0]
    documented = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert documented == NAMES


def test_help_shows_every_flag_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["serve", "--help"])
    assert exit_code.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in NAMES if "--" + name.replace("_", "-") not in text] == []
    assert "examples:" in text


@pytest.mark.posix  # Windows takes it for a folder beside one's own
@pytest.mark.parametrize("name", ["config", "state", "model", "tokens", "tls"])
def test_a_home_that_is_not_known_is_refused_without_a_traceback(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_server.log.configure", lambda **_: None)  # pytest has the root logger
    given = {"state": str(tmp_path), "listen": "127.0.0.1:0", name: "~nosuchuser/x"}
    if name == "tls":
        given |= {"tls-cert": given["tls"], "tls-key": given.pop("tls")}
    assert main(["serve", *(word for name, value in given.items() for word in (f"--{name}", value))]) == 2
    assert "~nosuchuser/x: no home folder" in capsys.readouterr().err


def test_certificate_and_key_may_lie_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "pem").write_text("no certificate")
    with pytest.raises(StartRefused, match=r"PEM|SSL"):  # it was found and read
        Credentials(resolve({"tls_cert": "~/pem", "tls_key": "~/pem"}, {}))


@pytest.mark.parametrize("library", ["grpc", "cloud_server.server"])
def test_ctrl_c_while_a_library_is_being_imported_ends_the_program_quietly(library: str) -> None:
    """Some of them lose the exception that Python makes of it."""
    interrupted = f"""
import contextlib, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "{library}":
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["cloud-server", "serve", "--listen", "127.0.0.1:0"]
runpy.run_module("cloud_server", run_name="__main__")
"""
    finished = subprocess.run(
        [sys.executable, "-c", interrupted],
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}"},
    )
    assert (finished.returncode, finished.stderr) == (130, b"")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("::", False),
        ("192.168.1.2", False),
        ("localhost.example", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_an_address_is_host_and_port() -> None:
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("127.0.0.1:0") == ("127.0.0.1", 0)


@pytest.mark.parametrize(
    "listen",
    ["127.0.0.1:" + "9" * 5_000, "::1:80", "[127.0.0.1]:80", "localhost]:80", "[[::1]]:80", "[]:80", "80"],
)
def test_what_is_no_address_is_refused_with_an_example(listen: str) -> None:
    with pytest.raises(StartRefused, match=r"must be HOST:PORT, such as 127.0.0.1:50052 or \[::1\]:50052"):
        split_address(listen)
