"""How many threads a model runs on, that its pictures are those of diffusers, and what a failed one leaves behind."""

from __future__ import annotations

import gc
import inspect
import io
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from cloud_server import complete, generator
from cloud_server.errors import DeviceNotReady, GenerationFailed, StartRefused
from cloud_server.generator import Generator, Image
from cloud_server.model import Card, Model, open_model
from cloud_server.request import Spec
from tests.miniature import miniature_lcm, miniature_pipeline, miniature_xl


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Torch's own choice, for the time of a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_small_denoiser_runs_on_one_thread_and_a_large_one_on_those_that_torch_chooses(
    three_threads: None, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(generator, "SMALL_WORK", 1)
        Generator.load(open_model(str(model_folder)), "cpu", "float32").close()
        assert torch.get_num_threads() == 3
    Generator.load(open_model(str(model_folder)), "cpu", "float32").close()
    assert torch.get_num_threads() == 1


def test_the_setting_beats_the_choice(three_threads: None, model_folder: Path) -> None:
    Generator.load(open_model(str(model_folder)), "cpu", "float32", threads=2).close()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("lacking", ["callback_on_step_end", "guidance_scale"])
def test_a_pipeline_that_does_not_take_what_every_image_needs_is_refused_before_any(lacking: str) -> None:
    """As StableCascade's takes no guidance_scale."""

    class Lacking(StableDiffusionPipeline):
        def __call__(self, **given: Any) -> Any: ...

    parameters = inspect.signature(StableDiffusionPipeline.__call__).parameters
    others = [parameter for name, parameter in parameters.items() if name != lacking]
    Lacking.__call__.__signature__ = inspect.Signature(others)  # type: ignore[attr-defined]
    with pytest.raises(StartRefused, match=f"Lacking takes no {lacking}, which every image needs"):
        Generator(Lacking(**miniature_pipeline().components), Model("m", "", Path(), "0" * 64, Card()))


class Features:
    """What a safety checker is shown."""

    def __init__(self, *_: object, **__: object) -> None:
        self.pixel_values = torch.zeros(1, 3, 8, 8)

    def to(self, _device: object) -> Features:
        return self


def passes(images: torch.Tensor, clip_input: object) -> tuple[torch.Tensor, list[bool]]:
    """A safety checker without objections."""
    return images, [False] * len(images)


@pytest.mark.parametrize("kind", ["plain", "checked", "consistency", "pictures only"])
async def test_the_picture_is_the_one_that_diffusers_makes(kind: str) -> None:
    pipeline: Any = miniature_lcm() if kind == "consistency" else miniature_pipeline()
    if kind == "checked":
        pipeline.safety_checker, pipeline.feature_extractor = passes, Features
    made_by = Generator(pipeline, Model("m", "", Path(), "0" * 64, Card()))
    if kind == "pictures only":
        made_by._parameters -= {"output_type"}
    *_, image = [event async for event in made_by.generate(Spec("a cat", "", 7, 64, 64, 4, 3.0))]
    noise = torch.Generator("cpu").manual_seed(7)
    size = {"width": 64, "height": 64}
    expected = pipeline(
        prompt="a cat", **size, num_inference_steps=4, guidance_scale=3.0, generator=noise
    ).images[0]
    file = io.BytesIO()
    expected.save(file, format="PNG")
    assert isinstance(image, Image) and image.png == file.getvalue()
    made_by.close()


@pytest.mark.parametrize(
    "error",
    [
        OSError("Cannot allocate memory (os error 12)"),  # safetensors
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: not enough memory: you tried"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("Invalid buffer size: 19.45 GB"),  # Apple's GPUs
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        MemoryError("std::bad_alloc"),
        MemoryError("Unable to allocate 2.00 GiB for an array"),  # numpy
        MemoryError(),
    ],
)
def test_a_model_that_memory_does_not_hold_is_to_be_tried_again_and_not_to_be_saved_again(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(complete, "pipeline", full)
    with pytest.raises(DeviceNotReady, match="Free memory, or choose a smaller one with --model") as refused:
        Generator.load(open_model(str(model_folder)), "cpu", "float32")
    assert "save_pretrained" not in refused.value.message
    assert refused.value.exit_code == 3


async def drawn(made_by: Generator) -> bytes:
    """The PNG of a cat, after two steps."""
    *_, image = [event async for event in made_by.generate(Spec("a cat", "", 7, 64, 64, 2, 3.0))]
    assert isinstance(image, Image)
    return image.png


async def test_an_image_whose_decoding_found_no_memory_changes_nothing_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Diffusers turns a float16 autoencoder to float32 for the time of it, and forgets to turn it back."""
    pipeline: Any = miniature_xl().to(torch.float16)
    assert pipeline.vae.config.force_upcast
    made_by = Generator(pipeline, Model("m", "", Path(), "0" * 64, Card()))
    before = await drawn(made_by)

    def full(*_: Any, **__: Any) -> None:
        assert pipeline.vae.dtype == torch.float32
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.vae, "decode", full)
        with pytest.raises(GenerationFailed):
            await drawn(made_by)
    assert await drawn(made_by) == before
    made_by.close()


async def test_a_failed_image_leaves_none_of_its_tensors_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what the next one needs the memory for, and when cycles are collected nobody knows."""
    pipeline = miniature_pipeline()
    made_by = Generator(pipeline, Model("m", "", Path(), "0" * 64, Card()))
    tensors: list[weakref.ref[torch.Tensor]] = []

    def fail(latents: torch.Tensor, *_: Any, **__: Any) -> None:
        tensors.append(weakref.ref(latents))
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(pipeline.vae, "decode", fail)
    gc.disable()
    try:
        with pytest.raises(GenerationFailed, match="the pipeline failed: a kernel failed") as failed:
            await drawn(made_by)
        assert [tensor() for tensor in tensors] == [None], failed
    finally:
        gc.enable()
    made_by.close()
