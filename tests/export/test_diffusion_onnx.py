"""An export ends in a bundle that is proven equal, or in nothing and a reason."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from huggingface_hub import constants, file_download
from onnx import numpy_helper
from transformers import CLIPImageProcessor

from edge_agent.bundle import MANIFEST, Bundle
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.schedule import Schedule
from edge_agent.diffusion.sessions import Runtime
from export import diffusion_onnx
from export.__main__ import INTERRUPTED
from export.__main__ import main as edge_export
from export.diffusion_onnx import export_bundle, main
from export.errors import ExportError
from export.graphs import MASKED
from export.pipeline import load, name_of
from export.reference import Reference, difference, largest_difference, reference_image, reference_images
from export.schedule import compile_schedule
from tests.miniature import (
    forget,
    miniature_pipeline,
    miniature_tiny_autoencoder,
    miniature_xl,
    save_miniature,
)


def silent(_line: str) -> None:
    """A report that nobody reads."""


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return miniature_pipeline()


@pytest.fixture(scope="module")
def starter_shaped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """Model folder and bundle of the starter's shape: 48 tokens, 16 x 16 latents, factor 4, v-prediction."""
    folder = tmp_path_factory.mktemp("starter")
    pipeline = miniature_pipeline(seed=1, factor=4, tokens=48)
    pipeline.scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_spacing="trailing"
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


def test_the_bundle_equals_the_pipeline_it_was_made_from(
    starter_shaped: tuple[Path, Path, list[str]],
) -> None:
    model, bundle, lines = starter_shaped
    loaded = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    for steps in (3, 6):
        assert largest_difference(Bundle.open(bundle), reference_images(loaded, steps, 2.0)) <= 1e-3
    assert any("largest difference" in line for line in lines)


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
        assert str(model.parent) not in path.read_text()


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


def test_a_bundle_that_differs_is_not_left(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No export is exact to the last bit, so a tolerance of zero stands for a difference."""
    monkeypatch.setattr(diffusion_onnx, "PIXEL_TOLERANCE", 0.0)
    with pytest.raises(ExportError, match="differ"):
        export_bundle(pipeline, tmp_path / "bundle", steps=(2,), report=silent)
    assert list(tmp_path.iterdir()) == []


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


def test_a_folder_that_is_no_bundle_is_never_replaced(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(ExportError, match="not a bundle"):
        export_bundle(pipeline, tmp_path / "photos", force=True, report=silent)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"x"


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
    ("name", "why"),
    [
        (
            "StableDiffusion3Pipeline",
            "not supported yet: it needs a transformer denoiser, a third text encoder",
        ),
        ("FluxPipeline", "not supported yet: it needs a transformer denoiser on packed latents"),
    ],
)
def test_a_class_that_is_asked_for_is_refused_saying_what_is_missing(
    tmp_path: Path, name: str, why: str
) -> None:
    """By its index alone: its gigabytes are not loaded first."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ExportError, match=why):
        export_bundle(tmp_path / "model", tmp_path / "bundle", report=silent)


def test_a_folder_without_an_index_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no model_index\.json: name a folder that diffusers saved"):
        export_bundle(tmp_path, tmp_path / "bundle", report=silent)


def test_a_hub_that_cannot_be_reached_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port where nobody listens stands for it; its library would try again for 23 seconds."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        template = f"http://127.0.0.1:{taken.getsockname()[1]}/{{repo_id}}/{{revision}}/{{filename}}"
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(time, "sleep", lambda _seconds: None)
        with pytest.raises(
            ExportError, match=r"some/model .*the hub at .* cannot be reached .* name a folder"
        ):
            export_bundle("some/model", tmp_path / "bundle", report=silent)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("size", "near"), [((500, 64), "496x64"), ((64, 8), "64x16")])
def test_a_size_that_the_denoiser_cannot_halve_is_refused_naming_one_near(
    pipeline: StableDiffusionPipeline, tmp_path: Path, size: tuple[int, int], near: str
) -> None:
    with pytest.raises(ExportError, match=f"multiples of 16 for this model, such as {near}"):
        export_bundle(pipeline, tmp_path / "bundle", size=size, report=silent)
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_that_the_pipeline_itself_does_not_run_is_refused(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    with pytest.raises(
        ExportError, match="StableDiffusionPipeline itself makes no image with FlowMatchEuler"
    ):
        export_bundle(
            pipeline, tmp_path / "bundle", steps=(2,), scheduler="FlowMatchEulerDiscrete", report=silent
        )


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
    facts = bundle.manifest
    assert (facts.width, facts.height, facts.latent_width, facts.latent_height) == (96, 64, 12, 8)
    assert (facts.steps, facts.default_guidance, facts.latent_scaling) == ((2,), 3.0, 1.0)
    generator = Generator(bundle, Runtime(threads=1))
    assert generator.denoiser.one_at_a_time
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


@pytest.mark.parametrize("size", ["512", "512x", "0x64", "axb"])
def test_sizes_that_are_none_are_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["model", "out", "--size", size])
    assert stopped.value.code == 2
    assert "WIDTHxHEIGHT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"guidance": float("nan")}, "guidance scale of nan .* at least 0"),
        ({"guidance": -1.0}, "guidance scale of -1"),
        ({"dtype": "fp16", "keep": ["vae"]}, "no vae; its parts are text_encoder, unet, vae_decoder"),
        ({"calibration_prompts": "prompts.txt"}, "nothing to calibrate in fp32 without --dtype"),
        ({"name": "edge"}, "can be called 'edge'; choose another with --name"),
        ({"name": "!"}, "cannot be called ''"),
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

    def counted(scheduler: Any, steps: int, **options: Any) -> Schedule:
        schedule = compile_schedule(scheduler, steps, **options)
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
    (tmp_path / "linked").symlink_to(tmp_path / "my-model")
    assert name_of(tmp_path / "linked") == "linked"
    assert name_of("owner/name") == "name"


