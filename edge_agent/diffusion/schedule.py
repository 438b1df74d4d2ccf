"""A scheduler compiled to a lower-triangular matrix.

For a fixed number of steps every input to the denoiser, and the final latents, are a linear function of the
initial noise z, the model outputs o_1, o_2, ... so far, and any fresh noise f_1, f_2, ...:

    input_k = signal[k] . (z, o_1 .. o_k) + noise[k] . (f_1 .. f_j),    k = 0 .. T - 1
    final   = signal[T] . (z, o_1 .. o_T) + noise[T] . (f_1 .. f_j)

`export/schedule.py` reads the coefficients off the real scheduler. Prediction type, sigmas, model-input
scaling and multistep history are all in them, so one weighted sum a step runs any such scheduler.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator as Coroutine
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.diffusion.noise import TorchNoise
from edge_agent.errors import BundleError, NewerBundle

FORMAT = 1

MAX_FRESH = 4
"""Fresh noises for each call of the denoiser. Schedulers draw one or two; each takes the memory of the latents."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Schedule:
    """A scheduler for one number of steps: T calls of the denoiser, which may be more (PNDM, Heun)."""

    scheduler: str  # diffusers class name, for people
    steps: int
    timesteps: tuple[float, ...]  # T
    signal: tuple[tuple[float, ...], ...]  # T + 1 rows; row k has k + 1 coefficients
    noise: tuple[tuple[float, ...], ...]  # T + 1 rows; row k has one for each fresh noise drawn before it
    clean: tuple[tuple[float, float], ...]  # T; a * input + b * output estimates the clean latents

    @property
    def calls(self) -> int:
        """T, how often the denoiser is called."""
        return len(self.timesteps)

    def run(self, shape: Sequence[int], noise: TorchNoise) -> Coroutine[Floats, Floats, Floats]:
        """Yields each denoiser input, float32 [*shape], is sent the output, returns the final latents.

        `noise` gives the initial noise first and then the fresh noises, in the order in which diffusers
        draws them from its generator.
        """
        # float64: the rows of high-order solvers cancel, and a sum is little beside a call of the denoiser.
        signals = np.empty((self.calls + 1, math.prod(shape)))
        noises = np.empty((len(self.noise[-1]), signals.shape[1]))
        signals[0] = noise.draw(shape).reshape(-1)
        drawn = 0
        for call, (row, noise_row) in enumerate(zip(self.signal, self.noise, strict=True)):
            while drawn < len(noise_row):
                noises[drawn] = noise.draw(shape).reshape(-1)
                drawn += 1
            total = np.asarray(row) @ signals[: len(row)] + np.asarray(noise_row) @ noises[:drawn]
            latents = total.astype(np.float32).reshape(shape)
            if call == self.calls:
                break
            signals[call + 1] = (yield latents).reshape(-1)
        return latents

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schedule as JSON; Python's floats are written in full."""
        Path(path).write_bytes(json.dumps({"format": FORMAT, **asdict(self)}).encode() + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Read a schedule. Raises BundleError, naming the file, unless it is lower-triangular and finite."""
        try:
            document = json.loads(Path(path).read_bytes())
            schedule = cls(
                scheduler=str(document["scheduler"]),
                steps=int(document["steps"]),
                timesteps=_numbers(document["timesteps"]),
                signal=_rows(document["signal"]),
                noise=_rows(document["noise"]),
                clean=tuple((a, b) for a, b in _rows(document["clean"])),
            )
            version = document["format"]
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        # OverflowError: an integer that no float can hold.
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise BundleError(f"{path} is not a compiled schedule: {error!r}") from error
        if type(version) is int and version > FORMAT:
            raise NewerBundle(
                f"{path} has schedule format {version} and this edge-agent reads {FORMAT}, so the bundle is newer than "
                "this edge-agent: update edge-agent"
            )
        if version != FORMAT:
            raise BundleError(f"{path} has schedule format {version!r}; this version reads {FORMAT}")
        calls, fresh = schedule.calls, [len(row) for row in schedule.noise]
        if (
            calls == 0
            or [len(row) for row in schedule.signal] != list(range(1, calls + 2))
            or len(fresh) != calls + 1
            or fresh != sorted(fresh)
            or len(schedule.clean) != calls
        ):
            raise BundleError(f"{path} is not a lower-triangular schedule of {calls} calls")
        if fresh[-1] > MAX_FRESH * calls:
            raise BundleError(
                f"{path} draws {fresh[-1]:,} noises for {calls} calls; at most {MAX_FRESH} each"
            )
        return schedule


def _rows(rows: Any) -> tuple[tuple[float, ...], ...]:
    return tuple(map(_numbers, rows))


def _numbers(values: Any) -> tuple[float, ...]:
    numbers = tuple(map(float, values))
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")
    return numbers
