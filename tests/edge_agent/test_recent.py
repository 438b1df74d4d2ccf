"""Alpha follows the prompts of the device, if it is told to, and says where their share is not the wanted one."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.calibration import Calibration
from edge_agent.manifest import CALIBRATION as CALIBRATION_FILE
from edge_agent.notes import SAVED_EVERY, Notes
from edge_agent.reader import Reader
from edge_agent.recent import ENOUGH, KEPT, Recent
from edge_agent.superiority import ALPHA_BOUND
from routet2i.edge.v1 import edge_pb2
from routet2i.image.v1 import image_pb2
from tests.edge_agent.test_calibration import CALIBRATION
from tests.running import daemon_here

SCORES = tuple(np.linspace(0.1, 0.6, 400).tolist())
WANTED = 0.5


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    return replace(CALIBRATION, scores=SCORES).save(tmp_path / "calibration.json")


def harder(count: int) -> list[float]:
    """Four in five of these lie below the calibration's alpha for half of its prompts."""
    return (np.random.default_rng(0).permutation(count) / count * 0.3 + 0.11).tolist()


def test_the_wanted_share_of_other_prompts_goes_to_the_cloud_once_alpha_follows_them(
    calibration: Calibration,
) -> None:
    still, following = Recent(calibration, WANTED), Recent(calibration, WANTED, follow=True)
    assert still.alpha == following.alpha == calibration.alpha(WANTED)
    routed: dict[Recent, list[bool]] = {still: [], following: []}
    for prs in harder(600):
        for recent, below in routed.items():
            below.append(prs < recent.alpha)
            recent.add(prs)
    assert np.mean(routed[still][300:]) == pytest.approx(0.8, abs=0.05)
    assert np.mean(routed[following][300:]) == pytest.approx(WANTED, abs=0.07)
    assert following.alpha <= 0.5


def test_the_first_prompts_move_alpha_by_little(calibration: Calibration) -> None:
    recent = Recent(calibration, WANTED, follow=True)
    for _ in range(3):
        recent.add(0.6)
    assert calibration.alpha(WANTED) < recent.alpha < calibration.alpha(WANTED) + 0.05


def test_only_the_last_scores_count(calibration: Calibration) -> None:
    one, other = (Recent(calibration, WANTED, follow=True) for _ in range(2))
    for prs in (*harder(500), *SCORES[:KEPT] * 3):
        one.add(prs)
    for prs in SCORES[:KEPT] * 3:
        other.add(prs)
    assert one.alpha == other.alpha


def test_scores_outlive_the_process_each_calibrations_apart(calibration: Calibration, tmp_path: Path) -> None:
    before = Recent(calibration, WANTED, follow=True, folder=tmp_path)
    due = [before.add(prs) for prs in harder(SAVED_EVERY + 7)]
    assert [number for number, now in enumerate(due, 1) if now] == [SAVED_EVERY]
    before.save()
    assert Recent(calibration, WANTED, follow=True, folder=tmp_path).alpha == before.alpha
    assert before.alpha != calibration.alpha(WANTED)
    other = replace(calibration, created="another day").save(tmp_path / "other.json")
    aside = Recent(other, WANTED, follow=True, folder=tmp_path)
    assert aside.alpha == other.alpha(WANTED)
    aside.add(0.2)
    aside.save()
    assert Recent(calibration, WANTED, follow=True, folder=tmp_path).alpha == before.alpha


@pytest.mark.parametrize(
    "content", ["", "{", "3", '{"prs": []}', "[" * 100_000, "[1" + "0" * 400 + "]", "[NaN]"]
)
def test_a_damaged_file_costs_no_more_than_what_it_held(
    calibration: Calibration, tmp_path: Path, content: str
) -> None:
    (tmp_path / f"recent-{calibration.calibration_id}.json").write_text(content)
    assert Recent(calibration, WANTED, follow=True, folder=tmp_path).alpha == calibration.alpha(WANTED)


