"""A smaller bundle makes the same pictures in fewer bytes, or is refused with the part that it fails on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.generator import Generator, Image
from edge_agent.diffusion.sessions import Session
from edge_agent.errors import BundleError
from edge_agent.manifest import DECODER, DENOISER, FUSED, TEXT_ENCODER
from export import graph_file, precision
from export.diffusion_onnx import export_bundle
from export.errors import ExportError
from export.precision import BOUNDS, COMPARISON_PROMPTS, Loss, shrink
from export.terminal import silent
from tests.miniature import miniature_pipeline, save_miniature

GRAPHS = (TEXT_ENCODER, DENOISER, DECODER)
PROMPTS = ("a cat", "two dogs on a beach", "a red moon")


@pytest.fixture(scope="module", params=["fp16", "int8"])
def small(
    request: pytest.FixtureRequest, miniature_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Loss]:
    """Dtype, folder and loss of a smaller form of the miniature. Only to be read."""
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    shutil.copytree(miniature_bundle, folder)
    return request.param, folder, shrink(folder, request.param, prompts=PROMPTS, report=silent)


def colours(bundle: Path, prompt: str = "two cats", seed: int = 3) -> np.ndarray:
    generator = Generator(Bundle.open(bundle))
    states, negative = generator.encode(prompt)[1], generator.encode_negative("")
    *_, image = generator.generate(states, negative, seed, 4, 5.0)
    assert isinstance(image, Image)
    return image.colours


def test_the_edge_makes_nearly_the_same_picture_from_fewer_bytes(
    small: tuple[str, Path, Loss], miniature_bundle: Path
) -> None:
    dtype, folder, loss = small
    assert 0 < loss.share <= BOUNDS[dtype]
    difference = np.abs(colours(folder) - colours(miniature_bundle))
    assert 0 < difference.max() <= 4 * loss.largest
    for name in GRAPHS:
        weights = [
            sum(tensor.ByteSize() for tensor in onnx.load(bundle / name).graph.initializer)
            for bundle in (folder, miniature_bundle)
        ]
        assert weights[0] < 0.9 * weights[1], name


def test_weights_are_of_the_type_that_was_asked_for(small: tuple[str, Path, Loss]) -> None:
    dtype, folder, _ = small
    for name in GRAPHS:
        graph = onnx.load(folder / name).graph
        types = {tensor.data_type for tensor in graph.initializer}
        operators = {node.op_type for node in graph.node}
        if dtype == "fp16":
            assert onnx.TensorProto.FLOAT16 in types
        else:
            assert onnx.TensorProto.INT8 in types
            assert ("DequantizeLinear" in operators) == (name != TEXT_ENCODER)
            assert name == DECODER or "MatMulInteger" in operators
            _check_eight_bits(graph)


def _check_eight_bits(graph: onnx.GraphProto) -> None:
    """Seven of them are in use, and each channel of what is made has a scale of its own."""
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name: values for name, values in weights.items() if values.dtype == np.int8 and values.ndim > 1}
    assert found
    for name, values in found.items():
        made = values.shape[0 if values.ndim == 4 else -1]
        assert np.abs(values.astype(int)).max() <= 64
        assert weights[name.removesuffix("_quantized") + "_scale"].size == made


def test_its_attention_is_fused_over_the_smaller_weights(small: tuple[str, Path, Loss]) -> None:
    _, folder, _ = small
    traced, fused = (onnx.load(folder / "unet" / name) for name in ("model.onnx", FUSED))
    weights = {tensor.name: tensor for tensor in traced.graph.initializer}
    assert all(weights[tensor.name] == tensor for tensor in fused.graph.initializer)
    operators = [node.op_type for node in fused.graph.node]
    assert operators.count("MultiHeadAttention") == 8 and "Softmax" not in operators


def test_what_goes_in_and_out_stays_as_it_was(small: tuple[str, Path, Loss], miniature_bundle: Path) -> None:
    """So the edge, optimum and every execution provider feed it as before."""
    for name in GRAPHS:
        signatures = []
        for bundle in (small[1], miniature_bundle):
            graph = onnx.load(bundle / name).graph
            signatures.append([(n.name, n.type.tensor_type.elem_type) for n in (*graph.input, *graph.output)])
        assert signatures[0] == signatures[1]


def test_the_models_are_others_and_say_so(small: tuple[str, Path, Loss], miniature_bundle: Path) -> None:
    """A calibration for the float32 models must not pass for one of these."""
    assert Bundle.open(small[1]).model_digest != Bundle.open(miniature_bundle).model_digest
    assert {path.name for path in small[1].parent.iterdir()} == {"bundle"}


def test_optimums_own_pipeline_makes_the_same_picture(small: tuple[str, Path, Loss]) -> None:
    """Within what the form may lose: on some processors a rounding to eight bits falls the other way here or there."""
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    dtype, folder, _ = small
    pipeline = ORTStableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "two cats",
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).images[0]
    assert Loss.between([colours(folder)], [theirs]).share <= BOUNDS[dtype]
    assert Loss.between([colours(folder, seed=4)], [theirs]).share > BOUNDS["int8"]


def test_a_part_that_is_kept_keeps_its_bytes(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it is, where another follows."""
    drawn, before = watched_prompts(monkeypatch), [(bundle_copy / name).read_bytes() for name in GRAPHS]
    shrink(bundle_copy, "fp16", keep=("text_encoder", "vae_decoder"), prompts=PROMPTS[:1], report=silent)
    kept = [(bundle_copy / name).read_bytes() == old for name, old in zip(GRAPHS, before, strict=True)]
    assert kept == [True, False, True]
    assert Bundle.open(bundle_copy).manifest.dtypes == {"unet": "fp16"}
    assert drawn == [*COMPARISON_PROMPTS, PROMPTS[0], *COMPARISON_PROMPTS]
    shrink(bundle_copy, "int8", keep=("unet", "vae_decoder"), prompts=PROMPTS[:1], report=silent)
    assert Bundle.open(bundle_copy).manifest.dtypes == {"unet": "fp16", "text_encoder": "int8"}


