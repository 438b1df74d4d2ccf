"""Latents to pixels, on real graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.decoder import Decoder
from edge_agent.diffusion.sessions import Runtime
from edge_agent.errors import GenerationFailed


def test_a_graph_that_makes_another_size_than_the_manifest_says_makes_no_image(bundle_copy: Path) -> None:
    """One that takes any size does not tell before it has run; the caller would be told a size that is not so."""
    facts = Bundle.open(bundle_copy).manifest
    write_manifest(bundle_copy, width=2 * facts.width, height=2 * facts.height)
    decoder = Decoder(Bundle.open(bundle_copy), Runtime(threads=1))
    latents = np.zeros((1, facts.latent_channels, facts.latent_height, facts.latent_width), np.float32)
    with pytest.raises(GenerationFailed, match="where the manifest asks for"):
        decoder.decode(latents)
