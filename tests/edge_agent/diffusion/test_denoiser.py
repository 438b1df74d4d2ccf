"""What the denoiser is told besides latents and words equals what diffusers tells it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from edge_agent.diffusion.denoiser import guidance_embedding


@pytest.mark.parametrize("size", [8, 9, 256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.7, 8.5])
def test_the_guidance_scale_is_embedded_as_diffusers_embeds_it(scale: float, size: int) -> None:
    """It is a method of the pipeline that reads nothing of it."""
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1.0]), embedding_dim=size
    )
    np.testing.assert_allclose(guidance_embedding(scale, size), expected.numpy(), atol=1e-3)
