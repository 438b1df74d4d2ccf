"""An export ends in a bundle that is proven equal, or in nothing and a reason."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from onnx import numpy_helper
from transformers import CLIPImageProcessor

from cloud_server import complete
from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.decoder import Decoder
from edge_agent.diffusion.generator import Generator, Image
from edge_agent.diffusion.schedule import Schedule
from edge_agent.diffusion.sessions import Runtime
from edge_agent.manifest import CALIBRATION, MANIFEST, PREDICTOR, schedule_file
from export import diffusion_onnx, graphs
from export import reference as references
from export.__main__ import INTERRUPTED
from export.__main__ import main as edge_export
from export.diffusion_onnx import export_bundle, main
from export.errors import ExportError
from export.folder import beside, move
from export.graphs import MASKED
from export.pipeline import class_of, facts, licence_of, load, name_of, prepared, size_of
from export.reference import Reference, difference, largest_difference, reference_image, reference_images
from export.schedule import compile_schedule
from export.terminal import silent
from tests.hub import NOBODY, asked_here, hub, silent_hub
from tests.miniature import (
    forget,
    miniature_edm,
    miniature_lcm,
    miniature_pipeline,
    miniature_tiny_autoencoder,
    miniature_v2,
    miniature_v3,
    miniature_xl,
    save_miniature,
)


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return miniature_pipeline()


@pytest.fixture(scope="module")
def starter_shaped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """Model folder and bundle of the starter's shape: 48 tokens, 16 x 16 latents, factor 4, v-prediction."""
    folder = tmp_path_factory.mktemp("starter")
    pipeline = miniature_pipeline(seed=1, factor=4, tokens=48)
    pipeline.scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,  # which diffusers' pipeline asks for, and such a spacing does not use
    )
    pipeline.save_pretrained(folder / "model")
    lines: list[str] = []
    export_bundle(folder / "model", folder / "bundle", steps=(6, 3), guidance=2.0, report=lines.append)
    return folder / "model", folder / "bundle", lines


def test_a_folder_becomes_a_bundle_that_states_its_models(
    starter_shaped: tuple[Path, Path, list[str]],
) -> None:
    manifest = Bundle.open(starter_shaped[1]).manifest
    assert manifest.name == "model"
    assert (manifest.width, manifest.height) == (64, 64)
    assert (manifest.latent_channels, manifest.latent_height, manifest.latent_width) == (4, 16, 16)
    assert (manifest.steps, manifest.default_steps, manifest.default_guidance) == ((3, 6), 6, 2.0)
    assert manifest.text_tokens == 48
    shown = any("previews use it" in line for line in starter_shaped[2])
    assert shown == (manifest.latent_to_rgb is not None)


def test_the_bundle_equals_the_pipeline_it_was_made_from(
    starter_shaped: tuple[Path, Path, list[str]],
) -> None:
    model, bundle, lines = starter_shaped
    loaded = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    for steps in (3, 6):
        assert largest_difference(Bundle.open(bundle), reference_images(loaded, steps, 2.0)) <= 1e-3
    assert any("largest difference" in line for line in lines)
    assert lines[-1].startswith(f"wrote {bundle}, which a pull will call model; --name")


