"""A pipeline that paints on demand, in a process of its own: the edge's, optimum's or diffusers'.

It is started as `python deploy/bench/painter.py KIND FOLDER THREADS STEPS GUIDANCE PROVIDERS`. KIND is edge, optimum or
diffusers, cpu for the edge's on the CPU in any case, or single for the edge's where that is one in half precision.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from child import Reply, answer

Paint = Callable[..., tuple[NDArray[np.float32], list[float]]]
"""From prompt and seed, and for the edge also a size, to colours in 0..1, [H, W, 3], before rounding, and the moments
when each step was done."""


def edge(folder: str, threads: int, steps: int, guidance: float, providers: str) -> Paint:
    """What the daemon runs, loaded as the daemon loads it: every file against its sha256."""
    from edge_agent.diffusion.generator import Image
    from opening import opened

    generator = opened(Path(folder), threads, providers)

    def paint(
        prompt: str, seed: int, size: tuple[int, int] | None = None
    ) -> tuple[NDArray[np.float32], list[float]]:
        states, negative = generator.encode(prompt)[1], generator.encode_negative("")
        done = []
        for event in generator.generate(states, negative, seed, steps, guidance, size=size):
            if isinstance(event, Image):
                return event.colours, done
            done.append(time.perf_counter())
        raise AssertionError("the last event is the image")

    return paint


def cpu(folder: str, threads: int, steps: int, guidance: float, _: str) -> Paint:
    """The same on the CPU."""
    return edge(folder, threads, steps, guidance, "cpu")


def optimum(folder: str, threads: int, steps: int, guidance: float, providers: str) -> Paint:
    """Runs optimum's pipeline on the very same files, on CUDA where ours is on another provider than the CPU."""
    import onnxruntime
    from optimum.onnxruntime import ORTDiffusionPipeline

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    provider = "CPUExecutionProvider" if providers == "cpu" else "CUDAExecutionProvider"
    pipeline = ORTDiffusionPipeline.from_pretrained(folder, provider=provider, session_options=options)
    return _diffusers_call(pipeline, steps, guidance)


def diffusers(folder: str, threads: int, steps: int, guidance: float, providers: str) -> Paint:
    """Runs torch in float32, on the CPU or on CUDA likewise."""
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(threads)
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    return _diffusers_call(pipeline.to("cpu" if providers == "cpu" else "cuda"), steps, guidance)


def _diffusers_call(pipeline: Any, steps: int, guidance: float) -> Paint:
    import torch

    pipeline.set_progress_bar_config(disable=True)

    def paint(prompt: str, seed: int) -> tuple[NDArray[np.float32], list[float]]:
        done = []

        def step(_pipeline: Any, _step: int, _timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if pipeline.device.type == "cuda":  # which may still be at work
                torch.cuda.synchronize()
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


def load(
    kind: str, folder: str, threads: str, steps: str, guidance: str, providers: str
) -> Callable[..., Reply]:
    """Answers `prompt` and `seed` with the seconds that the image and each step but the first took.

    The first step cannot be told from what goes before it in a pipeline. `keep` names a file for the colours, and
    `size` says width and height where they are not the default ones, which the edge alone is asked for.
    """
    kinds = {"edge": edge, "cpu": cpu, "single": edge, "optimum": optimum, "diffusers": diffusers}
    paint = kinds[kind](folder, int(threads), int(steps), float(guidance), providers)

    def reply(prompt: str, seed: int, keep: str = "", size: Sequence[int] = ()) -> Reply:
        began = time.perf_counter()
        colours, done = paint(prompt, seed, *([tuple(size)] if size else []))
        seconds = time.perf_counter() - began
        if keep:
            np.save(Path(keep), colours)
        return {"seconds": seconds, "step_seconds": np.diff(done).tolist()}

    return reply


if __name__ == "__main__":
    answer(lambda: load(*sys.argv[1:]))
