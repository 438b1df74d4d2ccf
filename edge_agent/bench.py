"""`edge-agent bench`: what images take on this device, on each provider that onnxruntime has."""

from __future__ import annotations

import argparse
import base64
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent import child, settings, terminal
from edge_agent.client import BAD_INPUT, DONE
from edge_agent.errors import InvalidRequest, RouteT2IError
from edge_agent.interrupt import interruptible
from edge_agent.request import ImageRequest, Limits, validate
from edge_agent.terminal import add_image_options, print_json, print_table, spinner

EPILOG = """\
examples:
  edge-agent bench
  edge-agent bench --providers cuda,cpu --bundle ./sd-turbo --steps 1
  edge-agent bench --json > bench.jsonl

Each provider gets a process of its own, which loads the models as the daemon does, so that one that crashes is a line
of the table. No daemon is asked: stop the one that runs, or both share cores and memory. A compiler such as TensorRT
first builds what it needs, which takes minutes, is part of `first image`, and is kept in --cache for the daemon.

`image` is from a prompt's token states to pixels, `step` one call of the network, `decode` from latents to pixels,
`decision` from the prompt to PRS, of a bundle without predictor to token states: medians of the images after the
first, as many as --seconds allow, 1 to 30. `first image` begins with the process. `memory` is the most that it held,
without a graphics card's own. `differs` is by how much of 255 a pixel of the first image differs at most from that of
the first provider, which is the CPU where it is measured.

--json prints one object a line: provider, error, first_image_s, images, image_s, step_s, decode_s, decision_s,
peak_memory_bytes, largest_difference, model_digest, width, height, steps, guidance_scale, threads, onnxruntime. What
was not measured is null; `threads` is 0 for one a physical core.
"""

_PARTS = ("image_s", "step_s", "decode_s", "decision_s")
_MEASURED = ("first_image_s", "images", *_PARTS, "peak_memory_bytes")
_LONGEST_S = 86_400.0


def add_command(commands: Any) -> None:
    """Adds `bench` to the command line."""
    bench = terminal.add_command(
        commands,
        "bench",
        _bench,
        "measure images on this device, on each provider",
        EPILOG,
        client=False,
    )
    bench.add_argument(
        "--prompt",
        default="a red apple on a beach",
        metavar="TEXT",
        help="what is drawn (default: %(default)s)",
    )
    bench.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long each provider draws after its first image (default: %(default)g)",
    )
    add_image_options(bench)
    bench.add_argument(
        "--providers",
        metavar="NAME,NAME",
        default=argparse.SUPPRESS,
        help="which to measure, one after the other, such as cuda,cpu; default: all that onnxruntime has",
    )
    settings.add_flags(bench, ("bundle", "models", "threads", "cache"))
    bench.add_argument("--json", action="store_true", help="print JSON, one object a line")


def _bench(options: argparse.Namespace) -> int:
    with interruptible():
        import onnxruntime as ort

        from edge_agent.bundle import Bundle
        from edge_agent.diffusion import providers
        from edge_agent.loader import unfit

    if not 0 <= options.seconds <= _LONGEST_S:  # also refuses NaN
        raise InvalidRequest(f"--seconds must be a number from 0 to {_LONGEST_S:,.0f}")
    chosen = settings.resolve(vars(options), os.environ)
    bundle = Bundle.open(os.path.realpath(chosen.bundle_folder))
    manifest = bundle.manifest
    request = validate(
        ImageRequest(
            request_id="bench",
            prompt=options.prompt,
            width=options.width,
            height=options.height,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
        ),
        Limits(manifest.sizes, manifest.steps, chosen.max_prompt_characters),
    )
    width, height = request.size
    facts = {
        "model_digest": bundle.model_digest,
        "width": width,
        "height": height,
        "steps": manifest.default_steps if request.steps is None else request.steps,
        "guidance_scale": (
            manifest.default_guidance if request.guidance_scale is None else request.guidance_scale
        ),
        "threads": chosen.threads,
        "onnxruntime": ort.__version__,
    }
    task = facts | {
        "bundle": str(bundle.folder),
        "cache": str(chosen.cache_folder),
        "prompt": request.prompt,
        "seconds": options.seconds,
    }
    # The CPU first, whose picture the others are compared with.
    names = sorted(chosen.providers or providers.names(), key=lambda name: name != providers.CPU)
    found: list[dict[str, Any]] = []

    def measured() -> Iterator[dict[str, Any]]:
        for one in _measured(names, {} if chosen.providers else unfit(manifest), task):
            found.append(one)
            yield one

    if options.json:
        for one in measured():
            print_json(one | facts)
    else:
        print(
            f"{manifest.name} ({bundle.model_digest[:16]}): {width} x {height} pixels, {facts['steps']} steps, "
            f"guidance {facts['guidance_scale']:g}; onnxruntime {ort.__version__}"
        )
        print_table(
            ("provider", "image", "step", "decode", "decision", "first image", "memory", "differs"),
            map(_row, measured()),
        )
        for one in found:
            if one["error"]:
                print(f"{one['provider']}: {one['error']}")
    failed = sum(bool(one["error"]) for one in found)
    # Of providers that nobody named some are always lacking.
    return BAD_INPUT if failed == len(found) or (failed and chosen.providers) else DONE


def _measured(
    names: Sequence[str], unfit: Mapping[str, str], task: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What --json has of each provider."""
    reference: NDArray[np.int64] | None = None
    for name in names:
        found: dict[str, Any] = dict.fromkeys(_MEASURED)
        error, difference = unfit.get(name), None
        if not error:
            try:
                measured, drawn = _asked({**task, "provider": name, "began": time.time()})
            except RouteT2IError as failure:
                error = failure.message
            except OSError as failure:
                error = f"no process can be started for it: {failure.strerror or failure}"
            else:
                found |= measured
                if reference is None:
                    reference = drawn
                else:
                    difference = int(np.abs(drawn - reference).max())
        yield {"provider": name, "error": error, **found, "largest_difference": difference}


def _asked(task: Mapping[str, Any]) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """What the process for one provider measures, and the colours of its first image, 0..255, in one row; it is told on
    a terminal how far that is. Raises GenerationFailed, and OSError where there can be no such process.
    """
    name, measured = task["provider"], {}
    with spinner(f"{name}: loading the models") as say:
        for answer in child.answers("edge_agent.measure", task, name):
            if "step" in answer:
                say(f"{name}: image {answer['image']}, step {answer['step']} of {answer['steps']}")
            elif "images" in answer:
                measured = answer
    images = measured.pop("images")
    medians = {part: statistics.median(image[part] for image in images) for part in _PARTS}
    pixels = np.frombuffer(base64.b64decode(measured.pop("pixels")), np.uint8)
    return {**measured, "images": len(images), **medians}, pixels.astype(np.int64)


def _row(found: Mapping[str, Any]) -> tuple[str, ...]:
    if found["error"]:
        return (found["provider"], "failed", *[""] * 6)
    times = (_time(found[name]) for name in (*_PARTS, "first_image_s"))
    memory, difference = found["peak_memory_bytes"], found["largest_difference"]
    return (
        found["provider"],
        *times,
        "" if memory is None else f"{memory / 1e6:,.0f} MB",
        "" if difference is None else str(difference),
    )


def _time(seconds: float) -> str:
    """To three digits, and from a thousand seconds on to one second."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"
