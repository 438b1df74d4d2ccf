"""Stable Diffusion 3 becomes a bundle without its third text encoder; test_parity.py compares its pixels."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from cloud_server import complete
from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.generator import Generator, Step
from edge_agent.diffusion.sessions import Runtime
from edge_agent.errors import BundleError
from edge_agent.manifest import FUSED, TRANSFORMER
from edge_agent.reader import Reader
from export import diffusion_onnx
from export.diffusion_onnx import export_bundle, main
from export.errors import ExportError
from export.pipeline import load, loop_of, prepared
from export.precision import shrink
from export.reference import difference, reference_image, reference_images
from export.schedule import NotLinear, compile_schedule
from export.terminal import silent
from tests.miniature import miniature_pipeline, miniature_v3


@pytest.fixture
def pipeline() -> StableDiffusion3Pipeline:
    return miniature_v3()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only to be read."""
    folder = tmp_path_factory.mktemp("sd3") / "bundle"
    export_bundle(miniature_v3(), folder, steps=(4,), report=silent)
    return folder


def tiny_t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=32, d_model=64, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def name_parts(model: Path, **parts: list[str] | None) -> None:
    """In the index of `model`, whatever lies in its folder."""
    index = model / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | parts))


def test_a_folder_with_the_third_text_encoder_is_exported_without_it_when_that_is_said(
    pipeline: StableDiffusion3Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its gigabytes are neither loaded nor needed: here they are not even there."""
    pipeline.save_pretrained(tmp_path / "model")
    name_parts(
        tmp_path / "model",
        text_encoder_3=["transformers", "T5EncoderModel"],
        tokenizer_3=["transformers", "T5TokenizerFast"],
    )
    with pytest.raises(ExportError, match="is not supported: leave it out with --without-t5"):
        main([str(tmp_path / "model"), str(tmp_path / "bundle")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert main([str(tmp_path / "model"), str(tmp_path / "bundle"), "--without-t5", "--steps", "2"]) == 0
    assert "comparing pixels" in capsys.readouterr().out
    bundle = Bundle.open(tmp_path / "bundle")
    assert not any("_3" in name for name in bundle.manifest.files)
    reference = reference_image(pipeline, "two cats", "dog", 3, 2, 5.0)
    assert difference(Generator(bundle, Runtime(threads=1)), reference) <= 1e-3


def test_what_is_made_of_images_need_not_be_there(pipeline: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    """Nor does the bundle name it, for optimum's pipeline would look for it."""
    pipeline.save_pretrained(tmp_path / "model")
    name_parts(
        tmp_path / "model",
        image_encoder=["transformers", "SiglipVisionModel"],
        feature_extractor=["transformers", "SiglipImageProcessor"],
    )
    export_bundle(tmp_path / "model", tmp_path / "bundle", steps=(2,), report=silent)
    written = json.loads((tmp_path / "bundle" / "model_index.json").read_text())
    assert written["image_encoder"] == written["feature_extractor"] == [None, None]


@pytest.mark.parametrize("without_t5", [False, True])
def test_a_third_text_encoder_that_is_null_says_what_to_write(
    pipeline: StableDiffusion3Pipeline, tmp_path: Path, without_t5: bool
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    name_parts(tmp_path / "model", text_encoder_3=None)
    with pytest.raises(ExportError, match=r"text_encoder_3 must be .* or for none \[null, null\], not null"):
        load(tmp_path / "model", without_t5=without_t5)


def test_no_other_class_has_a_third_text_encoder_to_leave_out(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--without-t5 is for Stable Diffusion 3; StableDiffusionPipeline"):
        export_bundle(miniature_pipeline(), tmp_path / "bundle", without_t5=True, report=silent)


def test_a_bundle_inside_of_another_is_refused(pipeline: StableDiffusion3Pipeline, exported: Path) -> None:
    with pytest.raises(ExportError, match="lies in the bundle"):
        export_bundle(pipeline, exported / "more", report=silent)


def test_a_manifest_that_asks_for_more_than_the_transformer_has_weights_for_is_refused(
    exported: Path, tmp_path: Path
) -> None:
    """Also where the graph leaves the size open: a token's state of 2 GiB would be filled with zeros."""
    folder = Path(shutil.copytree(exported, tmp_path / "bundle"))
    joint = replace(Bundle.open(folder).manifest.joint, hidden=2**29)
    write_manifest(folder, joint=joint)
    with pytest.raises(BundleError, match="the manifest asks for"):
        Generator(Bundle.open(folder))
    for path in (folder / TRANSFORMER, (folder / TRANSFORMER).with_name(FUSED)):
        graph = onnx.load(path, load_external_data=False)
        states = next(one for one in graph.graph.input if one.name == "encoder_hidden_states")
        states.type.tensor_type.shape.dim[2].dim_param = "hidden"
        onnx.save(graph, path)
    write_manifest(folder)
    with pytest.raises(BundleError, match="does not say what size of a token's state it takes"):
        Generator(Bundle.open(folder))


def test_a_pipeline_keeps_the_third_text_encoder_that_its_export_leaves_out(
    pipeline: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    pipeline.text_encoder_3 = tiny_t5()
    with pytest.raises(ExportError, match="leave it out with --without-t5"):
        export_bundle(pipeline, tmp_path / "bundle", steps=(2,), report=silent)
    export_bundle(pipeline, tmp_path / "bundle", steps=(2,), without_t5=True, report=silent)
    assert isinstance(pipeline.text_encoder_3, T5EncoderModel)
    index = json.loads((tmp_path / "bundle" / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None]


def test_a_prompt_is_read_as_what_drives_the_transformer(
    pipeline: StableDiffusion3Pipeline, exported: Path
) -> None:
    """The predictor gets both encoders' states, and the transformer the same in a larger room."""
    states = Reader.open(Bundle.open(exported), routing_rate=0.5).read("two red cats! 🐈").states
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(*3 * ["two red cats! 🐈"])
    assert states.tokens.shape == (1, 77, 56) and tokens.shape == (1, 333, 64)
    np.testing.assert_allclose(states.tokens, tokens[:, :77, :56].numpy(), atol=1e-4)
    assert not tokens[:, 77:].any() and not tokens[..., 56:].any()
    np.testing.assert_allclose(states.pooled, pooled.numpy(), atol=1e-4)


@pytest.mark.parametrize("passes", ["batch", "separate"])
def test_guidance_in_one_pass_and_in_two(
    pipeline: StableDiffusion3Pipeline, exported: Path, passes: Any
) -> None:
    generator = Generator(Bundle.open(exported), Runtime(threads=1))
    generator.denoiser.passes = passes
    reference = reference_image(pipeline, "two cats", "dog", 3, 4, 5.0)
    assert difference(generator, reference) <= 1e-3


def test_previews_approach_the_image(exported: Path) -> None:
    generator = Generator(Bundle.open(exported), Runtime(threads=1))
    states, negative = generator.encode("cat")[1], generator.encode_negative("")
    *events, image = generator.generate(states, negative, 1, 4, 1.0, previews=True)
    previews = [event.preview for event in events if isinstance(event, Step) and event.preview is not None]
    apart = [np.abs(preview.astype(float) - image.pixels).mean() for preview in previews]
    assert len(apart) == 3 and apart == sorted(apart, reverse=True)


def constants(graph: Path) -> set[tuple[int, ...]]:
    """The shapes of what is constant in the graph, such as the table of positions."""
    model = onnx.load(graph)
    inside = [
        attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")
    ]
    return {tuple(tensor.dims) for tensor in (*model.graph.initializer, *inside)}


def test_a_size_of_its_own_and_fixed_shapes(pipeline: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    """A transformer's positions are those of one size, which need not be the model's or square."""
    bundle = export_bundle(
        pipeline, tmp_path / "bundle", steps=(2,), sizes=[(96, 64)], shapes="fixed", report=silent
    )
    generator = Generator(bundle, Runtime(threads=1))
    shapes = {session.path.parent.name: session.shapes for session in generator.sessions}
    assert shapes["transformer"] == {
        "hidden_states": (1, 16, 8, 12),
        "timestep": (1,),
        "encoder_hidden_states": (1, 333, 64),
        "pooled_projections": (1, 24),
        "out_hidden_states": (1, 16, 8, 12),
    }
    assert shapes["text_encoder"]["input_ids"] == (1, 77)
    assert json.loads((bundle.folder / "transformer" / "config.json").read_text())["sample_size"] == 8
    assert pipeline.transformer.config.sample_size == 8
    assert pipeline.transformer.pos_embed.pos_embed.shape == (1, 12 * 12, 32)
    assert (1, 4 * 6, 32) in constants(bundle.path(TRANSFORMER))
    assert (1, 12 * 12, 32) not in constants(bundle.path(TRANSFORMER))
    reference = reference_image(pipeline, "two cats", "dog", 3, 2, 5.0, size=(96, 64))
    assert difference(generator, reference) <= 1e-3


@pytest.mark.parametrize(
    ("sizes", "square"), [([(64, 64), (96, 64)], 6), ([(64, 80), (64, 64)], 6), ([(64, 64), (192, 112)], 12)]
)
def test_several_sizes_have_their_positions_out_of_the_middle_of_one_table(
    pipeline: StableDiffusion3Pipeline, tmp_path: Path, sizes: list[tuple[int, int]], square: int
) -> None:
    """Of the model's, which has 12 rows and columns, so that the middle of an odd table would be another."""
    bundle = export_bundle(pipeline, tmp_path / "bundle", steps=(2,), sizes=sizes, report=silent)
    assert bundle.manifest.sizes == tuple(sizes)
    graph = bundle.path(TRANSFORMER)
    assert any(shape in constants(graph) for shape in ((1, square**2, 32), (1, square, square, 32)))
    assert pipeline.transformer.pos_embed.pos_embed_max_size == 12
    generator = Generator(bundle, Runtime(threads=1))
    for size in sizes:
        for reference in reference_images(pipeline, 2, 5.0, size):
            assert difference(generator, reference) <= 1e-3


def test_several_sizes_whose_timesteps_differ_are_refused(
    pipeline: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(
        ExportError, match=r"DiscreteScheduler shifts its timesteps by the size.* once for each"
    ):
        export_bundle(pipeline, tmp_path / "bundle", steps=(2,), sizes=[(64, 64), (96, 64)], report=silent)
    assert list(tmp_path.iterdir()) == []


def test_with_the_tiny_autoencoder_for_it(pipeline: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(tmp_path / "tiny")
    bundle = export_bundle(
        pipeline, tmp_path / "bundle", steps=(2,), autoencoder=tmp_path / "tiny", report=silent
    )
    assert (bundle.manifest.latent_scaling, bundle.manifest.latent_shift) == (1.0, 0.0)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_smaller_bundle(exported: Path, tmp_path: Path, dtype: Any) -> None:
    """It is compared with the float32 one."""
    folder = Path(shutil.copytree(exported, tmp_path / "bundle"))
    assert shrink(folder, dtype, prompts=["a cat", "the moon"], report=silent).share > 0
    assert Bundle.open(folder).manifest.joint is not None


def test_the_scheduler_is_shifted_by_the_size_where_it_says_so(
    pipeline: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
    )
    assert loop_of(pipeline, (32, 32)).mu == pytest.approx(0.5)
    assert loop_of(pipeline, (128, 128)).mu == pytest.approx(1.15)
    bundle = export_bundle(pipeline, tmp_path / "bundle", steps=(3,), report=silent)
    reference = reference_image(pipeline, "two cats", "dog", 3, 3, 5.0)
    assert difference(Generator(bundle, Runtime(threads=1)), reference) <= 1e-3


def test_a_scheduler_that_names_no_shifts_is_shifted_as_the_pipeline_shifts_it(
    pipeline: StableDiffusion3Pipeline,
) -> None:
    pipeline.scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True
    )
    compiled = compile_schedule(pipeline.scheduler, 3, loop_of(pipeline, (192, 192)))
    reference_image(pipeline, "two cats", "dog", 3, 3, 5.0, size=(192, 192))
    assert compiled.timesteps == tuple(pipeline.scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    ("made", "config", "why"),
    [
        (
            diffusers.FlowMatchEulerDiscreteScheduler,
            {"base_image_seq_len": 4096},
            "cannot shift its timesteps by the size: .* are 4096, 4096, 0.5, 1.15; write numbers",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler,
            {"max_shift": None},
            "cannot shift its timesteps by the size: .* are 256, 4096, 0.5, None; write numbers",
        ),
        (
            diffusers.FlowMatchHeunDiscreteScheduler,
            {},
            "does not shift its timesteps by the size, .* such as Flow",
        ),
    ],
)
def test_a_shift_by_size_that_cannot_be_is_refused(
    pipeline: StableDiffusion3Pipeline, tmp_path: Path, made: Any, config: dict[str, Any], why: str
) -> None:
    pipeline.scheduler = made()
    pipeline.scheduler.register_to_config(use_dynamic_shifting=True, **config)
    with pytest.raises(ExportError, match=f"{made.__name__} {why}"):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)


@pytest.mark.parametrize("scheduler", ["FlowMatchLCM", "FlowMatchEulerDiscrete:stochastic_sampling=true"])
def test_noise_that_no_seed_repeats_is_refused(
    pipeline: StableDiffusion3Pipeline, tmp_path: Path, scheduler: str
) -> None:
    """The pipeline hands its generator to no scheduler."""
    name = scheduler.partition(":")[0]
    with pytest.raises(
        NotLinear, match=f"^{name}Scheduler draws noise in a way that cannot be repeated, from torch"
    ):
        export_bundle(pipeline, tmp_path / "bundle", steps=(3,), scheduler=scheduler, report=silent)


def test_channels_that_the_transformer_leaves_open_are_the_latents(
    pipeline: StableDiffusion3Pipeline,
) -> None:
    pipeline.transformer.register_to_config(out_channels=None)
    prepared(pipeline)


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        (
            "transformer",
            {"sample_size": 7},
            r"a size of 56x56, as transformer[\\/]config\.json names it, does not work: .* such as 64x64",
        ),
        ("transformer", {"sample_size": 26}, "a size of 208x208, .* knows positions up to 192x192"),
        ("transformer", {"pos_embed_max_size": None}, "without a table of positions is not supported"),
        ("vae", {"shift_factor": None}, "must name a shift_factor, a number, not None"),
        ("vae", {"scaling_factor": 0}, "must name a scaling_factor, a number other than 0, not 0"),
        ("transformer", {"joint_attention_dim": 48}, "smaller states than the text encoders make"),
        ("transformer", {"in_channels": 33}, "input channels"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    pipeline: StableDiffusion3Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    change: dict[str, Any],
    why: str,
) -> None:
    monkeypatch.setattr(diffusion_onnx, "reference_images", None)
    getattr(pipeline, part).register_to_config(**change)
    with pytest.raises(ExportError, match=why):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)


def test_a_text_encoder_that_makes_no_vector_is_refused(
    pipeline: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    pipeline.text_encoder = CLIPTextModel(pipeline.text_encoder.config)
    with pytest.raises(ExportError, match="a first text encoder without projection is not supported"):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"sizes": [(72, 64)]}, "must be multiples of 16 for this model, such as 64x64"),
        ({"sizes": [(208, 64)]}, "this model knows positions up to 192x192"),
        (
            {"scheduler": "EulerDiscrete"},
            "EulerDiscreteScheduler is not for flow matching, .* such as FlowMatch",
        ),
        ({"scheduler": "UniPCMultistep:use_flow_sigmas=true"}, "UniPC.* is not for flow matching"),
    ],
)
def test_what_does_not_work_is_refused_before_anything_is_run(
    pipeline: StableDiffusion3Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    why: str,
) -> None:
    monkeypatch.setattr(diffusion_onnx, "reference_images", None)
    with pytest.raises(ExportError, match=why):
        export_bundle(pipeline, tmp_path / "bundle", report=silent, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_cloud_server_loads_one_that_was_saved_without_its_third_encoder(tmp_path: Path) -> None:
    miniature_v3().save_pretrained(tmp_path)
    made = complete.pipeline(tmp_path, torch.float32)
    assert made.text_encoder_3 is None and made.tokenizer_3 is None
    made.set_progress_bar_config(disable=True)
    image = made("two cats", num_inference_steps=1, output_type="np").images[0]
    assert np.isfinite(image).all()