def test_a_model_that_does_not_say_its_size_asks_for_it(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(ExportError, match="--size WIDTHxHEIGHT"):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)


def test_a_file_of_weights_says_how_to_make_a_folder_of_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(ExportError, match=r"from_single_file\('.*model\.safetensors'\)\.save_pretrained"):
        export_bundle(file, tmp_path / "bundle", report=silent)


def test_an_export_that_is_ended_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = save_miniature(tmp_path / "model"), tmp_path / "out" / "bundle"

    def ended(*_arguments: object) -> None:
        assert len(list(out.parent.iterdir())) == 1
        assert signal.getsignal(signal.SIGTERM) is not before  # else it would end the tests
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(diffusion_onnx.graphs, "trace", ended)
    assert edge_export(["diffusion", str(model), str(out), "--steps", "1"]) == INTERRUPTED
    assert list(out.parent.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


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
    assert compared == [(2, True), (2, False), (3, True)]


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


def test_a_folder_with_half_precision_files_alone_is_loaded(tmp_path: Path) -> None:
    pipeline = miniature_pipeline().to(torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert not [file for file in tmp_path.glob("*/*.safetensors") if ".fp16." not in file.name]
    loaded = load(tmp_path)
    for part in ("text_encoder", "unet", "vae"):
        wanted, found = getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()
        assert all(torch.equal(found[name], wanted[name].float()) for name in wanted)


def test_an_index_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    save_miniature(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name"')
    with pytest.raises(ExportError, match=r"model_index\.json cannot be read: .*not a valid JSON"):
        load(tmp_path)


@pytest.mark.parametrize("named", [{}, {"scheduler": [None, None]}])
def test_an_index_that_names_no_scheduler_is_refused_by_what_it_lacks(
    tmp_path: Path, named: dict[str, Any]
) -> None:
    miniature_xl().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["scheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index | named))
    with pytest.raises(ExportError, match=r"pipeline: model_index\.json names no scheduler$"):
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
        ("vae", {"latents_std": [1.0] * 4}, "mean and deviation"),
        ("unet", {"in_channels": 9}, "input channels"),
        ("unet", {"out_channels": 8}, "variance"),
    ],
)
def test_a_network_that_takes_or_gives_something_else_is_refused(
    pipeline: StableDiffusionPipeline, tmp_path: Path, part: str, change: dict[str, Any], why: str
) -> None:
    getattr(pipeline, part).register_to_config(**change)
    with pytest.raises(ExportError, match=why):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_an_embedding_of_several_vectors_is_refused(tmp_path: Path, part: str) -> None:
    """For it diffusers rewrites the prompt, so that the bundle would draw another picture of it and nothing else."""
    pipeline = miniature_xl()
    number = part.removeprefix("tokenizer")
    tokenizer, encoder = (getattr(pipeline, name + number) for name in ("tokenizer", "text_encoder"))
    learnt = {"<catty>": torch.randn(2, encoder.config.hidden_size)}
    pipeline.load_textual_inversion(learnt, tokenizer=tokenizer, text_encoder=encoder)
    with pytest.raises(ExportError, match=f"the {part}'s '<catty>' is an embedding of several vectors"):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_a_length_says_where_to_write_it(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.tokenizer.model_max_length = int(1e30)
    with pytest.raises(ExportError, match=r"1e\+30 tokens.* 77 positions.*tokenizer_config"):
        export_bundle(pipeline, tmp_path / "bundle", report=silent)


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
    assert "step counts" in capsys.readouterr().err


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = edge_export(["diffusion", str(tmp_path / "none"), str(tmp_path / "bundle")])
    said = "".join(capsys.readouterr())
    assert code == 2
    assert "cannot be loaded as a diffusers pipeline" in said
    assert "Traceback" not in said
    assert not (tmp_path / "bundle").exists()


def test_the_manifest_lists_every_file_and_no_other(starter_shaped: tuple[Path, Path, list[str]]) -> None:
    bundle = starter_shaped[1]
    there = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(json.loads((bundle / MANIFEST).read_text())["files"]) == there - {MANIFEST}
    assert not (bundle / "vae_encoder").exists()


def test_diffusers_index_names_the_pipeline(starter_shaped: tuple[Path, Path, list[str]]) -> None:
    assert DiffusionPipeline.load_config(starter_shaped[1])["_class_name"] == "StableDiffusionPipeline"
