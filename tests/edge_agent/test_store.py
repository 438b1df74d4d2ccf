"""The store: what is installed, which model is chosen, and that nothing half-done is ever seen."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.errors import BundleError, Busy, StoreError
from edge_agent.manifest import CALIBRATION, DENOISER
from edge_agent.settings import STARTER, resolve
from edge_agent.store import MAX_NAME_CHARS, Store, _make_writable, check_name, name_from

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models", STARTER)


def install(store: Store, name: str, bundle: Path = STARTER) -> Path:
    return Path(shutil.copytree(bundle, store.folder / name))


def test_without_a_folder_there_is_the_starter_and_nothing_is_made(store: Store) -> None:
    assert store.names() == ["starter"]
    assert (store.current, store.current_folder) == ("starter", STARTER)
    assert store.unfinished() == {}
    assert not store.folder.exists()


def test_the_folder_lies_under_xdg_data_home_unless_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert resolve({}, {}).store.folder == Path("/data/routet2i/models")
    monkeypatch.delenv("XDG_DATA_HOME")
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    base = tmp_path / ("Local" if os.name == "nt" else ".local/share")
    assert resolve({}, {}).store.folder == base / "routet2i" / "models"
    assert resolve({}, {"EDGE_AGENT_MODELS": "~/m"}).store.folder == tmp_path / "m"


def test_what_is_installed_is_listed_and_what_only_looks_like_it_is_not(store: Store, tmp_path: Path) -> None:
    install(store, "two")
    install(store, "one")
    for other in (".partial/three", ".hidden", "with space", "edge"):
        (store.folder / other).mkdir(parents=True)
    (store.folder / "file").write_text("")
    assert store.names() == ["starter", "one", "two"]


def test_the_chosen_model_is_what_the_settings_give_unless_a_bundle_is_named(
    store: Store, tmp_path: Path
) -> None:
    chosen = install(store, "mine")
    store.choose("mine")
    flags = {"models": str(store.folder)}
    assert store.current == "mine"
    assert resolve(flags, {}).bundle_folder == chosen
    assert resolve(flags | {"bundle": str(tmp_path)}, {}).bundle_folder == tmp_path
    store.choose("starter")
    assert resolve(flags, {}).bundle_folder == STARTER
    assert not (store.folder / ".current").exists()


def test_a_damaged_model_is_not_chosen(store: Store) -> None:
    install(store, "mine")
    store.choose("mine")
    (install(store, "broken") / DENOISER).unlink()
    with pytest.raises(BundleError, match="is missing"):
        store.choose("broken")
    assert store.current == "mine"


def test_a_model_whose_calibration_cannot_be_read_is_not_chosen(store: Store) -> None:
    folder = install(store, "broken")
    calibration = folder / CALIBRATION
    calibration.write_text(json.dumps(json.loads(calibration.read_text()) | {"scale": [10**400] * 10}))
    write_manifest(folder)
    with pytest.raises(BundleError, match=r"calibration\.json is not a calibration"):
        store.choose("broken")
    assert store.current == "starter"


def test_a_model_that_is_tried_is_chosen_only_when_that_ends_well(store: Store) -> None:
    for name in ("former", "mine"):
        install(store, name)
    store.choose("former")

    def interrupted() -> None:
        with store.choosing("mine"):
            assert store.current == "former"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.current == "former"
    with store.choosing("mine"):
        for disturbing in (store.choose, store.remove):
            with pytest.raises(Busy, match="another `edge-agent models use` or `remove` is under way"):
                disturbing("former")
    assert store.current == "mine"


def test_a_choice_that_is_not_there_any_more_says_what_to_do(store: Store) -> None:
    chosen = install(store, "mine")
    store.choose("mine")
    shutil.rmtree(chosen)
    with pytest.raises(StoreError, match="models use NAME"):
        _ = store.current_folder
    (store.folder / ".current").write_text("../../etc")
    with pytest.raises(StoreError, match=r"holds no model's name.*models use NAME"):
        _ = store.current
    store.choose("starter")
    assert store.current_folder == STARTER


@pytest.mark.posix
def test_others_may_read_the_choice_as_far_as_the_umask_lets_them(store: Store) -> None:
    """The daemon may be another user's than whoever chooses."""
    install(store, "mine")
    before = os.umask(0)
    try:
        for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
            os.umask(umask)
            store.choose("mine")
            assert stat.S_IMODE((store.folder / ".current").stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_folder_that_may_not_be_entered_is_explained(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    install(store, "mine")
    store.choose("mine")

    def forbidden(path: Path) -> bool:
        if path.name in ("mine", "other"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os.path.isdir(path)  # noqa: PTH112  # the other one is this

    monkeypatch.setattr(Path, "is_dir", forbidden)
    for ask in (lambda: store.path("mine"), lambda: store.current_folder, lambda: store.remove("other")):
        with pytest.raises(StoreError, match=r"cannot be read: Permission denied; .*choose another folder"):
            ask()


def test_an_error_that_has_no_words_of_the_system_is_told_in_its_own(store: Store) -> None:
    with (
        pytest.raises(StoreError, match="cannot be written: the tape has run out; choose"),
        store.explained("written"),
    ):
        raise OSError("the tape has run out")


@pytest.mark.parametrize("name", ["../mine", "", ".", "..", ".partial", "a/b", "/etc", "mine\n", "none"])
def test_a_name_that_is_none_leads_nowhere(store: Store, name: str) -> None:
    install(store, "mine")
    (store.folder / ".partial").mkdir()
    for wrong in (store.path, store.choose, store.remove):
        with pytest.raises(StoreError, match="there is no model"):
            wrong(name)


@pytest.mark.parametrize(
    "name", ["starter", "edge", "cloud", "../a", ".a", "a.", "a b", "ä", "a" * 101, "", "a\n"]
)
def test_a_name_that_a_model_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(StoreError, match="--name"):
        check_name(name)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("routet2i-starter-edge", "routet2i-starter-edge"),
        ("stabilityai/sd-turbo (int8)", "stabilityai-sd-turbo-int8"),
        ("../../etc/passwd", "etc-passwd"),
        ("x" * 300, "x" * MAX_NAME_CHARS),
        (f"{'x' * 99}.{'x' * 9}", "x" * 99),
    ],
)
def test_a_name_is_made_of_what_the_maker_calls_it(text: str, name: str) -> None:
    assert name_from(text) == name


@pytest.mark.parametrize("name", ["SD-Turbo", "sd-turbo."])
def test_another_spelling_of_a_name_is_not_that_model_also_where_the_file_system_takes_it_for_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As on macOS and Windows: else the chosen model, or the one that a daemon serves, could be removed."""
    install(store, "sd-turbo")
    store.choose("sd-turbo")
    with store.pulling("half") as partial:
        partial.mkdir()
    is_dir, exists = Path.is_dir, Path.exists

    def as_there(path: Path) -> Path:
        return path.with_name(path.name.lower().rstrip(".")) if store.folder in path.parents else path

    monkeypatch.setattr(Path, "is_dir", lambda path: is_dir(as_there(path)))
    monkeypatch.setattr(Path, "exists", lambda path: exists(as_there(path.parent) / path.name))
    for wrong in (store.path, store.choose, store.remove):
        with pytest.raises(StoreError, match="there is no model"):
            wrong(name)
    with pytest.raises(StoreError, match="there is no model"):
        store.remove("Half")
    assert store.names() == ["starter", "sd-turbo"]
    assert list(store.unfinished()) == ["half"]


@pytest.mark.posix
def test_a_model_whose_name_ends_with_a_dot_since_earlier_versions_stays_one(store: Store) -> None:
    install(store, "mine.")
    store.choose("mine.")
    assert store.current_folder == store.path("mine.") == store.folder / "mine."
    store.choose("starter")
    assert store.remove("mine.") > 0
    store.partial("half.").mkdir(parents=True)
    assert store.remove("half.") == 0
    assert store.unfinished() == {}


def test_remove_frees_the_bytes_and_refuses_what_is_in_use(store: Store) -> None:
    size = sum(path.stat().st_size for path in install(store, "mine").rglob("*") if path.is_file())
    store.choose("mine")
    with pytest.raises(StoreError, match="is the chosen model"):
        store.remove("mine")
    with pytest.raises(StoreError, match="starter"):
        store.remove("starter")
    store.choose("starter")
    assert store.remove("mine") == size
    assert store.names() == ["starter"]
    assert [path.name for path in store.folder.iterdir()] == []


def test_a_model_is_removed_from_a_full_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what makes room there."""
    install(store, "mine")

    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "mkdir", full)
    assert store.remove("mine") > 0
    assert list(store.folder.iterdir()) == []


