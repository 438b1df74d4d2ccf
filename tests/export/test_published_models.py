"""Published models have traits that miniatures made by code have not. They are exported all the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from safetensors.torch import load as weights_in
from safetensors.torch import load_file, save_file

from cloud_server import complete
from edge_agent.bundle import Bundle
from export.convert import convert
from export.diffusion_onnx import export_bundle
from export.errors import ExportError
from export.pipeline import class_of, load, name_of, prepared
from export.terminal import silent
from tests.miniature import (
    BETAS,
    as_transformers_5_saves,
    miniature_pipeline,
    miniature_tiny_autoencoder,
    miniature_xl,
    save_miniature,
)
from tests.single_file import autoencoder_weights

STEPS = 2


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def export(model: Any, tmp_path: Path, **options: Any) -> Bundle:
    """Which compares the bundle's pixels with those of diffusers."""
    return export_bundle(model, tmp_path / "bundle", steps=(STEPS,), report=lambda _line: None, **options)


def as_first_diffusers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of an autoencoder, under the names that they had then."""
    for now, then in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        weights = {name.replace(f".{now}.", f".{then}."): one for name, one in weights.items()}
    return weights


THREE_LEVELS = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [2, 4, 4],
}
CUT_DOWN = {
    "small-sd": (miniature_pipeline, {"mid_block_type": None}),
    "SDXS": (miniature_pipeline, {**THREE_LEVELS, "mid_block_type": None, "layers_per_block": [1, 2, 2]}),
    "SSD-1B": (
        miniature_xl,
        {
            **THREE_LEVELS,
            "layers_per_block": 2,
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [1, 1], [1, 2]],
            "reverse_transformer_layers_per_block": [[1, 1, 2], [2, 1, 1], 1],
        },
    ),
    "LCM-SDXL": (miniature_xl, {"time_cond_proj_dim": 16}),
}


@pytest.mark.parametrize("name", CUT_DOWN)
def test_a_denoiser_that_was_distilled_becomes_a_bundle(tmp_path: Path, name: str) -> None:
    """With a block less, fewer layers here than there, or the guidance scale as an input of Stable Diffusion XL."""
    make, changes = CUT_DOWN[name]
    pipeline = make()
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipeline.unet = UNet2DConditionModel(**(config | changes)).eval()
    if name == "SDXS":
        pipeline.vae = miniature_tiny_autoencoder()
    if name == "LCM-SDXL":
        pipeline.scheduler = LCMScheduler(**BETAS)
    pipeline.save_pretrained(tmp_path / "model")
    manifest = export(tmp_path / "model", tmp_path, guidance=3.0).manifest
    assert manifest.guidance_embedding == changes.get("time_cond_proj_dim")


@pytest.mark.parametrize(
    "scheduler",
    [{"_class_name": "PNDMScheduler", "skip_prk_steps": True}, {"_class_name": "DDIMScheduler"}],
    ids=lambda config: config["_class_name"],
)
def test_a_folder_of_the_first_diffusers_becomes_a_bundle(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], scheduler: dict[str, Any]
) -> None:
    """Its weights are pickled and some have other names, and its scheduler's config lacks what the pipeline corrects.

    Of which nothing is called an error on the way.
    """
    model = save_miniature(tmp_path / "model")
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | BETAS))
    pairs = {
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    index = json.loads((model / "model_index.json").read_text())
    kept = {name: index[name] for name in ("_class_name", "text_encoder", "tokenizer", "unet", "vae")}
    (model / "model_index.json").write_text(json.dumps({**kept, **pairs, "_diffusers_version": "0.2.2"}))
    for file in sorted(model.glob("*/*.safetensors")):
        weights = load_file(file)
        if file.parent.name == "vae":
            weights = as_first_diffusers(weights)
        if file.parent.name == "text_encoder":
            weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        named = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(weights, file.with_name(named))
        file.unlink()
    export(model, tmp_path)
    assert "rror" not in capfd.readouterr().err


def test_a_tokenizer_of_transformers_5_becomes_that_of_a_bundle(tmp_path: Path) -> None:
    model = save_miniature(tmp_path / "model")
    tokenizer = as_transformers_5_saves(model / "tokenizer", ["<catty>"])
    loaded = complete.pipeline(model, torch.float32)  # as the cloud server does, too
    assert loaded.tokenizer("a <catty>").input_ids == tokenizer("a <catty>").input_ids
    loaded.text_encoder.resize_token_embeddings(len(tokenizer))
    larger = shutil.copytree(model, tmp_path / "larger")  # Windows writes over no file that is in use
    loaded.text_encoder.save_pretrained(larger / "text_encoder")
    export(larger, tmp_path)


@pytest.mark.parametrize("make", [miniature_pipeline, miniature_xl])
def test_weights_that_transformers_5_named_are_those_they_were(tmp_path: Path, make: Any) -> None:
    """It leaves out of CLIP's the name of the module that holds them all."""
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    weights = weights_in(file.read_bytes())
    renamed = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    save_file(renamed, file, {"format": "pt"})
    loaded = complete.pipeline(tmp_path / "model", torch.float32)  # as the cloud server does, too
    for name, weight in pipeline.text_encoder.state_dict().items():
        assert torch.equal(loaded.text_encoder.state_dict()[name], weight)
    export(tmp_path / "model", tmp_path)


