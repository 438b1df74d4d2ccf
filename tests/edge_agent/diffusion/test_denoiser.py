"""What the denoiser is told besides latents and words equals what diffusers tells it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.denoiser import graph_on, guidance_embedding
from edge_agent.diffusion.sessions import Runtime
from edge_agent.manifest import DENOISER, FUSED


@pytest.mark.parametrize("size", [8, 9, 256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.7, 8.5])
def test_the_guidance_scale_is_embedded_as_diffusers_embeds_it(scale: float, size: int) -> None:
    """It is a method of the pipeline that reads nothing of it."""
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1.0]), embedding_dim=size
    )
    np.testing.assert_allclose(guidance_embedding(scale, size), expected.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("providers", "graph"),
    [
        ("CPU", f"unet/{FUSED}"),
        ("CUDA CPU", DENOISER),
        ("Tensorrt CUDA CPU", DENOISER),
    ],
)
def test_fused_attention_is_for_the_cpu(miniature_bundle: Path, providers: str, graph: str) -> None:
    names = tuple(f"{name}ExecutionProvider" for name in providers.split())
    assert graph_on(Bundle.open(miniature_bundle), Runtime(providers=names)) == graph


def test_a_bundle_without_fused_attention_runs_as_it_was_traced(bundle_copy: Path) -> None:
    """As those of before were written, and the starter is."""
    (bundle_copy / "unet" / FUSED).unlink()
    write_manifest(bundle_copy)
    assert graph_on(Bundle.open(bundle_copy), Runtime()) == DENOISER
