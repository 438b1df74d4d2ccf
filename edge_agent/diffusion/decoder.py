"""Latents to pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.diffusion.sessions import Runtime, Session, Stop
from edge_agent.errors import GenerationFailed
from edge_agent.manifest import DECODER


class Decoder:
    """The decoding half of the bundle's autoencoder. `session` is its graph."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        """Raises BundleError when the graph cannot be loaded or has another signature."""
        self.session = Session(
            bundle.path(DECODER), ["latent_sample"], ["sample"], runtime, bundle.files_of(DECODER)
        )
        facts = bundle.manifest
        for width, height in runtime.sizes_of(facts):
            latents = facts.latent_shape((width, height))
            self.session.expect({"latent_sample": (None, *latents[1:]), "sample": (None, 3, height, width)})
        self._factor = facts.factor
        self._scaling, self._shift = np.float32(facts.latent_scaling), np.float32(facts.latent_shift)

    def decode(self, latents: NDArray[np.float32], *, stop: Stop | None = None) -> NDArray[np.float32]:
        """Colours in 0..1, float32 [H, W, 3], of latents [1, C, h, w].

        Raises:
            Cancelled, GenerationFailed: see `Session.run`.
            GenerationFailed: what the graph gives is not of the size that the latents make, or not finite.
        """
        scaled = latents / self._scaling + self._shift
        (sample,) = self.session.run({"latent_sample": scaled}, stop=stop, shrink=True)
        height, width = (side * self._factor for side in latents.shape[2:])
        if sample.shape != (1, 3, height, width):  # which a graph that takes any size does not tell before
            raise GenerationFailed(
                f"{self.session.path} gave the shape {sample.shape} where the manifest asks for "
                f"{(1, 3, height, width)}; export the bundle again"
            )
        if not np.isfinite(sample).all():  # which would be black or white
            raise GenerationFailed(
                f"{self.session.path} gave numbers that are not finite; if it computes in half precision, export the "
                "bundle in float32"
            )
        colours: NDArray[np.float32] = np.clip(sample[0].transpose(1, 2, 0) / 2 + np.float32(0.5), 0, 1)
        return colours
