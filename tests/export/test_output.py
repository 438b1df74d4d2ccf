"""What a command writes replaces what was there whole, or not at all; and never what it reads. Counts count."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from export.__main__ import main
from export.errors import ExportError
from export.output import check_output, default_output, replacing, shown, write_output


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    for text in ("one\n", "twö\n"):
        write_output(file, text)
        assert file.read_bytes() == text.encode()  # the same bytes on every system
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with replacing(file) as partial:
            partial.write_text("half of tw")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "report.md"
    file.write_text("one")
    with pytest.raises(OSError, match="No space"):
        fill_the_disk()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.posix
def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, file = tmp_path / "report.md", tmp_path / "elsewhere" / "report.md"
    link.symlink_to(file)
    write_output(link, "one")
    assert link.is_symlink() and file.read_text() == "one"


@pytest.mark.posix
def test_what_cannot_become_the_result_is_refused(tmp_path: Path) -> None:
    """By the name of the option, and before the work."""
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_text("")
    os.mkfifo(pipe)
    for out, words in (
        (file / "a.md", "cannot be made"),
        (Path("/proc/a.md"), "cannot be made or written to"),
        (tmp_path, "is a folder; name a file"),
        (pipe, "is no regular file"),
    ):
        with pytest.raises(ExportError, match=f"^--report {out}.*{words}"):
            check_output(out, option="--report")
    check_output(tmp_path / "new" / "a.md", tmp_path / "nothing")
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "INPUT", "bundle", "--out"],
        ["validity", "INPUT", "--out"],
        ["inspect", "INPUT", "images", "--report"],
        ["label", "--prompts", "INPUT", "--out"],
        ["starter", "summary", "--labels", "INPUT", "--out"],
    ],
    ids=lambda command: command[0],
)
def test_no_command_writes_over_what_it_reads(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    given.write_text("\n".join(f"a photo of thing {number}" for number in range(60)))
    also = "linked"
    if os.name == "posix":
        (tmp_path / also).symlink_to(given)
    else:
        also = "GIVEN"  # where capitals make no difference
    before = given.read_bytes()
    for out in ("given", also):
        arguments = [str(given) if one == "INPUT" else one for one in command]
        assert main([*arguments, str(tmp_path / out)]) == 2
        assert f"{command[-1]} {tmp_path / out} is what is read; name another" in capsys.readouterr().err
    assert given.read_bytes() == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["evaluate", "labels", "bundle"], "evaluation.json"),
        (["validity", "labels"], "metrics.md"),
        (["precision", "bundle"], "precision.md"),
        (["starter", "summary", "--labels", "labels"], "docs/starter.md"),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_no_command_writes_over_somebodys_own_file_without_being_told(
    command: list[str],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told, it looks for what it reads, which is not there."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("# My metrics")
    for told, refused in (([], True), (["--out", name], False)):
        assert main([*command, *told]) == 2
        assert (
            f"{Path(name)} is there and this command did not write it" in capsys.readouterr().err
        ) is refused
    assert own.read_text() == "# My metrics"


def test_a_commands_own_file_and_an_empty_one_are_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for held in (None, "", "# Report", "# Report\n\nof yesterday"):
        if held is not None:
            Path("report.md").write_text(held)
        assert default_output("report.md", "# Report") == Path("report.md")


def test_a_document_names_a_path_from_where_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "runs" / "labels") == shown(Path("runs/labels")) == "runs/labels"
    assert shown(tmp_path.parent / "labels") == (tmp_path.parent / "labels").as_posix()


@pytest.mark.parametrize(
    "stage", ["autoencoder", "decoder", "edge-text", "sketch", "judge", "inspector", "cloud"]
)
def test_no_stage_of_the_starter_is_trained_for_less_than_a_step(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in ("0", "-5"):
        with pytest.raises(SystemExit, match="2"):
            main(["starter", stage, "--work", str(tmp_path), "--steps", steps])
        assert f"--steps: must be at least 1, not {steps}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "most"),
    [("threads", 1024), *((option, 8192) for option in ("rank", "hidden", "words", "sentence"))],
)
def test_a_predictor_is_not_trained_with_what_no_machine_has_room_for(
    option: str, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "labels", "bundle", "out", f"--{option}", str(most + 1)])
    assert f"--{option}: must be at most {most}, not {most + 1}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "least"),
    [(option, 1) for option in ("seeds", "steps", "kept", "rank", "hidden", "threads")]
    + [(option, 0) for option in ("words", "sentence")],
)
def test_a_predictor_is_not_trained_with_less_than_the_least(
    option: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "labels", "bundle", "out", f"--{option}", str(least - 1)])
    assert f"--{option}: must be at least {least}, not {least - 1}" in capsys.readouterr().err
