"""Gaussian noise equal to torch's on the CPU, so that a seed means the same image here and in diffusers.

Follows `normal_fill` and `normal_distribution` of PyTorch's ATen/native/cpu/DistributionTemplates.h and
ATen/core/DistributionsHelper.h. torch's vectorised logarithm and cosine leave differences of a few 1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SEED_LIMIT = 2**32  # torch's CPU generator keeps the low 32 bits of a seed
_BLOCK = 16  # torch pairs uniform i with uniform i + 8 inside blocks of 16


class TorchNoise:
    """The stream of `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` in float32."""

    def __init__(self, seed: int) -> None:
        """Raises ValueError when `seed` is not in 0..2**32-1."""
        if not 0 <= seed < SEED_LIMIT:
            raise ValueError(f"seed must be in 0..{SEED_LIMIT - 1}, not {seed}")
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed)  # noqa: SLF001  # RandomState(seed) seeds so, and torch
        self._spare: float | None = None  # torch keeps the second of a pair for the next small draw

    def draw(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next float32 [*shape] of the stream."""
        size = math.prod(shape)
        values = self._draw_blocks(size) if size >= _BLOCK else self._draw_singly(size)
        return values.reshape(shape)

    def _draw_blocks(self, size: int) -> NDArray[np.float32]:
        uniform = self._uniform(size)
        whole = size - size % _BLOCK
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(uniform[:whole])
        if whole < size:  # the last 16 are drawn afresh and overlap the block before
            values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values

    def _uniform(self, size: int) -> NDArray[np.float32]:
        bits = self._bits.random_raw(size) & np.uint64(0xFFFFFF)
        return bits.astype(np.float32) * np.float32(2**-24)

    def _draw_singly(self, size: int) -> NDArray[np.float32]:
        values = np.empty(size, np.float32)
        for index in range(size):
            if self._spare is not None:
                values[index], self._spare = self._spare, None
                continue
            first, second = self._uniform_double(), self._uniform_double()
            radius, theta = math.sqrt(-2.0 * math.log1p(-second)), 2.0 * math.pi * first
            values[index], self._spare = radius * math.cos(theta), radius * math.sin(theta)
        return values

    def _uniform_double(self) -> float:
        high, low = (int(word) for word in self._bits.random_raw(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    pairs = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - pairs[:, 0]))
    theta = np.float32(2.0 * math.pi) * pairs[:, 1]
    return np.stack((radius * np.cos(theta), radius * np.sin(theta)), axis=1).reshape(-1)
