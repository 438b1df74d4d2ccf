"""Pipelines and their parts, loaded only where every weight is in their files."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from packaging import version
from transformers.utils import logging as transformers_logging

from cloud_server import hub, model_index, part_files
from cloud_server.errors import reason
from cloud_server.model_index import LIBRARIES, NETWORKS, kind_of

_HALF = {"variant": "fp16"}
# How version 4 of transformers begins the names of the weights of CLIP's text encoder, and version 5 does not.
_NESTED = "text_model."
# Since when they say so; the name they had before goes in diffusers 1.0.
_SAYS_DTYPE = {"diffusers": "0.40", "transformers": "4.56"}
# Of Stable Diffusion 3, which was trained to do without; diffusers wants to be told that they are left out.
_DISPENSABLE = ("text_encoder_3", "tokenizer_3")
_LONGEST_REASON = 300  # characters of what a library says


def downloaded(model: str, **left_out: None) -> Path:
    """The snapshot of a pipeline of the hub without some parts, in half precision where there is nothing else of one.

    Raises whatever the hub's library raises.
    """
    options = {"local_files_only": hub.out_of_reach(model), **left_out}
    with bars_on_terminals_alone():
        folder = Path(diffusers.DiffusionPipeline.download(model, **options))
        index = json.loads((folder / diffusers.DiffusionPipeline.config_name).read_text(encoding="utf-8"))
        taken = model_index.parts_of(index) - left_out.keys()
        kinds = {name: kind_of(made) for name, made in index.items() if name in taken}
        networks = [name for name, kind in kinds.items() if kind is not None and issubclass(kind, NETWORKS)]
        if not all(part_files.weights_at(folder / name) for name in networks):
            try:
                folder = Path(diffusers.DiffusionPipeline.download(model, **_HALF, **options))
            except LocalEntryNotFoundError:  # the connection broke
                raise
            except ValueError:  # not in half precision either
                pass
    return folder


def dtype_for(device: str, dtype: str) -> Any:
    """Torch's type of that name; of "auto" float16 on CUDA, else float32."""
    if dtype == "auto":
        dtype = "float16" if device.startswith("cuda") else "float32"
    return getattr(torch, dtype)


def pipeline(folder: Path, dtype: Any, **options: Any) -> Any:
    """`DiffusionPipeline.from_pretrained` of a folder here, with weights of torch's type `dtype`. `options` may name
    parts, to be left out with None.

    Raises ValueError, naming parts, files or weights that are missing, and whatever the libraries raise.
    """
    index = diffusers.DiffusionPipeline.load_config(os.fspath(folder))
    model_index.check(index)
    made = model_index.pipeline_class(index)  # of its own, which alone knows the parts that it can be without
    options |= {name: None for name in _DISPENSABLE if name in index and name not in model_index.named(index)}
    if missing := sorted(model_index.required(index) - options.keys() - model_index.named(index)):
        named = diffusers.DiffusionPipeline.config_name
        raise ValueError(f"{named} names no {' and no '.join(missing)}: {part_files.AGAIN}")
    taken = model_index.parts_of(index)
    for name in sorted((taken & index.keys()) - options.keys()):
        model_index.refuse_foreign(name, index[name])
    kinds = {name: kind_of(made) for name, made in index.items() if name in taken and name not in options}
    known = {name: kind for name, kind in kinds.items() if kind is not None}
    for name, kind in known.items():  # of all, before gigabytes of one are read
        part_files.refuse_faulty(kind, folder / name)
    parts: dict[str, Any] = {}
    with bars_on_terminals_alone():
        newer = newer_tokenizers(folder, {name: index[name] for name in known})
        # Networks last: what else is faulty shows in a moment.
        for name, kind in sorted(known.items(), key=lambda one: issubclass(one[1], NETWORKS)):
            if issubclass(kind, NETWORKS):
                parts[name] = part(kind, folder, dtype, subfolder=name)
            elif name not in newer:
                parts[name] = _loaded(kind, folder, subfolder=name)
        parts |= dict.fromkeys(newer)  # diffusers takes none that is not of the index's class
        options |= _typed(made, dtype)
        loaded = made.from_pretrained(folder, local_files_only=True, **parts, **options)
        loaded.register_modules(**newer)
        return loaded


