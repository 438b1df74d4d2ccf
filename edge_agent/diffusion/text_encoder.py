"""Token ids to token states."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import TEXT_ENCODER, Bundle
from edge_agent.diffusion.sessions import Runtime, Session
from edge_agent.errors import BundleError


class TextEncoder:
    """The bundle's text encoder. Its states drive the denoiser and are what the quality predictor reads."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        """Raises BundleError when the graph cannot be loaded or has another signature."""
        output = bundle.manifest.text_output
        self._shape = (bundle.manifest.text_tokens, bundle.manifest.text_hidden)
        self._session = Session(bundle.path(TEXT_ENCODER), ["input_ids"], [output], runtime)
        self._session.expect(input_ids=(None, self._shape[0]), **{output: (None, *self._shape)})

    def encode(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """States, float32 [B, L, d], of token ids [B, L].

        Raises:
            BundleError: the graph gives states of another size than the manifest says.
            GenerationFailed: onnxruntime failed.
        """
        # No shrinking: this arena is small, and the encoder also runs for prompts that only want a decision.
        (states,) = self._session.run({"input_ids": ids})
        if states.shape[1:] != self._shape:
            raise BundleError(
                f"{self._session.path} gives states {states.shape[1:]}, the manifest says {self._shape}"
            )
        return states
