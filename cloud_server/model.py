"""The model folder: where it lies, what it is called, what it serves, and its digest. Needs no torch.

A model is a diffusers folder (the one that holds model_index.json), or a hub id that is downloaded to one.
Beside model_index.json may lie `routet2i.json`, which says what diffusers folders leave open:

    {
      "name": "starter-cloud",        how people call it
      "licence": "Apache-2.0",        SPDX id of the weights' licence
      "width": 64, "height": 64,      pixels, when the request names none
      "steps": 25,                    denoising steps, when the request names none
      "guidance_scale": 3.0,          classifier-free guidance scale, when the request names none
      "sizes": [[64, 64]]             the only [width, height] served; left out: what the autoencoder allows
    }

Every key may be left out. Without the file a model is named after its folder, or by its hub id, and serves its own size
with the defaults that diffusers' own documentation uses.
"""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud_server.errors import HubNotReached, StartRefused
from cloud_server.settings import STARTER, expanded

INDEX_FILE = "model_index.json"
CARD_FILE = "routet2i.json"
DEFAULT_STEPS = 25  # enough for DPM-Solver++, which most pipelines ship with or profit from
DEFAULT_GUIDANCE_SCALE = 7.5  # diffusers' default for Stable Diffusion
HASH_BLOCK = 1 << 20  # bytes read at a time

WHAT_TO_INSTALL = "install what a server needs: pip install 'routet2i[cloud]'"
_WHAT_TO_DO = (
    "Give --model a folder saved by a diffusers pipeline's save_pretrained(), or a hub id such as owner/name."
)


@dataclass(frozen=True)
class Card:
    """The content of routet2i.json. None where it is silent."""

    name: str | None = None
    licence: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sizes: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Model:
    """A model folder that looks loadable.

    `digest` is the SHA-256 (lower-case hex) over one line "<sha256 of the file>  <path>" for each file, sorted by
    path: model_index.json, routet2i.json and everything in the folders that model_index.json names. Prose beside
    them (a README, a model card) can change without the digest changing.
    """

    name: str
    licence: str
    folder: Path
    digest: str
    card: Card


def locate(model: str) -> Path:
    """The folder of `model`: itself when it is one, otherwise the snapshot of the hub id, downloaded if needed.

    Raises StartRefused when there is neither.
    """
    folder = expanded(model)
    try:
        found, there = stat.S_ISREG(_mode(folder / INDEX_FILE)), bool(_mode(folder))
    except OSError as error:  # a name too long, a folder that one may not enter
        raise StartRefused(f"the model {folder} cannot be read: {error.strerror}. {_WHAT_TO_DO}") from error
    if found:
        return folder.resolve()
    if folder == STARTER and not there:
        raise StartRefused(
            "the starter model is not installed: it is a distribution of its own, routet2i-cloud-starter, which "
            f"`pip install ./deploy/cloud-starter` takes from a checkout. Or choose a model of yours. {_WHAT_TO_DO}"
        )
    if there:
        raise StartRefused(f"{folder} has no {INDEX_FILE}, so it is not a diffusers pipeline. {_WHAT_TO_DO}")
    if model.count("/") != 1 or model.startswith((".", "~")) or Path(model).anchor:
        raise StartRefused(f"there is no model folder {folder}. {_WHAT_TO_DO}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        from cloud_server import hub
        from cloud_server.complete import downloaded
    except ImportError as error:
        raise StartRefused(f"{error}; {WHAT_TO_INSTALL}") from error
    try:
        folder = downloaded(model).resolve()
        kept = hub.out_of_reach(model)
        try:  # diffusers takes no card
            # A snapshot is called after its commit.
            hf_hub_download(model, CARD_FILE, revision=folder.name, local_files_only=kept)
        except LocalEntryNotFoundError:  # also what comes of a hub that answers just now with an error
            if not kept:
                raise
        except EntryNotFoundError:  # most have none
            pass
        return folder
    except Exception as error:  # the hub client raises whatever its transport raises
        refused = HubNotReached if hub.may_recover(error) else StartRefused
        told = hub.why(model, error) or f"the hub did not give it: {error}. {_WHAT_TO_DO}"
        raise refused(f"there is no folder {model}, and {told}") from error


def _mode(path: Path) -> int:
    """The mode of what is there; 0 where nothing is. Raises OSError where that cannot be seen, as Path.exists and its
    like did before Python 3.14.
    """
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return 0


def open_model(model: str) -> Model:
    """Locates a model, reads its card and takes its digest (reads every file once). Raises StartRefused."""
    folder = locate(model)
    try:
        card = _read_card(folder / CARD_FILE)
        return Model(
            # A snapshot's folder is called after its commit.
            name=card.name or (folder.name if expanded(model).is_dir() else model),
            licence=card.licence or "",
            folder=folder,
            digest=digest(folder),
            card=card,
        )
    except OSError as error:
        raise StartRefused(f"cannot read the model: {error}") from error


def digest(folder: Path) -> str:
    """The model's digest, as `Model` defines it."""
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in _model_files(folder)]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _model_files(folder: Path) -> list[Path]:
    index = _read_object(folder / INDEX_FILE)
    files = [folder / INDEX_FILE]
    if (folder / CARD_FILE).is_file():
        files.append(folder / CARD_FILE)
    for component in index:
        if component not in ("", "..") and Path(component).name == component and component[0] != "_":
            files += [path for path in (folder / component).rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            total.update(block)
    return total.hexdigest()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StartRefused(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise StartRefused(f"{path} must hold one JSON object")
    return content


def _read_card(path: Path) -> Card:
    if not path.is_file():
        return Card()
    content = _read_object(path)
    checks: dict[str, Callable[[Any], bool]] = {
        "name": lambda v: isinstance(v, str),
        "licence": lambda v: isinstance(v, str),
        "width": _is_count,
        "height": _is_count,
        "steps": _is_count,
        "guidance_scale": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < 1e3,
        "sizes": lambda v: isinstance(v, list) and bool(v) and all(_is_size(pair) for pair in v),
    }
    for key, value in content.items():
        if key not in checks:
            raise StartRefused(f"{path}: unknown key {key!r}; there are {', '.join(checks)}")
        if not checks[key](value):
            raise StartRefused(f"{path}: {key} cannot be {value!r}")
    if "sizes" in content:
        content["sizes"] = tuple((width, height) for width, height in content["sizes"])
    card = Card(**content)
    if card.sizes is not None and (card.width, card.height) not in card.sizes:
        raise StartRefused(f"{path}: the default width and height must be one of sizes")
    return card


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(side) for side in value)
