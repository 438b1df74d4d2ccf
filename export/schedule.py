"""Compile a diffusers scheduler to the matrix that `edge_agent.diffusion.schedule` runs.

The scheduler is a black box here, driven exactly as diffusers' pipelines drive it. A run with
unit vectors for the initial noise and for every model output reads the coefficients off; a run with zeros
shows what the scheduler's own fresh noise does, which is known because its draws can be repeated; a run with
random inputs must then agree with the sums, or the scheduler is not linear and is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from edge_agent.diffusion.schedule import Schedule
from export.errors import ExportError, reason

# Some schedulers compute in float32 whatever they are given, so the check cannot be tighter than its
# rounding.
TOLERANCE = 1e-4
_MOST_DRAWS = 4  # fresh noises in one step; no scheduler known draws more than one

_OTHER = "choose another scheduler with --scheduler"
_CHANGE = f"change its scheduler_config.json, or {_OTHER}"
# What Python itself raises where a scheduler is made for another kind of loop, has a null in its config, or values that
# do not go together. Its words are about code.
_MISFITS = (AttributeError, LookupError, NameError, TypeError)

Doubles = NDArray[np.float64]


class NotLinear(ExportError):
    """The scheduler cannot be written as weighted sums; the message says why and what to do."""


@dataclass(frozen=True)
class Loop:
    """How a pipeline drives its scheduler."""

    # It has it scale the first noise and each input, and hands it what it draws noise with.
    scales: bool = True
    # It tells it that its first step comes first, as Stable Diffusion XL's does. Others let it look the first timestep
    # up, which finds the second of two that are equal.
    begins_at_first: bool = False
    # By how much the timesteps of flow matching are shifted towards noise, where the size of the image decides that.
    mu: float | None = None


PLAIN = Loop()
"""Stable Diffusion's."""

Steps = int | tuple[int, ...]
"""A number of steps, whose timesteps the scheduler chooses, or the timesteps themselves."""


def number_of(steps: Steps) -> int:
    """How many steps there are."""
    return steps if isinstance(steps, int) else len(steps)


def asked(steps: Steps) -> dict[str, Any]:
    """`steps` as diffusers' pipelines and schedulers are asked for them."""
    return {"num_inference_steps": steps} if isinstance(steps, int) else {"timesteps": list(steps)}


def compile_schedule(scheduler: Any, steps: Steps, loop: Loop = PLAIN) -> Schedule:
    """The scheduler's matrix.

    Args:
        scheduler: any diffusers scheduler; it is copied through its config and left as it is.
        steps: how many, or the timesteps of each.
        loop: how the pipeline drives it.

    Raises:
        NotLinear: it clips, thresholds, draws noise that cannot be repeated, or is otherwise not linear.
        ExportError: it has no such number of steps, or cannot be run.
    """
    _refuse_steps(scheduler, steps)
    fresh = _fresh(scheduler, steps, loop)
    timesteps = fresh.timesteps
    calls = len(timesteps)
    # One coordinate for the initial noise and each model output, and enough of them to solve for fresh noise.
    width = 4 * calls + 16
    units = list(np.eye(calls + 1, width))
    nothing = [np.zeros(width)] * (calls + 1)

    silent, draws = _drive(scheduler, steps, nothing, 0, loop)
    probed, _ = _drive(scheduler, steps, units, 0, loop)
    signal = [
        tuple((with_units - without)[: call + 1].tolist())
        for call, (with_units, without) in enumerate(zip(probed, silent, strict=True))
    ]
    schedule = Schedule(
        scheduler=type(scheduler).__name__,
        steps=number_of(steps),
        timesteps=tuple(float(timestep) for timestep in timesteps),
        signal=tuple(signal),
        noise=_taken_apart(silent, draws),
        clean=tuple(_clean(fresh, call) for call in range(calls)),
    )
    for scale in (1.0, 1e3):  # a clip at one leaves small values alone, a clip at a hundred larger ones
        _check(scheduler, steps, schedule, scale, loop)
    return schedule


def _refuse_steps(scheduler: Any, steps: Steps) -> None:
    """Raises ExportError for more steps, or later ones, than the model was trained on."""
    if (trained := scheduler.config.get("num_train_timesteps")) is None:
        return
    if not isinstance(steps, int):
        if max(steps) >= trained:
            raise ExportError(f"the model was trained on the timesteps 0 to {trained - 1}: name none beyond")
        return
    # Timesteps that lead are moved up by an offset, so that as many as were trained end beyond the last.
    leading = scheduler.config.get("timestep_spacing") == "leading"
    offset = (scheduler.config.get("steps_offset") or 0) if leading else 0
    if steps > trained - offset:  # some repeat timesteps instead, and take minutes
        why = f" and its steps_offset is {offset}" if offset else ""
        raise ExportError(
            f"{type(scheduler).__name__} has no schedule of {steps} steps: its model was trained on {trained}{why}; "
            f"name {trained - offset} at most"
        )