@pytest.mark.parametrize(
    ("make", "entries"),
    [
        (miniature_pipeline, {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}),
        (miniature_pipeline, {"trained_words": ["a", "b"], "teacher": ["diffusers", "UNet2DConditionModel"]}),
        (
            miniature_xl,
            {
                "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
                "feature_extractor": ["transformers", "CLIPImageProcessor"],
                "add_watermarker": True,
            },
        ),
    ],
    ids=["an image encoder", "entries of one's own", "of Stable Diffusion XL"],
)
def test_what_the_edge_does_not_run_need_not_be_there(
    tmp_path: Path, make: Any, entries: dict[str, Any]
) -> None:
    make().save_pretrained(tmp_path)
    rewrite(tmp_path / "model_index.json", **entries)
    pipeline = prepared(load(tmp_path))
    assert all(getattr(pipeline, name, None) is None for name in entries)
    named = dict(pipeline.config)  # what another program looks for in a bundle
    assert all(named.get(name) in (None, (None, None)) for name in ("image_encoder", "feature_extractor"))


def test_the_weights_of_what_diffusers_ignores_are_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others would be downloaded once more for it, in half precision."""
    model = save_miniature(tmp_path / "model")
    rewrite(model / "model_index.json", teacher=["diffusers", "UNet2DConditionModel"])
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(model)

    monkeypatch.setattr(complete.hub, "out_of_reach", lambda _: False)
    monkeypatch.setattr(complete.diffusers.DiffusionPipeline, "download", download)
    assert complete.downloaded("owner/name", safety_checker=None) == model
    assert asked == [("owner/name", {"safety_checker": None, "local_files_only": False})]


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_lora_that_was_not_fused_is_told_from_damage(tmp_path: Path, part: str) -> None:
    """Of the LoRA alone, as transformers writes it, or of all weights under other names, as diffusers does."""
    model = save_miniature(tmp_path / "model")
    if part == "text_encoder":
        (model / part / "config.json").rename(model / part / "adapter_config.json")
    else:
        file = model / part / "diffusion_pytorch_model.safetensors"
        weights = weights_in(file.read_bytes())  # not mapped: Windows writes over no file that is
        weights["conv_in.base_layer.weight"] = weights.pop("conv_in.weight")
        save_file(weights, file, {"format": "pt"})
    with pytest.raises(
        ExportError, match=f"{part} was saved with a LoRA .*: call fuse_lora.. and unload_lora_w"
    ):
        load(model)


def test_an_autoencoder_in_half_precision_alone_takes_the_place_of_a_models_own(tmp_path: Path) -> None:
    vae = miniature_tiny_autoencoder().half()
    vae.save_pretrained(tmp_path, variant="fp16")
    found = prepared(miniature_pipeline(), tmp_path).vae.state_dict()
    assert all(torch.equal(found[name], weights.float()) for name, weights in vae.state_dict().items())


def save_autoencoder(weights: dict[str, torch.Tensor], file: Path, prefix: str = "") -> Path:
    save_file({prefix + name: weight.contiguous() for name, weight in weights.items()}, file)
    return file


@pytest.mark.parametrize("names", ["diffusers'", "earlier ones", "first code's", "single file's", "vae."])
def test_an_autoencoder_in_a_file_takes_the_place_of_a_models_own(tmp_path: Path, names: str) -> None:
    """As those are passed around that fine-tunes go with, often in half precision."""
    vae = miniature_pipeline(seed=3).vae.half()
    weights = vae.state_dict() if names in ("diffusers'", "earlier ones") else autoencoder_weights(vae)
    if names == "earlier ones":
        weights = as_first_diffusers(weights)
    prefix = {"single file's": "first_stage_model.", "vae.": "vae."}.get(names, "")
    pipeline = miniature_pipeline()
    found = prepared(pipeline, save_autoencoder(weights, tmp_path / "vae-ft-mse.safetensors", prefix)).vae
    assert all(torch.equal(found.state_dict()[name], one.float()) for name, one in vae.state_dict().items())
    assert {weight.dtype for weight in found.parameters()} == {torch.float32}
    assert found.config.scaling_factor == pipeline.vae.config.scaling_factor


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda _: {}, ""),
        (lambda _: {"lora_unet.lora_up.weight": torch.ones(1)}, ""),
        (lambda whole: {name: one for name, one in whole.items() if "mid" not in name}, ""),
        (lambda whole: {name: one for name, one in whole.items() if "quant" not in name}, ""),
        (lambda whole: whole | {"decoder.conv_in.bias": whole["decoder.conv_in.bias"] / 0}, None),
        (lambda whole: whole | {"decoder.up.9.block.0.conv1.bias": torch.ones(1)}, "it has "),
        (
            lambda whole: whole | {"decoder.conv_in.weight": torch.ones(1)},
            ".*conv_in.weight has another size",
        ),
    ],
)
def test_a_file_that_is_no_autoencoder_of_the_models_kind_is_refused(
    tmp_path: Path, change: Any, why: str | None
) -> None:
    pipeline = miniature_pipeline()
    file = save_autoencoder(change(autoencoder_weights(pipeline.vae)), tmp_path / "vae.safetensors")
    refusal = "is damaged: it holds what is no number"
    if why is not None:
        refusal = f"is no autoencoder of this model's config: {why}"
    with pytest.raises(ExportError, match=refusal):
        prepared(pipeline, file)


def test_weights_for_which_the_config_has_no_place_are_not_left_out(tmp_path: Path) -> None:
    """Also under diffusers' own names, of which it passes over those that it does not know."""
    pipeline = miniature_pipeline()
    weights = pipeline.vae.state_dict()
    more = save_autoencoder(weights | {"decoder.more.weight": torch.ones(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(ExportError, match=f"it has {len(weights) + 1} weights, .* names {len(weights)}$"):
        prepared(pipeline, more)


def test_a_file_without_a_config_goes_with_that_of_an_ordinary_autoencoder(tmp_path: Path) -> None:
    pipeline = miniature_pipeline()
    file = save_autoencoder(autoencoder_weights(pipeline.vae), tmp_path / "vae.safetensors")
    tiny = miniature_tiny_autoencoder().state_dict()
    for names in ("decoder.layers.", ""):  # diffusers', and those that it was first published with
        some = {name: one for name, one in tiny.items() if name.startswith("decoder.layers.")}
        renamed = {name.replace("decoder.layers.", names): one for name, one in some.items()}
        with pytest.raises(ExportError, match=r"is a tiny autoencoder, .* such as madebyollin/taesd$"):
            prepared(pipeline, save_autoencoder(renamed, tmp_path / "taesd_decoder.safetensors"))
    (tmp_path / "vae.pt").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"vae\.pt is cut off or damaged, no file of weights, or"):
        prepared(pipeline, tmp_path / "vae.pt")
    pipeline.vae = miniature_tiny_autoencoder()
    with pytest.raises(
        ExportError, match="which has no config, and that of the model's own is of an AutoencoderTiny"
    ):
        prepared(pipeline, file)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
    ],
)
def test_what_git_leaves_in_the_place_of_a_large_file_is_called_that(tmp_path: Path, name: str) -> None:
    save_miniature(tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(
        ExportError, match=f"{Path(name).name} is a pointer, .* run `git lfs pull` in the clone, or"
    ):
        load(tmp_path)


def test_a_pointer_in_the_place_of_a_single_file_is_called_that(tmp_path: Path) -> None:
    (file := tmp_path / "fine-tune.safetensors").write_text(POINTER)
    with pytest.raises(ExportError, match=r"^\S+fine-tune\.safetensors is a pointer, "):
        convert(str(file), str(tmp_path / "folder"), report=silent)


def test_files_that_lie_beside_the_weights_are_left_alone(tmp_path: Path) -> None:
    """Of other runtimes and of training, beside weights in half precision alone."""
    pipeline = miniature_pipeline().to(torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    for name in (
        "unet/openvino_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/optimizer.bin",
    ):
        (tmp_path / name).write_text(POINTER)
    found = load(tmp_path)
    wanted = pipeline.to(torch.float32).unet.state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in found.unet.state_dict().items())
    convert(str(tmp_path), str(tmp_path / "folder"), scheduler="LCM", report=silent)
    kept = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in kept.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ("OnnxStableDiffusionPipeline", "is not supported: it holds ONNX graphs; name the model that they"),
        ("FlaxStableDiffusionPipeline", "is not supported: it holds weights for JAX"),
        ("StableDiffusionInstructPix2PixPipeline", "wants a picture, and the edge draws from a prompt alone"),
        *(
            (
                name,
                f"{name} is not supported: it needs a transformer of another kind and a text encoder that the edge",
            )
            for name in (
                "Flux2Pipeline",
                "FluxKontextPipeline",
                "PixArtSigmaPipeline",
                "SanaPipeline",
                "QwenImagePipeline",
            )
        ),
        ("AudioLDMPipeline", "AudioLDMPipeline is not supported; StableDiffusionPipeline, .* are$"),
        (["pipeline_mine", "MinePipeline"], "is of the class MinePipeline, code of its own that is not run;"),
    ],
)
def test_a_class_that_is_not_supported_is_refused_saying_what_to_do(
    tmp_path: Path, made: Any, why: str
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": made}))
    for read in load, class_of:
        with pytest.raises(ExportError, match=why):
            read(tmp_path)


def test_a_part_of_a_library_that_is_not_installed_is_refused_by_it(tmp_path: Path) -> None:
    save_miniature(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["mine.models", "MineUNet"]}))
    with pytest.raises(ExportError, match=r"names MineUNet of mine\.models as unet: that is no library that"):
        load(tmp_path)