def test_a_removal_that_is_interrupted_shows_no_half_of_a_model_and_the_next_one_takes_the_rest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("mine", "other"):
        install(store, name)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.remove("mine")
    assert store.names() == ["starter", "other"]
    store.remove("other")
    assert list(store.folder.iterdir()) == []


@pytest.mark.posix
def test_a_link_is_a_model_and_removing_it_leaves_what_it_leads_to(store: Store, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(STARTER, tmp_path / "elsewhere"))
    store.folder.mkdir()
    (store.folder / "linked").symlink_to(elsewhere)
    assert store.names() == ["starter", "linked"]
    assert Bundle.open(store.path("linked")).digest == Bundle.open(STARTER).digest
    assert store.remove("linked") == 0
    assert store.names() == ["starter"]
    Bundle.open(elsewhere)


@pytest.mark.posix
def test_a_link_that_leads_nowhere_is_listed_and_can_be_removed(store: Store, tmp_path: Path) -> None:
    store.folder.mkdir(parents=True)
    (store.folder / "gone").symlink_to(tmp_path / "unplugged")
    assert store.names() == ["starter", "gone"]
    with pytest.raises(BundleError, match="does not exist"):
        store.choose("gone")
    assert store.remove("gone") == 0
    assert store.names() == ["starter"]


