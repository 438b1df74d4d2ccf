"""The manifest: what a bundle states about its models, and every file of it with its bytes and sha256.

It is read from a folder or, before anything is fetched, from a source. Nobody need look twice at what it says: types,
bounds, and that files have plain paths inside the bundle are checked here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

from edge_agent.errors import BundleError, NewerBundle

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
MAX_LATENTS = 1 << 26  # numbers of one image's: of the largest image with 16 channels and a factor of 8
MAX_EMBEDDING = 1 << 14
MAX_SIZES = 100  # besides the default
MAX_FILE_BYTES = 2**63 - 1
MAX_JSON_BYTES = 1 << 26  # twice the largest tokenizers'; when read, JSON may take twenty times its size
# CLIP reads 77, T5 in the largest models 512. A tokenizer pads to as many as it is told, and ends the process where
# memory does not do.
MAX_TEXT_TOKENS = 1 << 14

_SHA256 = re.compile(r"[0-9a-f]{64}")
# What is no file's name on Windows: a colon names a drive or a stream, a backslash parts folders, the words are devices
# whatever their ending. And onnxruntime up to 1.23.2 takes `*/_ORT_MEM_ADDR_/*` for an address in the process's memory.
_NO_NAME = re.compile(r'[\\:\0*?"<>|]|[. ]\Z|\A(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\.|\Z)', re.IGNORECASE)


def schedule_file(steps: int) -> str:
    """Where a bundle keeps the schedule compiled for `steps` steps."""
    return f"schedules/{steps}.json"


@dataclass(frozen=True)
class FileEntry:
    """What the manifest promises about one file."""

    bytes: int
    sha256: str


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

    @property
    def model_digest(self) -> str:
        """The sha256, in hex, of the facts that decide what an image looks like and the sorted sha256 of the files in
        MODEL_FOLDERS; edge_model_digest on the wire.
        """
        kept = asdict(self)
        names = [field.name for field in fields(Facts) if field.name not in _LABELS]
        facts = {name: kept[name] for name in names if kept[name] is not None}
        digests = sorted(
            entry.sha256 for name, entry in self.files.items() if name.split("/")[0] in MODEL_FOLDERS
        )
        return hashlib.sha256(json.dumps([facts, digests], sort_keys=True).encode()).hexdigest()


def parse_manifest(text: bytes, place: Path | str) -> Manifest:
    """The manifest of a whole bundle, read from `text`; `place` names it in errors.

    Raises:
        BundleError: it is not one this program reads, too large, lists no plain paths, or not what every bundle has.
    """
    manifest = parse_unfinished(text, place)
    second = (TOKENIZER_2, TEXT_ENCODER_2) if manifest.second else ()
    schedules = map(schedule_file, manifest.steps)
    for name in (TOKENIZER, TEXT_ENCODER, *second, manifest.denoiser, DECODER, *schedules):
        if name not in manifest.files:
            raise BundleError(f"{place} does not list {name}, which every bundle must have")
    return manifest


def parse_unfinished(text: bytes, path: Path | str) -> Manifest:
    """The manifest of a bundle that may lack files as yet. Raises BundleError where it is not one that this reads."""
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
    facts = {
        name: _plain(document, name, kind, path)
        for name, kind in get_type_hints(Facts).items()
        if kind in (int, float, str)
    }
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
    _check_sizes(manifest, path)
    if manifest.latent_scaling == 0.0:
        raise BundleError(f"{path}: latent_scaling must not be zero")
    if manifest.default_steps not in manifest.steps:
        raise BundleError(f"{path}: default_steps {manifest.default_steps} is not among steps {steps}")
    return manifest


def _check_sizes(manifest: Manifest, path: Path | str) -> None:
    """Raises BundleError for sizes that no decoder makes, or that are there twice."""
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


def _plain(document: dict[str, Any], name: str, kind: type, path: Path | str) -> Any:
    """A fact that is a number or a text, within what any model may have."""
    value = _typed(document, name, kind, path)
    largest = {"text_tokens": MAX_TEXT_TOKENS, "width": MAX_SIDE, "height": MAX_SIDE}.get(name, MAX_INT)
    if kind is int and not 0 < value <= largest:
        raise BundleError(f"{path}: {name} must be from 1 to {largest}")
    if kind is float and not math.isfinite(value):
        raise BundleError(f"{path}: {name} must be a finite number")
    if kind is str and not value.isprintable():  # it is shown on terminals
        raise BundleError(f"{path}: {name} must be printable text on one line")
    return value


def _parse_added(document: dict[str, Any], path: Path | str) -> AddedConditioning | None:
    if document.get("added") is None:
        return None
    added = _typed(document, "added", dict, path)
    return AddedConditioning(
        text_output=_plain(added, "text_output", str, path),
        pooled_output=_plain(added, "pooled_output", str, path),
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
        text_output=_plain(stated, "text_output", str, path),
        pooled_output=_plain(stated, "pooled_output", str, path),
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
    taken = files.keys() | {MANIFEST}
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        inside = (
            parts
            and not name.startswith("/")
            and ".." not in parts
            and PurePosixPath(name).as_posix() == name
        )
        if (
            not inside
            or any(map(_NO_NAME.search, parts))
            or not name.isprintable()
            or len(name.encode()) > MAX_PATH_BYTES
        ):
            raise BundleError(
                f"{path} lists {name[:MAX_PATH_BYTES]!r}, which is not a plain path inside the bundle that all systems "
                f"take, of at most {MAX_PATH_BYTES} bytes"
            )
        if name == MANIFEST or any(parent.as_posix() in taken for parent in PurePosixPath(name).parents):
            raise BundleError(f"{path} lists {name!r}, whose place another file has")
        if not isinstance(entry, dict):
            raise BundleError(f"{path}: the entry of {name} must hold bytes and sha256")
        found = FileEntry(_typed(entry, "bytes", int, path), _typed(entry, "sha256", str, path))
        if not 0 <= found.bytes <= MAX_FILE_BYTES or not _SHA256.fullmatch(found.sha256):
            raise BundleError(
                f"{path}: the entry of {name} must hold bytes, from 0 to {MAX_FILE_BYTES}, and a sha256 in hex"
            )
        if name.endswith(".json") and found.bytes > MAX_JSON_BYTES:
            raise BundleError(
                f"{path}: {name} has {found.bytes:,} bytes; a bundle's JSON has at most {MAX_JSON_BYTES:,}"
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
