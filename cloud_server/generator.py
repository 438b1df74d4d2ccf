"""The diffusers pipeline behind one worker thread: yields each denoising `Step`, then the `Image`."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import io
import math
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from cloud_server.errors import (
    CloudServerError,
    DeviceLost,
    DeviceNotReady,
    GenerationFailed,
    ImageWithheld,
    StartRefused,
    reason,
)
from cloud_server.model import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, WHAT_TO_INSTALL, Model
from cloud_server.request import Limits, Spec

ALWAYS_GIVEN = (
    "prompt",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "generator",
    "callback_on_step_end",
)
PREVIEW_SIDE = 128  # pixels of a preview's longer side
SMALL_WORK = 5e10
"""Bytes of a denoiser's weights times positions of its latent, below which a second thread costs more than it saves.

On two x86-64 cores it made a call of 1.3e10 (the starter's) take 1.55 times as long, one of 2.8e10 1.15 times, of 5e10
0.95 to 1.05 times, of 1.1e11 0.8 times and of 2e11 0.7 times. By size and not by a measurement at each start, which
other work on the machine would turn around.
"""
NO_MEMORY = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "out_of_memory",
    "out_of_device_memory",
    "blas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "invalid buffer size",
    "allocation_failed",
    "bad_alloc",
    "memoryerror",
    "unable to allocate",
)
"""As the system, torch, CUDA, ROCm, their libraries, Intel's and Apple's GPUs, C++, Python and numpy put it, in lower
case."""
NOT_YET = (
    "busy or unavailable",
    "system not yet initialized",
    "unknown error",
    "gpus are available",
    "no xpu devices are available",
)
"""As CUDA and torch put it, in lower case, where another process has the GPU to itself, NVSwitch's fabric is not up
yet, the driver has just been replaced, or the GPU fell off the bus."""
NO_MEMORY_RETRY_S = 30.0
"""What RetryInfo says after an image for which there was too little memory.

Edges leave the cloud alone for that long, with all their images: long enough for the work of another process to pass,
and half of what they heed at most, as images of other sizes may well go through.
"""
MOST_SAID = 300  # characters of what torch says of a device
MIN_SIDE_MULTIPLE = 8  # diffusers' pipelines refuse sizes that are not multiples of 8 pixels


def usable_device(wanted: str) -> str:
    """The torch device that is wanted, where "auto" is CUDA when there is a GPU, else the CPU.

    Raises DeviceNotReady where it may be usable later, else StartRefused where it computes nothing: that takes none of
    the model to say.
    """
    device = wanted
    try:
        try:
            import torch
        except ImportError:
            return wanted  # `Generator.load` says what to install
        if wanted == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        compute(device)
    except Exception as error:  # torch's backends each raise their own
        whole = reason(error).rstrip(".")
        # Of one that it lacks torch names all that it has instead, in thousands of characters.
        said = shorten(whole, MOST_SAID, placeholder=" [...]")
        name = f"--device {wanted}" + (f" (here {device})" if device != wanted else "")
        if _names(whole, NO_MEMORY + NOT_YET):
            raise DeviceNotReady(f"{name} cannot be used now: {said}. Free it, or try again later") from error
        raise StartRefused(
            f"{name} cannot be used: {said}. Give --device cpu, or another that torch can use here"
        ) from error
    return device


def compute(device: Any) -> None:
    """Has the device run a kernel and waits for it: tensors can be had of one that can do no more than that.

    Raises whatever torch raises.
    """
    import torch

    torch.ones(1, device=device).add(1).item()


@dataclass(frozen=True)
class Step:
    """Denoising step `step` of `steps` is done. `preview`: PNG of the image as it stands, if asked for."""

    step: int
    steps: int
    preview: bytes | None = None


@dataclass(frozen=True)
class Image:
    """A finished image: PNG bytes, their SHA-256 in hex, and how long pipeline and PNG took, in seconds.

    `step_s` is how long a denoising step took, in seconds; None after a single one, which also warms up.
    """

    png: bytes
    sha256: str
    generate_s: float
    step_s: float | None
    png_s: float


class _Stopped(Exception):
    """Raised inside the pipeline's step callback to leave the pipeline at once."""


class Generator:
    """One loaded pipeline. Makes one image at a time, whatever the callers do.

    `lost` is done once the device is, for this process: CUDA contexts do not heal.
    """

    def __init__(self, pipeline: Any, model: Model) -> None:
        self.model = model
        self.device = str(pipeline.device)
        self.dtype = str(pipeline.dtype).removeprefix("torch.")
        self.lost: Future[DeviceLost] = Future()
        self._pipeline = pipeline
        self._denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        self._autoencoder_dtype = getattr(getattr(pipeline, "vae", None), "dtype", None)
        self._parameters = frozenset(inspect.signature(pipeline.__call__).parameters)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generator")
        self._worker.submit(int)  # which starts its thread now: later there may be none to be had
        if lacking := [name for name in ALWAYS_GIVEN if name not in self._parameters]:
            raise StartRefused(
                f"{type(pipeline).__name__} takes no {', '.join(lacking)}, which every image needs; choose a "
                "text-to-image pipeline that does"
            )

    @classmethod
    def load(cls, model: Model, device: str, dtype: str, threads: int = 0) -> Generator:
        """Loads the weights; blocks for seconds to minutes. `device` is what `usable_device` gave.

        `dtype` "auto" is float16 on CUDA, else float32. `threads` are torch's on a CPU, where 0 is one for a small
        denoiser and torch's own choice for a large.

        Raises DeviceNotReady where memory does not hold it, else StartRefused, with what diffusers said.
        """
        for library in ("DIFFUSERS", "TRANSFORMERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")  # both log while they are imported
        # diffusers imports onnxruntime where it is installed, and that would report to its maker.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import torch
            from diffusers.utils import logging as diffusers_logging
            from transformers.utils import logging as transformers_logging

            from cloud_server import complete
        except ImportError as error:
            raise StartRefused(f"{error}; {WHAT_TO_INSTALL}") from error

        for logs in (diffusers_logging, transformers_logging):
            logs.set_verbosity_error()
            logs.disable_progress_bar()
            logs.disable_default_handler()
            logs.enable_propagation()
        try:
            pipeline = complete.pipeline(model.folder, complete.dtype_for(device, dtype)).to(device)
        except Exception as error:  # loaders of many formats, each with its own exceptions
            said = reason(error).rstrip(".")
            kind, cure = StartRefused, "Save it again with save_pretrained(), or choose another with --model"
            if _names(said, NO_MEMORY):
                kind, cure = DeviceNotReady, "Free memory, or choose a smaller one with --model"
            raise kind(f"cannot load the model in {model.folder}: {said}. {cure}") from error
        pipeline.set_progress_bar_config(disable=True)
        generator = cls(pipeline, model)
        if device.startswith("cpu") and (threads or generator._small()):
            torch.set_num_threads(threads or 1)
        return generator

    def limits(self, *, max_side: int, max_steps: int, max_prompt_characters: int) -> Limits:
        """What this model serves within the settings. Raises StartRefused when it does not say its size."""
        card = self.model.card
        width, height = self._size()
        return Limits(
            width=width,
            height=height,
            steps=DEFAULT_STEPS if card.steps is None else card.steps,
            guidance_scale=DEFAULT_GUIDANCE_SCALE
            if card.guidance_scale is None
            else float(card.guidance_scale),
            sizes=card.sizes,
            side_multiple=math.lcm(MIN_SIDE_MULTIPLE, self._latent_factor()),
            max_side=max(max_side, width, height),
            max_steps=max_steps,
            max_prompt_characters=max_prompt_characters,
            negative_prompt="negative_prompt" in self._parameters,
        )

    async def generate(self, spec: Spec, preview: bool = False) -> AsyncGenerator[Step | Image, None]:
        """Steps, then one Image. Closing the generator stops the pipeline at its next step and awaits that.

        Raises GenerationFailed when the pipeline raised, DeviceLost when it did or will as the device is lost, and
        ImageWithheld when its safety checker blanked the image.
        """
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[Step | None] = asyncio.Queue()
        stop = threading.Event()

        def tell(step: Step) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, step)

        job = asyncio.wrap_future(self._worker.submit(self._make, spec, preview, stop, tell))

        def done(job: asyncio.Future[Image | None]) -> None:
            job.exception()  # seen: nobody may be left to await it
            steps.put_nowait(None)

        job.add_done_callback(done)
        try:
            while (step := await steps.get()) is not None:
                yield step
            if (image := await job) is not None:
                yield image
        finally:
            stop.set()
            await asyncio.wait([job])

    def close(self) -> None:
        """Ends the worker thread, which after `generate` was cancelled twice may be in a step that does not end."""
        self._worker.shutdown(wait=False)

    def _make(
        self, spec: Spec, preview: bool, stop: threading.Event, tell: Callable[[Step], None]
    ) -> Image | None:
        """Runs in the worker thread. None when stopped."""
        import torch

        told = 0
        moments: list[float] = []  # when each timestep was done

        def on_step_end(pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal told
            if stop.is_set():
                raise _Stopped
            moments.append(time.perf_counter())
            # Some schedulers (Heun, PNDM) take more timesteps than the steps asked for; progress counts these.
            step = math.ceil((index + 1) * spec.steps / pipeline.num_timesteps)
            if step > told:
                told = step
                tell(Step(step, spec.steps, _preview(pipeline, tensors["latents"]) if preview else None))
            return tensors

        started = time.perf_counter()
        arguments = {
            "prompt": spec.prompt,
            "width": spec.width,
            "height": spec.height,
            "num_inference_steps": spec.steps,
            "guidance_scale": spec.guidance_scale,
            # On the CPU whatever the device: the same seed is the same noise everywhere.
            "generator": torch.Generator("cpu").manual_seed(spec.seed),
            "callback_on_step_end": on_step_end,
        }
        if "output_type" in self._parameters:
            arguments["output_type"] = "np"  # a finished picture no longer shows what was no number
        if spec.negative_prompt:
            arguments["negative_prompt"] = spec.negative_prompt
        if stop.is_set():
            return None
        if self.lost.done():
            raise self.lost.result()
        failed = ""
        try:
            output = self._pipeline(**arguments)
        except _Stopped:
            return None
        # Whatever torch, diffusers or a driver raise; a panic in a native library is no Exception.
        except BaseException as error:
            failed = reason(error)
        # Not in there, nor from that error: through its frames it would hold the image's tensors until some later time.
        if failed:
            raise self._failure(failed)
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise ImageWithheld(
                "the model's safety checker withheld the image; nothing is charged",
                facts={"charged_micro_usd": "0"},
            )
        generated = time.perf_counter()
        png = _png(self._picture(output.images[0]))
        return Image(
            png=png,
            sha256=hashlib.sha256(png).hexdigest(),
            generate_s=generated - started,
            step_s=(moments[-1] - moments[0]) * len(moments) / (len(moments) - 1) / spec.steps
            if len(moments) > 1
            else None,
            png_s=time.perf_counter() - generated,
        )

    def _failure(self, said: str) -> CloudServerError:
        """What an image comes to whose pipeline said this. Puts right what can be, so that the next one is made."""
        # Of a lost device, as is found next; or there is no memory, and then for no image.
        with suppress(Exception):
            if self._autoencoder_dtype is not None and self._pipeline.vae.dtype != self._autoencoder_dtype:
                # diffusers decodes in float32 what overflows in float16, and stays there where that fails.
                self._pipeline.vae.to(self._autoencoder_dtype)
        try:
            compute(self._pipeline.device)
        except Exception as error:  # torch's, of whatever backend
            if not _names(reason(error), NO_MEMORY):  # which others may have taken, and give back
                lost = f"the device {self.device} is lost, so the server ends; starting it again may help"
                self.lost.set_result(DeviceLost(lost, log_only=f"{said}; then {reason(error)}"))
                return self.lost.result()
        if _names(said, NO_MEMORY):
            return GenerationFailed(  # torch names the processes on the GPU, and what memory each has
                "the server has too little memory for this image; ask for a smaller one, or try again later",
                retry_after_s=NO_MEMORY_RETRY_S,
                log_only=said,
            )
        return GenerationFailed(f"the pipeline failed: {said}")

    def _picture(self, image: Any) -> Any:
        """The PIL image of what the pipeline gave: that, or colours [H, W, C] from 0 to 1. Raises GenerationFailed."""
        import numpy as np

        if not isinstance(image, np.ndarray):
            return image
        if not np.isfinite(image).all():  # which would be drawn in black
            raise GenerationFailed(
                "the model gave numbers that are not finite; try another seed, --dtype float32 or --device cpu"
            )
        return self._pipeline.numpy_to_pil(image)[0]

    def _latent_factor(self) -> int:
        return int(getattr(self._pipeline, "vae_scale_factor", MIN_SIDE_MULTIPLE))

    def _small(self) -> bool:
        if self._denoiser is None:
            return False
        weights = sum(weight.numel() * weight.element_size() for weight in self._denoiser.parameters())
        width, height = self._size()
        return bool(weights * width * height / self._latent_factor() ** 2 < SMALL_WORK)

    def _size(self) -> tuple[int, int]:
        """(width, height) in pixels of the images made unless a request says otherwise: what the card says, or else
        what the denoiser was trained for. Raises StartRefused.
        """
        card = self.model.card
        if card.width is not None and card.height is not None:
            return card.width, card.height
        size = getattr(getattr(self._denoiser, "config", None), "sample_size", None)
        if size is None:
            raise StartRefused(
                f"the model in {self.model.folder} does not say its image size; write width and height to "
                "routet2i.json beside model_index.json"
            )
        height, width = (size, size) if isinstance(size, int) else size
        return width * self._latent_factor(), height * self._latent_factor()


def _names(said: str, words: tuple[str, ...]) -> bool:
    return any(each in said.lower() for each in words)


def _preview(pipeline: Any, latents: Any) -> bytes | None:
    """PNG of `latents` [1, C, H, W] decoded as they are, at most PREVIEW_SIDE on a side.

    None where decoding takes more than the autoencoder: packed latents, or a float16 autoencoder that has to
    be upcast first.
    """
    vae = getattr(pipeline, "vae", None)
    config = getattr(vae, "config", None)
    scaling = getattr(config, "scaling_factor", None)
    if vae is None or scaling is None or latents.ndim != 4:
        return None
    if getattr(config, "force_upcast", False) and vae.dtype.itemsize < 4:
        return None
    shift = getattr(config, "shift_factor", None) or 0.0
    pixels = vae.decode(latents.to(vae.dtype) / scaling + shift).sample
    picture = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return _png(picture)


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