def newer_tokenizers(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `index` that transformers 5 saved in `folder`, which version 4 reads with another class. By name.

    Raises ValueError where one cannot be read.
    """
    kinds = {name: kind_of(made) for name, made in index.items()}
    return {
        # What is special is in tokenizer.json too, and in the config of a form that version 4 cannot read.
        name: _loaded(fast, folder, subfolder=name, extra_special_tokens={})
        for name, kind in kinds.items()
        if kind is not None and (fast := _fast(kind, folder / name))
    }


def part(kind: Any, model: str | os.PathLike[str], dtype: Any, **options: Any) -> Any:
    """`kind.from_pretrained` with weights of torch's type `dtype`.

    What a file lacks, the libraries draw at random, anew in every process, or leave out: here it is refused. Of a
    folder here that holds weights in half precision alone, those are loaded.

    Raises ValueError, naming the part and what of it is missing or cannot be read.
    """
    options |= _typed(kind, dtype)
    if weights := part_files.weights_at(Path(model, options.get("subfolder", ""))):
        options |= _HALF if part_files.is_half(weights[0]) else {}
        if weights[0].suffix != part_files.SAFETENSORS:
            options["use_safetensors"] = False  # else diffusers calls it an error that it must look further
    made, found = _loaded(kind, model, output_loading_info=True, **options)
    nested = {_NESTED + name for name in found["unexpected_keys"]}
    if found["missing_keys"] and nested.issuperset(found["missing_keys"]):
        options["key_mapping"] = {"^": _NESTED}
        made, found = _loaded(kind, model, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        where = options.get("subfolder") or Path(model).name
        if any(".base_layer." in name for name in found["unexpected_keys"]):
            raise ValueError(f"{where} {part_files.UNFUSED}")
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"{where} has no weights {missing[0]}{more}")
    return made


def _typed(kind: Any, dtype: Any) -> dict[str, Any]:
    """The option that has `kind` loaded as `dtype`, under the name that its library's version has for it."""
    library = kind.__module__.partition(".")[0]
    newer = version.parse(LIBRARIES[library][0].__version__) >= version.parse(_SAYS_DTYPE[library])
    return {"dtype" if newer else "torch_dtype": dtype}


def _fast(kind: Any, folder: Path) -> Any:
    """The class that reads a tokenizer in `folder` of transformers 5, where version 4 has another; otherwise None.

    Version 5 gives the plain name, `kind`, to what was the fast class before, and writes tokenizer.json alone.
    """
    if not issubclass(kind, transformers.PreTrainedTokenizer) or not (folder / "tokenizer.json").is_file():
        return None
    whole = all((folder / name).is_file() for name in kind.vocab_files_names.values())
    return None if whole else getattr(transformers, f"{kind.__name__}Fast", None)


def _loaded(kind: Any, model: str | os.PathLike[str], **options: Any) -> Any:
    folder = Path(model, options.get("subfolder", ""))
    try:
        return kind.from_pretrained(model, **options)
    except Exception as error:  # each library fails in its own ways
        why = reason(error)[:_LONGEST_REASON]
        if not folder.is_dir():
            raise ValueError(f"{folder.as_posix()} cannot be loaded: {why}") from error
        part_files.refuse_unreadable(folder)
        if issubclass(kind, transformers.PreTrainedTokenizerBase):
            _explain_tokenizer(kind, folder)
        if issubclass(kind, diffusers.SchedulerMixin):  # which is nothing but its config
            config = folder / kind.config_name
            _explain_scheduler(kind, config)
            raise ValueError(
                f"{config} makes no {kind.__name__}: {why}; correct it, or get it again"
            ) from error
        raise ValueError(f"{folder} cannot be loaded: {why}") from error


def _explain_tokenizer(kind: Any, folder: Path) -> None:
    """Raises ValueError where it is plain why `folder` is no tokenizer of class `kind`."""
    names = [name for name in kind.vocab_files_names.values() if name != "tokenizer.json"]
    fast = issubclass(kind, transformers.PreTrainedTokenizerFast) and (folder / "tokenizer.json").is_file()
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and not fast:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}: {part_files.AGAIN}")
    for name in ("tokenizer_config.json", "tokenizer.json", *names):
        if name.endswith(".json") and (folder / name).is_file():
            part_files.refuse_no_object(folder / name)


def _explain_scheduler(kind: Any, file: Path) -> None:
    """Raises ValueError, naming the first value in `file` that is no number where the default of `kind` is one.

    What torch says of it is longer than a line and names no value.
    """
    part_files.refuse_no_object(file)
    held = json.loads(file.read_text(encoding="utf-8"))
    for name, parameter in inspect.signature(kind).parameters.items():
        value = held.get(name, parameter.default)
        if _is_number(parameter.default) and not _is_number(value):
            raise ValueError(
                f"{file}: {name} must be a number, such as {parameter.default}, not {json.dumps(value):.40}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextmanager
def bars_on_terminals_alone() -> Iterator[None]:
    """The libraries' progress bars fill a log, where stderr is no terminal."""
    shown = [logs for logs in (diffusers_logging, transformers_logging) if logs.is_progress_bar_enabled()]
    hub_shown = not are_progress_bars_disabled()
    if sys.stderr.isatty():
        shown, hub_shown = [], False
    for logs in shown:
        logs.disable_progress_bar()
    if hub_shown:
        disable_progress_bars()
    try:
        yield
    finally:
        for logs in shown:
            logs.enable_progress_bar()
        if hub_shown:
            enable_progress_bars()
