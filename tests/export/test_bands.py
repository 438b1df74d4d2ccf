"""Bands of a decoder's large convolutions: the same image at every size, and nothing where none is large."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from onnx import TensorProto, helper, numpy_helper
from optimum.onnxruntime import ORTDiffusionPipeline

from edge_agent.bundle import Bundle
from edge_agent.diffusion.decoder import Decoder
from edge_agent.diffusion.sessions import Runtime
from edge_agent.manifest import DECODER, Size
from export import bands
from export.bands import split
from export.diffusion_onnx import export_bundle
from export.precision import shrink
from export.terminal import silent
from tests.miniature import miniature_pipeline

LOW = 2e6
"""A limit that half of the decoder's convolutions are above, at 64 x 64 pixels."""


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """Its decoder has 24 and 40 channels, which are no multiples of a band's, and bands of which one is narrower."""
    made = miniature_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made.register_modules(
            vae=AutoencoderKL(
                block_out_channels=(24, 24, 40, 40),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=4,
                norm_num_groups=8,
                sample_size=64,
            ).eval()
        )
    return made


@pytest.fixture
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "LIMIT", LOW)
    monkeypatch.setattr(bands, "GRAIN", 16)


def convolutions(graph: Path) -> int:
    return sum(node.op_type == "Conv" for node in onnx.load(graph, load_external_data=False).graph.node)