def test_what_comes_after_a_token_is_masked_without_denormal_numbers(
    starter_shaped: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    """And to the same states, bit by bit, as with the lowest number there is."""
    path, lowest = starter_shaped[1] / "text_encoder" / "model.onnx", np.finfo(np.float32).min
    graph = onnx.load(path)
    masks = [
        attribute.t
        for node in graph.graph.node
        for attribute in node.attribute
        if attribute.HasField("t") and (numpy_helper.to_array(attribute.t) < -1).any()
    ]
    for mask in masks:
        values = numpy_helper.to_array(mask)
        assert values.min() == MASKED
        mask.CopyFrom(numpy_helper.from_array(np.where(values == MASKED, lowest, values), mask.name))
    assert masks
    onnx.save(graph, tmp_path / "model.onnx")
    ids = {"input_ids": np.arange(48)[None]}
    mild, hard = (ort.InferenceSession(file).run(None, ids) for file in (path, tmp_path / "model.onnx"))
    np.testing.assert_array_equal(mild[0], hard[0])
    assert np.exp(np.float32(MASKED - 20)) > np.finfo(np.float32).tiny  # of scores 20 below the largest


def test_nothing_tells_where_the_weights_lay(starter_shaped: tuple[Path, Path, list[str]]) -> None:
    """And the same models have the same digest, wherever they are exported."""
    model, bundle, _ = starter_shaped
    for path in bundle.rglob("*.json"):
        assert json.dumps(str(model.parent))[1:-1] not in path.read_text(encoding="utf-8")


def test_optimums_own_pipeline_loads_the_bundle_and_makes_the_same_picture(
    starter_shaped: tuple[Path, Path, list[str]],
) -> None:
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    model, bundle, _ = starter_shaped
    images = [
        loaded(
            "two cats",
            num_inference_steps=6,
            guidance_scale=2.0,
            generator=torch.Generator("cpu").manual_seed(3),
            output_type="np",
        ).images[0]
        for loaded in (
            ORTStableDiffusionPipeline.from_pretrained(bundle),
            StableDiffusionPipeline.from_pretrained(model, safety_checker=None),
        )
    ]
    assert np.abs(images[0] - images[1]).max() <= 1e-3


def test_a_bundle_that_differs_is_told_from_one_that_does_not(
    starter_shaped: tuple[Path, Path, list[str]],
) -> None:
    other = miniature_pipeline(seed=2, factor=4, tokens=48)
    assert largest_difference(Bundle.open(starter_shaped[1]), reference_images(other, 3, 2.0)) > 1e-2


class Drawn:
    """In the place of a generator: one image, whatever it is asked for."""

    def __init__(self, colours: np.ndarray) -> None:
        self.colours, self.asked = colours, dict[str, Any]()

    def encode(self, _prompt: str) -> tuple[None, None]:
        return None, None

    def encode_negative(self, _negative: str) -> None:
        return None

    def generate(self, *_: Any, **asked: Any) -> Iterator[Image]:
        self.asked = asked
        yield Image(self.colours)


@pytest.mark.parametrize("by", [0.25, -0.25])
def test_one_colour_of_one_pixel_is_a_difference_whichever_is_the_darker(by: float) -> None:
    colours = np.full((4, 6, 3), 0.5, np.float32)
    drawn = Drawn(colours.copy())
    drawn.colours[3, 2, 1] += by
    reference = Reference("", "", 0, 1, 1.0, np.zeros((4, 1, 1), np.float32), colours)
    assert difference(drawn, reference) == 0.25  # type: ignore[arg-type]
    assert drawn.asked == {"size": (6, 4)}


@pytest.mark.parametrize(("scale", "guided"), [(7.5, 7.5), (1.0, 1.5), (0.0, 1.5)])
def test_either_way_to_draw_is_compared_whatever_the_default_guidance_is(
    monkeypatch: pytest.MonkeyPatch, scale: float, guided: float
) -> None:
    """A model that was distilled not to need guidance takes it all the same, from who asks for it."""
    monkeypatch.setattr(references, "reference_image", lambda *given, **_: given[5])
    assert reference_images(None, 2, scale) == [guided, 1.0, guided]


@pytest.mark.parametrize("differences", [(0.5, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_the_denoiser_is_held_to_the_pipeline_as_it_was_traced_and_fused(
    miniature_bundle: Path, monkeypatch: pytest.MonkeyPatch, differences: tuple[float, float]
) -> None:
    found = iter(differences)
    monkeypatch.setattr(diffusion_onnx, "largest_difference", lambda *_: next(found))
    monkeypatch.setattr(diffusion_onnx.attention, "fuse", lambda _: 0)
    monkeypatch.setattr(diffusion_onnx, "write_manifest", lambda _: None)
    if any(differences):
        with pytest.raises(ExportError, match=r"differ from the torch pipeline's by 5\.0e-01; not written$"):
            diffusion_onnx._compare_and_fuse(miniature_bundle, [], [], 1.0, silent)
    else:
        diffusion_onnx._compare_and_fuse(miniature_bundle, [], [], 1.0, silent)


def test_a_bundle_is_replaced_only_when_asked(
    starter_shaped: tuple[Path, Path, list[str]], bundle_copy: Path, tmp_path: Path
) -> None:
    before = Bundle.open(bundle_copy).digest
    with pytest.raises(ExportError, match="--force"):
        export_bundle(starter_shaped[0], bundle_copy, steps=(3,), report=silent)
    assert Bundle.open(bundle_copy).digest == before
    export_bundle(starter_shaped[0], bundle_copy, steps=(3,), force=True, report=silent)
    assert Bundle.open(bundle_copy).manifest.text_tokens == 48
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_path_that_is_not_utf8_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"[\\/]\\udcff' is not a path in UTF-8; name one that is$"):
        export_bundle("no/such/model", tmp_path / "\udcff", report=silent)


@pytest.mark.posix
def test_of_what_torch_says_of_a_graph_one_line_is_shown(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """It shows the whole of a graph that it cannot write."""
    with pytest.raises(ExportError, match=r"^optimum cannot trace the text_encoder: .*$") as refused:
        graphs.trace(pipeline, tmp_path / "\udcff", (64, 64), silent)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_a_pipeline_that_nobody_else_has_gives_its_weights_up_as_they_are_traced(tmp_path: Path) -> None:
    """At Stable Diffusion XL's widths an export takes 12 GB that way, and took 19."""
    pipeline = miniature_xl()
    parts = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet)
    graphs.trace(pipeline, tmp_path, [(64, 64)], silent, consume=True)
    assert {weight.device.type for part in parts for weight in part.parameters()} == {"meta"}
    assert facts(pipeline, (64, 64))["text_hidden"] == 56  # which asks its configs alone


def test_an_empty_folder_becomes_the_bundle(tmp_path: Path) -> None:
    for name in ("made", "bundle"):
        (tmp_path / name).mkdir()
    (tmp_path / "made" / "file").touch()
    move(tmp_path / "made", tmp_path / "bundle")
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "file"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Ctrl-C comes between the two renames."""
    for name in ("made", "bundle"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    renamed, replace = [], os.replace

    def interrupted(old: Path, new: Path) -> None:
        renamed.append(old)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        move(tmp_path / "made", tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bundle", "bundle", "made", "made"]


def test_a_folder_that_is_no_bundle_is_never_replaced(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(ExportError, match="not a bundle"):
        export_bundle(pipeline, tmp_path / "photos", force=True, report=silent)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("name", "listed"),
    [(PREDICTOR, True), (CALIBRATION, True), ("NOTES.txt", False), ("unet/old.bin", False)],
)
def test_a_bundle_that_holds_what_no_export_makes_is_not_replaced(
    pipeline: StableDiffusionPipeline, bundle_copy: Path, name: str, listed: bool
) -> None:
    """It took hours to make, or is somebody's own."""
    (bundle_copy / name).parent.mkdir(exist_ok=True)
    (bundle_copy / name).write_text("x")
    if listed:
        write_manifest(bundle_copy)
    with pytest.raises(ExportError, match=f"also holds {name}, .* move the folder away, or name a new one"):
        export_bundle(pipeline, bundle_copy, force=True, report=silent)
    assert (bundle_copy / name).read_text() == "x"


@pytest.mark.posix
def test_a_bundle_that_holds_a_link_to_a_folder_is_not_replaced(
    pipeline: StableDiffusionPipeline, bundle_copy: Path, tmp_path: Path
) -> None:
    (bundle_copy / "photos").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ExportError, match=r"also holds photos, which no export makes"):
        export_bundle(pipeline, bundle_copy, force=True, report=silent)
    assert (bundle_copy / "photos").is_symlink()


def test_what_is_put_into_the_bundle_during_an_export_is_not_deleted(
    pipeline: StableDiffusionPipeline, bundle_copy: Path
) -> None:
    def put(_line: str) -> None:
        (bundle_copy / "NOTES.txt").write_text("x")

    with pytest.raises(ExportError, match=r"also holds NOTES\.txt"):
        export_bundle(pipeline, bundle_copy, steps=(1,), force=True, report=put)
    assert (bundle_copy / "NOTES.txt").read_text() == "x"


def test_a_bundle_is_not_written_into_another(pipeline: StableDiffusionPipeline, bundle_copy: Path) -> None:
    for inside in ("unet", "new/bundle"):
        with pytest.raises(ExportError, match=f"lies in the bundle {re.escape(str(bundle_copy))}; name"):
            export_bundle(pipeline, bundle_copy / inside, force=True, report=silent)
    assert Bundle.open(bundle_copy)


def test_a_scheduler_that_clips_is_refused_before_anything_is_written(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.scheduler = diffusers.DDIMScheduler(clip_sample=True)
    with pytest.raises(ExportError, match="clip_sample"):
        export_bundle(pipeline, tmp_path / "bundle", steps=(2,), report=silent)
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    save_miniature(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(
        index.read_text().replace('"StableDiffusionPipeline"', '"StableDiffusionImg2ImgPipeline"')
    )
    with pytest.raises(ExportError, match="StableDiffusionImg2ImgPipeline is not supported"):
        export_bundle(tmp_path / "model", tmp_path / "bundle", report=silent)


@pytest.mark.parametrize(
    ("first", "why"),
    [
        ([None, None], "it wants a picture"),
        (["transformers", "CLIPTextModel"], "it has the parts of a StableDiffusionXLPipeline"),
    ],
)
def test_a_refiner_is_not_advised_to_call_itself_something_else(
    tmp_path: Path, first: list[str | None], why: str
) -> None:
    miniature_xl().save_config(tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    index = json.loads(file.read_text()) | {"_class_name": "StableDiffusionXLImg2ImgPipeline"}
    file.write_text(json.dumps(index | {"tokenizer": first, "text_encoder": first}))
    for read in (load, class_of):
        with pytest.raises(ExportError, match=f"StableDiffusionXLImg2ImgPipeline is not supported: {why}"):
            read(tmp_path / "model")


def test_a_text_encoder_that_is_no_clip_is_refused_before_anything_is_drawn(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    config = transformers.BertConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    pipeline.text_encoder = transformers.BertModel(config)
    lines: list[str] = []
    with pytest.raises(ExportError, match="a text encoder that is no CLIP is not supported"):
        export_bundle(pipeline, tmp_path / "bundle", report=lines.append)
    assert not any("running" in line for line in lines)


def test_a_text_encoder_with_projection_is_refused_where_the_class_has_no_use_for_it(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.text_encoder = transformers.CLIPTextModelWithProjection(pipeline.text_encoder.config)
    with pytest.raises(ExportError, match="a text encoder with projection is not supported"):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)


def test_an_autoencoder_of_other_colours_is_refused_before_anything_is_drawn(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transparency, say."""
    monkeypatch.setattr(diffusion_onnx, "reference_images", None)
    tiny = AutoencoderTiny(
        out_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    tiny.save_pretrained(tmp_path / "tiny")
    for options in ({"autoencoder": tmp_path / "tiny"}, {}):
        with pytest.raises(
            ExportError, match="an autoencoder that makes other than three colours is not supp"
        ):
            export_bundle(pipeline, tmp_path / "bundle", report=silent, **options)
        pipeline.vae = tiny


@pytest.mark.parametrize(
    ("make", "scheduler", "instead"),
    [
        (miniature_pipeline, "EDMEuler", "EulerDiscrete"),
        (miniature_xl, "EDMDPMSolverMultistep", "EulerDiscrete"),
        (
            miniature_pipeline,
            "UniPCMultistep:use_flow_sigmas=true,prediction_type=flow_prediction",
            "EulerDiscrete",
        ),
        (miniature_edm, "EulerDiscrete", "EDMEuler"),
    ],
)
def test_a_scheduler_of_another_training_is_refused_before_anything_is_drawn(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Any],
    scheduler: str,
    instead: str,
) -> None:
    monkeypatch.setattr(diffusion_onnx, "reference_images", None)
    why = f"trained otherwise than this one, whose own is .*, and would draw no image: .* such as {instead}; "
    with pytest.raises(ExportError, match=f"^{scheduler.partition(':')[0]}Scheduler is for models .* {why}"):
        export_bundle(make(), tmp_path / "bundle", scheduler=scheduler, report=silent)


def test_a_safety_checker_that_a_pipeline_has_is_said_to_be_left_out(
    pipeline: StableDiffusionPipeline,
) -> None:
    lines: list[str] = []
    prepared(pipeline, report=lines.append)
    assert lines == []
    pipeline.safety_checker = lambda images, **_: (images, [False])
    assert prepared(pipeline, report=lines.append).safety_checker is None
    assert len(lines) == 1 and lines[0].startswith("leaving out the safety checker, ")
    assert pipeline.safety_checker is not None


def test_a_text_encoder_whose_scores_are_loud_keeps_its_mask(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """What comes after a token would leak into it: a score that is masked mildly can be the largest."""
    with torch.no_grad():
        for name, weights in pipeline.text_encoder.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weights.mul_(8)
    bundle = export_bundle(pipeline, tmp_path / "bundle", steps=(2,), report=silent)
    assert not (tmp_path / "bundle" / "text_encoder" / "mild.onnx").exists()
    assert MASKED not in _constants(tmp_path / "bundle" / "text_encoder" / "model.onnx")
    generator = Generator(bundle, Runtime(threads=1))
    for prompt in ("beach", "two red cats and a dog"):
        assert difference(generator, reference_image(pipeline, prompt, "", 5, 2, 7.5)) <= 1e-3


def _constants(path: Path) -> set[float]:
    """The numbers of the graph's own small constants."""
    attributes = [attribute for node in onnx.load(path).graph.node for attribute in node.attribute]
    return {
        float(number)
        for attribute in attributes
        if attribute.HasField("t")
        for number in numpy_helper.to_array(attribute.t).flat
    }


@pytest.mark.parametrize(
    ("apart", "milder"), [((0.0, 0.0), True), ((0.0, 1e-3), False), ((1e-3, 0.0), False)]
)
def test_a_mask_is_made_milder_where_it_changes_none_of_what_the_encoder_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: tuple[float, float], milder: bool
) -> None:
    lowest = np.finfo(np.float32).min
    value = numpy_helper.from_array(np.array([0, lowest], np.float32), "mask")
    nodes = [onnx.helper.make_node("Constant", [], ["mask"], value=value)]
    ends = [onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, [2])]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph(nodes, "encoder", [], ends)), tmp_path / "model.onnx"
    )
    made = {"model.onnx": (0.0, 0.0), "mild.onnx": apart}
    monkeypatch.setattr(graphs, "_states", lambda path, _: [np.ones(3) + more for more in made[path.name]])
    graphs._mask_mildly(tmp_path / "model.onnx", None)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert _constants(tmp_path / "model.onnx") == {0.0, MASKED if milder else float(lowest)}


def test_latents_that_are_spread_within_the_graph_are_spread_by_nobody_else() -> None:
    vae = miniature_edm().vae
    mean, deviation = (
        torch.tensor(vae.config[name]).reshape(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    vae.forward = lambda latent_sample: latent_sample
    graphs._fold_spread(vae)
    latents = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.forward(latents), latents * deviation + mean)
    assert (vae.config.latents_mean, vae.config.latents_std) == (None, None)


@pytest.mark.parametrize(
    ("error", "refusal", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left"),
        (RuntimeError("no such operator"), ExportError, "optimum cannot trace the text_encoder: no such"),
    ],
)
def test_a_full_disk_is_not_called_a_graph_that_cannot_be_traced(
    pipeline: StableDiffusionPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    refusal: type[Exception],
    why: str,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("optimum.exporters.onnx.convert.export", full)
    with pytest.raises(refusal, match=why):
        graphs.trace(pipeline, tmp_path, [(64, 64)], silent)


def test_a_class_that_is_asked_for_is_refused_saying_what_is_missing(tmp_path: Path) -> None:
    """By its index alone: its gigabytes are not loaded first."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    why = "FluxPipeline is not supported: it needs a transformer of another kind and a text encoder that the edge does"
    with pytest.raises(ExportError, match=why):
        export_bundle(tmp_path / "model", tmp_path / "bundle", report=silent)


def test_a_class_that_cannot_be_imported_here_is_refused_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ErnieImagePipeline with transformers 4. The cloud server, which might serve it, hears why it cannot."""
    monkeypatch.setitem(diffusers._class_to_module, "NewerPipeline", "newer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NewerPipeline"}))
    for opened in (class_of, load):
        with pytest.raises(ExportError, match=r"^NewerPipeline is not supported; StableDiffusionPipeline,"):
            opened(tmp_path)
    why = r"names NewerPipeline, which diffusers \S+ cannot import here: No module named 'diffusers\.newer'$"
    with pytest.raises(ValueError, match=why):
        complete.pipeline(tmp_path, torch.float32)


def test_a_folder_without_an_index_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no model_index\.json: name a folder that diffusers saved"):
        export_bundle(tmp_path, tmp_path / "bundle", report=silent)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (
            {"pytorch_lora_weights.safetensors": "", "config.json": "{}"},
            r"it holds a LoRA: add it with edge-export convert MODEL NEW --lora \S*pytorch_lora_weights.safetensors$",
        ),
        (
            {"adapter_config.json": "{}", "adapter_model.safetensors": ""},
            r"call fuse_lora\(\) in the pipeline",
        ),
        ({"fox.ckpt": "", "README.md": ""}, r"its one file with edge-export convert \S*fox.ckpt NEW$"),
        (
            {"config.json": '{"_class_name": "ControlNetModel"}'},
            "a ControlNetModel alone: name a whole pipeline$",
        ),
        (
            {"config.json": '{"_class_name": "UNet2DConditionModel"}'},
            r"alone: .* convert MODEL NEW --denoiser \S+$",
        ),
        (
            {"config.json": '{"architectures": ["CLIPTextModel"]}', "model.safetensors": ""},
            "a CLIPTextModel alone: name a whole pipeline$",
        ),
        ({"config.json": '{"architectures": 7}'}, "name a folder that diffusers saved"),
        ({"config.json": '{"_class_name": "no\\nname"}'}, "name a folder that diffusers saved"),
    ],
)
def test_a_folder_without_an_index_says_what_to_do_with_what_it_holds(
    tmp_path: Path, files: dict[str, str], why: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ExportError, match=why):
        export_bundle(tmp_path, tmp_path / "bundle", report=silent)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_model_with_quantized_weights_is_refused_in_our_words(tmp_path: Path, part: str) -> None:
    model = save_miniature(tmp_path / "model")
    file = model / part / "config.json"
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantized))
    with pytest.raises(
        ExportError, match=f"{part}.config.json says .* quantized .'bitsandbytes'.: get the model in"
    ):
        export_bundle(model, tmp_path / "bundle", report=silent)


