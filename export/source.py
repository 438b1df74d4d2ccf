"""Where models come from: folders that diffusers saved, files of weights, the hub; and why nothing comes of some."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from cloud_server import complete, hub, part_files
from export import weights_file
from export.errors import ExportError, reason
from export.terminal import Report

DENOISER = "model.diffusion_model."
"""How the names of a denoiser's weights begin in a single file of a whole model."""

BEGINNINGS = {"unet": (DENOISER,), "transformer": (DENOISER,), "vae": ("first_stage_model.", "vae.")}
"""The same of its parts."""

ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoders.")
"""The same of text encoders."""


# Where people have a model's id from.
_OF_HUB = re.compile(r"(?:https?://(?:huggingface\.co|hf\.co)/|hf:)([^/@?#]+/[^/@?#]+)(/(?:resolve|blob)/)?")


def located(name: str, what: str, *in_repository: str) -> Path:
    """The file of weights `name`, or the first of the files `in_repository` that the hub's repository of this name has.

    Raises ExportError, calling it `what`, where there is no such file, or it is damaged.
    """
    file = Path(name)
    if not file.exists():
        refuse_mistyped(name, what)
        try:
            with quiet(), complete.bars_on_terminals_alone():
                file = _from_repository(name, *in_repository)
        except Exception as error:  # the hub's library fails in its own ways
            absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            told = f"has no {' or '.join(in_repository)} on the hub" if absent else from_hub(name, error)
            raise ExportError(f"{name} cannot be loaded as {what}: it is no file here, and {told}") from error
    weights_file.types(file)
    return file


def _from_repository(name: str, *files: str) -> Path:
    kept = hub.out_of_reach(name)
    for file in files[:-1]:
        with suppress(EntryNotFoundError):
            return Path(hf_hub_download(name, file, local_files_only=kept))
    return Path(hf_hub_download(name, files[-1], local_files_only=kept))


def load_part(
    model: str | os.PathLike[str],
    part: str,
    what: str,
    classes: Sequence[Any],
    report: Report,
) -> Any:
    """A network by itself, of one of `classes`, on the CPU in float32.

    Args:
        model: a folder that diffusers saved, or a hub id.
        part: what it is called in a pipeline.
        what: what it is called here.
        report: gets a line before the hub is asked for it.

    Raises:
        ExportError: it is not there, incomplete, of another class, or the hub cannot be reached.
    """
    known = {made.__name__: made for made in classes}
    try:
        refuse_mistyped(model, what)
        if Path(model).is_dir() and Path(model, "model_index.json").is_file():
            raise ExportError(
                f"{model} holds a whole pipeline: name its {what.split()[-1]}, {Path(model, part)}"
            )
        tell_of_hub(model, report)
        with quiet(logging.ERROR), complete.bars_on_terminals_alone():
            if Path(model).is_dir():
                part_files.refuse_faulty(classes[0], Path(model))
            kept = hub.out_of_reach(model)
            name = classes[0].load_config(os.fspath(model), local_files_only=kept).get("_class_name")
            if name in known:
                return whole(known[name], model, local_files_only=kept)
    except ExportError:
        raise
    except Exception as error:  # the hub's library fails in its own ways
        raise ExportError(f"{model} cannot be loaded as {what}: {why_not(model, error)}") from error
    raise ExportError(f"{model} holds a {name}; as {what}, {' or '.join(known)} is wanted here")


def whole(made: Any, model: str | os.PathLike[str], **options: Any) -> Any:
    """The network of class `made` in float32, which may have only weights in half precision; `complete.part` sees that
    in folders alone.
    """
    try:
        return complete.part(made, model, torch.float32, **options)
    except ValueError as error:
        if any(isinstance(each, EntryNotFoundError) for each in hub.behind(error)):  # else they are faulty
            with suppress(ValueError):
                return complete.part(made, model, torch.float32, variant="fp16", **options)
        raise


def loaded_from(model: str, config: str) -> Path:
    """The folder here with the weights of a network that was loaded, beside the file `config` of the `model`."""
    if Path(model).is_dir():
        return Path(model, config).parent
    return Path(hf_hub_download(model, config, local_files_only=True)).parent


def from_first_code(made: Any, own: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """A network of class `made` with the config of `own`, whose `weights` are named as in the first code.

    Raises ValueError where it is not whole, and whatever diffusers raises.
    """
    with TemporaryDirectory() as folder, quiet(logging.ERROR):
        own.save_config(folder)
        network = made.from_single_file(dict(weights), config=folder)
    if missing := [name for name, weight in network.named_parameters() if weight.is_meta]:
        raise ValueError(f"it has no weights {listed(missing)}")
    if len(weights) > (held := len(network.state_dict())):
        raise ValueError(f"it has {len(weights)} weights, of which the config names {held}")
    return network.eval()


def listed(names: Sequence[str]) -> str:
    """The first, and how many more."""
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def refuse_mistyped(model: str | os.PathLike[str], what: str) -> None:
    """Raises ExportError for a name that the hub cannot have: it is a path, and the connection is not what it lacks."""
    text = os.fspath(model)
    if not text:
        raise ExportError(
            f"a name of '' cannot be loaded as {what}: name a folder that diffusers saved, or a hub id"
        )
    if (named := _OF_HUB.match(text)) and named[2]:
        raise ExportError(f"{text} cannot be loaded as {what}: download that file, and name it")
    if named:
        raise ExportError(f"{text} cannot be loaded as {what}: a model of the hub goes by its id, {named[1]}")
    if "://" in text:
        raise ExportError(f"{text} cannot be loaded as {what}: download it, and name the file or folder")
    file = Path(text).suffix in weights_file.SUFFIXES
    path_like = (
        file or text.startswith((".", "~")) or bool(Path(text).anchor) or text.count("/") > 1 or "\\" in text
    )
    if path_like and not Path(model).exists():
        raise ExportError(
            f"{text} cannot be loaded as {what}: there is no such {'file' if file else 'folder'}"
        )


def tell_of_hub(model: str | os.PathLike[str], report: Report) -> None:
    """A line before the hub is asked for `model`, which may take long."""
    if not Path(model).is_dir():
        where = (
            "looking into the hub's cache"
            if constants.HF_HUB_OFFLINE
            else f"asking the hub at {constants.ENDPOINT}"
        )
        report(f"{model} is no folder here: {where}")


def why_not(model: str | os.PathLike[str], error: Exception) -> str:
    """Why nothing came of `model`, a folder or hub id."""
    names_file = isinstance(error, OSError) and error.filename is not None
    if names_file or Path(model).is_dir():
        return reason(error)
    return f"it is no folder here, and {from_hub(os.fspath(model), error)}"


def from_hub(model: str, error: Exception) -> str:
    """Why the hub gave no `model`."""
    return hub.why(model, error) or f"not to be had from the hub: {reason(error)}"


def card(model: str | os.PathLike[str], name: str) -> Path | None:
    """The file `name` in which a folder or repository says of its model what the parts do not, where it does."""
    if Path(model).is_dir():
        return Path(model, name) if Path(model, name).is_file() else None
    try:
        with quiet(), complete.bars_on_terminals_alone():
            return Path(hf_hub_download(os.fspath(model), name, local_files_only=hub.out_of_reach(model)))
    except Exception:  # the hub's library fails in its own ways, and no model needs a card
        return None


@contextmanager
def quiet(most: int = logging.WARNING) -> Iterator[None]:
    """Loading and tracing warn of much that is harmless; the comparison of pixels decides instead. Nothing of the
    level `most`, or below, is logged.
    """
    level = logging.root.manager.disable
    logging.disable(most)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
