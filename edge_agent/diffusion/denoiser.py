"""One call of the denoising network, with classifier-free guidance.

A bundle may have the network's graph twice, over the same weights: as it was traced, and with each attention as one
operator, onnxruntime's own, which need not hold all scores between all positions. At Stable Diffusion 1.5's size a call
for 768 x 768 pixels then takes 0.3 GB above the weights in place of 5.8, and 9 % less time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.diffusion.plugins import CPU_PROVIDER
from edge_agent.diffusion.sessions import Runtime, Session, Stop
from edge_agent.diffusion.text_encoder import TextStates
from edge_agent.errors import BundleError, GenerationFailed
from edge_agent.manifest import FUSED, AddedConditioning

Floats = NDArray[np.float32]

Passes = Literal["batch", "separate"]
"""How guidance runs the network for the negative prompt and the prompt: once on both, or once for each.

On the CPU a small network is faster on both, since its runs are mostly overhead. A large one as it was traced is faster
on each, whose activations stay in the caches more often: at Stable Diffusion 1.5's size by 6 %, in 1.1 GB less memory.
With its attention fused neither is faster, and each for itself takes 0.15 GB less and can be stopped sooner.
"""

FUSES = frozenset({CPU_PROVIDER, "DmlExecutionProvider"})
"""Providers, by onnxruntime's names, whose operator for attention was seen to compute what the traced nodes do; on
DirectML that was on a GPU in software. WebGPU's computes something else (onnxruntime 1.27, in software as well), CUDA's
was not tried, and compilers need not have it.
"""

SMALL_WORK = 2e9
"""Bytes of weights times positions of a latent, below which most nodes are done before a second thread has woken up.

