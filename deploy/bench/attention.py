"""What fused attention saves: a call of the denoiser at Stable Diffusion 1.5's size, by either of the bundle's graphs.

Each has a process of its own, started as `python deploy/bench/attention.py fused|traced BUNDLE PIXELS THREADS
PROVIDERS`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from child import Child, Reply, answer, held_bytes
from edge_agent import manifest
from edge_agent.bundle import Bundle
from edge_agent.diffusion import denoiser
from edge_agent.diffusion.sessions import Runtime
from edge_agent.diffusion.text_encoder import TextStates
from estimate import Estimate, quantile, ratio
from images import FULL_SIZE, HALF, NOT_THE_DEVICES, full_size_folders, half_folder
from opening import runtime
from plan import Plan
from row import Row

GROUP, HALF_GROUP = f"{FULL_SIZE}-attention", f"{HALF}-attention"
FUSED, TRACED = "fused", "traced"


def rows(plan: Plan) -> list[Row]:
    """Time and memory of a call with fused attention over those of one as it was traced, for images of some sizes, and
    how far what they compute is apart.
    """
    return _rows(plan, GROUP, "full size", lambda: full_size_folders(plan)[1])


def half_rows(plan: Plan) -> list[Row]:
    """The same in half precision, for which CUDA has another operator."""
    return _rows(plan, HALF_GROUP, "full size in half precision", lambda: half_folder(plan))


def _rows(plan: Plan, group: str, prefix: str, made: Callable[[], Path]) -> list[Row]:
    if plan.compiled:
        reason = "a compiler need not have the operator"
        return [Row.missing(group, f"{prefix}: attention fused ÷ as traced", reason)]
    bundle = made()
    return [row for pixels in plan.attention_pixels for row in _rows_of(plan, group, prefix, bundle, pixels)]


def _rows_of(plan: Plan, group: str, prefix: str, bundle: Path, pixels: int) -> list[Row]:
    arguments = (str(bundle), str(pixels), str(plan.threads), plan.providers)
    seconds: dict[str, list[float]] = {FUSED: [], TRACED: []}
    megabytes = {}
    with (
        tempfile.TemporaryDirectory() as kept,
        Child("attention.py", FUSED, *arguments, threads=plan.threads, edge=True) as fused,
        Child("attention.py", TRACED, *arguments, threads=plan.threads, edge=True) as traced,
    ):
        files = {name: f"{kept}/{name}.npy" for name in (FUSED, TRACED)}
        for number in range(2 * plan.full_size_pairs + 1):
            for name, child in ((FUSED, fused), (TRACED, traced)):
                reply = child.ask(keep=files[name])
                if number:  # in the first call all memory is new
                    seconds[name].append(reply["call_s"])
                megabytes[name] = (reply["peak_bytes"] - reply["loaded_bytes"]) / 1e6
        output, expected = (np.load(files[name]) for name in (FUSED, TRACED))
    where = f"attention fused ÷ as traced, {pixels} x {pixels}"
    ours, theirs = seconds[FUSED], seconds[TRACED]
    memory = f"{prefix}: memory of a call above the weights, {where}"
    return [
        Row.untargeted(
            group,
            f"{prefix}: time of a call, {where}",
            ratio(ours, theirs),
            "x",
            note=f"{quantile(ours).value:.3g} over {quantile(theirs).value:.3g} s",
            details={"seconds": seconds},
        ),
        Row.untargeted(
            group,
            memory,
            Estimate.exact(megabytes[FUSED] / megabytes[TRACED]),
            "x",
            note=f"{megabytes[FUSED]:,.0f} over {megabytes[TRACED]:,.0f} MB",
        )
        if plan.on_cpu
        else Row.missing(group, memory, NOT_THE_DEVICES),
        Row.untargeted(
            group,
            f"{prefix}: difference of a call, attention fused from as traced, {pixels} x {pixels}",
            Estimate.exact(float(np.linalg.norm(output - expected) / np.linalg.norm(expected))),
            "",
            note="of its norm",
        ),
    ]


def load(attention: str, folder: Path, pixels: int, threads: int, providers: str) -> Callable[[str], Reply]:
    """A function that calls the denoiser once, as for an image of `pixels` a side, which its graphs leave open, and
    keeps the output in the file that it is told.
    """

    def graph(bundle: Bundle, _: Runtime) -> str:
        traced = Path(bundle.manifest.denoiser)
        return (traced if attention == TRACED else traced.with_name(manifest.FUSED)).as_posix()

    denoiser.graph_on = graph  # also where it would not take the fused one
    bundle = Bundle.open(folder, verify=False)
    facts, draw = bundle.manifest, np.random.default_rng(0)
    network = denoiser.Denoiser(bundle, runtime(threads, providers))
    side = pixels * facts.latent_width // facts.width
    latents = draw.standard_normal((1, facts.latent_channels, side, side), np.float32)
    states = TextStates(draw.standard_normal((1, facts.text_tokens, facts.text_hidden), np.float32))
    loaded_bytes = held_bytes()

    def call(keep: str) -> Reply:
        began = time.perf_counter()
        output = network.predict(latents, 500.0, states, states, 1.0)
        call_s = time.perf_counter() - began
        np.save(keep, output)
        return {"call_s": call_s, "loaded_bytes": loaded_bytes}

    return call


if __name__ == "__main__":
    kind, bundle_folder, pixel_count, thread_count, names = sys.argv[1:]
    answer(partial(load, kind, Path(bundle_folder), int(pixel_count), int(thread_count), names))
