"""What fused attention saves: a call of the denoiser at Stable Diffusion 1.5's size, by either of the bundle's graphs.

Each has a process of its own, started as `python deploy/bench/attention.py fused|traced BUNDLE PIXELS THREADS`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from child import Child, Reply, answer, held_bytes
from edge_agent.bundle import Bundle
from edge_agent.diffusion import denoiser
from edge_agent.diffusion.sessions import Runtime
from edge_agent.diffusion.text_encoder import TextStates
from estimate import Estimate, quantile, ratio
from images import FULL_SIZE, full_size_folders
from plan import Plan
from row import Row

GROUP = f"{FULL_SIZE}-attention"
PIXELS = (512, 768)
FUSED, TRACED = "fused", "traced"


def rows(plan: Plan) -> list[Row]:
    """Time and memory of a call with fused attention over those of one as it was traced, for images of some sizes."""
    _, bundle = full_size_folders(plan)
    return [row for pixels in PIXELS for row in _rows(plan, bundle, pixels)]


def _rows(plan: Plan, bundle: Path, pixels: int) -> list[Row]:
    arguments = (str(bundle), str(pixels), str(plan.threads))
    seconds: dict[str, list[float]] = {FUSED: [], TRACED: []}
    megabytes = {}
    with (
        Child("attention.py", FUSED, *arguments, threads=plan.threads, edge=True) as fused,
        Child("attention.py", TRACED, *arguments, threads=plan.threads, edge=True) as traced,
    ):
        for number in range(2 * plan.full_size_pairs + 1):
            for name, child in ((FUSED, fused), (TRACED, traced)):
                reply = child.ask()
                if number:  # in the first call all memory is new
                    seconds[name].append(reply["call_s"])
                megabytes[name] = (reply["peak_bytes"] - reply["loaded_bytes"]) / 1e6
    where = f"attention fused ÷ as traced, {pixels} x {pixels}"
    ours, theirs = seconds[FUSED], seconds[TRACED]
    return [
        Row.untargeted(
            GROUP,
            f"full size: time of a call, {where}",
            ratio(ours, theirs),
            "x",
            note=f"{quantile(ours).value:.3g} over {quantile(theirs).value:.3g} s",
            details={"seconds": seconds},
        ),
        Row.untargeted(
            GROUP,
            f"full size: memory of a call above the weights, {where}",
            Estimate.exact(megabytes[FUSED] / megabytes[TRACED]),
            "x",
            note=f"{megabytes[FUSED]:,.0f} over {megabytes[TRACED]:,.0f} MB",
        ),
    ]


def load(attention: str, folder: Path, pixels: int, threads: int) -> Callable[[], Reply]:
    """A function that calls the denoiser once, as for an image of `pixels` a side, which its graphs leave open."""
    if attention == TRACED:
        denoiser.graph_on = lambda bundle, _: bundle.manifest.denoiser
    bundle = Bundle.open(folder, verify=False)
    facts, draw = bundle.manifest, np.random.default_rng(0)
    network = denoiser.Denoiser(bundle, Runtime(threads=threads))
    side = pixels * facts.latent_width // facts.width
    latents = draw.standard_normal((1, facts.latent_channels, side, side), np.float32)
    states = TextStates(draw.standard_normal((1, facts.text_tokens, facts.text_hidden), np.float32))
    loaded_bytes = held_bytes()

    def call() -> Reply:
        began = time.perf_counter()
        network.predict(latents, 500.0, states, states, 1.0)
        return {"call_s": time.perf_counter() - began, "loaded_bytes": loaded_bytes}

    return call


if __name__ == "__main__":
    kind, bundle_folder, pixel_count, thread_count = sys.argv[1:]
    answer(partial(load, kind, Path(bundle_folder), int(pixel_count), int(thread_count)))
