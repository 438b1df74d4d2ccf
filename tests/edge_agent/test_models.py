"""`edge-agent models`, as a program with exit codes: what it prints, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from edge_agent.__main__ import main
from edge_agent.bundle import Bundle, write_manifest
from edge_agent.client import UNREACHABLE, AgentClient, CallFailed
from edge_agent.errors import Busy
from edge_agent.manifest import CALIBRATION, DENOISER, MANIFEST, PREDICTOR, SCHEMA_VERSION
from edge_agent.settings import STARTER
from edge_agent.store import Store
from tests.hollow import SIZES, hollow_bundle
from tests.running import Finished, Process, Run, commands, process_environment, short_folder
from tests.web import web_server

LISTED = (
    "name", "current", "served", "calibrated", "digest", "folder", "bytes", "width", "height", "sizes", "steps",
    "licence", "error"
)  # fmt: skip
PULLED = (
    "name", "folder", "digest", "bytes", "fetched_bytes", "was_installed", "current", "served", "calibrated", "advice"
)  # fmt: skip
LABEL_AND_CALIBRATE = (
    "run `edge-export label`, unless you have its labels of both models, then `edge-export calibrate`"
)


@pytest.fixture
def home() -> Iterator[Path]:
    made = short_folder()  # a socket must fit
    yield made
    shutil.rmtree(made)


@pytest.fixture
def models(home: Path) -> Path:
    return home / "data" / "routet2i" / "models"


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(home)
    command = commands(home, monkeypatch, capfd)
    return lambda *arguments: command("models", *arguments)


def names(finished: Finished) -> dict[str, dict[str, Any]]:
    assert all(tuple(model) == LISTED for model in finished.objects)
    return {model["name"]: model for model in finished.objects}


def test_the_starter_is_there_from_the_beginning_and_nothing_is_made(run: Run, models: Path) -> None:
    (starter,) = run("list", "--json").objects
    assert tuple(starter) == LISTED
    assert (starter["name"], starter["current"], starter["served"]) == ("starter", True, None)
    assert (starter["calibrated"], starter["width"], starter["licence"]) == (True, 64, "Apache-2.0")
    assert starter["sizes"] == [[64, 64]]
    assert starter["digest"] == Bundle.open(STARTER, verify=False).model_digest
    assert starter["bytes"] == sum(path.stat().st_size for path in STARTER.rglob("*") if path.is_file()) - (
        (STARTER / "manifest.json").stat().st_size
    )
    table = run("list").out
    assert "current" in table and "starter" in table and starter["digest"][:16] in table
    assert not models.exists()


def test_a_model_is_pulled_chosen_verified_and_removed(run: Run, home: Path, models: Path) -> None:
    folder = hollow_bundle(home / "made" / "tiny")
    (pulled,) = run("pull", "made/tiny", "--name", "mine", "--json").objects
    assert tuple(pulled) == PULLED
    assert (pulled["name"], pulled["folder"], pulled["current"]) == ("mine", str(models / "mine"), False)
    assert pulled["bytes"] == pulled["fetched_bytes"] == sum(SIZES.values())
    again = run("pull", folder, "--name", "mine", "--use")
    assert (again.code, "was here already" in again.out, "mine is the chosen model" in again.out) == (
        0,
        True,
        True,
    )
    listed = names(run("list", "--json"))
    assert [listed[name]["current"] for name in ("starter", "mine")] == [False, True]
    assert [found["ok"] for found in run("verify", "--json").objects] == [True, True]
    refused = run("remove", "mine")
    assert (refused.code, refused.out) == (2, "") and "models use starter" in refused.err
    (used,) = run("use", "starter", "--json").objects
    assert (used["name"], used["folder"], used["calibrated"]) == ("starter", str(STARTER), True)
    (removed,) = run("remove", "mine", "--json").objects
    assert removed == {
        "name": "mine",
        "freed_bytes": pulled["bytes"] + (folder / "manifest.json").stat().st_size,
    }
    assert list(names(run("list", "--json"))) == ["starter"]


def test_an_uncalibrated_model_says_so_and_how_to_calibrate(run: Run, home: Path) -> None:
    pulled = run("pull", hollow_bundle(home / "tiny"), "--use")
    assert "uncalibrated: " in pulled.out
    stages = ("label", "train", "predictor", "calibrate")  # each makes what the next one reads
    take_up = "edge-agent models pull BUNDLE --name NEW --use"
    learn = re.compile(".*".join([*(f"`edge-export {stage}`" for stage in stages), take_up]))
    assert learn.search(pulled.out)
    other = Path(shutil.copytree(STARTER, home / "other"))
    shutil.copy(other / "schedules" / "4.json", other / "schedules" / "5.json")
    write_manifest(
        other, steps=[4, 5, 8, 16], name="other"
    )  # another model, with the calibration of the first
    assert "the calibration was made for edge model" in run("pull", other).out
    assert "uncalibrated: " in run("use", "other").out
    assert learn.search(run("use", "other").out)
    listed = names(run("list", "--json"))
    assert [listed[name]["calibrated"] for name in ("starter", "hollow", "other")] == [True, False, False]
    (shown,) = run("show", "other", "--json").objects
    assert shown["calibrated"] is False and "edge-export calibrate" in shown["advice"][0]
    assert shown["calibrated_for_edge"] != shown["digest"]
    assert learn.search(run("show", "other").out)
    assert "uncalibrated" not in run("use", "starter").out


def test_a_model_with_a_predictor_alone_is_told_where_labels_come_from(run: Run, home: Path) -> None:
    """`edge-export calibrate` reads them."""
    bare = Path(shutil.copytree(STARTER, home / "bare"))
    (bare / CALIBRATION).unlink()
    write_manifest(bare, name="bare")
    retrained = Path(shutil.copytree(STARTER, home / "retrained"))
    graph = onnx.load(retrained / PREDICTOR)
    graph.producer_version = "another"
    onnx.save(graph, retrained / PREDICTOR)
    write_manifest(retrained, name="retrained")
    for folder, why in ((bare, "has no calibration"), (retrained, "was made for another predictor")):
        said = run("pull", folder).out
        assert why in said and LABEL_AND_CALIBRATE in said


def test_show_finds_a_model_by_name_and_by_the_beginning_of_its_digest(run: Run, home: Path) -> None:
    run("pull", hollow_bundle(home / "tiny"))
    (shown,) = run("show", "hollow", "--json").objects
    assert (shown["made_as"], shown["steps"], shown["files"]) == ("hollow", [4], len(SIZES) + 1)
    assert shown["sizes"] == run("list", "--json").objects[1]["sizes"]
    assert run("show", shown["digest"][:12], "--json").objects == [shown]
    assert "model.onnx" not in run("show", "hollow").out
    run("pull", home / "tiny", "--name", "again")
    several = run("show", shown["digest"][:12])
    assert several.code == 2 and "several digests begin with" in several.err
    assert "those of again, hollow: name one" in several.err
    for name in ("none", ""):
        wrong = run("show", name)
        assert wrong.code == 2 and "there are starter, again, hollow" in wrong.err
    for side in ("edge", "cloud"):
        assert run("show", side).code == 3  # no daemon is there to ask


def test_show_is_written_for_people(run: Run, home: Path) -> None:
    """What programs read, --json has as it is."""
    lines = [re.split("  +", line, maxsplit=1) for line in run("show", "starter").out.splitlines()]
    shown = {line[0]: line[-1] for line in lines}
    assert shown["scheduler"] == "DPMSolverMultistepScheduler"
    assert (shown["steps"], shown["sizes"]) == ("4, 8, 16", "64x64")
    assert shown["latent to rgb"] == "5 x 3 numbers"
    assert "(" not in "".join(shown.values())
    (facts,) = run("show", "starter", "--json").objects
    assert "scheduler" not in facts and facts["sizes"] == [[64, 64]]
    other = Path(shutil.copytree(STARTER, home / "other"))
    write_manifest(
        other, name="other", dtypes={"unet": "fp16", "vae_decoder": "int8"}, other_sizes=[(96, 64)]
    )
    run("pull", other)
    assert re.search("^dtypes +unet fp16; vae_decoder int8$", said := run("show", "other").out, re.MULTILINE)
    assert re.search("^sizes +64x64, 96x64$", said, re.MULTILINE)


def test_verify_reads_every_byte_and_list_does_not(run: Run, home: Path, models: Path) -> None:
    run("pull", hollow_bundle(home / "tiny"))
    with (models / "hollow" / DENOISER).open("r+b") as file:
        file.write(b"x")
    assert names(run("list", "--json"))["hollow"]["error"] is None
    damaged = run("verify")
    assert damaged.code == 2
    assert "starter: whole\n" in damaged.out
    assert (
        f"{Path(DENOISER)} does not match its sha256" in damaged.out and "models remove hollow" in damaged.out
    )
    assert run("verify", "starter").code == 0
    (found,) = run("verify", "hollow", "--json").objects
    assert (found["name"], found["ok"]) == ("hollow", False) and str(Path(DENOISER)) in found["error"]
    assert run("verify", "none").code == 2


def test_verify_does_not_take_a_bundle_of_a_newer_schema_for_a_damaged_one(
    run: Run, home: Path, models: Path
) -> None:
    """To pull it again would bring the same."""
    run("pull", hollow_bundle(home / "tiny"))
    manifest = models / "hollow" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": SCHEMA_VERSION + 1}))
    found = run("verify", "hollow")
    assert found.code == 2
    assert found.out.startswith("hollow: too new: ") and "update edge-agent" in found.out
    assert "damaged" not in found.out and "remove" not in found.out
    assert run("use", "hollow").code == 2


def test_a_damaged_model_is_listed_with_what_is_wrong_and_not_chosen(
    run: Run, home: Path, models: Path
) -> None:
    run("pull", hollow_bundle(home / "tiny"))
    (models / "hollow" / DENOISER).unlink()
    listed = names(run("list", "--json"))["hollow"]
    assert f"{Path(DENOISER)} is missing" in listed["error"] and listed["digest"] is None
    assert run("list").code == 0
    used = run("use", "hollow")
    assert used.code == 2 and "is missing" in used.err
    assert names(run("list", "--json"))["starter"]["current"] is True
    assert run("remove", "hollow").code == 0


def test_a_folder_that_is_no_model_is_never_deleted_nor_advised_to_be(
    run: Run, home: Path, models: Path
) -> None:
    (models / "photos").mkdir(parents=True)
    (models / "photos" / "holiday.jpg").write_bytes(b"irreplaceable")
    verified = run("verify", "photos")
    assert verified.code == 2 and verified.out.startswith("photos: no model: ")
    pulled = run("pull", hollow_bundle(home / "tiny"), "--name", "photos")
    assert pulled.code == 2 and "another --name" in pulled.err
    assert "remove" not in verified.out + pulled.err
    removed = run("remove", "photos")
    assert removed.code == 2 and "is no model" in removed.err
    assert (models / "photos" / "holiday.jpg").exists()


def test_a_chosen_model_that_is_gone_is_told(run: Run, home: Path, models: Path) -> None:
    run("pull", hollow_bundle(home / "tiny"), "--use")
    shutil.rmtree(models / "hollow")
    listed = run("list")
    assert listed.code == 0 and "the chosen model hollow is gone" in listed.err


def test_a_damaged_choice_is_told_and_keeps_nobody_from_choosing(run: Run, home: Path, models: Path) -> None:
    run("pull", hollow_bundle(home / "tiny"))
    (models / ".current").write_bytes(b"\xff two\nlines")
    listed, shown = run("list", "--json"), run("show", "starter", "--json")
    pulled = run("pull", hollow_bundle(home / "other", seed=1), "--name", "other", "--json")
    for finished in (listed, shown, pulled):
        assert finished.code == 0 and "holds no model's name; choose one with" in finished.err
        assert not any(model["current"] for model in finished.objects)
    assert list(names(listed)) == ["starter", "hollow"]
    assert run("use", "hollow").code == 0
    assert names(run("list", "--json"))["hollow"]["current"]


def test_a_folder_that_is_called_as_no_model_can_be_is_not_passed_over_in_silence(
    run: Run, home: Path, models: Path
) -> None:
    hollow_bundle(models / "my model")
    (models / ".partial" / "odd name").mkdir(parents=True)
    listed = run("list")
    assert "'my model' is not listed" in listed.err and "odd name" not in listed.out
    for action in ("use", "show", "verify", "remove"):
        refused = run(action, "my model")
        assert refused.code == 2 and "my model is no model" in refused.err and "rename" in refused.err


def test_an_unfinished_pull_is_listed_and_can_be_removed(run: Run, home: Path) -> None:
    hollow_bundle(home / "www")
    with web_server(home / "www") as web:
        web.misbehave("status", at=DENOISER, code=503, headers={"Retry-After": "3600"})
        broken = run("pull", web.address)
    assert (broken.code, broken.out) == (3, "") and "goes on where this one stopped" in broken.err
    listed = names(run("list", "--json"))["hollow"]
    assert "not pulled to its end" in listed["error"] and listed["bytes"] > SIZES["text_encoder/model.onnx"]
    assert (Path(listed["folder"]) / DENOISER).parent.is_dir()
    for action in ("use", "show", "verify"):
        refused = run(action, "hollow")
        assert refused.code == 2 and "hollow is not pulled to its end" in refused.err
    assert run("remove", "hollow").code == 0
    assert list(names(run("list", "--json"))) == ["starter"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("pull", "nothing"), 2, "hf:OWNER/NAME"),
        (("pull", ""), 2, "the source is empty"),
        (("pull", "hf:nobody"), 2, "hf:OWNER/NAME"),
        (("pull", "ftp://host/b"), 2, "http"),
        (("pull", "hf:someone/model"), 3, "cannot be reached"),
        (("pull", "http://127.0.0.1:1/b"), 3, "cannot be reached"),
        (("pull", "."), 2, "has no manifest.json, so it is no bundle"),
        (("pull", STARTER, "--name", "starter"), 2, "--name"),
        (("pull", STARTER, "--name", "../x"), 2, "--name"),
        (("use", "none"), 2, "there is no model 'none'"),
        (("use", "../../etc"), 2, "there is no model"),
        (("remove", "starter"), 2, "cannot be removed"),
        (("remove", "none"), 2, "there is no model"),
        (("show",), 2, "NAME"),
        ((), 2, "ACTION"),
        *(
            pytest.param(*case, marks=pytest.mark.posix)
            for case in (
                (("pull", "~nosuchuser/b"), 2, "no home folder"),
                (("list", "--models", "~nosuchuser/m"), 2, "no home folder"),
                (("list", "--models", "/dev/null"), 2, "cannot be read"),
                (
                    ("use", "starter", "--models", "/dev/null"),
                    2,
                    "/dev/null cannot be written: it is no folder; choose",
                ),
            )
        ),
    ],
)
def test_what_is_wrong_is_said_with_the_right_exit_code(
    run: Run, models: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, words: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    finished = run(*arguments)
    assert (finished.code, finished.out) == (code, "")
    assert words in finished.err
    assert not models.exists() or not [path for path in models.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("use", "mine"), 2),
        (("remove", "mine"), 2),
        (("show", "mine"), 2),
        (("verify", "mine"), 2),
        (("list",), 0),
        (("verify",), 0),
        (("use", "starter"), 0),
    ],
)
def test_a_folder_that_is_not_there_is_told_and_only_a_pull_makes_it(
    run: Run, home: Path, arguments: tuple[str, ...], code: int
) -> None:
    finished = run(*arguments, "--models", home / "misspelt")
    assert finished.code == code
    assert f"the folder {home / 'misspelt'} is not there" in finished.err
    assert not (home / "misspelt").exists()


def test_another_folder_can_be_named(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("pull", hollow_bundle(home / "tiny"), "--models", home / "elsewhere")
    assert (home / "elsewhere" / "hollow").is_dir()
    assert list(names(run("list", "--json"))) == ["starter"]
    monkeypatch.setenv("EDGE_AGENT_MODELS", str(home / "elsewhere"))
    assert list(names(run("list", "--json"))) == ["starter", "hollow"]


@pytest.mark.parametrize("action", [(), ("list",), ("show",), ("pull",), ("verify",), ("use",), ("remove",)])
def test_help_teaches(run: Run, action: tuple[str, ...]) -> None:
    finished = run(*action, "--help")
    assert finished.code == 0
    assert "edge-agent models" in finished.out.partition("examples:")[2] or action in ((), ("list",))
    if action:
        assert "--json prints one object" in finished.out or action == ("show",)


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., Process]]:
    """Starts a daemon at the default socket."""
    started: list[Process] = []

    def start(*flags: str | Path) -> Process:
        started.append(Process("edge_agent", home, "--threads", "1", *flags))
        started[-1].wait_for("serving")
        return started[-1]

    yield start
    for daemon in started:
        daemon.end()


def test_a_running_daemon_takes_up_the_chosen_model_and_keeps_it_from_being_removed(
    run: Run, models: Path, miniature_bundle: Path, start: Callable[..., Process]
) -> None:
    assert run("pull", miniature_bundle).code == 0
    daemon = start()
    (used,) = run("use", "miniature", "--json").objects
    assert (used["served"], used["folder"]) == (True, str(models / "miniature"))
    assert main(["generate", "a cat", "--seed", "7", "-o", "cat.png"]) == 0
    assert run("show", "edge", "--json").objects[0]["digest"] == used["digest"]
    listed = names(run("list", "--json"))
    assert [listed[name]["served"] for name in ("starter", "miniature")] == [False, True]
    assert "current, served" in run("list").out
    (models / ".current").unlink()  # the daemon goes on with it
    refused = run("remove", "miniature")
    assert refused.code == 2 and "a running daemon serves miniature" in refused.err
    assert "the running daemon serves it" in run("use", "starter").out
    assert "comes with the project" in run("remove", "starter").err
    assert run("remove", "miniature").code == 0
    assert daemon.stop() == 0


def test_a_model_that_the_running_daemon_cannot_load_is_not_chosen(
    run: Run, home: Path, start: Callable[..., Process]
) -> None:
    run("pull", hollow_bundle(home / "tiny"))  # whole, and no model
    start()
    refused = run("use", "hollow")
    assert (refused.code, refused.out) == (2, "")
    assert "so starter stays the chosen model" in refused.err and "hollow" in refused.err
    listed = names(run("list", "--json"))
    assert (listed["starter"]["current"], listed["starter"]["served"]) == (True, True)
    assert main(["generate", "a red apple", "-o", "apple.png"]) == 0


def test_a_model_that_the_daemon_refuses_leaves_even_a_damaged_one_chosen(
    run: Run, home: Path, models: Path, start: Callable[..., Process]
) -> None:
    run("pull", STARTER, "--name", "former", "--use")
    run("pull", hollow_bundle(home / "tiny"))
    start()
    (models / "former" / DENOISER).unlink()  # the daemon has it in memory
    refused = run("use", "hollow")
    assert refused.code == 2 and "so former stays the chosen model" in refused.err
    assert names(run("list", "--json"))["former"]["current"] is True


def test_a_daemon_without_room_for_a_model_has_not_gone_away(
    run: Run, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("pull", STARTER, "--name", "mine")
    start()

    def full(agent: AgentClient, model: str) -> dict[str, Any]:
        raise CallFailed("0 MB can be had", UNREACHABLE, no_room=True)

    monkeypatch.setattr(AgentClient, "reload", full)
    used = run("use", "mine")
    assert (used.code, used.out) == (3, "")
    assert "cannot serve mine now, so starter stays the chosen model: 0 MB can be had" in used.err
    assert names(run("list", "--json"))["starter"]["current"] is True


def test_a_daemon_that_dies_of_a_model_leaves_the_former_one_chosen(
    run: Run, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("pull", STARTER, "--name", "mine")
    daemon = start()
    reload = AgentClient.reload

    def die(agent: AgentClient, model: str) -> dict[str, Any]:
        daemon.kill()
        return reload(agent, model)

    monkeypatch.setattr(AgentClient, "reload", die)
    used = run("use", "mine")
    assert (used.code, used.out) == (3, "") and "so starter stays the chosen model" in used.err
    assert names(run("list", "--json"))["starter"]["current"] is True


def test_whatever_ends_a_choice_before_the_model_is_served_leaves_the_former_one(
    run: Run, home: Path, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("pull", STARTER, "--name", "mine")
    start()

    def interrupt(agent: AgentClient, model: str) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(AgentClient, "reload", interrupt)
    used = run("use", "mine")
    assert used.code == 130 and "starter stays the chosen model" in used.err
    script = """