def test_each_image_is_drawn_from_noise_of_its_own(miniature_bundle: Path) -> None:
    one, other = precision.drawn(Bundle.open(miniature_bundle), ["a cat"] * 2, seed=0)
    assert np.abs(one - other).max() > 0.05


def test_a_part_that_is_not_there_cannot_be_kept(bundle_copy: Path) -> None:
    before = Bundle.open(bundle_copy).digest
    with pytest.raises(ExportError, match=r"no decoder; its parts are text_encoder, unet, vae_decoder"):
        shrink(bundle_copy, "fp16", keep=("decoder",), report=silent)
    assert Bundle.open(bundle_copy).digest == before


def test_what_loses_too_much_is_refused_with_a_way_out(bundle_copy: Path) -> None:
    """Eight bits are never exact, so a bound of nothing stands for a picture that is grossly off."""
    with pytest.raises(ExportError, match="in fp32 with --keep"):
        shrink(bundle_copy, "int8", keep=("unet",), prompts=PROMPTS[:1], bound=0.0, report=silent)


def _with_large_values(bundle: Path) -> None:
    """The decoder's first layer's outputs grow by a million and shrink by as much before the second: nothing changes in
    float32, nor in half precision on a CPU, which computes in float32 all the same.
    """
    model = onnx.load(bundle / DECODER)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    for name in first.input[1:]:
        grown = onnx.numpy_helper.to_array(weights[name]) * np.float32(1e6)
        weights[name].CopyFrom(onnx.numpy_helper.from_array(grown, name))
    shrunk = onnx.helper.make_node("Mul", ["grown", "millionth"], list(first.output))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1e-6), "millionth"))
    place = list(model.graph.node).index(first)
    first.output[0] = "grown"
    model.graph.node.insert(place + 1, shrunk)
    onnx.save(model, bundle / DECODER)
    write_manifest(bundle)


def test_a_part_whose_values_half_precision_does_not_hold_stays_float32(
    bundle_copy: Path, miniature_bundle: Path
) -> None:
    """Although a CPU's pictures do not show it; the other parts are smaller all the same."""
    _with_large_values(bundle_copy)
    decoder = (bundle_copy / DECODER).read_bytes()
    said: list[str] = []
    loss = shrink(bundle_copy, "fp16", report=said.append)
    assert any(
        line.startswith("vae_decoder stays in float32: it computes with values up to ") for line in said
    )
    assert (bundle_copy / DECODER).read_bytes() == decoder
    bundle = Bundle.open(bundle_copy)
    assert bundle.manifest.dtypes == {"text_encoder": "fp16", "unet": "fp16"}
    assert bundle.manifest.dtype(DECODER) == "fp32"
    assert 0 < loss.share <= BOUNDS["fp16"]
    assert 0 < np.abs(colours(bundle_copy) - colours(miniature_bundle)).max() <= 4 * loss.largest
    assert not list(bundle_copy.rglob("watched.onnx"))


def test_the_largest_value_is_looked_for_on_either_side_of_nothing_and_masks_are_none(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("Mul", ["x", "times"], ["low"]),
        onnx.helper.make_node("Add", ["low", "mask"], ["y"]),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["places"]) for name in ("x", "y")
    ]
    constants = {"times": np.float32(-7e4), "mask": np.finfo(np.float32).min}
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "low", ends[:1], ends[1:], weights)
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "model.onnx")
    feeds = [{"x": np.linspace(0, 1, 5, dtype=np.float32)}]
    assert precision._largest_value(tmp_path / "model.onnx", feeds) == pytest.approx(7e4)


