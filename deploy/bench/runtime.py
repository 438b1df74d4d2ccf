"""What onnxruntime is told beside what it could be told: threads, spinning, and how guidance runs. On local images.

The defaults come from these rows; none has a target. Its own process is started as
`python deploy/bench/runtime.py BUNDLE THREADS IMAGES PROVIDERS NAME...`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from child import Reply, answer, asked
from clock import settle
from edge_agent.bundle import Bundle
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.sessions import Runtime
from estimate import calm_ratio, quantile, ratio
from images import FULL_SIZE, full_size_folders
from opening import opened
from plan import PROMPTS, Plan
from row import Row

GROUP = "runtime"
FULL_SIZE_GROUP = f"{FULL_SIZE}-guidance"
GUIDED = 3.0  # a guidance scale above 1, whatever the bundle's own
SEPARATE, SPINNING, HALF, MORE = "separate", "spinning", "half", "more"
WHAT = {
    SEPARATE: "guidance in two passes ÷ in one batch",
    SPINNING: "threads that spin between nodes ÷ that sleep",
    HALF: "half as many threads ÷ one a core",
    MORE: "twice as many threads ÷ one a core",
}
WHY = {SPINNING: "; they sleep all the same, as the event loop and decisions share the cores"}


def rows(plan: Plan) -> list[Row]:
    """Time of an image with the alternative over that with the default; above 1 the default is faster."""
    if plan.on_cpu:
        return _rows(plan, GROUP, plan.bundle, plan.images, *WHAT)
    left_out = [
        Row.missing(GROUP, what, "the threads are the CPU's")
        for name, what in WHAT.items()
        if name != SEPARATE
    ]
    return [*_guidance(plan, GROUP, plan.bundle, plan.images), *left_out]


def full_size_rows(plan: Plan) -> list[Row]:
    """How guidance runs, at Stable Diffusion 1.5's size."""
    _, bundle = full_size_folders(plan)
    return _guidance(plan, FULL_SIZE_GROUP, bundle, plan.full_size_pairs)


def _guidance(plan: Plan, group: str, bundle: Path, images: int) -> list[Row]:
    if plan.compiled:
        return [Row.missing(group, WHAT[SEPARATE], "what is compiled is made for one image at a time")]
    return _rows(plan, group, bundle, images, SEPARATE)


def _rows(plan: Plan, group: str, bundle: Path, images: int, *names: str) -> list[Row]:
    found = asked(plan.threads, "runtime.py", bundle, plan.threads, images, plan.providers, *names)
    prefix = "full size: " if group == FULL_SIZE_GROUP else ""
    return [
        Row.untargeted(
            group,
            prefix + WHAT[name],
            ratio(*series),
            "x",
            note=f"{quantile(series[0]).value:.3g} over {quantile(series[1]).value:.3g} s"
            + WHY.get(name, ""),
            calm=calm_ratio(*series),
            details={"alternative_s": series[0], "default_s": series[1]},
        )
        for name, series in found.items()
        if name in WHAT
    ]


def measure(folder: Path, threads: int, images: int, providers: str, *names: str) -> Reply:
    """For each alternative of these names: seconds of images with it and with the default, in turns."""
    bundle = Bundle.open(folder)
    default = opened(folder, threads, providers)
    runtimes = {
        SPINNING: Runtime(threads=threads, spinning=True),
        HALF: Runtime(threads=max(1, threads // 2)),
        MORE: Runtime(threads=2 * threads),
    }
    own = default.denoiser.passes
    found: Reply = {}
    for name in names:
        # Two at a time at most: a large model must not need the memory of five.
        other = Generator(bundle, runtimes[name]) if name in runtimes else default
        pairs: tuple[list[float], list[float]] = ([], [])
        for number in range(images + 1):
            for side in (0, 1) if number % 2 else (1, 0):
                generator = (other, default)[side]
                generator.denoiser.passes = ("separate", "batch")[side] if name == SEPARATE else own
                if name == SPINNING:
                    settle()
                began = time.perf_counter()
                draw(generator, bundle, number)
                pairs[side].append(time.perf_counter() - began)
        found[name] = [series[1:] for series in pairs]  # the first pair warmed both up
    return found


def draw(generator: Generator, bundle: Bundle, number: int) -> None:
    """One guided image."""
    _, states = generator.encode(PROMPTS[number % len(PROMPTS)])
    steps = bundle.manifest.default_steps
    for _ in generator.generate(states, generator.encode_negative(""), number, steps, GUIDED):
        pass


if __name__ == "__main__":
    bundle_folder, thread_count, image_count, provider_names, *alternatives = sys.argv[1:]
    answer(
        lambda: (
            lambda: measure(
                Path(bundle_folder), int(thread_count), int(image_count), provider_names, *alternatives
            )
        )
    )