def test_a_hub_that_cannot_be_reached_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    with asked_here(NOBODY, tmp_path / "cache"):
        with pytest.raises(
            ExportError, match=r"some/model .*the hub at .* cannot be reached .* name a folder"
        ):
            export_bundle("some/model", tmp_path / "bundle", report=lines.append)
        with pytest.raises(ExportError, match="some/vae cannot be loaded as an autoencoder"):
            export_bundle(
                miniature_pipeline(), tmp_path / "bundle", autoencoder="some/vae", report=lines.append
            )
    asking = f"is no folder here: asking the hub at {NOBODY}"
    assert lines == [f"some/model {asking}", f"some/vae {asking}"]
    assert not (tmp_path / "bundle").exists()


def test_a_model_of_the_hub_is_exported_also_where_it_is_in_half_precision_alone(
    tmp_path: Path,
) -> None:
    model = save_miniature(tmp_path / "model")
    for weights in model.rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: research-only\n---\n# A model\n")
    out = tmp_path / "bundle"
    with hub(model) as address, asked_here(address, tmp_path / "cache"):
        assert main(["owner/name", str(out), "--steps", "2"]) == 0
    manifest = Bundle.open(out).manifest
    assert (manifest.name, manifest.licence) == ("name", "research-only")


def test_a_licence_that_the_hub_cannot_be_asked_for_is_said_to_stay_unknown(tmp_path: Path) -> None:
    lines: list[str] = []
    with silent_hub() as address, asked_here(address, tmp_path):
        assert licence_of("owner/name", lines.append) == "unknown"
    assert lines == [
        "the hub cannot be asked for the licence of owner/name: it stays unknown; --licence names it"
    ]


