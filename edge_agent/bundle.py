"""The bundle: a folder with everything the edge runs, and a manifest that names every file of it.

    manifest.json                       `edge_agent.manifest`
    tokenizer/tokenizer.json ...        `edge_agent.tokens`
    text_encoder/ unet/ vae_decoder/    one `model.onnx` each: `edge_agent.diffusion`
                                        and a `fused.onnx` beside the denoiser's: `edge_agent.diffusion.denoiser`
    transformer/                        in the place of unet/, in Stable Diffusion 3
    tokenizer_2/ text_encoder_2/        the second of both, in Stable Diffusion XL and 3
    schedules/<steps>.json              compiled schedulers: `edge_agent.diffusion.schedule`
    predictor/                          quality predictor and its calibration, once they are made

Nothing in a bundle is imported or unpickled. A file that is missing, truncated, altered, a symbolic link or
outside the folder is refused by name when the bundle is opened, and so is a graph whose weights lie in such a file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from edge_agent.calibration import Calibration
from edge_agent.errors import BundleError, NotABundle
from edge_agent.graph_files import FileState, sha256_of
from edge_agent.manifest import (
    CALIBRATION,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_PATH_BYTES,
    PREDICTOR,
    AddedConditioning,
    Facts,
    FileEntry,
    JointConditioning,
    Manifest,
    parse_manifest,
    parse_unfinished,
)
from edge_agent.superiority import METRICS
from edge_agent.weights import locations

CALIBRATE = "run `edge-export label`, unless you have its labels of both models, then `edge-export calibrate`"
"""What makes a calibration where there is a predictor for both models."""

LEARN = "run `edge-export label`, `edge-export train`, `edge-export predictor` and `edge-export calibrate`"
"""What makes predictor and calibration for models that no predictor knows yet."""

TAKE_UP = (
    "then `edge-agent models pull BUNDLE --name NEW --use`, or restart edge-agent where --bundle names it"
)
"""What comes after either: a daemon serves the store's copy of a bundle, which a restart leaves as it is."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `Bundle.open` is the only way in."""

    folder: Path
    manifest: Manifest
    digest: str  # sha256 of manifest.json, hex
    # Of each graph: itself and its weights, as they were when they were checked.
    graphs: Mapping[str, Mapping[Path, FileState]]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: bool = True) -> Bundle:
        """Read the manifest and check the files against it.

        Existence, kind and size are always checked; `verify=False` leaves out only the reading of every byte
        for sha256.

        Raises:
            BundleError: naming the file that is missing, truncated, altered, a link, outside or too new.
            NotABundle: the folder has no manifest.
        """
        root = Path(folder)
        try:
            str(root).encode()
        except UnicodeEncodeError as error:  # onnxruntime takes no other paths
            raise BundleError(
                f"{str(root)!r} is not a path in UTF-8; move the bundle to one that is"
            ) from error
        text = _manifest_text(root)
        manifest = parse_manifest(text, root / MANIFEST)
        try:
            states = {
                root / name: _check(root, name, entry, verify) for name, entry in manifest.files.items()
            }
            graphs = {
                name: {file: states[file] for file in _graph_files(root, name, manifest)}
                for name in manifest.files
                if name.endswith(".onnx")
            }
        except OSError as error:
            raise BundleError(f"{error.filename or root} cannot be read: {error.strerror}") from error
        return cls(root, manifest, hashlib.sha256(text).hexdigest(), graphs)

    def path(self, name: str) -> Path:
        """The path of a file that the manifest lists. Raises BundleError for any other."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder / MANIFEST} does not list {name}")
        return self.folder / name

    def files_of(self, graph: str) -> Mapping[Path, FileState]:
        """The graph and its weights, as they were when they were checked. Raises BundleError where there is none."""
        self.path(graph)
        return self.graphs[graph]

    def size_of(self, name: str) -> int:
        """Bytes of the graph `name` and of what the manifest lists beside it."""
        folder = name.rpartition("/")[0] + "/"
        return sum(entry.bytes for other, entry in self.manifest.files.items() if other.startswith(folder))

    @cached_property
    def model_digest(self) -> str:
        """Of what decides what an image looks like: see `Manifest.model_digest`."""
        return self.manifest.model_digest

    @property
    def predictor(self) -> Path | None:
        """The quality predictor's graph, or None when the bundle has none."""
        return self.path(PREDICTOR) if PREDICTOR in self.manifest.files else None

    @cached_property
    def calibration(self) -> Calibration | None:
        """The calibration, or None when the bundle has none. Raises BundleError when it cannot be read."""
        return Calibration.load(self.path(CALIBRATION)) if CALIBRATION in self.manifest.files else None

    @property
    def advice(self) -> str:
        """What to run before prompts can be routed with this bundle; empty when they can.

        Raises BundleError when the calibration cannot be read, or is not of our metrics.
        """
        if self.predictor is None:
            lacks = f"the bundle {self.folder} has no quality predictor, so no prompt is routed"
            return f"{lacks}: {LEARN} for it, {TAKE_UP}"
        calibration = self.calibration
        if calibration is None:
            return f"the bundle {self.folder} has no calibration, so no prompt is routed: {CALIBRATE} for it, {TAKE_UP}"
        if calibration.edge_digest != self.model_digest:
            return (
                f"the calibration was made for edge model {calibration.edge_digest[:16]} and the bundle holds "
                f"{self.model_digest[:16]}, so no prompt is routed: {LEARN} for {self.folder}, {TAKE_UP}"
            )
        predictor = self.manifest.files[PREDICTOR].sha256
        if calibration.recipe.get("predictor_sha256", predictor) != predictor:
            return (
                "the calibration was made for another predictor than the bundle's, so no prompt is routed: "
                f"{CALIBRATE} for {self.folder}, {TAKE_UP}"
            )
        if tuple(name for name, _, _ in calibration.metrics) != METRICS:
            raise BundleError(
                f"{self.folder}: the calibration is not of the metrics {', '.join(METRICS)}; calibrate again"
            )
        return ""