def test_a_part_that_is_left_out_may_be_of_any_library(tmp_path: Path) -> None:
    save_miniature(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"safety_checker": ["mine", "Checker"]}))
    lines: list[str] = []
    assert load(tmp_path, report=lines.append).safety_checker is None
    assert [line for line in lines if "leaving out the safety checker, " in line]


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("https://huggingface.co/owner/name", "a model of the hub goes by its id, owner/name$"),
        ("https://huggingface.co/owner/name/tree/main", "a model of the hub goes by its id, owner/name$"),
        (
            "https://huggingface.co/owner/name?library=diffusers",
            "a model of the hub goes by its id, owner/name$",
        ),
        ("https://huggingface.co/owner/name/resolve/main/x.safetensors", "download that file, and name it$"),
        ("https://example.com/x.safetensors", "download it, and name the file or folder$"),
        ("hf:owner/name", "a model of the hub goes by its id, owner/name$"),
        ("model/model_index.json", r"is a file, and a pipeline is a folder: name its folder, \S+model$"),
        ("model/unet", r"has no model_index\.json: name the whole pipeline, \S+model$"),
        (
            "models--owner--name",
            r"has no model_index\.json: name what the hub's cache has in it, \S+snapshots\S+c0ffee$",
        ),
    ],
)
def test_what_people_name_instead_is_put_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, why: str
) -> None:
    save_miniature(tmp_path / "model")
    snapshots = tmp_path / "models--owner--name" / "snapshots"
    for number, snapshot in enumerate(
        ("decade", "c0ffee", "facade")
    ):  # the one that came last is none of the ends
        (snapshots / snapshot).mkdir(parents=True)
        (index := snapshots / snapshot / "model_index.json").touch()
        os.utime(index, ns=(when := 10**18 + 10**9 * (0, 2, 1)[number], when))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=why):
        load(tmp_path / named if (tmp_path / named).exists() else named)


