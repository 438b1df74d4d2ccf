"""One call of the denoising network, with classifier-free guidance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import DENOISER, Bundle
from edge_agent.diffusion.sessions import Runtime, Session, Stop

Floats = NDArray[np.float32]


class Denoiser:
    """The bundle's UNet."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        """Raises BundleError when the graph cannot be loaded or has another signature."""
        self._session = Session(
            bundle.path(DENOISER), ["sample", "timestep", "encoder_hidden_states"], ["out_sample"], runtime
        )
        facts = bundle.manifest
        latents = (None, facts.latent_channels, facts.latent_height, facts.latent_width)
        states = (None, facts.text_tokens, facts.text_hidden)
        self._session.expect(sample=latents, encoder_hidden_states=states, out_sample=latents)

    def predict(
        self,
        latents: Floats,
        timestep: float,
        states: Floats,
        guidance_scale: float,
        *,
        stop: Stop | None = None,
        last: bool = False,
    ) -> Floats:
        """The model output, float32 [1, C, h, w].

        Args:
            latents: [1, C, h, w], already scaled as the scheduler asks.
            states: [1, L, d] of the prompt, or [2, L, d] of the negative prompt and the prompt; then both go
                through the network as one batch and the result is
                negative + guidance_scale * (prompt - negative), as in Ho & Salimans, "Classifier-Free
                Diffusion Guidance", 2022.
            last: the final call for this image, after which memory is given back.

        Raises:
            Cancelled, GenerationFailed: see `Session.run`.
        """
        sample = np.repeat(latents, len(states), axis=0)
        (output,) = self._session.run(
            {"sample": sample, "timestep": np.asarray(timestep), "encoder_hidden_states": states},
            stop=stop,
            shrink=last,
        )
        if len(states) == 1:
            return output
        negative, positive = output[:1], output[1:]
        return np.asarray(negative + np.float32(guidance_scale) * (positive - negative), np.float32)