def write_manifest(folder: str | os.PathLike[str], **facts: Any) -> Path:
    """Hash every file of `folder` and write its manifest.json; returns its path.

    `facts` are the fields of `Facts`. Those left out are kept from the manifest that is there, so that a
    file can be added to a finished bundle with `write_manifest(folder)`.

    Raises:
        BundleError: a fact is missing, unknown or of the wrong type, or the folder holds a symbolic link.
    """
    root = Path(folder)
    target = root / MANIFEST
    known = [field.name for field in fields(Facts)]
    if unknown := sorted(set(facts) - set(known)):
        raise BundleError(f"a manifest has no {', '.join(unknown)}")
    if target.exists():
        kept = parse_unfinished(target.read_bytes(), target)
        facts = {name: getattr(kept, name) for name in known} | facts
    partial = target.with_suffix(".json.partial")
    files = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        _refuse_links(root, name)
        if path.is_file() and path not in (target, partial):
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    stated = {name: facts[name] for name in known if facts.get(name) is not None}
    for name, value in stated.items():
        if isinstance(value, (AddedConditioning, JointConditioning)):
            stated[name] = asdict(value)
    version = 3 if "joint" in stated else 2 if {"added", "guidance_embedding"} & set(stated) else 1
    document = {"schema_version": version, **stated, "files": files}
    text = json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
    parse_unfinished(text, target)  # what is written can be read
    partial.write_bytes(text)
    os.replace(partial, target)
    return target


def put_file(folder: Path, name: str, made: Path, without: str | None = None) -> None:
    """Make the file `made`, on the same disk, the file `name` of a finished bundle, and take `without` out of it.

    Nothing else is hashed, so files and manifest disagree for no longer than two renames take.
    """
    manifest = folder / MANIFEST
    document = json.loads(manifest.read_bytes())
    files = document["files"] | {name: {"bytes": made.stat().st_size, "sha256": sha256_of(made)}}
    document["files"] = {other: files[other] for other in sorted(files) if other != without}
    partial = manifest.with_suffix(".json.partial")
    partial.write_bytes(json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n")
    (folder / name).parent.mkdir(exist_ok=True)
    os.replace(made, folder / name)
    os.replace(partial, manifest)
    if without is not None:
        (folder / without).unlink(missing_ok=True)


def _manifest_text(root: Path) -> bytes:
    """The manifest, or so much of it that it is seen to be too large. Raises what `Bundle.open` raises."""
    try:
        if not stat.S_ISDIR(mode := mode_of(root)):
            why = "it is a file, not a folder" if mode else "the folder does not exist"
            raise BundleError(f"no bundle at {root}: {why}")
        _refuse_links(root, MANIFEST)
        mode = mode_of(root / MANIFEST)
        if mode and not stat.S_ISREG(mode):  # from a pipe, reading would wait for ever
            raise BundleError(f"{root / MANIFEST} is not a plain file")
        with (root / MANIFEST).open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise NotABundle(
            f"{root} has no {MANIFEST}, so it is no bundle; `edge-export diffusion` makes one of a pipeline"
        ) from error
    except OSError as error:
        raise BundleError(f"{root / MANIFEST} cannot be read: {error.strerror}") from error


def _check(root: Path, name: str, entry: FileEntry, verify: bool) -> FileState:
    """The file's state from before its bytes are read, so that whatever changes later shows."""
    path = root / name
    _refuse_links(root, name)
    mode = mode_of(path)
    if not mode:
        raise BundleError(f"{path} is missing; fetch or export the bundle again")
    if not stat.S_ISREG(mode):
        raise BundleError(f"{path} is not a plain file")
    state = FileState.of(path)
    if state.bytes != entry.bytes:
        raise BundleError(
            f"{path} has {state.bytes} bytes where {MANIFEST} says {entry.bytes}; fetch or export it again"
        )
    if verify and sha256_of(path) != entry.sha256:
        raise BundleError(f"{path} does not match its sha256 in {MANIFEST}; fetch or export the bundle again")
    return state._replace(sha256=entry.sha256) if verify else state


def _refuse_links(root: Path, name: str) -> None:
    """A link could lead out of the folder, or to other bytes later. The bundle folder itself may be one."""
    path = root
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{path} is a symbolic link; a bundle holds plain files only")


def _graph_files(root: Path, graph: str, manifest: Manifest) -> list[Path]:
    """The graph and the files with its weights. No sha256 covers one that is not listed, wherever it lies."""
    names = [graph]
    for location in sorted(locations(root / graph)):
        # Not brought into a plain form: onnxruntime takes it as it is written, and manifests list plain paths only.
        name = f"{graph.rpartition('/')[0]}/{location}".removeprefix("/")
        # Up to 1.23.2 a location with that word may stand for an address in the process's memory, and no file is read.
        if location.startswith("/") or "_MEM_ADDR_" in location or name not in manifest.files:
            raise BundleError(
                f"{root / graph} has weights in {location[:MAX_PATH_BYTES]!r}, which is no file below its folder that "
                f"{MANIFEST} lists, so nothing tells whether they are whole; export the bundle again"
            )
        names.append(name)
    return [root / name for name in names]


def mode_of(path: Path) -> int:
    """The mode of what is there; 0 where nothing is. Raises OSError where that cannot be seen, as Path.exists and its
    like did before Python 3.14.
    """
    try:
        return path.stat().st_mode
    except ValueError:  # a null character
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return 0