On a batch of two and two x86_64 cores a second thread made a call take 1.5 times as long at 0.9e9 (the starter's), 1.2
times at 1.5e9, 0.9 times at 3.3e9 and 0.75 times at 6e9; with 256 positions as with 1,024. By size and not by a
measurement at each start, which other work on the device would turn around.
"""


class Denoiser:
    """The bundle's UNet, or the transformer of Stable Diffusion 3. `session` is its graph.

    A graph made for one image at a time always runs separate passes.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        """Raises BundleError when the graph cannot be loaded or has another signature."""
        self._facts = facts = bundle.manifest
        graph, joint = graph_on(bundle, runtime), facts.joint
        # As optimum names them: the latents and what is predicted of them.
        self._latents, output = (
            ("sample", "out_sample") if joint is None else ("hidden_states", "out_hidden_states")
        )
        # The inputs, each with the shape that it must have; None where any will do, or one is asked for below.
        takes: dict[str, tuple[int | None, ...] | None] = {
            self._latents: None,
            "timestep": None,
            "encoder_hidden_states": (None, facts.text_tokens, facts.text_hidden),
        }
        if facts.guidance_embedding is not None:
            takes["timestep_cond"] = (None, facts.guidance_embedding)
        if facts.added is not None:
            takes |= {"text_embeds": None, "time_ids": (None, len(facts.added.time_ids))}
        if joint is not None:
            states = (None, joint.positions, joint.hidden)
            takes |= {"timestep": (None,), "encoder_hidden_states": states, "pooled_projections": None}
        if bundle.size_of(graph) * facts.latent_height * facts.latent_width < SMALL_WORK:
            runtime = replace(runtime, threads=1)
        if facts.dtype(graph) == "fp16" and runtime.on_cpu:
            # onnxruntime 1.23 to 1.27 fails where it fuses what it has cast for the CPU.
            runtime = replace(runtime, unfused=("SimplifiedLayerNormFusion",))
        self.session = Session(bundle.path(graph), [*takes], [output], runtime, bundle.files_of(graph))
        self.session.expect({name: shape for name, shape in takes.items() if shape is not None})
        for size in runtime.sizes_of(facts):
            latents = (None, *facts.latent_shape(size)[1:])
            self.session.expect({self._latents: latents, output: latents})
        # What a manifest alone says, nobody has weights for: it could ask for more than the memory.
        if joint is not None and self.session.shapes["encoder_hidden_states"][-1] != joint.hidden:
            raise BundleError(f"{self.session.path} does not say what size of a token's state it takes")
        one_at_a_time = self.session.shapes[self._latents][0] == 1
        # By size and not by a measurement at each start: both round off differently, and a seed should stay a picture.
        separate = one_at_a_time or (self.session.large and runtime.on_cpu)
        self.passes: Passes = "separate" if separate else "batch"

    def guides(self, guidance_scale: float) -> bool:
        """Whether a negative prompt takes part: not with a guidance scale of 1 or below, and never where the scale
        is an input of the network, as in diffusers.
        """
        return guidance_scale > 1.0 and self._facts.guidance_embedding is None

    def predict(
        self,
        latents: Floats,
        timestep: float,
        states: TextStates,
        negative: TextStates,
        guidance_scale: float,
        *,
        stop: Stop | None = None,
        last: bool = False,
    ) -> Floats:
        """The model output, float32 [1, C, h, w].

        Where `guides`, that is negative + guidance_scale * (prompt - negative), as in Ho & Salimans,
        "Classifier-Free Diffusion Guidance", 2022; otherwise `negative` is not read.

        Args:
            latents: [1, C, h, w], already scaled as the scheduler asks.
            last: the final call for this image, after which memory is given back.

        Raises:
            Cancelled, GenerationFailed: see `Session.run`.
            GenerationFailed: what the graph gives is not of the latents' size.
        """
        prompts = [negative, states] if self.guides(guidance_scale) else [states]
        if len(prompts) == 1 or self.passes == "batch":
            output = self._run(latents, timestep, prompts, guidance_scale, stop, last)
        else:
            output = np.concatenate(
                [
                    self._run(latents, timestep, [prompt], guidance_scale, stop, last and prompt is states)
                    for prompt in prompts
                ]
            )
        if len(prompts) == 1:
            return output
        without, with_prompt = output[:1], output[1:]
        return np.asarray(without + np.float32(guidance_scale) * (with_prompt - without), np.float32)

    def _run(
        self,
        latents: Floats,
        timestep: float,
        prompts: list[TextStates],
        guidance_scale: float,
        stop: Stop | None,
        last: bool,
    ) -> Floats:
        facts, count = self._facts, len(prompts)
        states = np.concatenate([prompt.tokens for prompt in prompts])
        pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
        inputs = {
            self._latents: np.repeat(latents, count, axis=0),
            "timestep": np.asarray(timestep),
            "encoder_hidden_states": states,
        }
        if facts.guidance_embedding is not None:
            embedding = guidance_embedding(guidance_scale, facts.guidance_embedding)
            inputs["timestep_cond"] = np.repeat(embedding, count, axis=0)
        if facts.added is not None:
            inputs["text_embeds"] = np.concatenate(pooled)
            inputs["time_ids"] = np.repeat(self._time_ids(facts.added, latents), count, axis=0)
        if facts.joint is not None:
            _, tokens, hidden = states.shape
            room = ((0, 0), (0, facts.joint.positions - tokens), (0, facts.joint.hidden - hidden))
            inputs["timestep"] = np.full(count, timestep)
            inputs["encoder_hidden_states"] = np.pad(states, room)
            inputs["pooled_projections"] = np.concatenate(pooled)
        (output,) = self.session.run(inputs, stop=stop, shrink=last)
        expected = (count, *latents.shape[1:])
        if output.shape != expected:  # which a graph need not tell before, nor keep to
            raise GenerationFailed(
                f"{self.session.path} gave the shape {output.shape} where the manifest asks for {expected}; export "
                "the bundle again"
            )
        return output

    def _time_ids(self, added: AddedConditioning, latents: Floats) -> Floats:
        """float32 [1, N]. An image of another size than the default's is taken for a whole one as well."""
        ids = added.time_ids
        if latents.shape != self._facts.latent_shape(self._facts.sizes[0]):
            height, width = (float(side * self._facts.factor) for side in latents.shape[2:])
            ids = (height, width, *ids[2:4], height, width)
        return np.asarray([ids], np.float32)


def graph_on(bundle: Bundle, runtime: Runtime) -> str:
    """Which of the bundle's graphs of the denoiser to run there, by its name in the manifest: the fused one where all
    that may run it are in FUSES.
    """
    traced = bundle.manifest.denoiser
    fused = f"{traced.rpartition('/')[0]}/{FUSED}"
    return fused if fused in bundle.manifest.files and FUSES.issuperset(runtime.providers) else traced


def guidance_embedding(guidance_scale: float, size: int) -> Floats:
    """float32 [1, size]: the guidance scale as latent consistency models take it, sines and then cosines.

    Luo et al., "Latent Consistency Models", 2023; in diffusers `get_guidance_scale_embedding`.
    """
    half = size // 2
    step = np.log(np.float32(10_000.0)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = np.float32(1000.0 * (guidance_scale - 1.0)) * frequencies
    embedding = np.zeros((1, size), np.float32)  # an odd size ends in a zero
    embedding[0, : 2 * half] = np.concatenate((np.sin(angles), np.cos(angles)))
    return embedding
