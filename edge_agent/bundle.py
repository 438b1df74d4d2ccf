"""The bundle: a folder with everything the edge runs, and a manifest that names every file with its bytes
and sha256.

    manifest.json                       what this module reads and writes
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
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

from edge_agent.calibration import Calibration
from edge_agent.errors import BundleError, NewerBundle, NotABundle
from edge_agent.superiority import METRICS
from edge_agent.weights import locations

# 2 adds what schema 1 cannot run: added conditioning and embedded guidance; 3 adds joint conditioning. A bundle without
# them is written as 1, so that older programs read it.
SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer/tokenizer.json"
TOKENIZER_2 = "tokenizer_2/tokenizer.json"
TEXT_ENCODER = "text_encoder/model.onnx"
TEXT_ENCODER_2 = "text_encoder_2/model.onnx"
DENOISER = "unet/model.onnx"
TRANSFORMER = "transformer/model.onnx"  # the denoiser of Stable Diffusion 3
DECODER = "vae_decoder/model.onnx"
FUSED = "fused.onnx"
"""Beside the denoiser's graph, where there is one: the same over the same weights, with each attention in one operator,
which is onnxruntime's own."""
PREDICTOR = "predictor/model.onnx"
CALIBRATION = "predictor/calibration.json"

CALIBRATE = "run `edge-export label`, unless you have its labels of both models, then `edge-export calibrate`"
"""What makes a calibration where there is a predictor for both models."""

LEARN = "run `edge-export label`, `edge-export train`, `edge-export predictor` and `edge-export calibrate`"
"""What makes predictor and calibration for models that no predictor knows yet."""

# The folders that decide what an image looks like. Predictor and calibration are made *for* these, so they
# stay out of the model digest: adding them must not change the digest that the calibration was made for.
MODEL_FOLDERS = (
    "text_encoder",
    "text_encoder_2",
    "unet",
    "transformer",
    "vae_decoder",
    "schedules",
    "tokenizer",
    "tokenizer_2",
)
# The facts that do not.
_LABELS = ("name", "licence", "latent_to_rgb", "dtypes", "other_sizes")

SMALLER_DTYPES = ("fp16", "int8")
"""What a graph computes in besides float32: half precision, or eight bits wherever it multiplies."""

# A manifest is a list of some dozen files. What is larger is a mistake, or wants to fill memory or disk.
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILES = 1000
MAX_PATH_BYTES = 200  # in UTF-8: file systems count bytes, and take 255 or fewer for a name
MAX_INT = 2**31 - 1  # of a count
MAX_SIDE = 1 << 14  # of an image, in pixels: what is larger fills the memory
MAX_LATENTS = (
    1 << 26
)  # numbers of one image's latents; those of the largest image with 16 channels and a factor of 8
MAX_EMBEDDING = 1 << 14
MAX_SIZES = 100  # besides the default
MAX_FILE_BYTES = 2**63 - 1
# CLIP reads 77, T5 in the largest models 512. A tokenizer pads to as many as it is told, and ends the process where
# memory does not do.
MAX_TEXT_TOKENS = 1 << 14

READ_BYTES = 1 << 20
"""How much of a file is read at a time."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def schedule_file(steps: int) -> str:
    """Where a bundle keeps the schedule compiled for `steps` steps."""
    return f"schedules/{steps}.json"


@dataclass(frozen=True)
class FileEntry:
    """What the manifest promises about one file."""

    bytes: int
    sha256: str


FileState = tuple[int, int, int]
"""What tells whether a file was replaced: inode, bytes, time of change."""


@dataclass(frozen=True)
class AddedConditioning:
    """What Stable Diffusion XL's denoiser takes besides latents, timestep and token states."""

    text_output: str  # of the second text encoder; its states stand behind the first's in each token's state
    pooled_output: str  # of the second text encoder: the prompt as one vector
    # Of the default size: height and width of the original, top and left of the crop, height and width.
    time_ids: tuple[float, ...]
    zero_negative: bool  # an empty negative prompt is all zeros, not what the encoders make of an empty text


@dataclass(frozen=True)
class JointConditioning:
    """What Stable Diffusion 3's transformer takes besides latents and timestep: the tokens' states, which it attends to
    together with the latents, and the prompt as one vector, the first text encoder's with the second's behind it.
    """

    text_output: str  # of the second text encoder; its states stand behind the first's in each token's state
    pooled_output: str  # of both text encoders: the prompt as one vector
    # What the denoiser is given, [positions, hidden], is larger than what both encoders make: it has room for the
    # states of a third, which a bundle does without. The rest is zeros.
    positions: int
    hidden: int


