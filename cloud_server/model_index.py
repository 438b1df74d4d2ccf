"""The model_index.json of a pipeline: which parts it names, of which classes, and whether diffusers reads it."""

from __future__ import annotations

import importlib.util
import inspect
import json
from contextlib import suppress
from typing import Any

import diffusers
import transformers

NETWORKS = (diffusers.ModelMixin, transformers.PreTrainedModel)
LIBRARIES = {  # each with what of its classes can be a part
    "diffusers": (diffusers, (diffusers.ModelMixin, diffusers.SchedulerMixin)),
    "transformers": (transformers, (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)),
}


def check(index: Any) -> None:
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


def refuse_foreign(name: str, made: Any) -> None:
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


def parts_of(index: dict[str, Any]) -> set[str]:
    """The names of what the index's class takes as parts: diffusers ignores other entries. All where it does not know
    the class.
    """
    needed, others = _parameters(index)
    return (needed | others) or set(index)


def required(index: dict[str, Any]) -> set[str]:
    """The names of the parts without which the class that the index names cannot be; none where diffusers does not know
    it.
    """
    return _parameters(index)[0]


def named(index: dict[str, Any]) -> set[str]:
    """The parts that the index names; one that was left out when it was saved has two nulls."""
    return {name for name, made in index.items() if _is_pair(made) and made[0] is not None}


def kind_of(made: Any) -> Any:
    """The class that an entry of the index names; None for what is no part, or of another library."""
    if not _is_pair(made) or made[0] not in LIBRARIES:
        return None
    library, bases = LIBRARIES[made[0]]
    kind = getattr(library, made[1], None)
    return kind if isinstance(kind, type) and issubclass(kind, bases) else None


def pipeline_class(index: dict[str, Any]) -> Any:
    """What diffusers calls as the index names its class; `DiffusionPipeline` where it has nothing of that name.

    Raises ValueError where it cannot be imported here, as with a transformers that is too old for it.
    """
    name = str(index.get("_class_name"))
    try:
        return getattr(diffusers, name, diffusers.DiffusionPipeline)
    except Exception as error:  # whatever is raised where it is defined, behind words of diffusers' own
        file, why = diffusers.DiffusionPipeline.config_name, str(error).strip().rpartition("\n")[2]
        raise ValueError(
            f"{file} names {name}, which diffusers {diffusers.__version__} cannot import here: {why}"
        ) from error


def _parameters(index: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Parts without which the class that the index names cannot be, and those that it can be without.

    Both are empty where diffusers does not know it, or cannot import it here.
    """
    kind = None
    with suppress(ValueError):
        kind = pipeline_class(index)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        return set(), set()
    parameters = inspect.signature(kind).parameters.values()
    ordinary = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {one.name for one in parameters if one.kind in ordinary and one.default is one.empty}
    optional = set(getattr(kind, "_optional_components", ()))
    return needed - optional, optional


def _is_pair(made: Any) -> bool:
    """A library and a class, or the two nulls of a part that was left out when the pipeline was saved."""
    return (
        isinstance(made, (list, tuple))
        and len(made) == 2
        and (all(isinstance(one, str) for one in made) or made[0] is None)
    )