def decoded(bundle: Path, size: Size) -> np.ndarray:
    """Noise as latents, through the decoder of `bundle`."""
    opened = Bundle.open(bundle)
    width, height = (side // opened.manifest.factor for side in size)
    latents = np.random.default_rng(0).standard_normal((1, 4, height, width), np.float32)
    return Decoder(opened, Runtime()).decode(latents)


def expected(pipeline: StableDiffusionPipeline, size: Size) -> np.ndarray:
    """The same, through the autoencoder in torch."""
    width, height = (side // 8 for side in size)
    noise = np.random.default_rng(0).standard_normal((1, 4, height, width), np.float32)
    latents = torch.from_numpy(noise) / pipeline.vae.config.scaling_factor
    with torch.no_grad():
        sample = pipeline.vae.decode(latents).sample[0].permute(1, 2, 0).numpy()
    return np.clip(sample / 2 + 0.5, 0, 1)


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize(
    ("sizes", "shapes"),
    [([(64, 64), (48, 80), (32, 16)], "dynamic"), ([(80, 48)], "fixed")],
)
def test_bands_make_the_image_that_the_whole_makes(
    pipeline: StableDiffusionPipeline, tmp_path: Path, sizes: list[Size], shapes: str
) -> None:
    lines: list[str] = []
    export_bundle(
        pipeline,
        tmp_path / "bundle",
        steps=(2,),
        sizes=sizes,
        shapes=shapes,
        report=lines.append,  # type: ignore[arg-type]
    )
    assert any("bands of" in line for line in lines)
    onnx.checker.check_model(onnx.load(tmp_path / "bundle" / DECODER), full_check=True)
    for size in sizes:
        np.testing.assert_allclose(
            decoded(tmp_path / "bundle", size), expected(pipeline, size), rtol=0, atol=1e-5
        )


@pytest.fixture(scope="module")
def banded(
    pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[str]]:
    """A bundle as it is by default, one with bands, and what the second export reported."""
    folder, lines = tmp_path_factory.mktemp("banded"), list[str]()
    export_bundle(pipeline, folder / "whole", steps=(2,), report=silent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "LIMIT", LOW)
        patch.setattr(bands, "GRAIN", 16)
        export_bundle(pipeline, folder / "bands", steps=(2,), report=lines.append)
    return folder / "whole", folder / "bands", lines


@pytest.mark.usefixtures("low")
def test_a_larger_size_that_is_added_leaves_the_model_digest(
    pipeline: StableDiffusionPipeline, banded: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    """What was labelled and calibrated for the one holds for the other."""
    sizes = [(64, 64), (128, 128)]
    more = export_bundle(pipeline, tmp_path / "more", steps=(2,), sizes=sizes, report=silent)
    assert more.model_digest == Bundle.open(banded[1]).model_digest


def test_an_open_graph_with_bands_takes_any_height(banded: tuple[Path, Path, list[str]]) -> None:
    """One row of latents and odd ones, two at once: what the whole graph gives, to the bit or nearly."""
    whole, bands, _ = banded
    both = [ort.InferenceSession(one / DECODER, providers=["CPUExecutionProvider"]) for one in (whole, bands)]
    for height, width in ((1, 3), (5, 9), (11, 8)):
        latents = np.random.default_rng(height).standard_normal((2, 4, height, width), np.float32)
        (one,), (other,) = (session.run(None, {"latent_sample": latents}) for session in both)
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)


def test_the_weights_are_as_many_as_before(banded: tuple[Path, Path, list[str]]) -> None:
    whole, bands, lines = banded
    counts = [convolutions(one / DECODER) for one in (whole, bands)]
    assert counts[1] > counts[0]
    sizes = [
        sum(numpy_helper.to_array(one).size for one in onnx.load(each / DECODER).graph.initializer)
        for each in (whole, bands)
    ]
    assert sizes[0] == sizes[1]
    assert sum("bands of" in line for line in lines) == 1


def test_optimum_makes_the_same_picture_of_a_bundle_with_bands(banded: tuple[Path, Path, list[str]]) -> None:
    images = []
    for each in banded[:2]:
        theirs = ORTDiffusionPipeline.from_pretrained(each, provider="CPUExecutionProvider")
        theirs.set_progress_bar_config(disable=True)
        noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
        images.append(
            theirs(
                "the moon", num_inference_steps=2, latents=torch.from_numpy(noise), output_type="np"
            ).images
        )
    np.testing.assert_allclose(*images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_smaller_bundle_with_bands_loses_about_as_much_as_one_without(
    banded: tuple[Path, Path, list[str]], tmp_path: Path, dtype: str
) -> None:
    losses = []
    for each in banded[:2]:
        folder = Path(shutil.copytree(each, tmp_path / each.name))
        losses.append(
            shrink(folder, dtype, keep=("text_encoder", "unet"), prompts=["the moon"], report=silent).share
        )
        assert convolutions(folder / DECODER) == convolutions(each / DECODER)
    assert losses[1] <= 2 * losses[0]  # rounded elsewhere: by chance more, or less


def test_a_decoder_without_large_convolutions_is_not_touched(
    banded: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    content = (banded[0] / DECODER).read_bytes()
    graph = tmp_path / "model.onnx"
    graph.write_bytes(content)
    before = graph.stat().st_mtime_ns
    assert split(graph, 8, 8) == 0
    assert graph.stat().st_mtime_ns == before
    assert graph.read_bytes() == content
    assert list(tmp_path.iterdir()) == [graph]


@pytest.mark.parametrize(
    ("made", "places", "channels"),
    [
        (320, 1_000_000, 192),  # 200 would be allowed
        (200, 1_000_000, 0),
        (320, 625_000, 0),  # as many as there are
        (320, 300_000_000, 32),  # not one would be, and a band has a grain at least
        (32, 300_000_000, 0),
    ],
)
def test_a_band_has_as_many_grains_as_two_operations_a_product_allow(
    made: int, places: int, channels: int
) -> None:
    node = helper.make_node("Conv", ["x", "filters", ""], ["y"])
    assert bands._channels(node, {"filters": (made, 25, 2, 2)}, places) == channels


@pytest.mark.usefixtures("low")
def test_what_cannot_be_parted_stays(tmp_path: Path) -> None:
    """In groups, or with weights that the graph computes; the third of the same size is parted."""
    filters = np.ones((64, 64, 3, 3), np.float32)
    nodes = [
        helper.make_node("Conv", ["latent_sample", "grouped"], ["a"], pads=[1] * 4, group=2),
        helper.make_node("Neg", ["filters"], ["computed"]),
        helper.make_node("Conv", ["a", "computed"], ["b"], pads=[1] * 4),
        helper.make_node("Conv", ["b", "filters"], ["sample"], pads=[1] * 4, name="plain"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64, "height", "width"])
        for name in ("latent_sample", "sample")
    ]
    weights = [
        numpy_helper.from_array(filters, "filters"),
        numpy_helper.from_array(filters[:, :32], "grouped"),
    ]
    made = helper.make_model(
        helper.make_graph(nodes, "decoder", ends[:1], ends[1:], weights),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    graph = tmp_path / "model.onnx"
    onnx.save(made, graph)
    assert split(graph, 16, 16) == 1
    found = onnx.load(graph).graph
    assert [node.op_type for node in found.node] == ["Conv", "Neg", "Conv", *["Conv"] * 4, "Concat"]
    assert {"filters", "grouped"} <= {one.name for one in found.initializer}  # which others still read
