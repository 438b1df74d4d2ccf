"""How long a stop waits at Stable Diffusion 1.5's size: onnxruntime looks for one between two operators of a graph.

A thousand cancelled images of that size would take a night. So each operator is timed, and moments are drawn in the
image that they make up. Its own process is started as `python deploy/bench/operators.py BUNDLE THREADS`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import cancellation
from cancellation import FREE_MS
from child import Reply, answer, asked
from edge_agent.bundle import Bundle
from edge_agent.diffusion.denoiser import graph_on
from edge_agent.diffusion.sessions import Runtime
from edge_agent.manifest import DECODER
from estimate import Estimate
from images import FULL_SIZE, full_size_folders
from plan import Plan
from row import Row

GROUP = f"{FULL_SIZE}-stop"
MOMENTS = 100_000
CALLS = (1, 4, 50)
"""Of the denoiser in an image: one step and four, as distilled models take them, and 25, guided, in two passes. The
fewer, the more of an image is the decoder's."""

_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def rows(plan: Plan) -> list[Row]:
    """From a stop at a random moment of an image to the end of the operator that runs then.

    Elsewhere than on the CPU operators are begun and not waited for, so that images are cancelled there after all.
    """
    _, bundle = full_size_folders(plan)
    if not plan.on_cpu:
        return cancellation.measured(plan, GROUP, bundle, plan.full_size_cancellations, "full size: ")
    found = asked(plan.threads, "operators.py", bundle, plan.threads)
    denoiser, decoder = found["denoiser_ms"], found["decoder_ms"]
    p99 = {calls: float(np.quantile(waits_ms([*denoiser * calls, *decoder]), 0.99)) for calls in CALLS}
    each = ", ".join(f"{ms:.0f} ms in one of {calls}" for calls, ms in p99.items())
    return [
        Row.at_most(
            GROUP,
            "full size: from a stop to the end of the operator, p99 of the worst image",
            Estimate.exact(max(p99.values()), MOMENTS),
            "ms",
            FREE_MS,
            note=f"{each} calls; longest operator of a call {max(denoiser):.0f} ms, of the decoder {max(decoder):.0f} "
            "ms",
            details=found,
        )
    ]


def waits_ms(operators_ms: Sequence[float]) -> NDArray[np.float64]:
    """From moments drawn in the operators' time to the end of the operator that each falls into."""
    ends = np.cumsum(operators_ms)
    moments = np.random.default_rng(0).uniform(0, ends[-1], MOMENTS)
    return ends[np.searchsorted(ends, moments)] - moments


def measure(folder: Path, threads: int) -> Reply:
    """Milliseconds of each operator of one call of the denoiser and one of the decoder, in the order they ran."""
    bundle = Bundle.open(folder, verify=False)
    facts = bundle.manifest
    latents = (1, facts.latent_channels, facts.latent_height, facts.latent_width)
    states = (1, facts.text_tokens, facts.text_hidden)
    return {
        "denoiser_ms": operators_ms(
            bundle.path(graph_on(bundle, Runtime())),
            {"sample": latents, "timestep": (), "encoder_hidden_states": states},
            threads,
        ),
        "decoder_ms": operators_ms(bundle.path(DECODER), {"latent_sample": latents}, threads),
    }


def operators_ms(graph: Path, shapes: Mapping[str, tuple[int, ...]], threads: int) -> list[float]:
    """Of the second run, as in the first all memory is new. On the CPU, as the edge opens a large graph."""
    with tempfile.TemporaryDirectory() as scratch:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_profiling = True
        options.profile_file_prefix = f"{scratch}/run"
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        types = {node.name: _TYPES[node.type] for node in session.get_inputs()}
        draw = np.random.default_rng(0)
        feeds = {name: draw.standard_normal(shape).astype(types[name]) for name, shape in shapes.items()}
        for _ in range(2):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_bytes())
    ran = [event["dur"] / 1e3 for event in events if event["name"].endswith("_kernel_time")]
    return ran[len(ran) // 2 :]


if __name__ == "__main__":
    bundle_folder, thread_count = sys.argv[1:]
    answer(lambda: lambda: measure(Path(bundle_folder), int(thread_count)))
