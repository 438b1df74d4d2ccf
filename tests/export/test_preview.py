"""Previews come from a linear map where the decoder is nearly one, and from the decoder where it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.generator import Generator, Step
from edge_agent.diffusion.sessions import Runtime
from export.preview import WORTH_SHOWING, fit_preview
from export.reference import Reference

ROWS = np.array([[0.2, 0.0, 0.1], [0.0, -0.1, 0.0], [0.05, 0.05, 0.05], [0.0, 0.1, -0.1], [0.5, 0.4, 0.6]])


def reference(colours: np.ndarray, latents: np.ndarray) -> Reference:
    pixels = colours.astype(np.float32).repeat(8, axis=0).repeat(8, axis=1)
    return Reference("", "", 0, 1, 1.0, latents.astype(np.float32), pixels)


def test_a_linear_decoder_is_found_exactly() -> None:
    draw = np.random.default_rng(0)
    latents = [draw.standard_normal((4, 2, 1)) for _ in range(3)]  # of which no two say all
    made = [reference(np.tensordot(one, ROWS[:4], axes=(0, 0)) + ROWS[4], one) for one in latents]
    fitted = fit_preview(made)
    np.testing.assert_allclose(fitted.rows, ROWS, atol=1e-5)
    assert fitted.explained == pytest.approx(1.0, abs=1e-6)


def test_colours_that_have_nothing_to_do_with_the_latents_are_not_worth_a_map() -> None:
    draw = np.random.default_rng(0)
    made = [reference(draw.uniform(size=(16, 16, 3)), draw.standard_normal((4, 16, 16)))]
    assert fit_preview(made).explained < WORTH_SHOWING


def test_the_runtime_shows_what_the_map_says(bundle_copy: Path) -> None:
    """With a map that gives one colour whatever the latents are, every preview has that colour."""
    flat = [[0.0, 0.0, 0.0]] * 4 + [[1.0, 0.5, 0.0]]
    write_manifest(bundle_copy, latent_to_rgb=flat)
    generator = Generator(Bundle.open(bundle_copy), Runtime(threads=1))
    states, negative = generator.encode("cat")[1], generator.encode_negative("")
    steps = [
        event
        for event in generator.generate(states, negative, 1, 4, 1.0, previews=True)
        if isinstance(event, Step)
    ]
    assert len(steps) == 5
    for step in steps[:-1]:
        assert step.preview is not None
        assert step.preview.shape == (64, 64, 3)
        assert (step.preview == [255, 128, 0]).all()
    assert steps[-1].preview is None