def test_noise_beside_which_torch_loses_the_image_is_said_to_be_why_pixels_differ(tmp_path: Path) -> None:
    zero_snr = "EulerDiscrete:rescale_betas_zero_snr=true,timestep_spacing=trailing"
    with pytest.raises(
        ExportError, match=r"not written: beside noise .*; name more steps, or --scheduler DDIM$"
    ):
        export_bundle(miniature_v2(), tmp_path / "bundle", steps=(1,), scheduler=zero_snr, report=silent)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "unknown"),
        ('---\nlicense: "a\\nb"\n---\n', "unknown"),
        ("---\nlicense: {\n---\n", "unknown"),
        ("no facts at all", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_licence_is_what_the_models_card_says(tmp_path: Path, card: str | None, licence: str) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == licence


@pytest.mark.parametrize(("size", "near"), [((500, 64), "496x64"), ((64, 8), "64x16")])
def test_a_size_that_the_denoiser_cannot_halve_is_refused_naming_one_near(
    pipeline: StableDiffusionPipeline, tmp_path: Path, size: tuple[int, int], near: str
) -> None:
    with pytest.raises(ExportError, match=f"multiples of 16 for this model, such as {near}"):
        export_bundle(pipeline, tmp_path / "bundle", sizes=[size], report=silent)
    assert list(tmp_path.iterdir()) == []


def test_a_size_without_a_width_is_refused_and_the_models_own_need_not_be_square(
    pipeline: StableDiffusionPipeline,
) -> None:
    for none in (0, -16):
        with pytest.raises(ExportError, match="multiples of 16 for this model, such as 16x64"):
            size_of(pipeline, (none, 64))
    pipeline.unet.register_to_config(sample_size=(8, 12))  # height and width
    assert size_of(pipeline, None) == (96, 64)


def test_a_model_may_say_that_no_negative_prompt_is_an_empty_one() -> None:
    pipeline = miniature_xl()
    for said, zeros in ((None, True), (False, False), (True, True)):
        if said is not None:
            pipeline.register_to_config(force_zeros_for_empty_prompt=said)
        added = facts(pipeline, (96, 64))["added"]
        assert added.zero_negative is zeros
        assert added.time_ids == (64, 96, 0, 0, 64, 96)


@pytest.mark.parametrize("make", [miniature_pipeline, miniature_xl, miniature_lcm])
def test_images_of_every_size_equal_the_pipelines(make: Callable[[], Any], tmp_path: Path) -> None:
    """The first is the default, twice is one; Stable Diffusion XL is told what size it makes."""
    sizes = [(96, 64), (64, 64), (64, 112), (96, 64)]
    bundle = export_bundle(make(), tmp_path / "bundle", steps=(2,), sizes=sizes, report=silent)
    assert bundle.manifest.sizes == ((96, 64), (64, 64), (64, 112))
    pipeline, generator = make(), Generator(bundle, Runtime(threads=1))
    for size in bundle.manifest.sizes:
        for reference in reference_images(pipeline, 2, 4.0, size):
            assert difference(generator, reference) <= 1e-3
    if make is miniature_xl:  # the one whose facts know of its sizes
        one = export_bundle(make(), tmp_path / "one", steps=(2,), sizes=sizes[:1], report=silent)
        assert one.model_digest == bundle.model_digest, "what one was calibrated for holds for the other"


def test_the_command_takes_several_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(diffusion_onnx, "export_bundle", lambda *_names, **options: asked.update(options))
    assert main(["model", "bundle", "--size", "96x64,64X64,64x96"]) == 0
    assert asked["sizes"] == ((96, 64), (64, 64), (64, 96))


def test_steps_may_be_named_by_their_timesteps(tmp_path: Path) -> None:
    """Which the torch pipeline is given, too, to compare with."""
    save_miniature(tmp_path / "model")
    names = [str(tmp_path / part) for part in ("model", "bundle")]
    steps = ["--steps", "3", "--timesteps", "999,845,310,53", "--timesteps", "800"]
    assert main([*names, *steps, "--scheduler", "DPMSolverMultistep"]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert (bundle.manifest.default_steps, bundle.manifest.steps) == (3, (1, 3, 4))
    own = {count: Schedule.load(bundle.path(schedule_file(count))).timesteps for count in (1, 4)}
    assert own == {1: (800.0,), 4: (999.0, 845.0, 310.0, 53.0)}


@pytest.mark.parametrize(
    ("make", "scheduler", "steps", "why"),
    [
        (miniature_pipeline, "LCM", [2, (999, 499)], "has one schedule of 2 steps: leave one of two out"),
        (
            miniature_pipeline,
            "DDIM:clip_sample=false",
            [(999, 499)],
            "DDIMScheduler chooses its timesteps by itself; name --steps instead, or choose another",
        ),
        (
            miniature_pipeline,
            "LCM",
            [(5000, 499)],
            "trained on the timesteps 0 to 999: name none beyond",
        ),
        (
            miniature_pipeline,
            "EulerDiscrete:use_karras_sigmas=true",
            [(999, 499)],
            "no schedule of the timesteps 999, 499: .*; name --steps instead",
        ),
        (miniature_v3, None, [(999, 499)], "StableDiffusion3Pipeline takes no --timesteps: name --steps"),
    ],
)
def test_timesteps_that_nobody_could_take_are_refused(
    tmp_path: Path, make: Callable[[], Any], scheduler: str | None, steps: list[Any], why: str
) -> None:
    with pytest.raises(ExportError, match=why):
        export_bundle(make(), tmp_path / "bundle", steps=steps, scheduler=scheduler, report=silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "5,10", "999,999", "999,-1", "999;1", "999.5"])
def test_what_is_no_list_of_timesteps_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["model", "bundle", f"--timesteps={text}"])
    assert "is no list of falling timesteps, such as 999,749,499,249" in capsys.readouterr().err


