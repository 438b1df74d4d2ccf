"""What images take on one provider: the process of `edge-agent bench`, which runs the models as the daemon does."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Any

from edge_agent import child, memory
from edge_agent.diffusion import providers
from edge_agent.diffusion.generator import Generator, Step
from edge_agent.errors import GenerationFailed, StartRefused
from edge_agent.loader import load
from edge_agent.reader import Reader
from edge_agent.settings import Settings

MOST = 30
"""Images beyond the first."""

_TELL_S = 0.1  # how often it is told how far an image is


def main() -> int:
    """The process."""
    return child.work(_measure)


def _measure(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Draws images of seeds 0, 1, ... for so many `seconds`, at least one beyond the first.

    Tells how far it is, and last what it took: `first_image_s` since the task's `began`, a reading of time.time(),
    `peak_memory_bytes`, the seconds of each later image's parts, and the first image's `pixels`, uint8 [H, W, 3], as
    Base64: a file would stay behind where the command is killed.
    """
    memory.share_one_heap()
    reader, generator = _load(task)
    negative = generator.encode_negative("")
    images: list[dict[str, float]] = []
    first_image_s = told = end = 0.0
    while len(images) < 2 or (len(images) <= MOST and time.monotonic() < end):
        began = time.monotonic()
        reading = reader.read(task["prompt"])
        read = stepped = time.monotonic()
        for event in generator.generate(
            reading.states,
            negative,
            len(images),
            task["steps"],
            task["guidance_scale"],
            size=(task["width"], task["height"]),
        ):
            now = time.monotonic()
            if isinstance(event, Step):
                stepped, calls = now, event.n
                if now > told + _TELL_S:
                    told = now
                    yield {"image": len(images) + 1, "step": event.k, "steps": event.n}
            elif not images:
                pixels = event.pixels
                first_image_s, end = time.time() - task["began"], now + task["seconds"]
        images.append(
            {
                "decision_s": read - began,
                "step_s": (stepped - read) / calls,
                "decode_s": now - stepped,
                "image_s": now - read,
            }
        )
    yield {
        "first_image_s": first_image_s,
        "images": images[1:],
        "peak_memory_bytes": memory.peak_bytes(),
        "pixels": base64.b64encode(pixels.tobytes()).decode(),
    }


def _load(task: dict[str, Any]) -> tuple[Reader, Generator]:
    """On the provider, and what that lacks on what would serve meanwhile, as in a daemon that may choose."""
    name = task["provider"]
    if failure := providers.failure(name):
        raise GenerationFailed(failure)
    wish = (name,) if name in providers.QUICK_TO_OPEN else (name, *providers.find().serving)
    settings = Settings(bundle=task["bundle"], threads=task["threads"], providers=wish, cache=task["cache"])
    try:
        models = load(settings)
        return models.reader, models.open_better() if models.open_better else models.generator
    except StartRefused as error:
        raise error.__cause__ or error from None  # without advice on a setting that nobody made
    except OSError as error:  # of the cache's folder
        raise GenerationFailed(str(error)) from error
