"""An export ends in a bundle that is proven equal, or in nothing and a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline

from edge_agent.bundle import MANIFEST, Bundle
from export import diffusion_onnx
from export.__main__ import main as edge_export
from export.diffusion_onnx import export_bundle, main
from export.errors import ExportError
from export.reference import largest_difference, reference_images
from tests.miniature import miniature_pipeline, save_miniature


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
