"""How many threads a model runs on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cloud_server import generator
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
