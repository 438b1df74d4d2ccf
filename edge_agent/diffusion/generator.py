"""From a prompt's token states to an image, one step at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnxruntime as ort
import PIL.Image
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.diffusion.decoder import Decoder
from edge_agent.diffusion.denoiser import Denoiser, graph_on
from edge_agent.diffusion.noise import TorchNoise
from edge_agent.diffusion.rehearsal import rehearse
from edge_agent.diffusion.schedule import Schedule
from edge_agent.diffusion.sessions import Runtime, Session, Stop
from edge_agent.diffusion.text_encoder import TextEncoder, TextStates
from edge_agent.errors import BundleError, GenerationFailed, InvalidRequest, Unfit
from edge_agent.manifest import DECODER, Size, schedule_file
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


MOST_DIFFERENCE = 0.05
"""Of its norm, by which a result may differ between two providers: half precision and its sums differ by 1 % or so."""


WRONG_IN_HALF = "1.18."
"""The onnxruntime, old but made for Jetson, whose pictures in half precision are of something else."""


class Generator:
    """The bundle's models, loaded. Safe to use from one worker thread at a time."""

    def __init__(self, bundle: Bundle, runtime: Runtime | None = None) -> None:
        """Load tokenizer, schedules and graphs. Raises BundleError, naming the file that cannot be used."""
        runtime = runtime or Runtime()
        manifest = bundle.manifest
        if "fp16" in (manifest.dtypes or {}).values() and ort.__version__.startswith(WRONG_IN_HALF):
            raise BundleError(
                f"{bundle.folder} computes in half precision, which onnxruntime {ort.__version__} gets wrong: install "
                "1.19 or newer, or pull the model in another form"
            )
        self.tokenizer = Tokenizer.open(bundle)
        self.text_encoder = TextEncoder(bundle, runtime)
        self.text_encoder.check(self.tokenizer)
        self.denoiser = Denoiser(bundle, runtime)
        self.decoder = Decoder(bundle, runtime)
        self._schedules = {n: Schedule.load(bundle.path(schedule_file(n))) for n in manifest.steps}
        for steps, schedule in self._schedules.items():
            if schedule.steps != steps:
                raise BundleError(f"{bundle.path(schedule_file(steps))} is for {schedule.steps} steps")
        self._latent_to_rgb = (
            None if manifest.latent_to_rgb is None else np.asarray(manifest.latent_to_rgb, np.float32)
        )
        self._bundle = bundle
        # What makes images of other sizes than the default's.
        self.of_other_sizes = self.denoiser, self.decoder

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Every graph that an image of the default size takes."""
        return (*self.text_encoder.sessions, self.denoiser.session, self.decoder.session)

    @property
    def spare_sessions(self) -> tuple[Session, ...]:
        """Graphs that images of other sizes alone take."""
        denoiser, decoder = self.of_other_sizes
        return () if denoiser is self.denoiser else (denoiser.session, decoder.session)

    def on(self, denoiser: Runtime, decoder: Runtime) -> Generator:
        """The same models with denoiser and decoder on other runtimes, opened for one image of the default size.

        Tokenizer and text encoder are shared, so that what decisions are made of stays the same. Each graph is
        rehearsed first. Both denoisers and decoders then compute once and have to agree. Images of other sizes are
        made as before.

        Raises:
            BundleError: they cannot be opened there.
            GenerationFailed, OutOfMemory: they fail there, also in rehearsal.
            Unfit: nothing of the denoiser runs there, or one of them computes something else.
        """
        drawing, decoding = self.denoiser.session, self.decoder.session
        # With every size told: TensorRT builds anew for each it meets.
        denoiser, decoder = replace(denoiser, sizes=drawing.sizes), replace(decoder, sizes=decoding.sizes)
        graph = self._bundle.path(graph_on(self._bundle, denoiser))
        best = denoiser.providers[0]
        if best not in rehearse(graph, drawing.inputs, drawing.outputs, denoiser):
            raise Unfit(f"{best} takes nothing of {graph}, and all would run on the others")
        rehearse(self._bundle.path(DECODER), decoding.inputs, decoding.outputs, decoder)
        manifest = self._bundle.manifest
        other = copy.copy(self)
        other.denoiser = Denoiser(self._bundle, denoiser)
        other.decoder = Decoder(self._bundle, decoder)
        if not manifest.other_sizes:
            other.of_other_sizes = other.denoiser, other.decoder  # nothing holds on to the graphs of before
        for what, expected, found in zip(("denoiser", "decoder"), self.tried(), other.tried(), strict=True):
            # Not `>`: what is not a number is not near either.
            if not np.linalg.norm(found - expected) <= MOST_DIFFERENCE * np.linalg.norm(expected):
                raise Unfit(f"the {what} computes something else on {best}")
        return other

    def tried(self) -> tuple[Floats, Floats]:
        """What denoiser and decoder, each run once, make of the same noise for an image of the default size.

        Raises GenerationFailed, OutOfMemory and what else `Session.run` does, as opening them shows neither.
        """
        manifest = self._bundle.manifest
        _, states = self.encode("")
        schedule = self._schedules[min(self._schedules)]
        noise = TorchNoise(0).draw(manifest.latent_shape(manifest.sizes[0]))
        output = self.denoiser.predict(
            noise, schedule.timesteps[0], states, states, manifest.default_guidance, last=True
        )
        return output, self.decoder.decode(noise)

    def encode(self, prompt: str) -> tuple[Tokens, TextStates]:
        """The prompt's tokens and states."""
        tokens = self.tokenizer.encode(prompt)
        return tokens, self.text_encoder.encode(tokens)

    def encode_negative(self, prompt: str, stop: Stop | None = None) -> TextStates:
        """The states of a negative prompt, which may be empty."""
        return self.text_encoder.encode_negative(self.tokenizer.encode(prompt), empty=not prompt, stop=stop)

    def generate(
        self,
        states: TextStates,
        negative_states: TextStates,
        seed: int,
        steps: int,
        guidance_scale: float,
        previews: bool = False,
        stop: Stop | None = None,
        size: Size | None = None,
    ) -> Iterator[Step | Image]:
        """Yields a `Step` after each call of the denoiser, then one `Image`.

        Args:
            states: of the prompt.
            negative_states: of the negative prompt, or of the empty one.
                With a guidance scale of 1 or below, or where the scale is an input of the denoiser, the negative
                prompt takes no part, as in diffusers.
            seed: gives the noise that torch's CPU generator gives.
            steps: one of the step counts compiled in this bundle.
            guidance_scale: how far to go from the negative prompt to the prompt, and beyond.
            previews: show an image with every step. It costs one run of the decoder where the bundle has no
                linear map from latents to colours, and next to nothing where it has.
            stop: ends the work within a fraction of a second when set from another thread.
            size: width and height in pixels, one of the bundle's sizes; the default's if None.

        Raises:
            InvalidRequest: `steps` is not compiled in this bundle, it has no such `size`, or `seed` is not in
                0..2**32-1.
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
        manifest = self._bundle.manifest
        size = size or manifest.sizes[0]
        if size not in manifest.sizes:
            known = ", ".join(f"{width}x{height}" for width, height in manifest.sizes)
            raise InvalidRequest(f"the size must be one of {known}, not {size[0]}x{size[1]}", field="width")
        default = size == manifest.sizes[0]
        denoiser, decoder = (self.denoiser, self.decoder) if default else self.of_other_sizes
        schedule = self._schedules[steps]
        stop = stop or Stop()
        sums = schedule.run(manifest.latent_shape(size), noise)
        latents = next(sums)
        for call, timestep in enumerate(schedule.timesteps, start=1):
            last = call == schedule.calls
            output = denoiser.predict(
                latents, timestep, states, negative_states, guidance_scale, stop=stop, last=last
            )
            preview = None
            if previews and not last:  # after the last call comes the image itself
                a, b = schedule.clean[call - 1]
                clean = np.float32(a) * latents + np.float32(b) * output
                preview = self._preview(clean, decoder, stop)
            try:
                latents = sums.send(output)
            except StopIteration as final:
                latents = final.value
            yield Step(call, schedule.calls, preview)
        if not np.isfinite(latents).all():
            raise GenerationFailed(
                "the denoiser gave numbers that are not finite; try another seed or guidance scale"
            )
        yield Image(decoder.decode(latents, stop=stop))

    def _preview(self, latents: Floats, decoder: Decoder, stop: Stop) -> NDArray[np.uint8]:
        if self._latent_to_rgb is None:
            return Image(decoder.decode(latents, stop=stop)).pixels
        *channels, constant = self._latent_to_rgb
        colours = np.tensordot(latents[0], np.stack(channels), axes=(0, 0)) + constant
        small = PIL.Image.fromarray(Image(np.clip(colours, 0, 1)).pixels)
        factor = self._bundle.manifest.factor
        size = (small.width * factor, small.height * factor)
        return np.asarray(small.resize(size, PIL.Image.Resampling.BICUBIC))
