"""Pipelines and their parts, loaded only where every weight is in their files."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from packaging import version
from transformers.utils import logging as transformers_logging

from cloud_server import hub
from cloud_server.errors import reason

NETWORKS = (diffusers.ModelMixin, transformers.PreTrainedModel)
LIBRARIES = {
    "diffusers": (diffusers, (diffusers.ModelMixin, diffusers.SchedulerMixin)),
    "transformers": (
        transformers,
        (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase),
    ),
}
_SAFETENSORS = ".safetensors"
# How the libraries name what they read. Others lie beside, such as openvino_model.bin.
_READ = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.(safetensors|bin)"
)
# What git leaves in the place of a large file where its extension for these is not installed.
_POINTER = b"version https://git-lfs"
_HALF = {"variant": "fp16"}
# How version 4 of transformers begins the names of the weights of CLIP's text encoder, and version 5 does not.
_NESTED = "text_model."
# Since when they say so; the name they had before goes in diffusers 1.0.
_SAYS_DTYPE = {"diffusers": "0.40", "transformers": "4.56"}
# Of Stable Diffusion 3, which was trained to do without; diffusers wants to be told that they are left out.
_DISPENSABLE = ("text_encoder_3", "tokenizer_3")
# What diffusers and transformers write then, they themselves do not read.
_UNFUSED = "was saved with a LoRA beside its weights: call fuse_lora() and unload_lora_weights() before save_pretrained"
_LONGEST_REASON = 300  # characters of what a library says


def downloaded(model: str, **left_out: None) -> Path:
    """The snapshot of a pipeline of the hub without some parts, in half precision where there is nothing else of one.

    Raises whatever the hub's library raises.
    """
    options = {"local_files_only": hub.out_of_reach(model), **left_out}
    with bars_on_terminals_alone():
        folder = Path(diffusers.DiffusionPipeline.download(model, **options))
        index = json.loads((folder / diffusers.DiffusionPipeline.config_name).read_text(encoding="utf-8"))
        taken = parts_of(index) - left_out.keys()
        kinds = {name: _kind(made) for name, made in index.items() if name in taken}
        networks = [name for name, kind in kinds.items() if kind is not None and issubclass(kind, NETWORKS)]
        if not all(weights_at(folder / name) for name in networks):
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
    found = diffusers.DiffusionPipeline.load_config(os.fspath(folder))
    index = found[0] if isinstance(found, tuple) else found
    check_index(index)
    options |= {name: None for name in _DISPENSABLE if name in index and name not in named(index)}
    if missing := sorted(_parameters(index)[0] - options.keys() - named(index)):
        raise ValueError(f"{diffusers.DiffusionPipeline.config_name} names no {' and no '.join(missing)}")
    taken = parts_of(index)
    for name in sorted((taken & index.keys()) - options.keys()):
        _refuse_foreign(name, index[name])
    kinds = {name: _kind(made) for name, made in index.items() if name in taken and name not in options}
    known = {name: kind for name, kind in kinds.items() if kind is not None}
    for name, kind in known.items():  # of all, before gigabytes of one are read
        refuse_faulty(kind, folder / name)
    parts: dict[str, Any] = {}
    with bars_on_terminals_alone():
        newer = newer_tokenizers(folder, {name: index[name] for name in known})
        # Networks last: what else is faulty shows in a moment.
        for name, kind in sorted(known.items(), key=lambda one: issubclass(one[1], NETWORKS)):
            if issubclass(kind, NETWORKS):
                parts[name] = part(kind, folder, dtype, subfolder=name)
            elif name not in newer:
                parts[name] = _loaded(kind, folder, subfolder=name)
        # Of its own class, which alone knows the parts that it can be without.
        made = getattr(diffusers, str(index.get("_class_name")), diffusers.DiffusionPipeline)
        parts |= dict.fromkeys(newer)  # diffusers takes none that is not of the index's class
        options |= _typed(made, dtype)
        loaded = made.from_pretrained(folder, local_files_only=True, **parts, **options)
        loaded.register_modules(**newer)
        return loaded


def newer_tokenizers(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `index` that transformers 5 saved in `folder`, which version 4 reads with another class. By name.

    Raises ValueError where one cannot be read.
    """
    kinds = {name: _kind(made) for name, made in index.items()}
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
    if weights := weights_at(Path(model, options.get("subfolder", ""))):
        options |= _HALF if _is_half(weights[0]) else {}
        if weights[0].suffix != _SAFETENSORS:
            options["use_safetensors"] = False  # else diffusers calls it an error that it must look further
    made, found = _loaded(kind, model, output_loading_info=True, **options)
    nested = {_NESTED + name for name in found["unexpected_keys"]}
    if found["missing_keys"] and nested.issuperset(found["missing_keys"]):
        options["key_mapping"] = {"^": _NESTED}
        made, found = _loaded(kind, model, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        where = options.get("subfolder") or Path(model).name
        if any(".base_layer." in name for name in found["unexpected_keys"]):
            raise ValueError(f"{where} {_UNFUSED}")
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"{where} has no weights {missing[0]}{more}")
    return made


