"""The models that generate, as they are served: the edge's from a bundle, the cloud's as a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_server import complete
from cloud_server.errors import StartRefused
from cloud_server.model import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, Model, open_model
from edge_agent.bundle import Bundle
from edge_agent.diffusion import providers
from edge_agent.diffusion.generator import Generator, Image
from edge_agent.diffusion.sessions import Runtime
from export import source
from export.errors import ExportError, reason

BATCH = 5  # images a pipeline makes at once; a whole piece of large ones would not fit a GPU


@dataclass(frozen=True)
class Picture:
    """One generated image."""

    pixels: NDArray[np.uint8]
    """[H, W, 3]"""
    withheld: bool = False
    """The model's own safety checker blanked it: nobody would be served it."""


class Paints(Protocol):
    """A model that generates."""

    batch: int
    """Images it makes at once."""

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Picture]:
        """One image a prompt."""


class Painter:
    """Generates with a diffusers pipeline, at the size, steps and guidance its model card names, as the cloud does.

    ``batch`` images are made at once. ``dtype`` is one of the cloud server's. Raises ExportError when the pipeline
    cannot be loaded.
    """

    def __init__(self, model: Model, batch: int = BATCH, dtype: str = "auto") -> None:
        self.model, card = model.folder, model.card
        self.steps = DEFAULT_STEPS if card.steps is None else card.steps
        self.guidance_scale = DEFAULT_GUIDANCE_SCALE if card.guidance_scale is None else card.guidance_scale
        self.size = {} if None in (card.width, card.height) else {"width": card.width, "height": card.height}
        self.batch = batch
        try:
            self.pipeline = complete.pipeline(model.folder, complete.dtype_for(device(), dtype))
        except Exception as error:  # each part's library fails in its own way
            raise ExportError(
                f"--cloud {self.model} cannot be loaded: {reason(error)}; save it again with save_pretrained(), "
                "or name another"
            ) from error
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            self.pipeline.to(device())
        except torch.OutOfMemoryError as error:
            raise ExportError(
                f"--cloud {self.model} does not fit the GPU's memory: free some, or name another with --cloud"
            ) from error

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Picture]:
        """One image a prompt. Noise comes from the CPU, so a seed is the same image on every device.

        Raises ExportError for a model that makes no image of a prompt, or not so many at once.
        """
        made: list[Picture] = []
        for start in range(0, len(prompts), self.batch):
            chosen = slice(start, start + self.batch)
            noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[chosen]]
            try:
                with source.quiet():  # a prompt that is cut off would be printed whole
                    output = self.pipeline(
                        list(prompts[chosen]),
                        num_inference_steps=self.steps,
                        guidance_scale=self.guidance_scale,
                        generator=noise,
                        **self.size,
                    )
            except torch.OutOfMemoryError as error:
                way_out = (
                    f"name a smaller --batch than {self.batch}"
                    if self.batch > 1
                    else "free some, or name another"
                )
                raise ExportError(
                    f"--cloud {self.model}: the GPU's memory does not hold what {len(noise)} images at once need; "
                    f"{way_out}. Finished pieces are kept"
                ) from error
            except (TypeError, ValueError) as error:  # of a class that wants more than a prompt, or less
                raise ExportError(
                    f"--cloud {self.model}: a {type(self.pipeline).__name__} makes no image of a prompt: "
                    f"{reason(error)}"
                ) from error
            withheld = getattr(output, "nsfw_content_detected", None) or [False] * len(output.images)
            made += [
                Picture(np.asarray(image), bool(blank))
                for image, blank in zip(output.images, withheld, strict=True)
            ]
        return made


def device() -> str:
    """What torch computes on here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class BundlePainter:
    """Generates with a bundle, at its default steps and guidance, as the daemon does.

    Of what the daemon would run it on, whatever opens at once; ``threads`` in place of one a physical core. Raises
    BundleError when a graph cannot be opened.
    """

    batch = 1

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        names = map(providers.full_name, providers.find().serving)
        self.generator = Generator(bundle, Runtime(threads, providers=tuple(names)))
        self.nothing = self.generator.encode_negative("")
        self.steps, self.guidance_scale = bundle.manifest.default_steps, bundle.manifest.default_guidance

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Picture]:
        """One image a prompt. Raises GenerationFailed when one has numbers that are not finite."""
        return [Picture(self._image(*one).pixels) for one in zip(prompts, seeds, strict=True)]

    def _image(self, prompt: str, seed: int) -> Image:
        _, states = self.generator.encode(prompt)
        *_, image = self.generator.generate(states, self.nothing, seed, self.steps, self.guidance_scale)
        assert isinstance(image, Image)  # the last event
        return image


def cloud_model(model: str) -> Model:
    """The model folder that ``model`` names, or hub id; ExportError when there is none."""
    try:
        return open_model(model)
    except StartRefused as error:
        message = error.message.replace("--model", "--cloud")  # as the option is called here
        raise ExportError(message) from error
