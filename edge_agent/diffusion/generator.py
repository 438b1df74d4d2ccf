"""From a prompt's token states to an image, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import TOKENIZER, Bundle, schedule_file
from edge_agent.diffusion.decoder import Decoder
from edge_agent.diffusion.denoiser import Denoiser
from edge_agent.diffusion.noise import TorchNoise
from edge_agent.diffusion.schedule import Schedule
from edge_agent.diffusion.sessions import Runtime, Stop
from edge_agent.diffusion.text_encoder import TextEncoder
from edge_agent.errors import BundleError, GenerationFailed, InvalidRequest
from edge_agent.tokens import Tokenizer, Tokens

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """Call `k` of `n` of the denoiser is done."""

    k: int  # from 1
    n: int  # may be more than the steps asked for: PNDM and Heun call the denoiser more often
    preview: NDArray[np.uint8] | None  # [H, W, 3], the image this step expects to arrive at


@dataclass(frozen=True)
class Image:
    """A finished image."""

    colours: Floats  # [H, W, 3] in 0..1

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """[H, W, 3], rounded as diffusers rounds."""
        return (self.colours * 255).round().astype(np.uint8)


class Generator:
    """The bundle's models, loaded. Safe to use from one worker thread at a time."""

    def __init__(self, bundle: Bundle, runtime: Runtime | None = None) -> None:
        """Load tokenizer, schedules and the three graphs.

        Raises:
            BundleError: naming the file that cannot be used.
        """
        runtime = runtime or Runtime()
        manifest = bundle.manifest
        self.tokenizer = Tokenizer.load(bundle.folder / "tokenizer")
        if self.tokenizer.length != manifest.text_tokens:
            raise BundleError(
                f"{bundle.path(TOKENIZER)} makes {self.tokenizer.length} tokens, "
                f"the manifest asks for {manifest.text_tokens}"
            )
        self.text_encoder = TextEncoder(bundle, runtime)
        self._denoiser = Denoiser(bundle, runtime)
        self._decoder = Decoder(bundle, runtime)
        self._schedules = {n: Schedule.load(bundle.path(schedule_file(n))) for n in manifest.steps}
        for steps, schedule in self._schedules.items():
            if schedule.steps != steps:
                raise BundleError(f"{bundle.path(schedule_file(steps))} is for {schedule.steps} steps")
        self._latent_shape = (1, manifest.latent_channels, manifest.latent_height, manifest.latent_width)

    def encode(self, prompt: str) -> tuple[Tokens, Floats]:
        """The prompt's tokens, and their states float32 [1, L, d]."""
        tokens = self.tokenizer.encode(prompt)
        return tokens, self.text_encoder.encode(tokens.ids)

    def generate(
        self,
        states: Floats,
        negative_states: Floats,
        seed: int,
        steps: int,
        guidance_scale: float,
        previews: bool = False,
        stop: Stop | None = None,
    ) -> Iterator[Step | Image]:
        """Yields a `Step` after each call of the denoiser, then one `Image`.

        Args:
            states: float32 [1, L, d] of the prompt.
            negative_states: float32 [1, L, d] of the negative prompt, or of the empty one.
                With a guidance scale of 1 or below, the negative prompt takes no part, as in diffusers.
            seed: gives the noise that torch's CPU generator gives.
            steps: one of the step counts compiled in this bundle.
            guidance_scale: how far to go from the negative prompt to the prompt, and beyond.
            previews: decode an image with every step; each costs one run of the decoder.
            stop: ends the work within a fraction of a second when set from another thread.

        Raises:
            InvalidRequest: `steps` is not compiled in this bundle, or `seed` is not in 0..2**32-1.
            Cancelled: `stop` was set.
            GenerationFailed: onnxruntime failed, or the result is not finite.
        """
        if steps not in self._schedules:
            known = ", ".join(map(str, sorted(self._schedules)))
            raise InvalidRequest(f"steps must be one of {known}, not {steps}", field="steps")
        try:
            noise = TorchNoise(seed)
        except ValueError as error:
            raise InvalidRequest(str(error), field="seed") from error
        schedule = self._schedules[steps]
        stop = stop or Stop()
        stacked = np.concatenate((negative_states, states)) if guidance_scale > 1.0 else states
        sums = schedule.run(self._latent_shape, noise)
        latents = next(sums)
        for call, timestep in enumerate(schedule.timesteps, start=1):
            last = call == schedule.calls
            output = self._denoiser.predict(latents, timestep, stacked, guidance_scale, stop=stop, last=last)
            preview = None
            if previews and not last:  # after the last call comes the image itself
                a, b = schedule.clean[call - 1]
                clean = np.float32(a) * latents + np.float32(b) * output
                preview = Image(self._decoder.decode(clean, stop=stop)).pixels
            try:
                latents = sums.send(output)
            except StopIteration as final:
                latents = final.value
            yield Step(call, schedule.calls, preview)
        if not np.isfinite(latents).all():
            raise GenerationFailed(
                "the denoiser gave numbers that are not finite; try another seed or guidance scale"
            )
        yield Image(self._decoder.decode(latents, stop=stop))
