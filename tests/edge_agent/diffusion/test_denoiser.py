"""What the denoiser is told besides latents and words equals what diffusers tells it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from onnx import TensorProto, helper

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.denoiser import Denoiser, graph_on, guidance_embedding
from edge_agent.diffusion.sessions import Runtime
from edge_agent.diffusion.text_encoder import TextStates
from edge_agent.errors import BundleError, GenerationFailed
from edge_agent.manifest import (
    DENOISER,
    FUSED,
    TEXT_ENCODER_2,
    TOKENIZER_2,
    TRANSFORMER,
    AddedConditioning,
    JointConditioning,
)
from edge_agent.reader import Reader
from edge_agent.settings import STARTER


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
        ("Dml CUDA CPU", DENOISER),
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
    monkeypatch.setattr(denoiser.session, "run", lambda *_, **__: [np.zeros((1, *shape[1:]), np.float32)])
    states = TextStates(np.zeros((1, facts.text_tokens, facts.text_hidden), np.float32))
    assert denoiser.predict(np.zeros(shape, np.float32), 1.0, states, states, 1.0).shape == shape
    with pytest.raises(GenerationFailed, match="where the manifest asks for"):
        denoiser.predict(np.zeros(shape, np.float32), 1.0, states, states, 5.0)  # two passes in one batch


ADDED = AddedConditioning("states", "vector", (64.0, 64.0, 0.0, 0.0, 64.0, 64.0), zero_negative=True)
JOINT = JointConditioning("states", "vector", positions=77, hidden=32)
LATENTS, STATES = ("batch", 4, 8, 8), ("batch", 77, 32)
UNET = {"sample": LATENTS, "timestep": (), "encoder_hidden_states": STATES}
POOLED = {"text_embeds": ("batch", 16), "time_ids": ("batch", 6)}
TRANSFORMERS = {
    "hidden_states": LATENTS,
    "timestep": ("batch",),
    "encoder_hidden_states": STATES,
    "pooled_projections": ("batch", 16),
}


def put_denoiser(
    bundle: Path,
    facts: dict[str, Any],
    inputs: dict[str, tuple[int | str, ...]],
    output: tuple[int | str, ...],
) -> Bundle:
    """A graph of these inputs in the place of the denoiser's, which gives its latents back, or twice its channels."""
    name = TRANSFORMER if "joint" in facts else DENOISER
    latents, *_ = inputs
    given = [latents] * (1 if output == inputs[latents] else 2)
    graph = helper.make_graph(
        [helper.make_node("Concat", given, [f"out_{latents}"], axis=1)],
        "made",
        [helper.make_tensor_value_info(each, TensorProto.FLOAT, shape) for each, shape in inputs.items()],
        [helper.make_tensor_value_info(f"out_{latents}", TensorProto.FLOAT, output)],
    )
    for each in {name, *((TOKENIZER_2, TEXT_ENCODER_2) if {"added", "joint"} & facts.keys() else ())}:
        (bundle / each).parent.mkdir(exist_ok=True)
        (bundle / each).write_bytes(b"x")
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), bundle / name
    )
    (bundle / "unet" / FUSED).unlink(missing_ok=True)
    write_manifest(bundle, **facts)
    return Bundle.open(bundle)


@pytest.mark.parametrize(
    ("facts", "inputs", "wrong"),
    [
        ({}, UNET, {"encoder_hidden_states": ("batch", 77, 64)}),
        ({}, UNET, {"encoder_hidden_states": ("batch", 64, 32)}),
        ({}, UNET, {"sample": ("batch", 4, 8, 16)}),
        ({}, UNET, {"out_sample": ("batch", 8, 8, 8)}),  # as one that also predicts a variance
        (
            {"guidance_embedding": 16},
            UNET | {"timestep_cond": ("batch", 16)},
            {"timestep_cond": ("batch", 8)},
        ),
        ({"added": ADDED}, UNET | POOLED, {"time_ids": ("batch", 5)}),
        ({"joint": JOINT}, TRANSFORMERS, {"timestep": ()}),
        ({"joint": JOINT}, TRANSFORMERS, {"encoder_hidden_states": ("batch", 77, 16)}),
        ({"joint": JOINT}, TRANSFORMERS, {"encoder_hidden_states": ("batch", 77, "hidden")}),
    ],
)
def test_a_denoiser_that_takes_or_gives_something_else_than_the_manifest_says_is_refused_at_start(
    bundle_copy: Path,
    facts: dict[str, Any],
    inputs: dict[str, tuple[int | str, ...]],
    wrong: dict[str, tuple[int | str, ...]],
) -> None:
    """Each image would fail with it."""
    ((name, shape),) = wrong.items()
    latents, *_ = inputs.values()
    Denoiser(put_denoiser(bundle_copy, facts, inputs, latents), Runtime(threads=1))
    changed = {each: wrong.get(each, inputs[each]) for each in inputs}
    output = shape if name not in inputs else next(iter(changed.values()))
    other = put_denoiser(bundle_copy, facts, changed, output)
    with pytest.raises(BundleError, match=f"{name} has the shape|does not say what size of a token's state"):
        Denoiser(other, Runtime(threads=1))


def test_an_image_of_another_size_is_whole_and_cropped_as_the_defaults(bundle_copy: Path) -> None:
    """Of the default size it is said what the model states, which need not be the size of what is made."""
    added = replace(ADDED, time_ids=(1024.0, 512.0, 16.0, 8.0, 640.0, 320.0))
    bundle = put_denoiser(bundle_copy, {"added": added}, UNET | POOLED, LATENTS)
    denoiser = Denoiser(bundle, Runtime(threads=1))
    for shape, ids in (
        ((1, 4, 8, 8), added.time_ids),
        ((1, 4, 8, 12), (64.0, 96.0, 16.0, 8.0, 64.0, 96.0)),
    ):
        told = denoiser._time_ids(added, np.zeros(shape, np.float32))
        assert told.dtype == np.float32 and told.tolist() == [list(ids)]


def test_half_precision_is_not_fused_on_the_cpu_where_that_fails(bundle_copy: Path) -> None:
    azure = ("AzureExecutionProvider", "CPUExecutionProvider")  # it runs nothing, but is not the CPU alone
    for dtypes, providers, unfused in (
        ({"unet": "fp16"}, azure[1:], ("SimplifiedLayerNormFusion",)),
        ({"unet": "fp16"}, azure, ()),
        ({"vae_decoder": "fp16"}, azure[1:], ()),
    ):
        write_manifest(bundle_copy, dtypes=dtypes)
        session = Denoiser(Bundle.open(bundle_copy), Runtime(threads=1, providers=providers)).session
        assert session._runtime.unfused == unfused


def test_the_starters_models_are_small_enough_for_one_thread() -> None:
    """On two they take half as long again, as was measured."""
    bundle, two = Bundle.open(STARTER), Runtime(threads=2)
    reader = Reader.open(bundle, 0.5, two)  # with text encoder and predictor
    for session in (*reader.sessions, Denoiser(bundle, two).session):
        assert session._runtime.threads == 1
