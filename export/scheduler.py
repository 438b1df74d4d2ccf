"""Another diffusers scheduler for a model, from the model's own config: `NAME[:key=value,...]`."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Collection
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import DummyObject

from export.denoiser import ZERO_SNR
from export.errors import ExportError, reason

_RESCALE = "rescale_betas_zero_snr"
_ANOTHER = "name another, or other values after its name"
_CHANGE = re.compile(r'(?:\[[^\]]*\]|"[^"]*"|[^,])+')
"""A KEY=VALUE of several: up to a comma that is in no brackets and no quotes."""


def choose_scheduler(own: Any, wanted: str) -> Any:
    """The scheduler that `wanted` names, with the config of `own` and the changes that `wanted` lists.

    Args:
        own: the model's scheduler; its betas, prediction type and so on are kept.
        wanted: a class of diffusers, with or without "Scheduler" at its end, and what to change in its config:
            "EulerDiscrete:timestep_spacing=trailing,use_karras_sigmas=true". Values are JSON, such as [0,1], or plain
            text.

    Raises:
        ExportError: there is no such scheduler, it takes no such key, or not such a value.
    """
    name, _, changes = wanted.partition(":")
    if not name:
        raise ExportError(
            f"{wanted!r} names no scheduler: write NAME or NAME:KEY=VALUE, such as EulerDiscrete"
        )
    full = name if name.endswith("Scheduler") else f"{name}Scheduler"
    made = getattr(diffusers, full, None)
    if isinstance(made, DummyObject):
        _refuse_missing_package(made)
    if not _is_scheduler(made):
        names = (found for found in dir(diffusers) if found.endswith("Scheduler"))
        known = [found for found in names if _is_scheduler(getattr(diffusers, found))]
        near = difflib.get_close_matches(full, known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ExportError(f"diffusers has no scheduler {full}{hint}")
    config = {}
    parameters = dict(inspect.signature(made).parameters)
    for change in _CHANGE.findall(changes):
        key, equals, value = change.partition("=")
        if not equals:
            raise ExportError(f"{change!r} changes nothing: write {name}:KEY=VALUE,KEY=VALUE")
        if key not in parameters:
            raise ExportError(f"{full} takes no {key}; it takes {', '.join(parameters)}")
        config[key] = _value(value)
        # Any text is true, so that `no` would turn the option on.
        if isinstance(parameters[key].default, bool) and not isinstance(config[key], bool):
            raise ExportError(f"{key} takes true or false, not {value!r}")
    ordinary = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {key for key, one in parameters.items() if one.kind in ordinary and one.default is one.empty}
    if lacking := sorted(needed - config.keys() - own.config.keys()):
        raise ExportError(
            f"{full} is for other models: their config names {' and '.join(lacking)}, this one's does not; "
            f"{_ANOTHER}"
        )
    try:
        return made.from_config(own.config, **config)
    except Exception as error:  # each scheduler checks its config in its own way
        raise ExportError(
            f"{full} cannot be made from the model's config: {reason(error).rstrip('.')}; {_ANOTHER}"
        ) from error


def believed(own: Any, markers: Collection[str]) -> Any:
    """The scheduler `own` for a denoiser of which `export.denoiser.markers` found these; DDIM where it has to rescale
    betas and cannot.
    """
    if not markers:
        return own
    said = "prediction_type=v_prediction"
    if ZERO_SNR in markers:
        said += f",{_RESCALE}=true,timestep_spacing=trailing"
    if ZERO_SNR in markers and not _rescales(own):
        # PNDM and its like, which Stable Diffusion comes with. DDIM would clip, as these do not.
        return choose_scheduler(own, f"DDIM:{said},clip_sample=false")
    return choose_scheduler(own, f"{type(own).__name__}:{said}")


def refuse_unable(scheduler: Any, markers: Collection[str]) -> None:
    """Raises ExportError where the denoiser learnt to begin with noise alone, and this scheduler never does."""
    if ZERO_SNR in markers and not _rescales(scheduler):
        raise ExportError(
            f"{type(scheduler).__name__} is not for this model, whose file says {ZERO_SNR}: it learnt to begin with "
            f"noise alone; name one that takes {_RESCALE}, such as EulerDiscrete or DDIM"
        )


def _rescales(scheduler: Any) -> bool:
    return _RESCALE in inspect.signature(type(scheduler)).parameters


def _is_scheduler(made: Any) -> bool:
    return inspect.isclass(made) and issubclass(made, SchedulerMixin)


def _refuse_missing_package(stand_in: type) -> None:
    """ExportError in the words of what diffusers puts in the place of a class whose packages are not all there."""
    try:
        stand_in()
    except ImportError as error:
        raise ExportError(" ".join(str(error).split())) from error


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return None if text == "None" else text