@pytest.mark.usefixtures("ordinary_user")
def test_a_model_whose_folders_cannot_be_written_is_removed_whole() -> None:
    # Not tmp_path: its parents belong to the user who started the tests.
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "models", STARTER)
        for name in ("first", "second"):
            (install(store, name) / "unet").chmod(0o555)
        assert store.remove("first") > 0
        (left := store.folder / ".removed-left").mkdir()  # as by a version that could not
        (store.folder / "second").rename(left / "second")
        install(store, "third")
        assert store.remove("third") > 0
        assert store.names() == ["starter"]
        _make_writable(left)


def test_what_an_unfinished_pull_left_can_be_removed(store: Store) -> None:
    with store.pulling("mine") as partial:
        partial.mkdir()
        (partial / "file").write_bytes(b"12345")
    assert store.unfinished() == {"mine": 5}
    assert store.names() == ["starter"]
    assert store.remove("mine") == 5
    assert store.unfinished() == {}
    assert list((store.folder / ".partial").iterdir()) == []


@pytest.mark.parametrize("choice", ["mine", "../../etc", ""])
def test_a_choice_keeps_no_unfinished_pull_and_a_damaged_one_every_installed_model(
    store: Store, choice: str
) -> None:
    """Any of these may be what was chosen before the damage."""
    install(store, "other")
    (store.folder / ".current").write_text(choice)
    with store.pulling("mine") as partial:
        partial.mkdir()
    assert store.remove("mine") == 0
    assert store.unfinished() == {}
    with pytest.raises(StoreError, match="there is no model 'none'"):
        store.remove("none")
    if choice != "mine":
        with pytest.raises(StoreError, match=r"holds no model's name; choose one with .*models use NAME"):
            store.remove("other")
        assert store.names() == ["starter", "other"]
        store.choose("starter")
    assert store.remove("other") > 0


@pytest.mark.posix  # Windows takes away no folder that is being read
def test_unfinished_pulls_are_counted_while_they_end_or_are_removed(store: Store) -> None:
    partial = store.partial("mine")

    def come_and_go() -> None:
        for _ in range(300):
            for folder in (partial / "unet", partial / "vae_decoder"):
                folder.mkdir(parents=True)
                for number in range(5):
                    (folder / f"{number}").write_bytes(b"x")
            shutil.rmtree(partial)

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(come_and_go)
        while not coming.done():
            assert store.unfinished().get("mine", 0) <= 10
        coming.result()