import os, sys
from edge_agent.__main__ import main
from edge_agent.client import AgentClient
AgentClient.reload = lambda *_: os._exit(9)
main(["models", "use", "mine"])
"""
    killed = subprocess.run([sys.executable, "-c", script], env=process_environment(home))
    assert killed.returncode == 9
    assert names(run("list", "--json"))["starter"]["current"] is True


@pytest.mark.parametrize(("address", "code"), [("unix:", 2), ("x:99999", 2), ("127.0.0.1:9", 3)])
def test_a_wrong_address_is_refused_before_anything_changes(
    run: Run, models: Path, address: str, code: int
) -> None:
    """Also one at which nothing answers."""
    assert run("pull", STARTER, "--use", "--agent", address).code == code
    assert not models.exists()
    run("pull", STARTER, "--name", "mine")
    for command in ("use", "remove"):
        assert run(command, "mine", "--agent", address).code == code
    listed = names(run("list", "--json"))
    assert listed["starter"]["current"] is True and "mine" in listed


def test_a_choice_that_cannot_be_written_is_told_with_what_is_served(
    run: Run, models: Path, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("pull", STARTER, "--name", "mine")
    start()

    def full(path: Path, _: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr("edge_agent.store.write_durably", full)
    used = run("use", "mine")
    assert used.code == 2 and "make room" in used.err
    assert "starter stays the chosen model; the daemon serves mine until it restarts" in used.err
    listed = names(run("list", "--json"))
    assert (listed["starter"]["current"], listed["mine"]["served"]) == (True, True)


def test_nobody_else_chooses_or_removes_while_the_daemon_loads(
    run: Run, models: Path, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "other"):
        run("pull", STARTER, "--name", name)
    start()
    reload, beside = AgentClient.reload, []

    def disturbed(agent: AgentClient, model: str) -> dict[str, Any]:
        store = Store(models, STARTER)
        for disturb in (store.choose, store.remove):
            with pytest.raises(Busy) as busy:
                disturb("other")
            beside.append(busy.value.message)
        return reload(agent, model)

    monkeypatch.setattr(AgentClient, "reload", disturbed)
    used = run("use", "mine")
    assert used.code == 0 and "the running daemon serves it" in used.out
    assert beside == ["another `edge-agent models use` or `remove` is under way; wait for it, or stop it"] * 2
    listed = names(run("list", "--json"))
    assert (listed["mine"]["current"], listed["mine"]["served"], "other" in listed) == (True, True, True)


def test_who_comes_while_another_chooses_may_try_again(run: Run, models: Path) -> None:
    run("pull", STARTER, "--name", "mine")
    with Store(models, STARTER).choosing("mine"):
        busy = run("use", "starter")
    assert (busy.code, busy.out) == (UNREACHABLE, "") and "is under way; wait for it" in busy.err


def test_a_hand_placed_model_with_numbers_beyond_any_float_spoils_no_list(run: Run, models: Path) -> None:
    for name, deep in (("large", False), ("deep", True)):
        folder = Path(shutil.copytree(STARTER, models / name))
        facts = json.loads((folder / CALIBRATION).read_text()) | {"scale": [10**400] * 10}
        (folder / CALIBRATION).write_text("[" * 100_000 + "]" * 100_000 if deep else json.dumps(facts))
        write_manifest(folder, name=name)
    listed = names(run("list", "--json"))
    assert [listed[name]["error"] is None for name in ("starter", "deep", "large")] == [True, False, False]
    assert [found["ok"] for found in run("verify", "--json").objects] == [True, False, False]


def test_a_daemon_with_a_bundle_of_its_own_keeps_it_and_that_is_said(
    run: Run, home: Path, start: Callable[..., Process]
) -> None:
    run("pull", hollow_bundle(home / "tiny"))
    daemon = start("--bundle", STARTER)
    used = run("use", "hollow")
    assert used.code == 0 and "was started with a --bundle or --models of its own" in used.out
    assert [line["event"] for line in daemon.lines].count("serving") == 1  # nothing was loaded anew
    assert run("pull", home / "tiny", "--use", "--json").objects[0]["served"] is False
    assert names(run("list", "--json"))["hollow"]["current"] is True


def test_the_faults_of_a_bundle_that_a_daemon_was_started_with_refuse_no_other_model(
    run: Run, home: Path, start: Callable[..., Process]
) -> None:
    run("pull", STARTER, "--name", "mine")
    own = Path(shutil.copytree(STARTER, home / "own"))
    start("--bundle", own)
    (own / DENOISER).write_bytes(b"damaged since")
    used = run("use", "mine")
    assert used.code == 0 and f"of its own and serves {own.resolve()}" in used.out
    assert names(run("list", "--json"))["mine"]["current"] is True


def test_a_daemon_that_does_not_say_what_it_serves_keeps_every_model_from_being_removed(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.models.CONNECT_S", 0.3)
    run("pull", hollow_bundle(home / "tiny"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert run("remove", "hollow", "--agent", address).code == 3
        listed = names(run("list", "--json", "--agent", address))
        assert listed["hollow"]["served"] is None
    assert run("remove", "hollow").code == 0


def test_a_model_with_which_images_are_still_made_is_not_removed(
    run: Run, home: Path, models: Path, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs may have been unloaded, and are then loaded one by one, the decoder last."""
    run("pull", hollow_bundle(home / "tiny"))
    start()
    status, folder = AgentClient.status, models / "hollow"
    with monkeypatch.context() as patch:
        patch.setattr(
            AgentClient,
            "status",
            lambda agent: status(agent) | {"predecessors": [str(folder)]},
        )
        refused = run("remove", "hollow")
    assert refused.code == 2 and "still makes images with hollow; remove it when they are done" in refused.err
    assert run("remove", "hollow").code == 0
    assert not folder.exists()


def test_a_daemon_whose_chosen_model_is_gone_says_what_to_do(run: Run, home: Path, models: Path) -> None:
    run("pull", hollow_bundle(home / "tiny"), "--use")
    shutil.rmtree(models / "hollow")
    started = subprocess.run(
        [sys.executable, "-m", "edge_agent", "serve"],
        env=process_environment(home),
        capture_output=True,
        text=True,
    )
    assert started.returncode == 2
    assert "models use NAME" in started.stderr and "Traceback" not in started.stderr


@pytest.mark.parametrize("named", [False, True])
def test_a_daemon_whose_chosen_model_is_damaged_says_how_to_go_back(
    run: Run, home: Path, models: Path, named: bool
) -> None:
    run("pull", STARTER, "--name", "mine", "--use")
    weights = models / "mine" / DENOISER
    weights.write_bytes(bytes(weights.stat().st_size))
    started = subprocess.run(
        [sys.executable, "-m", "edge_agent", "serve", *(("--models", models) if named else ())],
        env=process_environment(home),
        capture_output=True,
        text=True,
    )
    assert started.returncode == 2
    assert "does not match its sha256" in started.stderr
    assert (
        f"`edge-agent models use starter{f' --models {models}' if named else ''}` goes back" in started.stderr
    )