def _fresh(scheduler: Any, steps: Steps, loop: Loop) -> Any:
    # With every value as it is: of those that were not in the model's file, diffusers keeps a list, and would take the
    # defaults again, where the pipeline has corrected them, as it does for the configs of its first versions.
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    copy = type(scheduler).from_config(config)
    wanted, what, cure = asked(steps), f"{steps} steps", "name other steps"
    if not isinstance(steps, int):
        what, cure = f"the timesteps {', '.join(map(str, steps))}", "name --steps instead"
        if not wanted.keys() & inspect.signature(copy.set_timesteps).parameters.keys():
            raise ExportError(
                f"{type(copy).__name__} chooses its timesteps by itself; {cure}, or {_OTHER}, such as EulerDiscrete"
            )
    try:
        copy.set_timesteps(**wanted, **({} if loop.mu is None else {"mu": loop.mu}))
    except Exception as error:  # each scheduler fails in its own way
        raise _explained(error, scheduler, f"has no schedule of {what}", f"{cure}, {_CHANGE}") from error
    return copy


def _drive(
    scheduler: Any, steps: Steps, inputs: Sequence[Doubles], seed: int, loop: Loop
) -> tuple[list[Doubles], list[tuple[int, Doubles]]]:
    """Run the pipeline's loop on initial noise inputs[0] and model outputs inputs[1:].

    Returns the T denoiser inputs and the final latents, and each fresh noise with the call after which it
    was drawn. Raises ExportError when the scheduler fails.
    """
    fresh = _fresh(scheduler, steps, loop)
    try:
        return _run(fresh, inputs, seed, loop)
    except ExportError:
        raise
    except Exception as error:  # each scheduler fails in its own way
        raise _explained(error, scheduler, "cannot be run", _CHANGE) from error


def _explained(error: Exception, scheduler: Any, what: str, cure: str) -> ExportError:
    name = type(scheduler).__name__
    if isinstance(error, _MISFITS):
        return ExportError(f"{name} cannot be run as the pipeline runs a scheduler; {_CHANGE}")
    return ExportError(f"{name} {what}: {reason(error).rstrip('.')}; {cure}")


def _run(
    scheduler: Any, inputs: Sequence[Doubles], seed: int, loop: Loop
) -> tuple[list[Doubles], list[tuple[int, Doubles]]]:
    if loop.begins_at_first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(seed)
    parameters = inspect.signature(scheduler.step).parameters
    # What the pipelines pass to each scheduler that takes it; TCD's own default for eta is another.
    given: dict[str, Any] = {"generator": generator, "eta": 0.0}
    extra = {name: value for name, value in given.items() if name in parameters and loop.scales}
    shape = (-1, 1, 1, 1)
    latents = torch.from_numpy(inputs[0]).reshape(shape) * (
        scheduler.init_noise_sigma if loop.scales else 1.0
    )
    seen, draws = [], []
    for call, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep) if loop.scales else latents
        seen.append(_array(scaled))
        before = generator.get_state()
        output = torch.from_numpy(inputs[call + 1]).reshape(shape)
        latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
        draws += [(call, draw) for draw in _repeat(before, generator, latents, type(scheduler).__name__)]
    return [*seen, _array(latents)], draws


def _repeat(before: torch.Tensor, generator: torch.Generator, like: torch.Tensor, name: str) -> list[Doubles]:
    """What the scheduler drew between the state `before` and now."""
    for dtype in (torch.float64, torch.float32):  # what it was given, or what it insists on
        replay = torch.Generator()
        replay.set_state(before)
        draws: list[Doubles] = []
        while len(draws) <= _MOST_DRAWS:
            if torch.equal(replay.get_state(), generator.get_state()):
                return draws
            draws.append(_array(torch.randn(like.shape, generator=replay, dtype=dtype)))
    raise NotLinear(f"{name} draws noise in a way that cannot be repeated; {_OTHER}")