def test_several_sizes_need_graphs_that_are_made_for_none(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="graphs of fixed shapes make images of one size: name one"):
        export_bundle(
            pipeline, tmp_path / "bundle", sizes=[(64, 64), (96, 64)], shapes="fixed", report=silent
        )
    many = [(16 * side, 16) for side in range(1, 103)]
    with pytest.raises(ExportError, match="images of 101 sizes at most, not 102"):
        export_bundle(pipeline, tmp_path / "bundle", sizes=many, report=silent)
    with pytest.raises(ExportError, match=r"512 does not work: .* multiples of 16"):
        export_bundle(pipeline, tmp_path / "bundle", sizes=[(64, 64), (500, 512)], report=silent)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_whose_other_sizes_alone_differ_is_not_written(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Decoder.decode

    def wrong(self: Decoder, latents: Any, **how: Any) -> Any:
        colours = decode(self, latents, **how)
        return colours + 0.01 if colours.shape == (64, 96, 3) else colours

    monkeypatch.setattr(Decoder, "decode", wrong)
    with pytest.raises(ExportError, match=r"differ from the torch pipeline's by 1\.0e-02; not written"):
        export_bundle(pipeline, tmp_path / "bundle", steps=(2,), sizes=[(64, 64), (96, 64)], report=silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chosen", ["FlowMatchEulerDiscrete", None])
def test_a_scheduler_that_scales_nothing_is_refused_with_one_that_goes(
    pipeline: StableDiffusionPipeline, tmp_path: Path, chosen: str | None
) -> None:
    if chosen is None:
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    why = "FlowMatchEulerDiscreteScheduler does not go with StableDiffusionPipeline, .* such as EulerDiscrete"
    with pytest.raises(ExportError, match=why):
        export_bundle(pipeline, tmp_path / "bundle", steps=(2,), scheduler=chosen, report=silent)


def test_a_scheduler_that_the_pipeline_itself_does_not_run_is_refused(tmp_path: Path) -> None:
    why = "TCDScheduler does not go with LatentConsistencyModelPipeline, .* name LCM with --scheduler"
    with pytest.raises(ExportError, match=why):
        export_bundle(miniature_lcm(), tmp_path / "bundle", steps=(2,), scheduler="TCD", report=silent)


def test_a_pipeline_that_cannot_be_run_is_not_blamed_on_its_own_scheduler(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.text_encoder.text_model.eos_token_id = None
    with pytest.raises(ExportError, match=r"^StableDiffusionPipeline itself makes no image: ") as refused:
        export_bundle(pipeline, tmp_path / "bundle", steps=(2,), report=silent)
    assert "scheduler" not in str(refused.value)


def test_another_scheduler_is_chosen_without_the_remarks_of_libraries(
    pipeline: StableDiffusionPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of what the model's own scheduler has in its config and the other has not, or of how it is run."""
    diffusers.utils.logging.add_handler(caplog.handler)
    try:
        with pytest.raises(ExportError, match="clip_sample"):  # once it is compiled
            export_bundle(
                pipeline,
                tmp_path / "bundle",
                steps=(2,),
                scheduler="LCM:clip_sample=true",
                report=silent,
            )
        pipeline.scheduler = diffusers.DPMSolverSinglestepScheduler(lower_order_final=False)
        reference_image(pipeline, "two cats", "", 1, 1, 1.0)  # an odd number of steps
    finally:
        diffusers.utils.logging.remove_handler(caplog.handler)
    assert not caplog.records


def test_an_autoencoder_that_is_none_is_refused(tmp_path: Path) -> None:
    save_miniature(tmp_path / "model")
    with pytest.raises(ExportError, match="unet holds a UNet2DConditionModel"):
        export_bundle(
            tmp_path / "model", tmp_path / "bundle", autoencoder=tmp_path / "model" / "unet", report=silent
        )


def test_the_options_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another scheduler, size and autoencoder, and graphs for that size and one image at a time.

    Their weights lie beside them, as weights of more than 2 GB must.
    """
    monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")
    save_miniature(tmp_path / "model")
    miniature_tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    options = ["--steps", "2", "--guidance", "3", "--size", "96x64", "--shapes", "fixed", "--licence", "MIT"]
    scheduler = "EulerDiscrete:timestep_spacing=trailing"
    names = [str(tmp_path / part) for part in ("model", "bundle", "tiny")]
    assert main([*names[:2], "--autoencoder", names[2], "--scheduler", scheduler, *options]) == 0

    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.path("unet/model.onnx_data").stat().st_size > bundle.path("unet/model.onnx").stat().st_size
    manifest = bundle.manifest
    assert (manifest.width, manifest.height, manifest.latent_width, manifest.latent_height) == (96, 64, 12, 8)
    assert (manifest.steps, manifest.default_guidance, manifest.latent_scaling) == ((2,), 3.0, 1.0)
    assert manifest.licence == "MIT"
    generator = Generator(bundle, Runtime(threads=1))
    assert generator.denoiser.passes == "separate"
    shapes = {session.path.parent.name: session.shapes for session in generator.sessions}
    assert shapes["unet"] == {
        "sample": (1, 4, 8, 12),
        "timestep": (),
        "encoder_hidden_states": (1, 77, 32),
        "out_sample": (1, 4, 8, 12),
    }
    assert shapes["text_encoder"]["input_ids"] == (1, 77)
    assert shapes["vae_decoder"] == {"latent_sample": (1, 4, 8, 12), "sample": (1, 3, 64, 96)}

    pipeline = StableDiffusionPipeline.from_pretrained(
        tmp_path / "model", vae=AutoencoderTiny.from_pretrained(tmp_path / "tiny"), safety_checker=None
    )
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    expected = reference_image(pipeline, "two cats", "dog", 7, 2, 3.0, size=(96, 64))
    assert expected.colours.shape == (64, 96, 3)
    assert difference(generator, expected) <= 1e-3
    said = capsys.readouterr().out
    for graph in ("text_encoder", "unet", "vae_decoder"):
        assert re.search(rf"{graph} +\d+\.\d s +\d+\.\d MB", said)


@pytest.mark.parametrize("size", ["512", "512x", "0x64", "axb", "512x512,", "512x512,768"])
def test_sizes_that_are_none_are_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["model", "out", "--size", size])
    assert stopped.value.code == 2
    assert (
        f"{size.rpartition(',')[2]!r} is no WIDTHxHEIGHT of at least 1x1, such as 512x512"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"guidance": float("nan")}, "guidance scale of nan .* takes 0 to 50"),
        ({"guidance": 50.5}, "guidance scale of 50.5 "),
        ({"guidance": -1.0}, "guidance scale of -1"),
        ({"dtype": "fp16", "keep": ["vae"]}, "no vae; its parts are text_encoder, unet, vae_decoder"),
        ({"sizes": [(64, 1_000_000)]}, "size of 64x1000000 does not work: width and height are at most 4096"),
        (
            {"dtype": "int8", "keep": ["text_encoder", "unet", "vae_decoder"]},
            "names every part, so that nothing would be int8",
        ),
        (
            {"dtype": "int8", "calibration_prompts": "no/such.txt"},
            r"^no[\\/]such\.txt cannot be read: No such file",
        ),
        ({"calibration_prompts": "prompts.txt"}, "nothing to calibrate in fp32 without --dtype"),
        ({"name": "edge"}, "can be called 'edge'; choose another with --name"),
        ({"name": "模型"}, "cannot be called '模型': a name has letters from a to z, .* one with --name$"),
        ({"name": "a\nb"}, "printable text on one line"),
        ({"licence": "MIT\r"}, "printable text on one line"),
        ({"licence": " "}, "printable text on one line"),
    ],
)
def test_what_no_bundle_can_be_is_refused_before_anything_is_run(
    pipeline: StableDiffusionPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    why: str,
) -> None:
    monkeypatch.setattr(diffusion_onnx, "reference_images", None)
    with pytest.raises(ExportError, match=why):
        export_bundle(pipeline, tmp_path / "bundle", report=silent, **options)
    assert list(tmp_path.iterdir()) == []


def test_too_many_steps_are_refused_before_any_schedule_is_compiled(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def counted(scheduler: Any, steps: int, *options: Any) -> Schedule:
        schedule = compile_schedule(scheduler, steps, *options)
        compiled.append(steps)
        return schedule

    monkeypatch.setattr(diffusion_onnx, "compile_schedule", counted)
    with pytest.raises(ExportError, match="PNDMScheduler has no schedule of 2000 steps"):
        export_bundle(pipeline, tmp_path / "bundle", steps=(2, 2000), report=silent)
    assert not compiled and list(tmp_path.iterdir()) == []


def test_the_folder_one_is_in_does_not_become_the_bundle(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="the folder you are in; name a new folder"):
        export_bundle(pipeline, ".", steps=(2,), report=silent)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_the_folder_one_is_in_has_that_folders_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path / "my-model")
    assert name_of(".") == "my-model"
    assert name_of("owner/name") == "name"


@pytest.mark.posix
def test_a_model_behind_a_link_has_the_links_name(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "my-model")
    assert name_of(tmp_path / "linked") == "linked"


@pytest.mark.parametrize("size", [None, [8], [8, 0], "x", 0, -8, 8.5])
def test_a_model_that_does_not_say_its_size_asks_for_it(model: Path, tmp_path: Path, size: Any) -> None:
    change_json(model / "unet" / "config.json", sample_size=size)
    with pytest.raises(ExportError, match=r"model[\\/]unet[\\/]config\.json.* with --size WIDTHxHEIGHT$"):
        export_bundle(model, tmp_path / "bundle", report=silent)


def test_a_size_that_is_none_is_refused_whatever_is_asked_for(model: Path, tmp_path: Path) -> None:
    """The denoiser is traced at the model's own."""
    change_json(model / "unet" / "config.json", sample_size="x")
    with pytest.raises(
        ExportError, match=r"unet[\\/]config\.json: a sample_size of 'x' is none: write .* or null"
    ):
        export_bundle(model, tmp_path / "bundle", sizes=[(64, 64)], report=silent)


def test_a_models_own_size_is_no_larger_than_any_other(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.unet.register_to_config(sample_size=1024)
    with pytest.raises(ExportError, match=r"8192x8192 does not work: .* name a smaller one with --size"):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)


def test_a_file_of_weights_says_how_to_make_a_folder_of_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(
        ExportError, match=r"make one with edge-export convert .*model\.safetensors'? FOLDER$"
    ):
        export_bundle(file, tmp_path / "bundle", report=silent)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.posix)])
def test_an_export_that_is_ended_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(signal, name)
    model, out = save_miniature(tmp_path / "model"), tmp_path / "out" / "bundle"

    def ended(*_arguments: object, **_: object) -> None:
        there = [path.name.split("-")[0] for path in sorted(out.parent.iterdir())]
        assert there == [".bundle.lock", ".bundle.partial"]
        assert signal.getsignal(number) != signal.SIG_DFL  # else it would end the tests
        signal.raise_signal(number)

    monkeypatch.setattr(diffusion_onnx.graphs, "trace", ended)
    before = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may have it ignored
    try:
        assert edge_export(["diffusion", str(model), str(out), "--steps", "1"]) == INTERRUPTED
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert list(out.parent.iterdir()) == []


def test_the_default_number_of_steps_is_compared_too(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, bool]] = []

    def nothing(_bundle: Bundle, references: list[Reference]) -> float:
        compared.extend((one.steps, one.guidance > 1) for one in references)
        return 1.0

    monkeypatch.setattr(diffusion_onnx, "largest_difference", nothing)
    with pytest.raises(ExportError, match="differ"):
        export_bundle(pipeline, tmp_path / "bundle", steps=(3, 2, 4), report=silent)
    assert compared == [(2, False), (2, True), (3, True), (2, True)]


