"""`edge-agent models`: the models one has, and how one gets, chooses and loses them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent import settings
from edge_agent.bundle import Bundle
from edge_agent.client import BAD_INPUT, CONNECT_S, DONE, UNREACHABLE, AgentClient, CallFailed
from edge_agent.errors import BundleError, InvalidRequest, NewerBundle, NotABundle, StoreError
from edge_agent.manifest import schedule_file
from edge_agent.store import RESERVED, STARTER_NAME, Store
from edge_agent.terminal import (
    add_command,
    client,
    on_terminal,
    print_facts,
    print_json,
    print_table,
    remark,
    spinner,
)

if TYPE_CHECKING:
    from edge_agent.pull import Pulled

DESCRIPTION = """\
The models on this device. One comes with the project, the starter; others are pulled, and one is chosen: `serve` runs
the chosen one unless --bundle names another. Only `show edge` and `show cloud` need a running daemon, and the other
actions the one that --agent names, where it does.
"""

EPILOG = """\
a model of your own, from the export to an image:
  edge-export diffusion stabilityai/sd-turbo sd-turbo --steps 1,2,4 --guidance 0    on a machine with torch
  edge-agent models pull ./sd-turbo --use                                           or https://... or hf:OWNER/NAME
  edge-agent generate "a red apple on a beach"

Name --steps and --guidance for models that were distilled to few steps; the defaults are for those that were not.

`edge-agent models ACTION --help` has examples of each.
"""

LIST_EPILOG = """\
`current` marks the chosen model, `served` the one that a running daemon serves. An `uncalibrated` model makes images
and routes no prompt to the cloud; `edge-agent models show NAME` says what to run.

--json prints one object a line: name, current, served, calibrated, digest, folder, bytes, width, height, sizes,
steps, licence, error. `sizes` are [width, height], the default's first. `served` is null where no daemon answers.
`error` says what is wrong with a damaged model, of which only name and folder are known. For an unfinished pull
`bytes` is what it has so far.
"""

SHOW_EPILOG = """\
examples:
  edge-agent models show starter
  edge-agent models show 3f2a       by the beginning of its digest
  edge-agent models show cloud      what a running daemon knows of the cloud's model

`sizes` are [width, height], the default's first. `dtypes` says which graphs compute in fp16 or int8, by folder; it is
absent where all are float32.
"""

PULL_EPILOG = """\
examples:
  edge-agent models pull ./sd-turbo                             a bundle folder that `edge-export diffusion` wrote
  edge-agent models pull https://models.example.com/sd-turbo    the same folder on any web server
  edge-agent models pull hf:someone/sd-turbo-bundle@v1 --use    a repository of the hub, at a branch, tag or commit

Every file is compared with its sha256 in the manifest, and the model is listed once all of it is there. Whatever ends a
pull, the same command goes on where it stopped. HF_ENDPOINT names another hub, HF_TOKEN opens private repositories, as
does `hf auth login`, and SSL_CERT_FILE names the certificates of your own authority. Nothing that is pulled is ever run
as code.

--json prints one object: name, folder, digest, bytes, fetched_bytes, was_installed, current, served,
calibrated, advice.
"""

VERIFY_EPILOG = """\
examples:
  edge-agent models verify            all models
  edge-agent models verify sd-turbo

Exit code 2 when one is damaged, newer than this edge-agent, or a folder that is no model. --json prints one object a
line: name, ok, bytes, error.
"""

USE_EPILOG = """\
examples:
  edge-agent models use sd-turbo
  edge-agent models use starter     back to the one that comes with the project

A running daemon switches to it without dropping a request. If the daemon cannot load it, the choice stays as it was.
--json prints one object: name, folder, digest, served, calibrated, advice. `served` is null without a daemon.
"""

REMOVE_EPILOG = """\
examples:
  edge-agent models remove sd-turbo

