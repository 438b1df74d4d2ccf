"""What the denoiser is told besides latents and words equals what diffusers tells it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.denoiser import Denoiser, graph_on, guidance_embedding
from edge_agent.diffusion.sessions import Runtime
from edge_agent.diffusion.text_encoder import TextStates
from edge_agent.errors import GenerationFailed
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
        ("Dml CPU", f"unet/{FUSED}"),
        ("CUDA CPU", DENOISER),
        ("Tensorrt CUDA CPU", DENOISER),
    ],
)
def test_fused_attention_is_for_where_it_computes_the_same(
    miniature_bundle: Path, providers: str, graph: str
) -> None:
    names = tuple(f"{name}ExecutionProvider" for name in providers.split())
    assert graph_on(Bundle.open(miniature_bundle), Runtime(providers=names)) == graph


def test_a_bundle_without_fused_attention_runs_as_it_was_traced(bundle_copy: Path) -> None:
    """As those of before were written, and the starter is."""
    (bundle_copy / "unet" / FUSED).unlink()
    write_manifest(bundle_copy)
    assert graph_on(Bundle.open(bundle_copy), Runtime()) == DENOISER


def test_a_graph_that_gives_another_size_than_the_latents_makes_no_image(
    miniature_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that leaves its sizes open does not tell before it has run."""
    bundle = Bundle.open(miniature_bundle)
    denoiser, facts = Denoiser(bundle, Runtime(threads=1)), bundle.manifest
    shape = facts.latent_shape(facts.sizes[0])
    monkeypatch.setattr(denoiser.sessions[0], "run", lambda *_, **__: [np.zeros((1, *shape[1:]), np.float32)])
    states = TextStates(np.zeros((1, facts.text_tokens, facts.text_hidden), np.float32))
    assert denoiser.predict(np.zeros(shape, np.float32), 1.0, states, states, 1.0).shape == shape
    with pytest.raises(GenerationFailed, match="where the manifest asks for"):
        denoiser.predict(np.zeros(shape, np.float32), 1.0, states, states, 5.0)  # two passes in one batch