@pytest.mark.parametrize("asked", [True, False])
def test_a_model_that_says_it_is_smaller_than_it_was_trained_for_is_pointed_out(
    tmp_path: Path, asked: bool
) -> None:
    """Fine-tunes of Stable Diffusion 1.x say so, whose first converted form left their size out."""
    pipeline = miniature_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    rewrite(tmp_path / "model" / "unet" / "config.json", sample_size=256 // pipeline.vae_scale_factor)
    said: list[str] = []
    sizes = ((256, 256),) if asked else ()
    export_bundle(
        tmp_path / "model", tmp_path / "bundle", steps=(STEPS,), sizes=sizes, guidance=0, report=said.append
    )
    assert any("trained for 512x512: then name --size" in line for line in said) != asked
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.sizes, manifest.default_guidance) == (((256, 256),), 0.0)


def test_a_snapshot_of_the_hubs_cache_has_its_models_name(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--tidy-model" / "snapshots" / "c0ffee"
    save_miniature(folder)
    assert name_of(folder) == "tidy-model"


def test_a_pipeline_that_is_named_as_an_autoencoder_says_how_to_name_its_own(tmp_path: Path) -> None:
    model = save_miniature(tmp_path / "model")
    with pytest.raises(ExportError, match=r"holds a whole pipeline: name its autoencoder, .*model[\\/]vae$"):
        prepared(miniature_pipeline(), model)