def _taken_apart(totals: list[Doubles], draws: list[tuple[int, Doubles]]) -> tuple[tuple[float, ...], ...]:
    """For each call the coefficients of the noises drawn before it, which add up to its total."""
    if not draws:
        return ((),) * len(totals)
    # Of all at once: the first columns of both factors are those of the first noises.
    q, r = np.linalg.qr(np.stack([draw for _, draw in draws], axis=1))
    found: list[tuple[float, ...]] = []
    for call, total in enumerate(totals):
        count = sum(after < call for after, _ in draws)
        first, sums = r[:count, :count], q[:, :count].T @ total
        # Of what is no number the check tells.
        found.append(tuple(solve_triangular(first, sums, check_finite=False).tolist()) if count else ())
    return tuple(found)


def _check(scheduler: Any, steps: Steps, schedule: Schedule, scale: float, loop: Loop) -> None:
    random = np.random.default_rng(1)
    width = 4 * schedule.calls + 16
    inputs = [scale * random.standard_normal(width) for _ in range(schedule.calls + 1)]
    before = torch.get_rng_state()
    seen, draws = _drive(scheduler, steps, inputs, 1, loop)
    given, noises = np.stack(inputs), np.array([draw for _, draw in draws])
    unseeded = not torch.equal(before, torch.get_rng_state())
    for call, values in enumerate(seen):
        where = "the final latents are" if call == schedule.calls else f"the input of call {call + 1} is"
        if not np.isfinite(values).all():
            raise ExportError(
                f"{schedule.scheduler} makes no images of {number_of(steps)} steps with this config, in diffusers "
                f"either ({where} no number); name other steps, {_CHANGE}"
            )
        expected = np.asarray(schedule.signal[call]) @ given[: call + 1]
        drawn = sum(after < call for after, _ in draws)
        if drawn != len(schedule.noise[call]):
            raise NotLinear(
                f"{schedule.scheduler} draws a different number of noises from run to run; {_OTHER}"
            )
        if drawn:
            expected = expected + np.asarray(schedule.noise[call]) @ noises[:drawn]
        difference = float(np.abs(values - expected).max() / max(1.0, np.abs(values).max()))
        if difference <= TOLERANCE:  # which what is no number is not
            continue
        if unseeded:
            raise NotLinear(
                f"{schedule.scheduler} draws noise in a way that cannot be repeated, from torch's own generator and "
                f"not from the image's, which the seed sets; {_OTHER}"
            )
        why = _OTHER
        if flags := [flag for flag in ("clip_sample", "thresholding") if scheduler.config.get(flag)]:
            wanted = f"{schedule.scheduler.removesuffix('Scheduler')}:{'=false,'.join(flags)}=false"
            why = f"it has {' and '.join(flags)} on; turn that off with --scheduler {wanted}"
        raise NotLinear(
            f"{schedule.scheduler} is not linear: {why} ({where} off by {difference:.1e} from a weighted sum)"
        )


def _clean(scheduler: Any, call: int) -> tuple[float, float]:
    """a, b such that a * input + b * output of the call estimates the clean latents; (1, 0) where that is not known.

    A scheduler that conditions its network as in Karras et al., "Elucidating the Design Space of Diffusion-Based
    Generative Models", 2022, table 1, says it itself. Every other's scaled input has the form sqrt(p) * clean +
    sqrt(1 - p) * noise with p = alphas_cumprod[t], so the estimate follows from the prediction type alone: Salimans &
    Ho, "Progressive Distillation", 2022, appendix D. In flow matching it is (1 - s) * clean + s * noise, and the output
    noise - clean.
    """
    timestep = float(scheduler.timesteps[call])
    if hasattr(scheduler, "precondition_outputs"):
        sigma = scheduler.sigmas[call]
        signal = scheduler.precondition_outputs(1.0, 0.0, sigma) / scheduler.precondition_inputs(1.0, sigma)
        return float(signal), float(scheduler.precondition_outputs(0.0, 1.0, sigma))
    kind = scheduler.config.get("prediction_type", "epsilon")
    if type(scheduler).__name__.startswith("FlowMatch") or kind == "flow_prediction":
        return 1.0, -timestep / float(scheduler.config.num_train_timesteps)
    products = getattr(scheduler, "alphas_cumprod", None)
    if kind == "sample":
        return 0.0, 1.0
    if products is None or kind not in ("epsilon", "v_prediction"):
        return 1.0, 0.0
    p = float(np.interp(timestep, np.arange(len(products)), products.numpy()))
    signal, noise = np.sqrt(p), np.sqrt(1.0 - p)
    if kind == "v_prediction":
        return float(signal), float(-noise)
    signal = max(signal, 1e-3)  # a schedule that ends in pure noise has no estimate there
    return float(1.0 / signal), float(-noise / signal)


def _array(tensor: torch.Tensor) -> Doubles:
    return tensor.to(torch.float64).reshape(-1).numpy().copy()
