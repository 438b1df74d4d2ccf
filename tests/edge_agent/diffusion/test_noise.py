"""The noise is torch's own, so that a seed means the same image here and in diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_agent.diffusion.noise import SEED_LIMIT, TorchNoise

# torch's vectorised logarithm and cosine differ from numpy's in the last bits.
TOLERANCE = 1e-6


@pytest.mark.parametrize("seed", [0, 1, 123456789, SEED_LIMIT - 1])
@pytest.mark.parametrize(
    "shape",
    [(1, 4, 64, 64), (1, 4, 8, 8), (16,), (17,), (31,), (1, 3, 5, 7), (15,), (2,), (1,), ()],
    ids=str,
)
def test_equals_torch_for_any_size(seed: int, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    drawn = TorchNoise(seed).draw(shape)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("sizes", [(64, 64, 64), (5, 3, 16, 1, 33), (1, 20, 1, 1), (7, 7, 7)])
def test_goes_on_as_torchs_stream_does(sizes: tuple[int, ...]) -> None:
    """Schedulers with fresh noise draw again from the generator that made the first latents."""
    generator, noise = torch.Generator().manual_seed(7), TorchNoise(7)
    for size in sizes:
        expected = torch.randn(size, generator=generator).numpy()
        np.testing.assert_allclose(noise.draw((size,)), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", [-1, SEED_LIMIT])
def test_refuses_seeds_that_torch_would_fold(seed: int) -> None:
    with pytest.raises(ValueError, match=str(seed)):
        TorchNoise(seed)
