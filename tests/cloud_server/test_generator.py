"""How many threads a model runs on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cloud_server import complete, generator
from cloud_server.errors import StartRefused
from cloud_server.generator import Generator
from cloud_server.model import open_model


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


@pytest.mark.parametrize(
    "error",
    [
        OSError("Cannot allocate memory (os error 12)"),  # safetensors
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_a_model_that_memory_does_not_hold_is_not_to_be_saved_again(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(complete, "pipeline", full)
    with pytest.raises(StartRefused, match="Free memory, or choose a smaller one with --model") as refused:
        Generator.load(open_model(str(model_folder)), "cpu", "float32")
    assert "save_pretrained" not in refused.value.message