def parts_of(index: dict[str, Any]) -> set[str]:
    """The names of what the index's class takes as parts: diffusers ignores other entries. All where it does not know
    the class.
    """
    needed, others = _parameters(index)
    return (needed | others) or set(index)


def check_index(index: Any) -> None:
    """Raises ValueError where `index`, read from a model_index.json, is of no form that diffusers reads."""
    file = diffusers.DiffusionPipeline.config_name
    if not isinstance(index, dict):
        raise ValueError(f"{file} must hold a JSON object, not {index!r:.60}")
    needed, others = _parameters(index)
    for name in sorted((needed | others) & index.keys()):
        made = index[name]
        absent = name in others and not isinstance(made, (list, tuple))
        instead = " such as EulerDiscreteScheduler," if name == "scheduler" else ""
        if _is_pair(made) and (library := LIBRARIES.get(made[0])) and not hasattr(library[0], made[1]):
            raise ValueError(
                f"{file} names {made[1]} as {name}, which {made[0]} {library[0].__version__} does not have: name "
                f"another class,{instead} or install a version that has it"
            )
        if not absent and not _is_pair(made):
            raise ValueError(
                f'{file}: {name} must be a library and a class, such as ["diffusers", "PNDMScheduler"], or for none '
                f"[null, null], not {json.dumps(made):.60}"
            )


def _refuse_foreign(name: str, made: Any) -> None:
    """Raises ValueError where the index names a part's library that diffusers would not find."""
    if not _is_pair(made) or made[0] is None:
        return
    for library in f"{diffusers.pipelines.__name__}.{made[0]}", made[0]:
        with suppress(ImportError, ValueError):  # of a part of what is not there
            if importlib.util.find_spec(library) is not None:
                return
    raise ValueError(
        f"{diffusers.DiffusionPipeline.config_name} names {made[1]} of {made[0]} as {name}: that is no library that is "
        "installed, or code beside the weights, which is not run; name a class of diffusers or transformers"
    )


def refuse_faulty(kind: Any, folder: Path, *, weights: bool = True) -> None:
    """Raises ValueError where `folder` lacks a file without which no network or scheduler of class `kind` is whole, its
    `weights` among them where they are wanted.

    transformers would take a config that is not there for the one that its class has by default.
    """
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}, which {diffusers.DiffusionPipeline.config_name} names: save or download the "
            "whole model again"
        )
    if issubclass(kind, transformers.PreTrainedTokenizerBase):
        for file in folder.iterdir():  # which of its files a tokenizer needs, it knows alone
            if file.is_file():
                refuse_absent(file)
        return
    config = folder / (getattr(kind, "config_name", None) or transformers.CONFIG_NAME)
    if not config.is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} {_UNFUSED}")
    refuse_absent(config)
    refuse_no_object(config)
    if not weights or not issubclass(kind, NETWORKS):
        return
    for file in (found := weights_at(folder)):
        refuse_absent(file)
    if not found:
        stem = "diffusion_pytorch_model" if issubclass(kind, diffusers.ModelMixin) else "model"
        raise ValueError(f"{folder} has no weights for torch, such as {stem}.safetensors")


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
        if folder.is_dir():
            _refuse_unreadable(folder)
        if folder.is_dir() and issubclass(kind, transformers.PreTrainedTokenizerBase):
            _explain_tokenizer(kind, folder)
        where = folder if folder.is_dir() else folder.as_posix()
        why = reason(error)[:_LONGEST_REASON]
        if folder.is_dir() and issubclass(kind, diffusers.SchedulerMixin):  # which is nothing but its config
            _explain_scheduler(kind, folder / kind.config_name)
            raise ValueError(
                f"{folder / kind.config_name} makes no {kind.__name__}: {why}; correct it, or get it again"
            ) from error
        raise ValueError(f"{where} cannot be loaded: {why}") from error