def test_a_model_that_is_called_like_a_lock_is_pulled_beside_the_other(store: Store) -> None:
    for name in ("mine", "mine.lock"):
        with store.pulling(name) as partial:
            partial.mkdir()
    assert list(store.unfinished()) == ["mine", "mine.lock"]


def test_install_makes_a_complete_folder_a_model_and_leaves_nothing_else(store: Store) -> None:
    with store.pulling("mine") as partial:
        shutil.copytree(STARTER, partial)
        assert store.install("mine").folder == store.folder / "mine"
    assert store.names() == ["starter", "mine"]
    assert list((store.folder / ".partial").iterdir()) == []


def test_the_folder_that_was_prepared_is_the_one_that_is_installed(store: Store) -> None:
    """One that is copied or filled anew is seen half-done under the model's name for as long as that takes."""

    def inodes(folder: Path) -> dict[str, int]:
        return {str(path.relative_to(folder)): path.stat().st_ino for path in (folder, *folder.rglob("*"))}

    with store.pulling("mine") as partial:
        shutil.copytree(STARTER, partial)
        prepared = inodes(partial)
        store.install("mine")
    assert inodes(store.folder / "mine") == prepared


def test_install_refuses_what_is_incomplete_and_what_would_replace(store: Store) -> None:
    with store.pulling("mine") as partial:
        (Path(shutil.copytree(STARTER, partial)) / DENOISER).unlink()
        with pytest.raises(BundleError, match="is missing"):
            store.install("mine")
        assert store.names() == ["starter"]
        shutil.rmtree(partial)
        shutil.copytree(STARTER, partial)
        (store.folder / "mine").mkdir()
        with pytest.raises(StoreError, match="is there already"):
            store.install("mine")


HOLD = """
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from edge_agent.store import Store
with Store(Path(sys.argv[1]), Path("none")).pulling("mine"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_pull_the_same_model_and_a_killed_one_lets_go(store: Store) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline().split() == [b"held"]
        with pytest.raises(Busy, match="another pull of mine"), store.pulling("mine"):
            pass
        with store.pulling("other"):
            pass
        holder.kill()
        holder.wait()
    with store.pulling("mine"):
        pass


def test_a_lock_that_is_taken_away_lets_no_two_pull_at_once(store: Store) -> None:
    """Its file goes with each pull that leaves nothing, while others are about to lock it."""
    inside: list[str] = []
    most = []

    def pull_often(who: str) -> int:
        own, pulls = Store(store.folder, STARTER), 0
        for _ in range(2000):
            with suppress(Busy), own.pulling("mine"):
                inside.append(who)
                time.sleep(0)  # the others' turn
                most.append(len(inside))
                inside.remove(who)
                pulls += 1
        return pulls

    with ThreadPoolExecutor(3) as pool:  # locks are a descriptor's, so threads meet as processes do
        pulls = list(pool.map(pull_often, "abc"))
    assert sum(pulls) > 0 and set(most) == {1}
    assert list((store.folder / ".partial").iterdir()) == []


def test_a_choice_is_seen_whole_while_others_choose(store: Store) -> None:
    for name in ("one", "two"):
        install(store, name)
    store.choose("one")

    def choose_often(name: str) -> None:
        own = Store(store.folder, STARTER)
        for _ in range(20):
            with suppress(Busy):
                own.choose(name)

    seen = set()
    with ThreadPoolExecutor(2) as pool:  # locks are a descriptor's, so threads meet as processes do
        choosing = [pool.submit(choose_often, name) for name in ("one", "two")]
        while not all(future.done() for future in choosing):
            seen.add(store.current)
            time.sleep(0.001)  # Windows replaces no file that is always open
    for future in choosing:
        future.result()
    assert seen <= {"one", "two"}
    assert [path.name for path in store.folder.glob(".current*")] == [".current"]


def test_a_choice_that_cannot_be_written_leaves_the_one_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        install(store, name)
    store.choose("one")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device; make room"):
        store.choose("two")
    assert store.current == "one"
    assert [path.name for path in store.folder.glob(".current*")] == [".current"]


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    store = Store(tmp_path / "models", STARTER)
    with pytest.raises(StoreError, match="models cannot be read"):
        store.names()
    with pytest.raises(StoreError, match="models cannot be written"):
        store.choose("starter")
