"""Files of weights: .safetensors, and what torch pickled before there were any, of which only the weights are read."""

from __future__ import annotations

import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from cloud_server import part_files
from export.errors import ExportError, reason

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

# Under which names weights lie in a file that says more, such as how they were trained: a model's, and those of an
# embedding of the WebUI.
_INNER = ("state_dict", "string_to_param")
_DEEPEST = 3
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors calls them


class _Inert:
    """Stands for what a pickled file holds beside weights: takes what it is given, and does nothing with it."""

    def __init__(self, *_values: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class _Dict:
    """Stands for a dictionary of another class: torch's unpickler gives entries, and attributes, to these alone."""

    def __new__(cls, *_values: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _List:
    """The same of a list."""

    def __new__(cls, *_values: Any) -> list[Any]:  # type: ignore[misc]
        return []


# What ComfyUI keeps beside weights that it has quantized, older and newer versions.
_SCALES = ("scale_weight", "scaled_fp8", "weight_scale", "comfy_quant")


def types(file: Path) -> dict[str, torch.dtype | None]:
    """By the names of the weights in `file` what they are held in; None for what is neither half nor single precision.

    Raises ExportError where it is no file of weights, or cannot be read.
    """
    _refuse_other(file)
    if _is_pickled(file):
        return {name: weight.dtype for name, weight in _unpickled(file).items()}
    with _opened(file) as weights:
        return {name: _TYPES.get(weights.get_slice(name).get_dtype()) for name in weights.keys()}  # noqa: SIM118, it is no dict


def read(file: Path) -> dict[str, torch.Tensor]:
    """The weights in `file`, by name. Raises ExportError as `types` does."""
    _refuse_other(file)
    if _is_pickled(file):
        return _unpickled(file)
    with _opened(file):
        return load_file(file)


def read_floating(file: Path, without: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The weights in `file`, by name, less those that are called as one of `without`. Raises ExportError as `types`
    does, and where some are whole numbers.
    """
    weights = {name: weight for name, weight in read(file).items() if name not in without}
    if kinds := {weight.dtype for weight in weights.values() if not weight.is_floating_point()}:
        raise ExportError(
            f"{file} holds weights of {kinds.pop()}, which are not read: get it in half precision"
        )
    return weights


def refuse_quantized(file: Path) -> None:
    """Raises ExportError where weights in `file` are whole numbers, or others in it scale them: only the program that
    wrote them knows what they stand for.
    """
    if _is_pickled(file):
        held = {name: (one.is_floating_point(), one.dim()) for name, one in _unpickled(file).items()}
    else:
        with _opened(file) as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118, it is no dict
            held = {name: (one.get_dtype()[0] in "BF", len(one.get_shape())) for name, one in slices.items()}
    for name, (floating, dimensions) in held.items():
        if name.startswith("text_encoders.t5xxl."):  # which is left out
            continue
        whole = not floating and dimensions > 1 and name.endswith("weight")
        if whole or name.endswith(_SCALES):
            raise ExportError(
                f"{file} is quantized, as {name} in it says, in a way that is not read: get it in half precision"
            )


def metadata(file: Path) -> dict[str, str]:
    """What `file`, which can be read, says beside its weights."""
    if _is_pickled(file):
        return {}
    with _opened(file) as weights:
        return dict(weights.metadata() or {})


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Within, torch's unpickler for weights alone passes over what else is in a `file` for which it would refuse it."""
    others = []
    if _is_pickled(file) and zipfile.is_zipfile(file):
        others = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    with torch.serialization.safe_globals([(_stand_in(name), name) for name in others]):
        yield


def _stand_in(name: str) -> type:
    """For the class of this name, which says alone what it holds: defaultdict, AttributeDict, ParameterDict, deque."""
    if name.lower().endswith("dict"):
        return _Dict
    if name.endswith((".ParameterList", ".ModuleList", ".UserList")):  # which are pickled as any object is
        return _Inert
    return _List if name.lower().endswith(("list", "deque")) else _Inert


def _refuse_other(file: Path) -> None:
    try:
        part_files.refuse_absent(file)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if file.suffix not in SUFFIXES:
        raise ExportError(f"{file} is no file of weights that is read here: these are {', '.join(SUFFIXES)}")


def _is_pickled(file: Path) -> bool:
    return file.suffix != SUFFIXES[0]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, "pt") as weights:
            yield weights
    except safetensors.SafetensorError as error:
        raise ExportError(f"{file} is cut off or damaged: {reason(error)}; get it again") from error


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    try:
        with alone(file), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an old protocol, before it says what is wrong
            held = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch fails in many ways, and says at length how to run what a file holds
        raise ExportError(
            f"{file} is cut off or damaged, no file of weights, or holds among them what is not read: get it again, as "
            ".safetensors where there is one"
        ) from error
    if not (weights := _named(held, _DEEPEST)):
        raise ExportError(f"{file} holds no weights")
    return weights


def _named(held: Any, deepest: int) -> dict[str, torch.Tensor]:
    """The weights in what was pickled, so deep within it at most; none where it goes on, as it may hold itself."""
    held = getattr(held, "_parameters", held)  # of a ParameterDict, which an embedding of 2022 may have
    if not isinstance(held, dict):
        return {}
    for name in _INNER:
        if isinstance(held.get(name), dict):
            return _named(held[name], deepest - 1) if deepest else {}
    return {name: one.detach() for name, one in held.items() if _is_plain(one)}


def _is_plain(one: Any) -> bool:
    """Whether that is a tensor whose numbers are there one by one."""
    return (
        isinstance(one, torch.Tensor)
        and one.layout is torch.strided
        and not (one.is_meta or one.is_quantized)
    )