def refuse_absent(file: Path) -> None:
    """Raises ValueError, saying what is there in its place, where there is no `file` that can be opened."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file} is not a file")
        with file.open("rb") as held:
            pointer = held.read(len(_POINTER)) == _POINTER
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not file.is_symlink():  # a link may lead nowhere
            raise ValueError(f"{file.parent} has no {file.name}") from error
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


def _refuse_unreadable(folder: Path) -> None:
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
        if file.suffix == _SAFETENSORS:
            try:
                with safetensors.safe_open(file, "pt"):  # reads where each weight lies
                    pass
            except safetensors.SafetensorError as error:
                raise ValueError(f"{file} is cut off or damaged: {reason(error)}; get it again") from error


def _explain_tokenizer(kind: Any, folder: Path) -> None:
    """Raises ValueError where it is plain why `folder` is no tokenizer of class `kind`."""
    names = [name for name in kind.vocab_files_names.values() if name != "tokenizer.json"]
    fast = issubclass(kind, transformers.PreTrainedTokenizerFast) and (folder / "tokenizer.json").is_file()
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and not fast:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}")
    for name in ("tokenizer_config.json", "tokenizer.json", *names):
        if name.endswith(".json") and (folder / name).is_file():
            refuse_no_object(folder / name)


def _explain_scheduler(kind: Any, file: Path) -> None:
    """Raises ValueError, naming the first value in `file` that is no number where the default of `kind` is one.

    What torch says of it is longer than a line and names no value.
    """
    refuse_no_object(file)
    held = json.loads(file.read_text(encoding="utf-8"))
    for name, parameter in inspect.signature(kind).parameters.items():
        value = held.get(name, parameter.default)
        if _is_number(parameter.default) and not _is_number(value):
            raise ValueError(
                f"{file}: {name} must be a number, such as {parameter.default}, not {json.dumps(value):.40}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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


def _kind(made: Any) -> Any:
    """The class that an entry of the index names; None for what is no part, or of another library."""
    if not _is_pair(made) or made[0] not in LIBRARIES:
        return None
    library, bases = LIBRARIES[made[0]]
    kind = getattr(library, made[1], None)
    return kind if isinstance(kind, type) and issubclass(kind, bases) else None


def _is_pair(made: Any) -> bool:
    """A library and a class, or the two nulls of a part that was left out when the pipeline was saved."""
    return (
        isinstance(made, (list, tuple))
        and len(made) == 2
        and (all(isinstance(one, str) for one in made) or made[0] is None)
    )


def _parameters(index: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Parts without which the class that the index names cannot be, and those that it can be without.

    None where diffusers does not know it.
    """
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        return set(), set()
    parameters = inspect.signature(kind).parameters.values()
    ordinary = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {one.name for one in parameters if one.kind in ordinary and one.default is one.empty}
    optional = set(getattr(kind, "_optional_components", ()))
    return needed - optional, optional


def named(index: dict[str, Any]) -> set[str]:
    """The parts that the index names; one that was left out when it was saved has two nulls."""
    return {name for name, made in index.items() if _is_pair(made) and made[0] is not None}


def weights_at(folder: Path) -> list[Path]:
    """The files of weights in `folder` that are loaded: of those in half precision and others the others, of those that
    are pickled and others the others.
    """
    found = sorted(file for file in folder.glob("*") if _READ.fullmatch(file.name))
    whole = [file for file in found if not _is_half(file)] or found
    return [file for file in whole if file.suffix == _SAFETENSORS] or whole


def _is_half(weights: Path) -> bool:
    """Whole, or one of several: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors."""
    return ".fp16." in weights.name or ".fp16-" in weights.name


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
