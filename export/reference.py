"""What a bundle must come up to: images of the torch pipeline, and how far the bundle's are from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.diffusion.generator import Generator, Image
from export.errors import ExportError, reason
from export.schedule import Steps, asked, number_of
from export.source import quiet
from export.support import kind


class Comparison(NamedTuple):
    """An image that is compared with the torch pipeline's after an export."""

    prompt: str
    negative: str
    seed: int
    guided: bool = True


NEGATED = Comparison("a red cat and two dogs on the beach 🐈", "blurry, dark", 1234567)
UNGUIDED = Comparison("the moon", "", 0, guided=False)
UNNEGATED = Comparison("the moon", "", 7)
"""Guidance away from no negative prompt, which most requests ask for, is another thing than away from one: zeros in
Stable Diffusion XL, in others what the encoders make of an empty text."""


@dataclass(frozen=True)
class Reference:
    """An image that the torch pipeline made, and from what."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    latents: NDArray[np.float32]  # [C, h, w], the last
    colours: NDArray[np.float32]  # [H, W, 3] in 0..1, before rounding


def reference_image(
    pipeline: Any,
    prompt: str,
    negative: str,
    seed: int,
    steps: Steps,
    guidance: float,
    size: tuple[int, int] | None = None,
) -> Reference:
    """One image of `pipeline`, of `size` = width, height or of its own, in `steps`, or at these timesteps.

    Raises ExportError when the pipeline cannot make it, or when it has numbers that are not finite.
    """
    width, height = size or (None, None)
    seen: list[torch.Tensor] = []

    def keep(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen[:] = [values["latents"]]
        return values

    # None and empty differ in Stable Diffusion XL; the edge's empty negative prompt is none.
    negatives = {"negative_prompt": negative or None} if kind(pipeline).takes_negative else {}
    try:
        with quiet():
            colours = pipeline(
                prompt,
                **negatives,
                width=width,
                height=height,
                **asked(steps),
                guidance_scale=guidance,
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=keep,
                output_type="np",
            ).images[0]
    except Exception as error:  # each part fails in its own way
        raise ExportError(f"{type(pipeline).__name__} itself makes no image: {reason(error)}") from error
    if not np.isfinite(colours).all():
        raise ExportError("the torch pipeline gives numbers that are not finite in float32")
    return Reference(prompt, negative, seed, number_of(steps), guidance, seen[0][0].numpy(), colours)


def reference_images(
    pipeline: Any,
    steps: Steps,
    guidance: float,
    size: tuple[int, int] | None = None,
    comparisons: Sequence[Comparison] = (NEGATED, UNGUIDED, UNNEGATED),
) -> list[Reference]:
    """An image of `pipeline` for each of `comparisons`, those without guidance at 1. Raises ExportError, see above."""
    return [
        reference_image(
            pipeline,
            *(one.prompt, one.negative, one.seed),
            steps,
            max(guidance, 1.5) if one.guided else 1.0,
            size,
        )
        for one in comparisons
    ]


def difference(generator: Generator, reference: Reference) -> float:
    """Largest difference of any colour in 0..1 between the generator's image and `reference`.

    Raises GenerationFailed when the generator gives numbers that are not finite.
    """
    _, states = generator.encode(reference.prompt)
    negative = generator.encode_negative(reference.negative)
    height, width, _ = reference.colours.shape
    *_, image = generator.generate(
        states, negative, reference.seed, reference.steps, reference.guidance, size=(width, height)
    )
    assert isinstance(image, Image)
    return float(np.abs(image.colours - reference.colours).max())


def largest_difference(bundle: Bundle, references: Sequence[Reference]) -> float:
    """The largest `difference` between the images of `bundle` and `references`."""
    generator = Generator(bundle)
    return max(difference(generator, reference) for reference in references)
