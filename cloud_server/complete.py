"""Pipelines and their parts, loaded only where every weight is in their files."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import diffusers
import transformers

LIBRARIES = {
    "diffusers": (diffusers, diffusers.ModelMixin),
    "transformers": (transformers, transformers.PreTrainedModel),
}


def pipeline(model: str | os.PathLike[str], torch_dtype: Any, **options: Any) -> Any:
    """`DiffusionPipeline.from_pretrained` of a folder or hub id. `options` may name parts, to be left out with None.

    Raises ValueError, naming parts or weights that are missing, and whatever the libraries raise.
    """
    found = diffusers.DiffusionPipeline.load_config(os.fspath(model))
    index = found[0] if isinstance(found, tuple) else found
    if missing := sorted(_needed(index) - options.keys() - _named(index)):
        raise ValueError(f"{diffusers.DiffusionPipeline.config_name} names no {' and no '.join(missing)}")
    hub = {name: value for name, value in options.items() if name == "local_files_only"}
    parts = {}
    for name, made in index.items():
        if name in options or not isinstance(made, (list, tuple)) or made[0] not in LIBRARIES:
            continue
        library, base = LIBRARIES[made[0]]
        kind = getattr(library, made[1], None)
        if isinstance(kind, type) and issubclass(kind, base):
            only = _variant(Path(model, name))
            parts[name] = part(kind, model, torch_dtype=torch_dtype, subfolder=name, **only, **hub)
    return diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=torch_dtype, **parts, **options)


def part(kind: Any, model: str | os.PathLike[str], **options: Any) -> Any:
    """`kind.from_pretrained`. What a file lacks, the libraries draw at random, anew in every process, or leave out.

    Raises ValueError, naming weights that are missing, and whatever the libraries raise.
    """
    made, found = kind.from_pretrained(model, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        where = options.get("subfolder") or Path(model).name
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"{where} has no weights {missing[0]}{more}")
    return made


def _needed(index: dict[str, Any]) -> set[str]:
    """The parts without which the class that the index names cannot be; none where diffusers does not know it."""
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        return set()
    parameters = inspect.signature(kind).parameters.values()
    ordinary = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {one.name for one in parameters if one.kind in ordinary and one.default is one.empty}
    return needed - set(getattr(kind, "_optional_components", ()))


def _named(index: dict[str, Any]) -> set[str]:
    """What the index has a value for; a part that was left out when it was saved has two nulls."""
    return {name for name, made in index.items() if made not in ([None, None], (None, None))}


def _variant(folder: Path) -> dict[str, str]:
    """Half precision where a folder here has nothing else, as a download of the smaller files leaves it."""
    weights = [file.name for ending in ("safetensors", "bin") for file in folder.glob(f"*.{ending}")]
    return {"variant": "fp16"} if weights and all(".fp16." in name for name in weights) else {}