def test_guidance_without_a_negative_prompt_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stable Diffusion XL guides away from zeros then: a bundle that encodes an empty text draws something else."""

    def inverted(pipeline: Any, size: tuple[int, int]) -> dict[str, Any]:
        found: dict[str, Any] = facts(pipeline, size)
        return found | {"added": replace(found["added"], zero_negative=not found["added"].zero_negative)}

    monkeypatch.setattr(diffusion_onnx.pipelines, "facts", inverted)
    with pytest.raises(ExportError, match="pixels differ"):
        export_bundle(miniature_xl(), tmp_path / "bundle", steps=(2,), guidance=7.5, report=silent)


@pytest.mark.parametrize("there", [(), ("feature_extractor",)])
def test_a_model_folder_needs_no_safety_checker_whatever_its_index_names(
    tmp_path: Path, there: tuple[str, ...]
) -> None:
    save_miniature(tmp_path)
    for part in there:
        CLIPImageProcessor().save_pretrained(tmp_path / part)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipeline = load(tmp_path)
    assert (pipeline.safety_checker, pipeline.feature_extractor) == (None, None)


INCOMPLETE = [
    ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", " and 1 more"),
    ("unet", "conv_in.bias", ""),
    ("vae", "decoder.conv_in.bias", ""),
]


@pytest.mark.parametrize(("part", "beginning", "more"), INCOMPLETE)
def test_weights_that_a_model_lacks_are_not_drawn_at_random(
    tmp_path: Path, part: str, beginning: str, more: str
) -> None:
    save_miniature(tmp_path / "model")
    forget(tmp_path / "model" / part, beginning)
    with pytest.raises(ExportError, match=rf": {part} has no weights {beginning}\S*{more}$"):
        export_bundle(tmp_path / "model", tmp_path / "bundle", steps=(2,), report=silent)
    assert not (tmp_path / "bundle").exists()


def test_weights_that_an_autoencoder_lacks_are_not_drawn_at_random(
    tmp_path: Path, pipeline: StableDiffusionPipeline
) -> None:
    miniature_tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    forget(tmp_path / "tiny", "decoder.layers.0.bias")
    with pytest.raises(ExportError, match="tiny has no weights decoder"):
        export_bundle(pipeline, tmp_path / "bundle", steps=(2,), autoencoder=tmp_path / "tiny", report=silent)


@pytest.mark.parametrize("largest", ["10GB", "100KB"])
def test_a_folder_with_half_precision_files_alone_is_loaded(tmp_path: Path, largest: str) -> None:
    """Also where there are several of a part."""
    pipeline = miniature_pipeline().to(torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size=largest)
    files = [file.name for file in tmp_path.glob("*/*.safetensors")]
    assert all(".fp16" in name for name in files) and (len(files) > 3) is (largest == "100KB")
    loaded = load(tmp_path)
    for part in ("text_encoder", "unet", "vae"):
        wanted, found = getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()
        assert all(torch.equal(found[name], wanted[name].float()) for name in wanted)


def test_an_index_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    save_miniature(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name"')
    with pytest.raises(ExportError, match=r"model_index\.json is not JSON: .* line 1 column 15"):
        load(tmp_path)


@pytest.mark.parametrize("held", ["[]", "3"])
def test_an_index_that_is_no_object_is_refused(tmp_path: Path, held: str) -> None:
    (tmp_path / "model_index.json").write_text(held)
    with pytest.raises(
        ExportError, match=rf"model_index\.json must hold a JSON object, not {re.escape(held)}"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", [None, "", 3, ["StableDiffusionPipeline"]])
def test_an_index_that_names_no_pipeline_says_where(tmp_path: Path, name: Any) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(
        ExportError, match=r"the _class_name in model_index\.json must be a pipeline's class, not"
    ):
        load(tmp_path)


def test_a_class_that_diffusers_does_not_have_is_refused_by_its_name(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "NewerScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    why = rf"names NewerScheduler as scheduler, which diffusers {diffusers.__version__} does not have: .* such as Euler"
    with pytest.raises(ExportError, match=why):
        load(tmp_path)


@pytest.mark.parametrize("entry", [[], ["diffusers"], 3, {"a": 1}])
def test_an_entry_that_names_no_class_is_refused_by_its_name(tmp_path: Path, entry: Any) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": entry}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ExportError, match=r"model_index\.json: scheduler must be a library and a class.*, not "
    ):
        load(tmp_path)


def test_an_optional_part_may_hold_no_nonsense_either(tmp_path: Path) -> None:
    miniature_xl().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"image_encoder": []}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"image_encoder must be a library and a class"):
        load(tmp_path)


FAULTY = [
    ("tokenizer", ("*", None), r"tokenizer has no vocab\.json and no merges\.txt"),
    ("tokenizer", ("vocab.json", None), r"tokenizer has no vocab\.json"),
    ("tokenizer", ("vocab.json", "{"), r"tokenizer/vocab\.json is not JSON"),
    (
        "tokenizer",
        ("tokenizer_config.json", "[]"),
        r"tokenizer/tokenizer_config\.json must hold a JSON object",
    ),
    (
        "scheduler",
        ("scheduler_config.json", "[]"),
        r"scheduler/scheduler_config\.json must hold a JSON object, not \[\]",
    ),
    ("scheduler", ("*", None), r"scheduler has no scheduler_config\.json"),
    (
        "scheduler",
        ("scheduler_config.json", '{"beta_schedule": "wavy"}'),
        r"scheduler/scheduler_config\.json makes no PNDMScheduler: wavy is not implemented.*; correct it",
    ),
    (
        "scheduler",
        ("scheduler_config.json", '{"num_train_timesteps": "many"}'),
        r"scheduler/scheduler_config\.json: num_train_timesteps must be a number, such as 1000, not \"many\"$",
    ),
    ("vae", ("config.json", None), r"vae has no config\.json"),
    ("vae", ("config.json", "[]"), r"vae/config\.json must hold a JSON object"),
    (
        "unet",
        ("*.safetensors", None),
        r"unet has no weights for torch, such as diffusion_pytorch_model\.safetensors",
    ),
    (
        "unet",
        ("*.safetensors", "cut"),
        r"unet/diffusion_pytorch_model\.safetensors is cut off or damaged: .*; get it again",
    ),
    ("text_encoder", ("config.json", None), r"text_encoder has no config\.json"),
    ("text_encoder", ("config.json", "{"), r"text_encoder/config\.json is not JSON"),
    (
        "text_encoder",
        ("*.safetensors", "cut"),
        r"text_encoder/model\.safetensors is cut off or damaged: .*; get it again",
    ),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder. Only to be read."""
    return save_miniature(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize(("part", "change", "why"), FAULTY)
def test_a_faulty_part_is_refused_by_its_folder_and_what_is_wrong(
    model: Path, part: str, change: tuple[str, str | None], why: str
) -> None:
    """By whoever loads it, the cloud server too."""
    names, text = change
    for file in list((model / part).glob(names)):
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
    why = re.escape(f"{model}{os.sep}") + why.replace("/", re.escape(os.sep))
    with pytest.raises(ExportError, match=why):
        load(model)
    with pytest.raises(ValueError, match=f"^{why}"):
        complete.pipeline(model, torch.float32)


@pytest.mark.parametrize("variant", ["bf16", "non_ema"])
@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_of_a_variant_that_is_not_read_are_named_and_what_to_do(
    model: Path, variant: str, name: str
) -> None:
    (model / f"{name}.safetensors").rename(there := model / f"{name}.{variant}.safetensors")
    why = (
        f"{re.escape(str(there.parent))} has {there.name}, and no variant but fp16 is read: save or download"
    )
    with pytest.raises(ExportError, match=why):
        load(model)
    with pytest.raises(ValueError, match=why):
        complete.pipeline(model, torch.float32)


WEIGHTS = ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kept", [0, 1, -1])
def test_weights_that_are_cut_off_are_refused_by_their_file(model: Path, name: str, kept: int) -> None:
    """As a download leaves them that was ended; by whoever loads them, too."""
    (model / name).write_bytes((model / name).read_bytes()[:kept])
    why = rf"{re.escape(str(model / name))} is cut off or damaged: .*; get it again$"
    with pytest.raises(ExportError, match=f": {why}"):
        load(model)
    with pytest.raises(ValueError, match=f"^{why}"):
        complete.pipeline(model, torch.float32)


@pytest.mark.parametrize("name", [*WEIGHTS, "model_index.json", "unet/config.json"])
def test_a_folder_in_the_place_of_a_file_is_called_what_it_is(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).mkdir()
    with pytest.raises(ExportError, match=f"(^|: ){re.escape(str(model / name))} is not a file$"):
        load(model)


@pytest.mark.posix
@pytest.mark.parametrize(
    "name", [*WEIGHTS, "tokenizer/merges.txt", "scheduler/scheduler_config.json", "unet/config.json"]
)
def test_a_file_that_cannot_be_opened_is_refused_by_its_name(model: Path, name: str) -> None:
    """A link that leads nowhere, as a hub's cache may hold it; by whoever loads it, too."""
    (model / name).unlink()
    (model / name).symlink_to("gone")
    why = re.escape(f"{model / name} is a link to gone, which is not there; copy")
    with pytest.raises(ExportError, match=f": {why}"):
        load(model)
    with pytest.raises(ValueError, match=f"^{why}"):
        complete.pipeline(model, torch.float32)


@pytest.mark.posix
def test_an_index_that_cannot_be_opened_is_not_called_missing(model: Path) -> None:
    (model / "model_index.json").unlink()
    (model / "model_index.json").symlink_to("gone")
    for read in load, class_of:
        with pytest.raises(ExportError, match=r"/model_index\.json is a link to gone, which is not there"):
            read(model)


def test_an_autoencoder_without_its_config_is_refused_by_its_folder(
    pipeline: StableDiffusionPipeline, model: Path, tmp_path: Path
) -> None:
    (model / "vae" / "config.json").unlink()
    with pytest.raises(ExportError, match=r"as an autoencoder: .*vae has no config\.json"):
        export_bundle(pipeline, tmp_path / "bundle", autoencoder=model / "vae", report=silent)


@pytest.mark.parametrize(
    ("merges", "why"),
    [
        ("c a\nth", "line 3 of merges.txt, 'th', makes no token of vocab.json"),
        ("c a\nca t</", "line 3 of merges.txt, 'ca t</', makes no token of vocab.json"),
    ],
)
def test_merges_that_are_cut_off_are_refused_before_anything_is_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merges: str, why: str
) -> None:
    monkeypatch.setattr(diffusion_onnx, "reference_images", None)
    (model / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + merges)
    with pytest.raises(
        ExportError, match=f"{re.escape(str(model / 'tokenizer'))}: {re.escape(why)}: .* cut off"
    ):
        export_bundle(model, tmp_path / "bundle", report=silent)


