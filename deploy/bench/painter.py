"""A pipeline that paints on demand, in a process of its own: the edge's, optimum's or diffusers'.

It is started as `python deploy/bench/painter.py edge|optimum|diffusers FOLDER THREADS STEPS GUIDANCE`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from child import Reply, answer

Paint = Callable[[str, int], tuple[NDArray[np.float32], list[float]]]
"""From prompt and seed to colours in 0..1, [H, W, 3], before rounding, and the moments when each step was done."""


def edge(folder: str, threads: int, steps: int, guidance: float) -> Paint:
    """What the daemon runs, loaded as the daemon loads it: every file against its sha256."""
    from edge_agent.bundle import Bundle
    from edge_agent.diffusion.generator import Generator, Image
    from edge_agent.diffusion.sessions import Runtime

    generator = Generator(Bundle.open(folder), Runtime(threads=threads))

    def paint(prompt: str, seed: int) -> tuple[NDArray[np.float32], list[float]]:
        states, negative = generator.encode(prompt)[1], generator.encode_negative("")
        done = []
        for event in generator.generate(states, negative, seed, steps, guidance):
            if isinstance(event, Image):
                return event.colours, done
            done.append(time.perf_counter())
        raise AssertionError("the last event is the image")

    return paint


def optimum(folder: str, threads: int, steps: int, guidance: float) -> Paint:
    """Runs optimum's pipeline on the very same files."""
    import onnxruntime
    from optimum.onnxruntime import ORTDiffusionPipeline

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return _diffusers_call(
        ORTDiffusionPipeline.from_pretrained(folder, session_options=options), steps, guidance
    )


def diffusers(folder: str, threads: int, steps: int, guidance: float) -> Paint:
    """Runs torch on the CPU, in float32."""
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(threads)
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    return _diffusers_call(pipeline, steps, guidance)


def _diffusers_call(pipeline: Any, steps: int, guidance: float) -> Paint:
    import torch

    pipeline.set_progress_bar_config(disable=True)

    def paint(prompt: str, seed: int) -> tuple[NDArray[np.float32], list[float]]:
        done = []

        def step(_pipeline: Any, _step: int, _timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            done.append(time.perf_counter())
            return kept

        colours: NDArray[np.float32] = pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
            callback_on_step_end=step,
        ).images[0]
        return colours, done

    return paint


def load(kind: str, folder: str, threads: str, steps: str, guidance: str) -> Callable[..., Reply]:
    """Answers `prompt` and `seed` with the seconds that the image and each step but the first took.

    The first step cannot be told from what goes before it in a pipeline. `keep` names a file for the colours.
    """
    paint = {"edge": edge, "optimum": optimum, "diffusers": diffusers}[kind](
        folder, int(threads), int(steps), float(guidance)
    )

    def reply(prompt: str, seed: int, keep: str = "") -> Reply:
        began = time.perf_counter()
        colours, done = paint(prompt, seed)
        seconds = time.perf_counter() - began
        if keep:
            np.save(Path(keep), colours)
        return {"seconds": seconds, "step_seconds": np.diff(done).tolist()}

    return reply


if __name__ == "__main__":
    answer(lambda: load(*sys.argv[1:]))