def test_the_runtime_is_watched_for_no_longer_than_is_asked() -> None:
    run = Session.run

    def interrupted() -> None:
        with precision._recorded(()):
            assert Session.run is not run
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Session.run is run


def test_where_no_part_can_be_in_half_precision_the_bundle_is_refused(bundle_copy: Path) -> None:
    _with_large_values(bundle_copy)
    for prompts in (None, PROMPTS[:1]):
        with pytest.raises(ExportError, match=r"no part is left to be in fp16, .*leave --dtype out"):
            shrink(bundle_copy, "fp16", keep=("text_encoder", "unet"), prompts=prompts, report=silent)


def watched_prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of all images that are drawn from now on."""
    drawn: list[str] = []
    draw = precision.drawn

    def counted(bundle: Bundle, prompts: Sequence[str], *how: Any, **more: Any) -> Iterator[np.ndarray]:
        drawn.extend(prompts)
        return draw(bundle, prompts, *how, **more)

    monkeypatch.setattr(precision, "drawn", counted)
    return drawn


def test_half_precision_makes_no_images_but_those_that_it_compares(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, at Stable Diffusion 1.5's size in 25 steps, each takes minutes."""
    drawn = watched_prompts(monkeypatch)
    shrink(bundle_copy, "fp16", report=silent)
    assert drawn == 2 * list(COMPARISON_PROMPTS)


def test_weights_beside_a_graph_are_found_by_what_watches_it(bundle_copy: Path) -> None:
    """And not copied for it, which would be gigabytes."""
    graph = bundle_copy / DECODER
    onnx.save_model(
        onnx.load(graph), graph, save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    write_manifest(bundle_copy)
    shrink(bundle_copy, "fp16", report=silent)
    assert np.isfinite(colours(bundle_copy)).all()


def test_what_is_small_already_is_not_rounded_again(small: tuple[str, Path, Loss], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small[1], tmp_path / "bundle"))
    with pytest.raises(ExportError, match="not float32"):
        shrink(copy, "fp16", prompts=PROMPTS[:1], report=silent)