def test_a_vocabulary_that_cannot_be_converted_is_refused_by_its_folder(model: Path, tmp_path: Path) -> None:
    file = model / "tokenizer" / "vocab.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"zz": "x"}))
    with pytest.raises(ExportError, match=r"tokenizer: vocab\.json and merges\.txt cannot be converted: "):
        export_bundle(model, tmp_path / "bundle", report=silent)


def test_merges_that_end_with_a_line_too_early_are_remarked_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They tokenize, and badly: in torch too, so that the pixels agree."""
    monkeypatch.setattr(diffusion_onnx, "reference_images", None)  # what comes next fails
    file, lines = model / "tokenizer" / "merges.txt", list[str]()
    for kept, remarks in ((None, 0), (-2, 1)):
        file.write_text("\n".join(file.read_text().splitlines()[:kept]))
        with pytest.raises(TypeError):
            export_bundle(model, tmp_path / "bundle", report=lines.append)
        assert len([line for line in lines if "no line of merges.txt makes" in line]) == remarks


@pytest.mark.parametrize("there", ["./nosuch", "/nosuch/model", "~/nosuch", "models/of/mine", "C:\\nosuch"])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ExportError,
        match=f"^{re.escape(there)} cannot be loaded as a diffusers pipeline: there is no such folder$",
    ):
        export_bundle(there, tmp_path / "bundle", report=silent)
    with pytest.raises(
        ExportError, match=f"^{re.escape(there)} cannot be loaded as an autoencoder: there is no such folder$"
    ):
        export_bundle(pipeline, tmp_path / "bundle", autoencoder=there, report=silent)


def test_a_name_that_is_empty_is_no_folder(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"^a name of '' cannot be loaded as a diffusers pipeline: name a folder"
    ):
        export_bundle("", tmp_path / "bundle", report=silent)
    with pytest.raises(ExportError, match=r"^a name of '' cannot be loaded as an autoencoder: name a folder"):
        export_bundle(pipeline, tmp_path / "bundle", autoencoder="", report=silent)


def test_a_bundle_is_no_model(starter_shaped: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is a bundle already; name the diffusers folder"):
        export_bundle(starter_shaped[1], tmp_path / "bundle", report=silent)


def test_loading_shows_no_bars_in_a_pipe(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = diffusers.utils.logging.is_progress_bar_enabled()  # another test may have turned them off
    diffusers.utils.logging.enable_progress_bar()
    try:
        load(saved)
        assert capfd.readouterr().err == ""
        assert diffusers.utils.logging.is_progress_bar_enabled()  # of whoever calls this, as it was
    finally:
        if not shown:
            diffusers.utils.logging.disable_progress_bar()


def test_a_folder_below_a_file_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match=r"file[\\/]models[\\/]bundle cannot be made, for .*file is a file"):
        export_bundle("no/such/model", tmp_path / "file" / "models" / "bundle", report=silent)


@pytest.mark.usefixtures("ordinary_user")
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded() -> None:
    # Not tmp_path: its parents belong to the user who started the tests.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o500)
        with pytest.raises(ExportError, match=r"cannot be written: Permission denied; name another folder"):
            export_bundle("no/such/model", Path(folder) / "bundle", report=silent)


@pytest.mark.usefixtures("ordinary_user")
@pytest.mark.parametrize("closed", ["", "unet"])
def test_a_model_that_cannot_be_read_is_not_called_a_folder_that_cannot_be_written(closed: str) -> None:
    """Nor is an autoencoder that takes the place of the model's own."""
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, as above
        model, out = save_miniature(Path(folder) / "model"), Path(folder) / "bundle"
        pipeline = miniature_pipeline()
        (model / closed).chmod(0)
        try:
            why = rf" cannot be loaded as .*: {re.escape(str(model / closed))}/\S+ cannot be read: Permission denied$"
            with pytest.raises(ExportError, match=f"^{re.escape(str(model))}{why}"):
                export_bundle(model, out, report=silent)
            with pytest.raises(ExportError, match=f"^{re.escape(str(model / 'unet'))}{why}"):
                export_bundle(pipeline, out, autoencoder=model / "unet", report=silent)
        finally:
            (model / closed).chmod(0o700)
        assert [path.name for path in Path(folder).iterdir()] == ["model"]