def test_a_disk_that_takes_nothing_for_a_while_costs_nothing(
    calibration: Calibration, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    recent = Recent(calibration, WANTED, follow=True, folder=folder)
    for prs in harder(SAVED_EVERY):
        recent.add(prs)
    recent.save()
    assert "cannot be written" in str(caplog.records[-1].__dict__["fields"])
    folder.mkdir()
    recent.save()
    assert Recent(calibration, WANTED, follow=True, folder=folder).alpha == recent.alpha


def test_a_write_that_breaks_off_leaves_the_file_as_it_was_and_nothing_beside_it(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recent = Recent(calibration, WANTED, follow=True, folder=tmp_path)
    recent.add(0.2)
    recent.save()
    files = sorted(tmp_path.iterdir())
    write = Path.write_text

    def full(path: Path, text: str) -> int:
        write(path, text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    recent.add(0.3)
    recent.save()
    assert sorted(tmp_path.iterdir()) == files
    assert Notes(tmp_path / f"recent-{calibration.calibration_id}.json").read() == [0.2]


def test_a_file_is_left_alone_while_nothing_comes(calibration: Calibration, tmp_path: Path) -> None:
    """What it holds may just not be readable now."""
    file = tmp_path / f"recent-{calibration.calibration_id}.json"
    file.write_text("{")
    recent = Recent(calibration, WANTED, follow=True, folder=tmp_path)
    recent.save()
    assert file.read_text() == "{"
    recent.add(0.2)
    recent.save()
    file.unlink()
    recent.save()
    assert not file.exists(), "each time is a write to the disk"


def test_a_share_that_is_not_the_wanted_one_is_spoken_of_beyond_chance(calibration: Calibration) -> None:
    unlike, alike = Recent(calibration, WANTED), Recent(calibration, WANTED)
    for prs in harder(ENOUGH - 1):
        unlike.add(prs)
    assert not unlike.advice
    unlike.add(0.2)
    assert f"of the last {ENOUGH} prompts 8" in unlike.advice
    assert "50% are wanted" in unlike.advice
    assert "--follow-prompts true" in unlike.advice
    for prs in np.random.default_rng(1).choice(SCORES, 200):
        alike.add(float(prs))
    assert not alike.advice


def test_too_small_a_share_is_spoken_of_too_and_none_while_alpha_follows(calibration: Calibration) -> None:
    still, following = Recent(calibration, WANTED), Recent(calibration, WANTED, follow=True)
    for recent in (still, following):
        for _ in range(ENOUGH):
            recent.add(0.4)  # a score goes as a whole or not at all
    assert "0% were worth the cloud" in still.advice
    assert not following.advice


def test_too_large_a_share_is_spoken_of_also_where_alpha_is_at_its_bound(tmp_path: Path) -> None:
    scores = tuple(np.linspace(0.4, 0.6, 400).tolist())
    recent = Recent(replace(CALIBRATION, scores=scores).save(tmp_path / "c.json"), WANTED)
    assert recent.alpha == ALPHA_BOUND
    for _ in range(ENOUGH):
        recent.add(0.2)
    assert "100% were worth the cloud" in recent.advice


def test_a_share_is_not_spoken_of_that_is_apart_by_less_than_anybody_would_notice(
    calibration: Calibration,
) -> None:
    """However little chance there is in it."""
    recent = Recent(calibration, 0.02)
    for number in range(1000):
        recent.add(0.05 if number % 20 == 0 else 0.5)
    assert not recent.advice


def test_two_samples_of_the_same_prompts_are_not_called_unlike(tmp_path: Path) -> None:
    """The calibration is one of them: its own chance counts."""
    draw, spoken = np.random.default_rng(3), 0
    for number in range(60):
        scores = tuple(np.sort(draw.beta(4, 8, 400)).tolist())
        drawn = replace(CALIBRATION, scores=scores).save(tmp_path / f"{number}.json")
        recent = Recent(drawn, 0.3)
        for prs in draw.beta(4, 8, 1000).tolist():
            recent.add(prs)
        spoken += bool(recent.advice)
    assert spoken <= 1


@pytest.mark.parametrize("follow", [False, True])
def test_none_go_where_none_are_wanted_however_low_they_score(calibration: Calibration, follow: bool) -> None:
    recent = Recent(calibration, 0.0, follow=follow)
    for prs in (0.05, 0.01, 0.0):
        assert prs >= recent.alpha
        recent.add(prs)


@pytest.mark.parametrize("wanted", [0.0, 1.0])
def test_nothing_is_said_where_all_or_none_are_wanted_and_go(calibration: Calibration, wanted: float) -> None:
    recent = Recent(replace(calibration, scores=tuple(0.4 * prs for prs in SCORES)), wanted)
    for prs in harder(200):
        recent.add(prs)
    assert not recent.advice


def test_what_the_bound_keeps_from_the_cloud_is_no_drift(tmp_path: Path) -> None:
    good = replace(CALIBRATION, scores=tuple(np.linspace(0.3, 0.9, 400).tolist())).save(
        tmp_path / "good.json"
    )
    recent = Recent(good, 0.9)
    for prs in np.random.default_rng(1).choice(good.scores, 200):
        recent.add(float(prs))
    assert recent.alpha == 0.5
    assert not recent.advice


async def test_the_daemon_counts_prompts_that_may_go_anywhere_and_keeps_their_scores(
    routed_bundle: Path, tmp_path: Path
) -> None:
    async with daemon_here(routed_bundle, tmp_path, follow_prompts="true") as here:
        free = await here.app.generate("a red moon")
        assert free.decision is not None
        await here.app.generate("a red moon", routing=edge_pb2.ROUTING_LOCAL_ONLY)
        await here.app.generate("a red moon", privacy=image_pb2.PRIVACY_LOCAL_ONLY)
        await here.app.route("a red moon")
        assert here.daemon.agent is not None
        calibration = here.daemon.agent.reader.calibration
    assert calibration is not None
    kept = Notes(tmp_path / f"recent-{calibration.calibration_id}.json").read()
    assert kept == pytest.approx([free.decision.prs])


async def test_alpha_stays_and_nothing_is_written_unless_it_is_told_to_follow(
    routed_bundle: Path, tmp_path: Path
) -> None:
    async with daemon_here(routed_bundle, tmp_path) as here:
        assert here.daemon.agent is not None
        reader = here.daemon.agent.reader
        before = reader.alpha
        await here.app.generate("a red moon")
        assert reader.recent is not None and len(reader.recent._scores) == 1
        for _ in range(200):
            reader.recent.add(0.1)
        assert reader.alpha == before
    assert not (tmp_path / f"recent-{reader.recent.calibration_id}.json").exists()


async def test_a_reload_of_the_same_models_forgets_nothing(routed_bundle: Path, tmp_path: Path) -> None:
    async with daemon_here(routed_bundle, tmp_path, follow_prompts="true") as here:
        await here.app.generate("a red moon")
        await here.daemon.reload()
        assert here.daemon.agent is not None
        recent = here.daemon.agent.reader.recent
        assert recent is not None
        assert len(Notes(tmp_path / f"recent-{recent.calibration_id}.json").read()) == 1
        await here.app.generate("a red moon")
    assert len(recent._scores) == 2


def test_scores_do_not_pass_over_to_another_calibration(routed_bundle: Path, tmp_path: Path) -> None:
    """They would mean something else there."""
    folder = Path(shutil.copytree(routed_bundle, tmp_path / "bundle"))
    made = Bundle.open(folder).calibration
    assert made is not None
    replace(made, created="another day").save(folder / CALIBRATION_FILE)
    write_manifest(folder)
    former, same, other = (
        Reader.open(Bundle.open(each), 0.5) for each in (routed_bundle, routed_bundle, folder)
    )
    own = other.recent
    assert former.recent is not None and own is not None
    same.succeed(former)
    other.succeed(former)
    assert same.recent is former.recent and other.recent is own