Size = tuple[int, int]
"""Width and height of an image, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an export states about its models. Sizes are in pixels, latent sizes in latent positions.

    What has a default is left out of the manifest, and of the model digest, where a model does not have it.
    """

    name: str
    licence: str
    width: int
    height: int
    latent_channels: int
    latent_height: int
    latent_width: int
    latent_scaling: float  # the decoder gets latents / latent_scaling + latent_shift
    latent_shift: float
    default_steps: int
    default_guidance: float
    steps: tuple[int, ...]  # the step counts that are compiled
    text_tokens: int  # positions the text encoder sees, padding included
    text_hidden: int  # size of one token's state, which drives the denoiser and which the predictor reads
    # The text encoder's output that is that state, or its first part where there are two encoders.
    text_output: str
    added: AddedConditioning | None = None  # Stable Diffusion XL
    joint: JointConditioning | None = None  # Stable Diffusion 3
    # Size of the guidance scale's embedding, where the denoiser takes it as an input instead of a second pass
    # (latent consistency models).
    guidance_embedding: int | None = None
    # Width and height of images that the same graphs make besides the default's.
    other_sizes: tuple[Size, ...] | None = None
    # A linear map from latents to colours in 0..1: a row of red, green, blue for each channel, then the constant.
    latent_to_rgb: tuple[tuple[float, float, float], ...] | None = None
    # What graphs compute in, by their folder, where it is not float32.
    dtypes: Mapping[str, str] | None = None

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The images that there are, the default's first."""
        return ((self.width, self.height), *(self.other_sizes or ()))

    @property
    def factor(self) -> int:
        """Pixels of a side for each latent position."""
        return self.width // self.latent_width

    def latent_shape(self, size: Size) -> tuple[int, int, int, int]:
        """Of one image of that size: [1, channels, height, width], in latent positions."""
        width, height = size
        return 1, self.latent_channels, height // self.factor, width // self.factor

    @property
    def second(self) -> AddedConditioning | JointConditioning | None:
        """What is stated of the second text encoder, where there is one."""
        return self.added or self.joint

    @property
    def denoiser(self) -> str:
        """The graph that is run in every step."""
        return TRANSFORMER if self.joint else DENOISER

    def dtype(self, graph: str) -> str:
        """What the graph computes in: fp32, or one of `SMALLER_DTYPES`."""
        return (self.dtypes or {}).get(graph.rpartition("/")[0], "fp32")