@pytest.mark.posix
def test_a_name_that_no_folder_can_have_is_not_blamed_on_the_bundles(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    name, out = "x" * 300, tmp_path / "bundle"
    with pytest.raises(
        ExportError, match=rf"^{name} cannot be loaded as .*: {name} cannot be read: File name"
    ):
        export_bundle(name, out, name="long", report=silent)
    with pytest.raises(
        ExportError, match=rf"^{name} cannot be loaded as .*: {name} cannot be read: File name"
    ):
        export_bundle(pipeline, out, autoencoder=name, report=silent)


def test_only_what_an_export_writes_is_called_unwritable(tmp_path: Path) -> None:
    other = tmp_path / "other" / "file"
    with (
        pytest.raises(ExportError, match=f"^{re.escape(str(other))}: No such file or directory$"),
        beside(tmp_path / "here" / "bundle", silent),
    ):
        other.read_bytes()
    with (
        pytest.raises(
            ExportError, match=r"here[\\/]\.bundle\.partial-\S+file cannot be written: No such file"
        ),
        beside(tmp_path / "here" / "bundle", silent) as partial,
    ):
        (partial / "none" / "file").write_bytes(b"x")


@pytest.mark.posix
def test_a_full_disk_is_said_in_words(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            ExportError, match=r"cannot be written: .*; make room, or name a folder on another"
        ):
            export_bundle(pipeline, tmp_path / "bundle", steps=(1,), report=silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# Stands for an export that takes long: it holds what one holds.
HOLDING = """
import sys, time
from pathlib import Path
from export.folder import beside
with beside(Path(sys.argv[1]), print) as partial:
    (partial / "weights").write_bytes(b"x")
    print(partial.name, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_export_left_is_removed_and_a_living_ones_is_not(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    others = [tmp_path / ".bundle.partial-x.partial-abcd1234", tmp_path / ".bundle-2.partial-abcd1234"]
    for folder in others:
        folder.mkdir()
    out, lines = tmp_path / "bundle", list[str]()
    pipeline.scheduler = diffusers.DDIMScheduler(clip_sample=True)  # refused once it has been looked
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(out)], stdout=subprocess.PIPE, text=True
    ) as holding:
        try:
            assert holding.stdout is not None
            left = tmp_path / holding.stdout.readline().strip()
            with pytest.raises(ExportError, match=r"another export of .*bundle is under way"):
                export_bundle(pipeline, out, report=lines.append)
            assert (left / "weights").is_file() and lines == []
        finally:
            holding.kill()
    assert left.is_dir()
    with pytest.raises(ExportError, match="clip_sample"):
        export_bundle(pipeline, out, report=lines.append)
    assert lines[:1] == [f"removed {left}, left by an export that was killed"]
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_the_bundle_that_a_killed_export_set_aside_is_kept_while_there_is_no_other(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """Between two renames it has the only name under which it can be found."""
    (aside := tmp_path / ".bundle.old-abcd1234").mkdir()
    pipeline.scheduler = diffusers.DDIMScheduler(clip_sample=True)
    with pytest.raises(ExportError, match="clip_sample"):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)
    assert aside.is_dir()
    (tmp_path / "bundle").mkdir()
    with pytest.raises(ExportError, match="clip_sample"):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)
    assert not aside.exists()


@pytest.mark.parametrize("named", [{}, {"scheduler": [None, None]}])
def test_an_index_that_names_no_scheduler_is_refused_by_what_it_lacks(
    tmp_path: Path, named: dict[str, Any]
) -> None:
    miniature_xl().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["scheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index | named))
    with pytest.raises(ExportError, match=r"pipeline: model_index\.json names no scheduler: save"):
        load(tmp_path)


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "unet"])
def test_a_model_folder_without_a_part_is_refused(tmp_path: Path, part: str) -> None:
    save_miniature(tmp_path / "model")
    for path in sorted((tmp_path / "model" / part).iterdir()):
        path.unlink()
    (tmp_path / "model" / part).rmdir()
    with pytest.raises(ExportError, match=part):
        export_bundle(tmp_path / "model", tmp_path / "bundle", report=silent)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        ("unet", {"addition_embed_type": "text_time"}, "added conditioning"),
        ("unet", {"encoder_hid_dim_type": "text_proj"}, "added conditioning"),
        (
            "unet",
            {"in_channels": 9},
            r"config\.json: the denoiser takes 9 input channels, .* 4: it wants a picture too",
        ),
        ("unet", {"num_class_embeds": 10}, "added conditioning"),
        ("unet", {"dual_cross_attention": True}, "a denoiser with dual_cross_attention"),
        ("unet", {"out_channels": 8}, "variance"),
        ("unet", {"cross_attention_dim": [32, 32]}, "lists its cross_attention_dim by block"),
    ],
)
def test_a_network_that_takes_or_gives_something_else_is_refused(
    pipeline: StableDiffusionPipeline, tmp_path: Path, part: str, change: dict[str, Any], why: str
) -> None:
    getattr(pipeline, part).register_to_config(**change)
    with pytest.raises(ExportError, match=why):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_an_embedding_of_several_vectors_is_refused_where_diffusers_reads_none(
    tmp_path: Path, part: str
) -> None:
    """The edge would read all of its vectors, and diffusers the first."""
    pipeline = miniature_v3()
    number = part.removeprefix("tokenizer")
    tokenizer, encoder = (getattr(pipeline, name + number) for name in ("tokenizer", "text_encoder"))
    tokenizer.add_tokens(["<catty>", "<catty>_1"])
    encoder.resize_token_embeddings(len(tokenizer))
    with pytest.raises(ExportError, match=f"the {part}'s '<catty>' is an embedding of several vectors"):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)
    assert list(tmp_path.iterdir()) == []


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("length", ["77", 10**400, [1], -1, 0, 1, 2, 78, 76.5, float("nan"), True, False])
def test_a_length_that_no_tokenizer_can_have_is_refused_by_its_file(
    model: Path, tmp_path: Path, length: Any
) -> None:
    change_json(file := model / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    why = f"^{re.escape(str(file))}: model_max_length must be a whole number from 3 to 77, .* not "
    with pytest.raises(ExportError, match=why + re.escape(f"{length!r:.40}; write 77")):
        export_bundle(model, tmp_path / "bundle", report=silent)


def test_a_tokenizer_without_a_length_says_where_to_write_it(model: Path, tmp_path: Path) -> None:
    (file := model / "tokenizer" / "tokenizer_config.json").unlink()
    why = rf"^{re.escape(str(file))}: model_max_length .* 77, .* not {int(1e30)}; write 77$"
    with pytest.raises(ExportError, match=why):
        export_bundle(model, tmp_path / "bundle", report=silent)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_that_fills_up_with_nothing_is_refused_by_its_file(tmp_path: Path, part: str) -> None:
    miniature_xl().save_pretrained(tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        change_json(tmp_path / "model" / part / name, pad_token=None)
    with pytest.raises(
        ExportError, match=rf"model[\\/]{part}[\\/]tokenizer_config\.json: pad_token .* not null$"
    ):
        export_bundle(tmp_path / "model", tmp_path / "bundle", report=silent)


@pytest.mark.parametrize("change", [{"additional_special_tokens": ["<new>"]}, {"pad_token": "<new>"}])
def test_a_token_that_the_text_encoder_does_not_know_is_refused_before_anything_is_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(diffusion_onnx, "reference_images", None)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        change_json(model / "tokenizer" / name, **change)
    with pytest.raises(ExportError, match=r"model[\\/]tokenizer: .* 535 embeddings, and none .* '<new>';"):
        export_bundle(model, tmp_path / "bundle", report=silent)


@pytest.mark.parametrize("factor", [None, "x", 0, float("nan")])
def test_an_autoencoder_that_does_not_say_its_scale_is_refused_before_anything_is_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: Any
) -> None:
    monkeypatch.setattr(diffusion_onnx, "reference_images", None)
    change_json(model / "vae" / "config.json", scaling_factor=factor)
    with pytest.raises(ExportError, match=f"AutoencoderKL, must name a scaling_factor, .* not {factor!r}$"):
        export_bundle(model, tmp_path / "bundle", report=silent)


def test_numbers_that_are_not_finite_do_not_pass_for_equal(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """Two images of nothing but NaN differ by no number above the tolerance."""
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ExportError, match="not finite"):
        export_bundle(pipeline, tmp_path / "bundle", steps=(2,), report=silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", ["0", "4,-1", "four", ""])
def test_step_counts_that_are_none_are_refused(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["model", "out", "--steps", steps])
    assert stopped.value.code == 2
    assert "no list of step counts of at least 1, such as 25,50" in capsys.readouterr().err


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = edge_export(["diffusion", str(tmp_path / "none"), str(tmp_path / "bundle")])
    said = "".join(capsys.readouterr())
    assert code == 2
    assert "cannot be loaded as a diffusers pipeline" in said
    assert "Traceback" not in said
    assert not (tmp_path / "bundle").exists()


def test_an_export_whose_progress_nobody_can_read_is_done_all_the_same(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As behind `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:  # which it writes to once more as it is closed
        monkeypatch.setattr(sys, "stdout", nobody)
        assert edge_export(["diffusion", str(saved), str(tmp_path / "bundle"), "--steps", "1"]) == 0
    assert "rror" not in capfd.readouterr().err
    assert Bundle.open(tmp_path / "bundle").manifest.steps == (1,)


def test_the_help_says_what_shapes_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "dynamic: one graph for every size, and for one image or two" in said
    assert "ORTDiffusionPipeline runs only without guidance" in said


def test_the_manifest_lists_every_file_and_no_other(starter_shaped: tuple[Path, Path, list[str]]) -> None:
    bundle = starter_shaped[1]
    there = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(json.loads((bundle / MANIFEST).read_text())["files"]) == there - {MANIFEST}
    assert not (bundle / "vae_encoder").exists()


def test_diffusers_index_names_the_pipeline(starter_shaped: tuple[Path, Path, list[str]]) -> None:
    assert DiffusionPipeline.load_config(starter_shaped[1])["_class_name"] == "StableDiffusionPipeline"