Does not ask for confirmation. Refuses the starter, the chosen model and the one that a running daemon serves. Also
removes what an unfinished pull left. --json prints one object: name, freed_bytes.
"""


def add_commands(commands: Any) -> None:
    """Adds `models` with its actions to the command line."""
    models = commands.add_parser(
        "models",
        help="list, get, choose and remove models",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = models.add_subparsers(dest="action", metavar="ACTION", required=True)

    listing = add_command(actions, "list", _list, "list the models on this device", LIST_EPILOG)
    show = add_command(actions, "show", _show, "show everything known of a model", SHOW_EPILOG)
    show.add_argument("name", metavar="NAME", help="name, `edge`, `cloud`, or the beginning of the digest")

    pull = add_command(actions, "pull", _pull, "get a model", PULL_EPILOG)
    pull.add_argument(
        "source", metavar="SOURCE", help="a bundle: DIR, http(s)://... or hf:OWNER/NAME[@REVISION]"
    )
    pull.add_argument(
        "--name", metavar="NAME", default=None, help="what to call it here (default: as its manifest does)"
    )
    pull.add_argument("--use", action="store_true", help="also choose it")

    verify = add_command(actions, "verify", _verify, "read every byte of a model and compare", VERIFY_EPILOG)
    verify.add_argument("name", metavar="NAME", nargs="?", help="only this model (default: all)")

    use = add_command(actions, "use", _use, "choose the model that the daemon runs", USE_EPILOG)
    use.add_argument("name", metavar="NAME", help=f"an installed model, or {STARTER_NAME}")

    remove = add_command(actions, "remove", _remove, "delete an installed model", REMOVE_EPILOG)
    remove.add_argument("name", metavar="NAME", help="an installed model, or an unfinished pull")

    for action in (listing, show, pull, verify, use, remove):
        settings.add_flags(action, ("models",))


def _list(options: argparse.Namespace) -> int:
    store = _store(options)
    served = _served(options)
    current = _current(store)
    models = [_summary(store, name, current, served) for name in store.names()]
    unfinished = {name: size for name, size in store.unfinished().items() if name not in store.names()}
    models += [
        _damaged(
            store.partial(name),
            name,
            f"not pulled to its end; the same pull goes on with it, `edge-agent models remove {name}` throws it away",
        )
        | {"bytes": size}
        for name, size in unfinished.items()
    ]
    if options.json:
        for model in models:
            print_json(model)
    else:
        print_table(
            ("", "name", "MB", "image", "steps", "calibration", "digest"),
            (
                (
                    ", ".join(mark for mark in ("current", "served") if model[mark]),
                    model["name"],
                    f"{model['bytes'] / 1e6:.1f}" if model["bytes"] is not None else "",
                    ", ".join(f"{width}x{height}" for width, height in model["sizes"] or ()),
                    ", ".join(map(str, model["steps"] or ())),
                    {True: "calibrated", False: "uncalibrated", None: ""}[model["calibrated"]],
                    model["error"] or model["digest"][:16],
                )
                for model in models
            ),
        )
    for name in store.misnamed():
        remark(f"the folder {name!r} is not listed, for no model can be called so: rename it")
    if current and current not in store.names():
        remark(f"the chosen model {current} is gone: choose another with `edge-agent models use NAME`")
    if served is not None and not any(model["served"] for model in models):
        remark(f"the daemon serves {served}, which is none of these")
    return DONE


def _show(options: argparse.Namespace) -> int:
    wanted = options.name
    if wanted in RESERVED and wanted != STARTER_NAME:
        return _show_served(options)
    store = _store(options)
    name = _find(store, wanted)
    facts = _facts(store, name, _served(options))
    if options.json:
        print_json(facts)
    else:
        print_facts(_for_people({"name": name, "scheduler": _scheduler(store, name)} | facts))
    return DONE


def _show_served(options: argparse.Namespace) -> int:
    """A model of the running daemon, by its side."""
    for model in client(options).models():
        if model["side"] == options.name:
            if options.json:
                print_json(model)
            else:
                known = {name: value for name, value in model.items() if value not in (None, "", 0, [])}
                print_facts(_for_people(model if options.name == "edge" else known))
            return DONE
    raise InvalidRequest(
        "the daemon knows of no cloud model: none is configured, and its bundle is not calibrated"
    )


def _pull(options: argparse.Namespace) -> int:
    store = _store(options)
    if options.use:
        _running(options)  # a wrong address is refused before anything is fetched
    pulled = _pulled(store, options)
    served, said = _take_up(store, pulled.name, options) if options.use else (None, "")
    advice = pulled.bundle.advice
    facts = {
        "name": pulled.name,
        "folder": str(pulled.bundle.folder),
        "digest": pulled.bundle.model_digest,
        "bytes": pulled.bundle.manifest.total_bytes,
        "fetched_bytes": pulled.fetched_bytes,
        "was_installed": pulled.was_installed,
        "current": _current(store) == pulled.name,
        "served": served,
        "calibrated": not advice,
        "advice": [advice] if advice else [],
    }
    if options.json:
        print_json(facts)
        return DONE
    came = f"pulled, {pulled.fetched_bytes / 1e6:,.1f} MB, verified"
    print(f"{pulled.name}: {'was here already' if pulled.was_installed else came}")
    if options.use:
        print(said)
    elif not facts["current"]:
        print(f"choose it with `edge-agent models use {pulled.name}`")
    _say_uncalibrated(advice)
    return DONE


def _pulled(store: Store, options: argparse.Namespace) -> Pulled:
    from edge_agent.pull import Fetched, pull  # the other actions need no HTTP
    from edge_agent.source import source_of

    source = source_of(options.source, os.environ)
    with _bar(f"asking for {source.place}") as show:  # a server may take half a minute not to answer
        for event in pull(source, store, options.name):
            if not isinstance(event, Fetched):
                return event
            now = f"waiting: {event.trouble}" if event.trouble else event.file
            show(now, event.done_bytes, event.total_bytes)
    raise StoreError("the pull ended without a model")  # which `pull` does not do


def _verify(options: argparse.Namespace) -> int:
    store = _store(options)
    code = DONE
    for name in [options.name] if options.name else store.names():
        folder = store.path(name)
        error, size, what = None, None, ""
        try:
            with spinner(f"verifying {name}"):
                bundle = Bundle.open(folder)
            size = bundle.manifest.total_bytes
            _ = bundle.advice  # reads the calibration
        except BundleError as found:
            error, code = found.message, BAD_INPUT
            what = _AILMENTS.get(type(found), "damaged")
        if options.json:
            print_json({"name": name, "ok": error is None, "bytes": size, "error": error})
        elif error is None:
            print(f"{name}: whole")
        else:
            mends = what == "damaged" and name != STARTER_NAME
            again = f"; `edge-agent models remove {name}` and pull it again" if mends else ""
            print(f"{name}: {what}: {error}{again}")
    return code


_AILMENTS = {NewerBundle: "too new", NotABundle: "no model"}
"""What is not damaged, so that fetching it again does not help."""


def _use(options: argparse.Namespace) -> int:
    store, name = _store(options), options.name
    served, said = _take_up(store, name, options)
    bundle = Bundle.open(store.path(name), verify=False)
    advice = bundle.advice
    if options.json:
        facts = {"name": name, "folder": str(bundle.folder), "digest": bundle.model_digest, "served": served}
        print_json(facts | {"calibrated": not advice, "advice": [advice] if advice else []})
        return DONE
    print(said)
    _say_uncalibrated(advice)
    return DONE


def _take_up(store: Store, name: str, options: argparse.Namespace) -> tuple[bool | None, str]:
    """Has a running daemon serve the model, then chooses it: whether it is served, None without a daemon, and what to
    say of it.

    The choice stays as it was when that does not come to its end. Raises StoreError when the daemon refuses the model,
    CallFailed when it is gone.
    """
    daemon = _running(options)  # a wrong address is refused before anything changes
    served, more = None, ""
    try:
        with store.choosing(name):
            if daemon is not None:
                served, more = _reloaded(daemon, store, name)
    except KeyboardInterrupt:
        remark(f"{_choice(store)} stays the chosen model; a daemon may serve {name} until it restarts")
        raise
    except CallFailed as error:
        refusal = f"so {_choice(store)} stays the chosen model: {error.message}"
        if error.no_room:
            raise CallFailed(
                f"the running daemon cannot serve {name} now, {refusal}", error.exit_code
            ) from error
        if error.exit_code == UNREACHABLE:
            raise CallFailed(
                f"the daemon went away while it loaded {name}, {refusal}", UNREACHABLE
            ) from error
        raise StoreError(f"the running daemon cannot serve {name}, {refusal}") from error
    except StoreError as error:
        if served:  # the choice could not be written
            error.message += (
                f". {_choice(store)} stays the chosen model; the daemon serves {name} until it restarts"
            )
        raise
    return served, f"{name} is the chosen model{more}"


def _reloaded(daemon: AgentClient, store: Store, name: str) -> tuple[bool, str]:
    """Has the running daemon serve the model: whether it does, and what to say of it. Raises CallFailed."""
    with spinner(f"the daemon loads {name}"):
        try:
            status = daemon.status()
        except CallFailed as error:
            if error.exit_code != UNREACHABLE:
                raise
            # It is still loading, shutting down, or stopped.
            return False, f"; the running daemon serves it when it is started again: {error.message}"
        served = str(status["bundle"])
        follows = status["models_folder"] == os.path.realpath(store.folder)
        if follows:  # any other would load its own anew, whose faults are not this model's
            served = str(daemon.reload(name)["bundle"])
    if _is_served(store, name, served):
        return True, ", and the running daemon serves it"
    return (
        False,
        f"; the running daemon was started with a --bundle or --models of its own and serves {served}",
    )


def _current(store: Store) -> str:
    """The chosen model; where the file that names it is damaged, none, which is told."""
    try:
        return store.current
    except StoreError as error:
        remark(error.message)
        return ""


def _choice(store: Store) -> str:
    """The chosen model; the starter where the file that says it is damaged."""
    try:
        return store.current
    except StoreError:
        return STARTER_NAME


def _remove(options: argparse.Namespace) -> int:
    store, name = _store(options), options.name
    removable = name in store.names() and name != STARTER_NAME  # what else it is, the store says
    status = _status(options) if removable else None
    if status is not None and _is_served(store, name, status["bundle"]):
        raise StoreError(
            f"a running daemon serves {name}; let it serve another, or stop it, and remove {name} then"
        )
    if status is not None and any(_is_served(store, name, folder) for folder in status["predecessors"]):
        raise StoreError(f"a running daemon still makes images with {name}; remove it when they are done")
    freed = store.remove(name)
    if options.json:
        print_json({"name": name, "freed_bytes": freed})
    else:
        print(f"{name}: removed, {freed / 1e6:,.1f} MB freed")
    return DONE


def _store(options: argparse.Namespace) -> Store:
    store = settings.resolve(vars(options), os.environ).store
    unnamed = options.action != "pull" and getattr(options, "name", None) in (None, STARTER_NAME)
    if hasattr(options, "models") and unnamed and not store.there:  # what else is named is refused
        remark(f"the folder {store.folder} is not there, so there is no model but the {STARTER_NAME}")
    return store


def _running(options: argparse.Namespace) -> AgentClient | None:
    """The daemon, where one runs. Raises CallFailed where --agent names one that does not."""
    daemon = client(options)
    if options.agent:
        daemon.must_be_reachable()
    elif not daemon.reachable():
        return None
    return daemon


def _status(options: argparse.Namespace) -> dict[str, Any] | None:
    """What a running daemon says of itself; None where none runs. Raises CallFailed for one that says nothing."""
    daemon = _running(options)
    return None if daemon is None else AgentClient(daemon.address, CONNECT_S).status()


def _served(options: argparse.Namespace) -> str | None:
    """The bundle folder that a running daemon serves; None where none does, or says so, as it is still loading."""
    try:
        status = _status(options)
    except CallFailed:
        return None
    return status["bundle"] if status is not None else None


def _is_served(store: Store, name: str, served: str | None) -> bool | None:
    """Whether the model lies in the folder `served`; None where that is not known."""
    return None if served is None else os.path.realpath(served) == os.path.realpath(store.path(name))


def _find(store: Store, wanted: str) -> str:
    """The name of the model that is called so, or whose digest begins so; where there is none, what was wanted.

    Raises StoreError when several digests begin so.
    """
    names = store.names()
    if wanted in names or not wanted:
        return wanted
    found = [name for name in names if _digest(store, name).startswith(wanted)]
    if len(found) > 1:
        raise StoreError(
            f"several digests begin with {wanted}, those of {', '.join(found)}: name one of these"
        )
    return found[0] if found else wanted


def _digest(store: Store, name: str) -> str:
    try:
        return Bundle.open(store.path(name), verify=False).model_digest
    except BundleError:  # it has none
        return ""


def _summary(store: Store, name: str, current: str, served: str | None) -> dict[str, Any]:
    """A line of the list."""
    marks = {"current": name == current, "served": _is_served(store, name, served)}
    try:
        bundle = Bundle.open(store.path(name), verify=False)
        calibrated = not bundle.advice
    except BundleError as error:
        return _damaged(store.path(name), name, error.message) | marks
    manifest = bundle.manifest
    return {
        "name": name,
        **marks,
        "calibrated": calibrated,
        "digest": bundle.model_digest,
        "folder": str(bundle.folder),
        "bytes": manifest.total_bytes,
        "width": manifest.width,
        "height": manifest.height,
        "sizes": list(manifest.sizes),
        "steps": list(manifest.steps),
        "licence": manifest.licence,
        "error": None,
    }


def _damaged(folder: Path, name: str, error: str) -> dict[str, Any]:
    unknown = dict.fromkeys(
        ("calibrated", "digest", "folder", "bytes", "width", "height", "sizes", "steps", "licence")
    )
    known = {"folder": str(folder), "error": error}
    return {"name": name, "current": False, "served": None} | unknown | known


def _facts(store: Store, name: str, served: str | None) -> dict[str, Any]:
    """All that is known of an installed model. Raises BundleError when it is damaged."""
    bundle = Bundle.open(store.path(name), verify=False)
    manifest, calibration, advice = bundle.manifest, bundle.calibration, bundle.advice
    stated = {key: value for key, value in asdict(manifest).items() if key != "files" and value is not None}
    stated.pop("other_sizes", None)  # which are among `sizes`
    return {
        "name": name,
        "current": _current(store) == name,
        "served": _is_served(store, name, served),
        "folder": str(bundle.folder),
        "bytes": manifest.total_bytes,
        "files": len(manifest.files),
        "digest": bundle.model_digest,
        "manifest_sha256": bundle.digest,
        "made_as": stated.pop("name"),
        **stated,
        "sizes": list(manifest.sizes),
        "calibrated": not advice,
        "calibration_id": calibration.calibration_id if calibration else None,
        "calibrated_for_edge": calibration.edge_digest if calibration else None,
        "calibrated_for_cloud": calibration.cloud_digest if calibration else None,
        "advice": [advice] if advice else [],
    }


def _scheduler(store: Store, name: str) -> str:
    """What the model's schedules were compiled of; empty where the default's does not say."""
    from edge_agent.diffusion.schedule import Schedule  # the other actions read none

    bundle = Bundle.open(store.path(name), verify=False)
    try:
        said = Schedule.load(bundle.path(schedule_file(bundle.manifest.default_steps))).scheduler
    except BundleError:
        return ""
    return said if said.isidentifier() else ""  # a class's name, not what steers a terminal


def _for_people(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` without Python's brackets: sizes as 64x64, of a table how large it is."""
    return {name: _in_words(value) for name, value in facts.items()}


def _in_words(value: Any) -> Any:
    if isinstance(value, dict):
        return "; ".join(
            f"{name if name.isprintable() else repr(name)} {_in_words(each)}" for name, each in value.items()
        )
    if not isinstance(value, (list, tuple)) or all(isinstance(each, str) for each in value):
        return value  # of texts, each has a line
    if not isinstance(value[0], (list, tuple)):
        return ", ".join(map(str, value))
    if len(value[0]) == 2:
        return ", ".join(f"{width}x{height}" for width, height in value)
    return f"{len(value)} x {len(value[0])} numbers"


def _say_uncalibrated(advice: str) -> None:
    if advice:
        print(f"uncalibrated: {advice}")


@contextmanager
def _bar(what: str) -> Iterator[Any]:
    """A function that shows (what is done now, bytes done, bytes in all) on a terminal, and nothing in a pipe."""
    if not on_terminal(sys.stderr):
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(what, total=None)

        def show(now: str, done_bytes: int, total_bytes: int) -> None:
            bars.update(bar, description=now, completed=done_bytes, total=total_bytes)

        yield show
