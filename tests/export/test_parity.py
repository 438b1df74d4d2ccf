"""For every class of pipelines and every scheduler the edge makes diffusers' picture; docs/parity.md says so."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.sessions import Runtime
from edge_agent.reader import Reader
from export.reference import difference, reference_image
from tests.export.parity import COLUMNS, PAGE, TOLERANCE, Parity, expected_shape, shape
from tests.miniature import miniature_pipeline, miniature_tokenizer


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory, miniature_bundle: Path) -> Parity:
    return Parity(tmp_path_factory.mktemp("parity"), {miniature_pipeline: miniature_bundle})


@pytest.mark.parametrize(
    ("column", "scheduler"),
    [(title, name) for title, column in COLUMNS.items() for name in column.schedulers],
)
def test_pixels_equal_diffusers(parity: Parity, column: str, scheduler: str) -> None:
    difference, deviation = parity.measure(column, scheduler)
    assert deviation > 0.03  # else anything would agree
    assert difference <= TOLERANCE


@pytest.mark.parametrize("column", ["SD 1.x, tiny autoencoder", "SD 2.x", "LCM", "SDXL", "SD 3"])
def test_optimums_own_pipeline_loads_the_bundle_and_makes_the_same_picture(
    parity: Parity, column: str
) -> None:
    """Stable Diffusion with an ordinary autoencoder is in test_diffusion_onnx.py."""
    from optimum.onnxruntime import ORTDiffusionPipeline

    pipeline, bundle = parity.bundle(column)
    theirs = ORTDiffusionPipeline.from_pretrained(bundle)
    assert type(theirs).__name__ == f"ORT{type(pipeline).__name__}"
    theirs.set_progress_bar_config(disable=True)
    pipeline.scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config)
    expected = reference_image(pipeline, "two cats", "dog", 3, 4, 3.0)
    negative = {} if column == "LCM" else {"negative_prompt": "dog"}
    image = theirs(
        "two cats",
        **negative,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).images[0]
    assert np.abs(image - expected.colours).max() <= TOLERANCE


def test_stable_diffusion_xl_hears_its_sizes_and_an_empty_negative_prompt_is_zeros(
    parity: Parity, tmp_path: Path
) -> None:
    """Without this, equal pixels could mean that the miniature does not listen."""
    pipeline, folder = parity.bundle("SDXL")
    added = Bundle.open(folder).manifest.added
    assert added is not None
    assert added.time_ids == (64, 64, 0, 0, 64, 64)
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    copy = Path(shutil.copytree(folder, tmp_path / "bundle"))
    without = reference_image(pipeline, "two cats", "", 3, 4, 5.0)
    for change, apart in (
        ({}, False),
        ({"time_ids": (640.0, 64.0, 0.0, 0.0, 64.0, 64.0)}, True),
        ({"zero_negative": False}, True),
    ):
        write_manifest(copy, steps=[4], default_steps=4, added=replace(added, **change))
        found = difference(Generator(Bundle.open(copy), Runtime(threads=1)), without)
        assert found > 10 * TOLERANCE if apart else found <= TOLERANCE


def test_a_negative_prompt_of_white_space_is_not_taken_for_none(parity: Parity) -> None:
    pipeline, folder = parity.bundle("SDXL")
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    generator = Generator(Bundle.open(folder), Runtime(threads=1))
    blank, none = (reference_image(pipeline, "two cats", each, 3, 4, 5.0) for each in (" ", ""))
    assert np.abs(blank.colours - none.colours).max() > 10 * TOLERANCE
    assert max(difference(generator, each) for each in (blank, none)) <= TOLERANCE


def test_a_prompt_for_stable_diffusion_xl_is_read_as_what_drives_its_denoiser(parity: Parity) -> None:
    """The states that the quality predictor gets are both encoders', side by side, as diffusers joins them."""
    pipeline, folder = parity.bundle("SDXL")
    states = Reader.open(Bundle.open(folder), routing_rate=0.5).read("two red cats! 🐈").states
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt("two red cats! 🐈", device=torch.device("cpu"))
    assert states.tokens.shape == (1, 77, 56)
    np.testing.assert_allclose(states.tokens, tokens.numpy(), atol=1e-4)
    np.testing.assert_allclose(states.pooled, pooled.numpy(), atol=1e-4)


def test_a_prompt_for_stable_diffusion_2_is_padded_with_a_token_of_its_own(
    parity: Parity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which its denoiser hears: states of other padding are other states."""
    pipeline, folder = parity.bundle("SD 2.x")
    reading = Reader.open(Bundle.open(folder), routing_rate=0.5).read("two red cats! 🐈")
    ids = reading.tokens.ids[0].tolist()
    end = pipeline.tokenizer.eos_token_id
    padding = ids[ids.index(end) + 1 :]
    assert padding and set(padding) == {0} and end != 0
    for pad, apart in (("!", False), ("<|endoftext|>", True)):
        monkeypatch.setattr(pipeline, "tokenizer", miniature_tokenizer(tmp_path, pad=pad))
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt("two red cats! 🐈", torch.device("cpu"), 1, False)
        found = np.abs(reading.states.tokens - expected.numpy()).max()
        assert found > 1e-2 if apart else found <= 1e-4


def test_a_latent_consistency_model_hears_its_guidance_scale(parity: Parity) -> None:
    """In one pass: nothing but the scale as an input says it."""
    pipeline, folder = parity.bundle("LCM")
    generator = Generator(Bundle.open(folder), Runtime(threads=1))
    assert not generator.denoiser.guides(8.5)
    reference = reference_image(pipeline, "two cats", "", 3, 4, 8.5)
    assert difference(generator, reference) <= TOLERANCE
    assert difference(generator, replace(reference, guidance=2.0)) > 10 * TOLERANCE


def test_the_page_has_the_cells_that_are_tested() -> None:
    """A row, a column or a dash that changes here must be measured again: run `make parity`."""
    assert shape(PAGE.read_text(encoding="utf-8")) == expected_shape()