@dataclass(frozen=True, kw_only=True)
class Manifest(Facts):
    """The facts, and every file by its path relative to the bundle, with forward slashes."""

    schema_version: int
    files: Mapping[str, FileEntry]

    @property
    def total_bytes(self) -> int:
        """What the files take together."""
        return sum(entry.bytes for entry in self.files.values())


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `Bundle.open` is the only way in."""

    folder: Path
    manifest: Manifest
    digest: str  # sha256 of manifest.json, hex
    # sha256 over the facts that decide what an image looks like and the sorted sha256 of the files in
    # MODEL_FOLDERS, hex; edge_model_digest on the wire.
    model_digest: str
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
        try:
            if not stat.S_ISDIR(mode := mode_of(root)):
                why = "it is a file, not a folder" if mode else "the folder does not exist"
                raise BundleError(f"no bundle at {root}: {why}")
            _refuse_links(root, MANIFEST)
            mode = mode_of(root / MANIFEST)
            if mode and not stat.S_ISREG(mode):  # from a pipe, reading would wait for ever
                raise BundleError(f"{root / MANIFEST} is not a plain file")
            with (root / MANIFEST).open("rb") as file:
                text = file.read(MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError as error:
            raise NotABundle(
                f"{root} has no {MANIFEST}, so it is no bundle; `edge-export diffusion` makes one of a pipeline"
            ) from error
        except OSError as error:
            raise BundleError(f"{root / MANIFEST} cannot be read: {error.strerror}") from error
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
        return cls(root, manifest, hashlib.sha256(text).hexdigest(), _model_digest(manifest), graphs)

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
            return (
                f"the bundle {self.folder} has no quality predictor, so no prompt is routed: {LEARN} for it"
            )
        calibration = self.calibration
        if calibration is None:
            return f"the bundle {self.folder} has no calibration, so no prompt is routed: {CALIBRATE} for it"
        if calibration.edge_digest != self.model_digest:
            return (
                f"the calibration was made for edge model {calibration.edge_digest[:16]} and the bundle holds "
                f"{self.model_digest[:16]}, so no prompt is routed: {LEARN} for {self.folder}"
            )
        predictor = self.manifest.files[PREDICTOR].sha256
        if calibration.recipe.get("predictor_sha256", predictor) != predictor:
            return (
                "the calibration was made for another predictor than the bundle's, so no prompt is routed: "
                f"{CALIBRATE} for {self.folder}"
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
        kept = _parse(target.read_bytes(), target)
        facts = {name: getattr(kept, name) for name in known} | facts
    partial = target.with_suffix(".json.partial")
    files = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        _refuse_links(root, name)
        if path.is_file() and path not in (target, partial):
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    stated = {name: facts[name] for name in known if facts.get(name) is not None}
    for name, value in stated.items():
        if isinstance(value, (AddedConditioning, JointConditioning)):
            stated[name] = asdict(value)
    version = 3 if "joint" in stated else 2 if {"added", "guidance_embedding"} & set(stated) else 1
    document = {"schema_version": version, **stated, "files": files}
    text = json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
    _parse(text, target)  # what is written can be read
    partial.write_bytes(text)
    os.replace(partial, target)
    return target


def put_file(folder: Path, name: str, made: Path, without: str | None = None) -> None:
    """Make the file `made`, on the same disk, the file `name` of a finished bundle, and take `without` out of it.

    Nothing else is hashed, so files and manifest disagree for no longer than two renames take.
    """
    manifest = folder / MANIFEST
    document = json.loads(manifest.read_bytes())
    files = document["files"] | {name: {"bytes": made.stat().st_size, "sha256": _sha256(made)}}
    document["files"] = {other: files[other] for other in sorted(files) if other != without}
    partial = manifest.with_suffix(".json.partial")
    partial.write_bytes(json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n")
    (folder / name).parent.mkdir(exist_ok=True)
    os.replace(made, folder / name)
    os.replace(partial, manifest)
    if without is not None:
        (folder / without).unlink(missing_ok=True)


def parse_manifest(text: bytes, place: Path | str) -> Manifest:
    """The manifest of a whole bundle, read from `text`; `place` names it in errors.

    Raises:
        BundleError: it is not one this program reads, too large, lists no plain paths, or not what every bundle has.
    """
    manifest = _parse(text, place)
    for name in _required(manifest):
        if name not in manifest.files:
            raise BundleError(f"{place} does not list {name}, which every bundle must have")
    return manifest


def _required(manifest: Manifest) -> list[str]:
    second = [TOKENIZER_2, TEXT_ENCODER_2] if manifest.second else []
    schedules = [schedule_file(steps) for steps in manifest.steps]
    return [TOKENIZER, TEXT_ENCODER, *second, manifest.denoiser, DECODER, *schedules]


def _parse(text: bytes, path: Path | str) -> Manifest:
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than any manifest may be ({MAX_MANIFEST_BYTES:,} bytes)")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BundleError(f"{path} must hold a JSON object")
    version = _typed(document, "schema_version", int, path)
    if version > SCHEMA_VERSION:
        raise NewerBundle(
            f"{path} has schema version {version} and this edge-agent reads up to {SCHEMA_VERSION}, so the bundle is "
            "newer than this edge-agent: update edge-agent"
        )
    if version < 1:
        raise BundleError(f"{path} has schema version {version}; versions start at 1")
    facts: dict[str, Any] = {}
    for name, kind in get_type_hints(Facts).items():
        if kind in (int, float, str):
            facts[name] = _typed(document, name, kind, path)
    steps = _typed(document, "steps", list, path)
    if not steps or not all(type(count) is int and 0 < count <= MAX_INT for count in steps):
        raise BundleError(f"{path}: steps must list step counts from 1 to {MAX_INT}")
    if document.get("guidance_embedding") is not None:
        facts["guidance_embedding"] = _typed(document, "guidance_embedding", int, path)
        if not 4 <= facts["guidance_embedding"] <= MAX_EMBEDDING:
            raise BundleError(f"{path}: guidance_embedding must be from 4 to {MAX_EMBEDDING}")
    manifest = Manifest(
        **facts,
        steps=tuple(sorted(steps)),
        added=_parse_added(document, path),
        joint=_parse_joint(document, facts, path),
        other_sizes=_parse_sizes(document, path),
        latent_to_rgb=_parse_map(document, facts["latent_channels"], path),
        dtypes=_parse_dtypes(document, path),
        schema_version=version,
        files=_parse_files(document, path),
    )
    for name, kind in get_type_hints(Facts).items():
        largest = {"text_tokens": MAX_TEXT_TOKENS, "width": MAX_SIDE, "height": MAX_SIDE}.get(name, MAX_INT)
        if kind is int and not 0 < getattr(manifest, name) <= largest:
            raise BundleError(f"{path}: {name} must be from 1 to {largest}")
        if kind is float and not math.isfinite(getattr(manifest, name)):
            raise BundleError(f"{path}: {name} must be a finite number")
        if kind is str and not getattr(manifest, name).isprintable():  # it is shown on terminals
            raise BundleError(f"{path}: {name} must be printable text on one line")
    factor = manifest.factor
    if (manifest.width, manifest.height) != (factor * manifest.latent_width, factor * manifest.latent_height):
        raise BundleError(
            f"{path}: a decoder makes no {manifest.width} x {manifest.height} pixels of {manifest.latent_width} x "
            f"{manifest.latent_height} latent positions: both sides grow by one whole factor"
        )
    if any(side % factor for size in manifest.sizes for side in size):
        raise BundleError(
            f"{path}: sides of other_sizes must be multiples of {factor}, as a decoder makes them"
        )
    # A graph may leave them open, so that nothing but the manifest says how much is to be drawn.
    if any(math.prod(manifest.latent_shape(size)) > MAX_LATENTS for size in manifest.sizes):
        raise BundleError(f"{path}: latents of more than {MAX_LATENTS:,} numbers fill the memory")
    if len(set(manifest.sizes)) < len(manifest.sizes):
        raise BundleError(f"{path}: other_sizes must be others than width and height, each named once")
    if manifest.other_sizes and manifest.added and len(manifest.added.time_ids) != 6:
        raise BundleError(
            f"{path}: with other_sizes, time_ids must be those of an image's size and crop, six"
        )
    if manifest.latent_scaling == 0.0:
        raise BundleError(f"{path}: latent_scaling must not be zero")
    if manifest.default_steps not in manifest.steps:
        raise BundleError(f"{path}: default_steps {manifest.default_steps} is not among steps {steps}")
    return manifest


def _parse_added(document: dict[str, Any], path: Path | str) -> AddedConditioning | None:
    if document.get("added") is None:
        return None
    added = _typed(document, "added", dict, path)
    return AddedConditioning(
        text_output=_typed(added, "text_output", str, path),
        pooled_output=_typed(added, "pooled_output", str, path),
        time_ids=_numbers(added.get("time_ids"), "time_ids", path),
        zero_negative=_typed(added, "zero_negative", bool, path),
    )


def _parse_joint(
    document: dict[str, Any], facts: Mapping[str, Any], path: Path | str
) -> JointConditioning | None:
    if document.get("joint") is None:
        return None
    if document.get("added") is not None or document.get("guidance_embedding") is not None:
        raise BundleError(f"{path}: no model has joint conditioning besides added or guidance_embedding")
    stated = _typed(document, "joint", dict, path)
    joint = JointConditioning(
        text_output=_typed(stated, "text_output", str, path),
        pooled_output=_typed(stated, "pooled_output", str, path),
        positions=_typed(stated, "positions", int, path),
        hidden=_typed(stated, "hidden", int, path),
    )
    for name, least, most in (
        ("positions", facts["text_tokens"], MAX_TEXT_TOKENS),
        ("hidden", facts["text_hidden"], MAX_INT),
    ):
        if not least <= getattr(joint, name) <= most:
            raise BundleError(f"{path}: {name} of joint must be from {least} to {most}")
    return joint


def _parse_sizes(document: dict[str, Any], path: Path | str) -> tuple[Size, ...] | None:
    if document.get("other_sizes") is None:
        return None
    sizes = _typed(document, "other_sizes", list, path)
    sides = [side for size in sizes for side in (size if isinstance(size, list) and len(size) == 2 else [0])]
    if not 0 < len(sizes) <= MAX_SIZES or not all(
        type(side) is int and 0 < side <= MAX_SIDE for side in sides
    ):
        raise BundleError(
            f"{path}: other_sizes must list up to {MAX_SIZES} pairs of width and height, from 1 to {MAX_SIDE}"
        )
    return tuple((width, height) for width, height in sizes)


def _parse_map(
    document: dict[str, Any], channels: int, path: Path | str
) -> tuple[tuple[float, float, float], ...] | None:
    if document.get("latent_to_rgb") is None:
        return None
    rows = [_numbers(row, "latent_to_rgb", path) for row in _typed(document, "latent_to_rgb", list, path)]
    if len(rows) != channels + 1 or any(len(row) != 3 for row in rows):
        raise BundleError(f"{path}: latent_to_rgb must have {channels + 1} rows of three numbers")
    return tuple((red, green, blue) for red, green, blue in rows)


def _parse_dtypes(document: dict[str, Any], path: Path | str) -> dict[str, str] | None:
    if document.get("dtypes") is None:
        return None
    dtypes: dict[str, str] = _typed(document, "dtypes", dict, path)
    if not all(dtype in SMALLER_DTYPES for dtype in dtypes.values()):
        raise BundleError(f"{path}: dtypes must be of {', '.join(SMALLER_DTYPES)}, by folder")
    return dtypes


def _numbers(value: Any, name: str, path: Path | str) -> tuple[float, ...]:
    try:
        if isinstance(value, list) and all(
            type(number) in (int, float) and math.isfinite(number) for number in value
        ):
            return tuple(map(float, value))
    except OverflowError:  # an integer that no float can hold
        pass
    raise BundleError(f"{path}: {name} must list numbers, not {value!r:.60}")


def _parse_files(document: dict[str, Any], path: Path | str) -> dict[str, FileEntry]:
    entries: dict[str, FileEntry] = {}
    files = _typed(document, "files", dict, path)
    if len(files) > MAX_FILES:
        raise BundleError(f"{path} lists {len(files):,} files; a bundle has at most {MAX_FILES:,}")
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        inside = (
            parts
            and not name.startswith("/")
            and ".." not in parts
            and PurePosixPath(name).as_posix() == name
        )
        # A backslash parts folders on Windows, where a colon names a drive or a stream.
        if (
            not inside
            or set(name) & set("\\:\0")
            or not name.isprintable()
            or len(name.encode()) > MAX_PATH_BYTES
        ):
            raise BundleError(
                f"{path} lists {name[:MAX_PATH_BYTES]!r}, which is not a plain path inside the bundle, of at most "
                f"{MAX_PATH_BYTES} bytes"
            )
        if name == MANIFEST or any(
            parent.as_posix() in (*files, MANIFEST) for parent in PurePosixPath(name).parents
        ):
            raise BundleError(f"{path} lists {name!r}, whose place another file has")
        if not isinstance(entry, dict):
            raise BundleError(f"{path}: the entry of {name} must hold bytes and sha256")
        found = FileEntry(_typed(entry, "bytes", int, path), _typed(entry, "sha256", str, path))
        if not 0 <= found.bytes <= MAX_FILE_BYTES or not _SHA256.fullmatch(found.sha256):
            raise BundleError(
                f"{path}: the entry of {name} must hold bytes, from 0 to {MAX_FILE_BYTES}, and a sha256 in hex"
            )
        entries[name] = found
    return entries


def _typed(document: dict[str, Any], name: str, kind: Any, path: Path | str) -> Any:
    value = document.get(name)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise BundleError(f"{path}: {name} must be a finite number") from error
    if type(value) is not kind:
        raise BundleError(f"{path}: {name} must be a {kind.__name__}, not {value!r:.60}")
    return value


def _check(root: Path, name: str, entry: FileEntry, verify: bool) -> FileState:
    """The file's state from before its bytes are read, so that whatever changes later shows."""
    path = root / name
    _refuse_links(root, name)
    mode = mode_of(path)
    if not mode:
        raise BundleError(f"{path} is missing; fetch or export the bundle again")
    if not stat.S_ISREG(mode):
        raise BundleError(f"{path} is not a plain file")
    state = _state(path)
    if state[1] != entry.bytes:
        raise BundleError(
            f"{path} has {state[1]} bytes where {MANIFEST} says {entry.bytes}; fetch or export it again"
        )
    if verify and _sha256(path) != entry.sha256:
        raise BundleError(f"{path} does not match its sha256 in {MANIFEST}; fetch or export the bundle again")
    return state


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
        if location.startswith("/") or name not in manifest.files:
            raise BundleError(
                f"{root / graph} has weights in {location[:MAX_PATH_BYTES]!r}, which is no file below its folder that "
                f"{MANIFEST} lists, so nothing tells whether they are whole; export the bundle again"
            )
        names.append(name)
    return [root / name for name in names]


def file_states(files: Iterable[Path]) -> dict[Path, FileState]:
    """What tells later whether they are still the same. A file that is not there has none."""
    found = {}
    for file in files:
        with suppress(OSError):
            found[file] = _state(file)
    return found


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


def _state(file: Path) -> FileState:
    state = file.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _model_digest(manifest: Manifest) -> str:
    kept = asdict(manifest)
    names = [field.name for field in fields(Facts) if field.name not in _LABELS]
    facts = {name: kept[name] for name in names if kept[name] is not None}
    digests = sorted(
        entry.sha256 for name, entry in manifest.files.items() if name.split("/")[0] in MODEL_FOLDERS
    )
    return hashlib.sha256(json.dumps([facts, digests], sort_keys=True).encode()).hexdigest()
