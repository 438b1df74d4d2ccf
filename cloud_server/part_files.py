"""The files of a pipeline's parts: which have to be there, and what is wrong with one that cannot be read."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import transformers

from cloud_server.errors import reason
from cloud_server.model_index import NETWORKS

SAFETENSORS = ".safetensors"
UNFUSED = "was saved with a LoRA beside its weights: call fuse_lora() and unload_lora_weights() before save_pretrained"
"""What diffusers and transformers write then, they themselves do not read."""
AGAIN = "save or download the whole model again"

# How the libraries name what they read. Others lie beside, such as openvino_model.bin.
_READ = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.(safetensors|bin)"
)
# The same of any variant.
_VARIANT = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.(safetensors|bin)"
)
# What git leaves in the place of a large file where its extension for these is not installed.
_POINTER = b"version https://git-lfs"


def refuse_faulty(kind: Any, folder: Path, *, weights: bool = True) -> None:
    """Raises ValueError where `folder` lacks a file without which no network or scheduler of class `kind` is whole, its
    `weights` among them where they are wanted.

    transformers would take a config that is not there for the one that its class has by default.
    """
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}, which {diffusers.DiffusionPipeline.config_name} names: {AGAIN}"
        )
    if issubclass(kind, transformers.PreTrainedTokenizerBase):
        for file in folder.iterdir():  # which of its files a tokenizer needs, it knows alone
            if file.is_file():
                refuse_absent(file)
        return
    config = folder / (getattr(kind, "config_name", None) or transformers.CONFIG_NAME)
    if not config.is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} {UNFUSED}")
    refuse_absent(config)
    refuse_no_object(config)
    if not weights or not issubclass(kind, NETWORKS):
        return
    for file in (found := weights_at(folder)):
        refuse_absent(file)
    if not found:
        stem = "diffusion_pytorch_model" if issubclass(kind, diffusers.ModelMixin) else "model"
        if variants := sorted(file.name for file in folder.glob("*") if _VARIANT.fullmatch(file.name)):
            raise ValueError(
                f"{folder} has {variants[0]}, and no variant but fp16 is read: save or download the model "
                "without a variant, or rename what is a single file as if it were none"
            )
        raise ValueError(f"{folder} has no weights for torch, such as {stem}.safetensors")


def refuse_absent(file: Path) -> None:
    """Raises ValueError, saying what is there in its place, where there is no `file` that can be opened."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file} is not a file")
        with file.open("rb") as held:
            pointer = held.read(len(_POINTER)) == _POINTER
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not file.is_symlink():  # a link may lead nowhere
            raise ValueError(f"{file.parent} has no {file.name}: {AGAIN}") from error
        if isinstance(error, FileNotFoundError):
            raise ValueError(
                f"{file} is a link to {file.readlink()}, which is not there; copy from the hub's cache with `cp -rL`"
            ) from error
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if pointer:
        raise ValueError(
            f"{file} is a pointer, which git leaves in the place of a large file: run `git lfs pull` in the clone, or "
            "get the model with `hf download`"
        )


def refuse_no_object(file: Path) -> None:
    """Raises ValueError, saying where it ends, where `file` holds no JSON object."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{file} must hold a JSON object, not {held!r:.60}")


def refuse_unreadable(folder: Path) -> None:
    """Raises ValueError, naming `folder` or the first file in it that cannot be opened, or is cut off.

    The libraries say of some that they are not there, and of others nothing.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    for file in files:
        if _READ.fullmatch(file.name) or not file.is_dir():
            refuse_absent(file)
        if file.suffix == SAFETENSORS:
            try:
                with safetensors.safe_open(file, "pt"):  # reads where each weight lies
                    pass
            except safetensors.SafetensorError as error:
                raise ValueError(f"{file} is cut off or damaged: {reason(error)}; get it again") from error


def weights_at(folder: Path) -> list[Path]:
    """The files of weights in `folder` that are loaded: of those in half precision and others the others, of those that
    are pickled and others the others.
    """
    found = sorted(file for file in folder.glob("*") if _READ.fullmatch(file.name))
    whole = [file for file in found if not is_half(file)] or found
    return [file for file in whole if file.suffix == SAFETENSORS] or whole


def is_half(weights: Path) -> bool:
    """Whole, or one of several: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors."""
    return ".fp16." in weights.name or ".fp16-" in weights.name