def test_weights_that_one_file_cannot_hold_lie_beside_the_graph(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny limit stands for the two gigabytes at which protobuf ends; what is written is read back again."""
    monkeypatch.setattr(graph_file, "LARGEST_GRAPH", 10_000)
    shrink(bundle_copy, "fp16", prompts=PROMPTS[:1], report=silent)
    bundle = Bundle.open(bundle_copy)
    assert "unet/model.onnx_data" in bundle.manifest.files
    assert np.isfinite(colours(bundle_copy)).all()
    # No byte of the weights is left out of what the manifest vouches for.
    (bundle_copy / "unet" / "model.onnx_data").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"model\.onnx_data has 5 bytes"):
        Bundle.open(bundle_copy)


def test_what_a_killed_conversion_leaves_lies_in_the_bundle_that_the_next_export_removes(
    bundle_copy: Path,
) -> None:
    with precision._rewritten(bundle_copy / DENOISER) as scratch:
        assert bundle_copy in scratch.parents
    assert not scratch.exists()


@pytest.mark.parametrize(
    ("free", "refusal", "said"), [(0, OSError, "No space left"), (10**12, ExportError, "bad magic")]
)
def test_a_full_disk_is_not_called_a_damaged_graph(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, free: int, refusal: type[Exception], said: str
) -> None:
    """Onnxruntime reads back what it wrote and finds it cut off; and nothing large is written to find out why."""

    def cut_off(*_: Any, **__: Any) -> None:
        raise RuntimeError("bad magic number in products.onnx")

    monkeypatch.setattr(precision, "quantize_dynamic", cut_off)
    monkeypatch.setattr(precision.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(Path, "write_bytes", None)
    with pytest.raises(refusal, match=said):
        shrink(bundle_copy, "int8", keep=("text_encoder", "vae_decoder"), prompts=PROMPTS[:1], report=silent)


@pytest.mark.parametrize(
    ("steps", "passes"), [(4, 1), (4, 2), (10, 1), (15, 2), (20, 1), (20, 2), (25, 1), (25, 2), (50, 1)]
)
def test_all_steps_take_part_in_what_calibrates(steps: int, passes: int) -> None:
    """The last ones too, in which a denoiser sees hardly any noise, and those with and without the prompt alike; and
    as many calls as may, none twice.
    """
    prompts = range(len(precision.CALIBRATION_PROMPTS))
    calls = [(prompt, step, one) for prompt in prompts for step in range(steps) for one in range(passes)]
    taken = precision._spread(calls, precision.MAX_CALLS)  # type: ignore[arg-type]
    assert {call[1:] for call in taken} == {call[1:] for call in calls}
    assert {call[0] for call in taken} == set(prompts)
    assert len(taken) == len(set(taken)) == min(len(calls), precision.MAX_CALLS)


def test_the_loss_of_other_pictures_is_twice_their_power() -> None:
    """What the bounds are a share of."""
    rng = np.random.default_rng(0)
    images = rng.random((2, 4, 64, 64, 3), np.float32)
    loss = Loss.between(list(images[0]), list(images[1]))
    assert loss.share == pytest.approx(2.0, rel=0.05)
    assert Loss.between(list(images[0]), list(images[0])) == Loss(0.0, float("inf"), 0.0)
    eighth = np.round(images[0] * 255) / 255
    assert Loss.between(list(eighth), list(images[0])).psnr == pytest.approx(58.9, abs=0.1)


def test_the_loss_is_that_of_the_size_that_lost_the_most() -> None:
    large, small = np.random.default_rng(0).random((2, 64, 64, 3), np.float32)
    small = small[:8, :8]
    references = [large, small, large]
    assert Loss.worst([large, 1 - small, large], references) == Loss.between([1 - small], [small])
    assert Loss.worst([large, small, large], references).share == 0.0


def test_every_size_is_compared_and_what_calibrates_is_of_the_default(bundle_copy: Path) -> None:
    """So that more sizes make no other weights, and labels go on holding."""
    with_more = Path(shutil.copytree(bundle_copy, bundle_copy.with_name("more")))
    sizes = [(96, 64), (64, 96), (112, 64), (64, 112)]
    write_manifest(with_more, other_sizes=sizes)
    shapes = {image.shape for image in precision._images(Bundle.open(with_more))}
    assert shapes == {(height, width, 3) for width, height in [(64, 64), *sizes]}
    for folder in (bundle_copy, with_more):
        shrink(folder, "int8", prompts=PROMPTS[:2], report=silent)
    assert Bundle.open(with_more).model_digest == Bundle.open(bundle_copy).model_digest


def test_an_export_ends_in_the_smaller_bundle_once_the_float32_one_is_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = watched_prompts(monkeypatch)
    model = save_miniature(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\n\n two dogs on a beach\n")
    lines: list[str] = []
    bundle = export_bundle(
        model,
        tmp_path / "bundle",
        steps=(2,),
        dtype="int8",
        keep=("vae_decoder",),
        calibration_prompts=tmp_path / "prompts.txt",
        report=lines.append,
    )
    assert drawn == [*COMPARISON_PROMPTS, "a cat", "two dogs on a beach", *COMPARISON_PROMPTS]
    proven = next(number for number, line in enumerate(lines) if "of 1e-03 allowed" in line)
    compared = next(number for number, line in enumerate(lines) if line.startswith("int8 against fp32"))
    assert proven < compared
    quantized = {name: _weight_types(bundle.path(name)) for name in GRAPHS}
    assert onnx.TensorProto.INT8 in quantized[TEXT_ENCODER] & quantized[DENOISER]
    assert onnx.TensorProto.INT8 not in quantized[DECODER]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "prompts.txt", "bundle"}


def test_weights_in_files_of_their_own_are_quantized_and_can_be_read_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon may run as another user than the one who exported; onnx writes such files for their owner alone."""
    monkeypatch.setattr(graph_file, "LARGEST_GRAPH", 10_000)
    bundle = export_bundle(
        miniature_pipeline(),
        tmp_path / "bundle",
        steps=(2,),
        dtype="int8",
        keep=("text_encoder",),
        report=silent,
    )
    assert "unet/model.onnx_data" in bundle.manifest.files
    assert onnx.TensorProto.INT8 in _weight_types(bundle.path(DENOISER))
    if os.name == "posix":
        modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "bundle").rglob("*") if path.is_file()}
        assert modes == {0o644}
        assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o755


def test_what_cannot_be_calibrated_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n")
    for prompts, why in (("prompts.txt", "no prompts"), ("none.txt", "none.txt")):
        with pytest.raises((ExportError, OSError), match=why):
            export_bundle(
                tmp_path / "no-model",
                tmp_path / "bundle",
                dtype="int8",
                calibration_prompts=tmp_path / prompts,
                report=silent,
            )
    with pytest.raises(ExportError, match="--dtype"):
        export_bundle(tmp_path / "no-model", tmp_path / "bundle", keep=("unet",), report=silent)


def _weight_types(graph: Path) -> set[int]:
    return {tensor.data_type for tensor in onnx.load(graph).graph.initializer}
