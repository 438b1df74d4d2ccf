"""A single file or a LoRA becomes a folder of exactly those weights, or is refused with what does not fit."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from huggingface_hub import hf_hub_download
from safetensors.torch import load as weights_in
from safetensors.torch import load_file, save_file

from cloud_server import complete
from edge_agent.tokens import Tokenizer
from export import denoiser as denoisers
from export import embedding
from export.__main__ import BAD_INPUT
from export.__main__ import main as edge_export
from export.convert import convert
from export.diffusion_onnx import export_bundle
from export.errors import ExportError
from export.pipeline import load, prepared
from export.reference import largest_difference, reference_image
from export.support import denoiser_of
from export.terminal import silent
from export.weights_file import refuse_quantized
from tests.hub import NOBODY, asked_here, hub, silent_hub
from tests.miniature import as_transformers_5_saves, miniature_pipeline, miniature_v3, miniature_xl
from tests.single_file import save_single_file

MADE = {"1.x": miniature_pipeline, "XL": miniature_xl}
RANKS, ALPHAS = (
    (1, 2, 4, 8),
    (2.0, 1.0, None),
)  # in turns: layers differ in both, as in LoRAs that were resized


@pytest.fixture(params=MADE)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path]:
    """A pipeline, its folder and its single file."""
    pipeline = MADE[request.param]()
    pipeline.save_pretrained(tmp_path / "model")
    return pipeline, tmp_path / "model", save_single_file(pipeline, tmp_path / "fine-tune.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    miniature_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_single_file(miniature_pipeline(), tmp_path / "fine-tune.safetensors")


def networks(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def weights_of(pipeline: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": weight
        for part, network in networks(pipeline).items()
        for name, weight in network.state_dict().items()
    }


def weights_at(folder: Path) -> dict[str, torch.Tensor]:
    return weights_of(complete.pipeline(folder, torch.float32))


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def without_tokens(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whose matrix has another size where tokens were added."""
    return {name: weight for name, weight in weights.items() if not name.endswith("token_embedding.weight")}


def lora_for(pipeline: Any, file: Path, **renamed: str) -> dict[str, torch.Tensor]:
    """Write a LoRA of all layers with attention, under the names that kohya-ss's trainer gives, and return what it
    adds to which weights.
    """
    found, added = {}, {}
    prefixes = {"text_encoder": "lora_te1" if hasattr(pipeline, "text_encoder_2") else "lora_te"}
    prefixes |= {"text_encoder_2": "lora_te2", "unet": "lora_unet"}
    for part, prefix in prefixes.items():
        for name, layer in attentive(getattr(pipeline, part, torch.nn.Module())):
            rank, alpha = RANKS[len(added) % len(RANKS)], ALPHAS[len(added) % len(ALPHAS)]
            down, up = matrices(layer, rank, seed=len(added))
            full = f"{prefix}_{name.replace('.', '_')}"
            for ours, theirs in renamed.items():
                full = full.replace(ours, theirs)
            found |= {f"{full}.lora_down.weight": down, f"{full}.lora_up.weight": up}
            if alpha is not None:
                found[f"{full}.alpha"] = torch.tensor(alpha)
            added[f"{part}.{name}.weight"] = (1.0 if alpha is None else alpha / rank) * up @ down
    save_file(found, file)
    return added


def attentive(network: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    return [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.Linear) and "attn" in name
    ]


def matrices(layer: torch.nn.Linear, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, layer.in_features, generator=generator)
    return down, torch.randn(layer.out_features, rank, generator=generator)


def test_a_single_file_becomes_a_folder_of_the_same_weights(
    saved: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    pipeline, model, file = saved
    out = tmp_path / "folder"
    assert edge_export(["convert", str(file), str(out), "--base", str(model)]) == 0
    assert differ(weights_at(out), weights_of(pipeline)) == []
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in model.iterdir())
    assert str(tmp_path) not in "".join(path.read_text() for path in out.rglob("*.json"))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_merge_of_2022_may_lack_a_part_of_the_text_encoders_names(
    model: Path, file: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copy lies where there is room for the folder, and not where temporary files do."""
    weights = {
        name.replace("transformer.text_model.", "transformer."): one for name, one in load_file(file).items()
    }
    if suffix == ".ckpt":  # some share memory there, as views of one tensor
        name = "cond_stage_model.transformer.embeddings.position_ids"
        weights[name] = (both := torch.arange(154).reshape(2, 77))[:1]
        weights["counted"] = both[1:]
    merge = tmp_path / f"merge{suffix}"
    save_file(weights, merge) if suffix == ".safetensors" else torch.save({"state_dict": weights}, merge)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        convert(str(merge), str(tmp_path / "folder"), base=str(model), report=silent)
    assert not list(tmp_path.glob(".folder*"))
    assert differ(weights_at(tmp_path / "folder"), weights_of(miniature_pipeline())) == []


def test_the_folder_of_a_single_file_can_be_exported(saved: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, model, file = saved
    convert(str(file), str(tmp_path / "folder"), base=str(model), report=silent)
    export_bundle(tmp_path / "folder", tmp_path / "bundle", steps=(2,), report=silent)


def test_what_was_in_half_precision_stays_so(model: Path, file: Path, tmp_path: Path) -> None:
    half = {name: weight.half() for name, weight in load_file(file).items()}
    save_file(half, file)
    convert(str(file), str(tmp_path / "folder"), base=str(model), report=silent)
    found = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in found.values()} == {torch.float16}
    assert torch.equal(found["conv_in.weight"], half["model.diffusion_model.input_blocks.0.0.weight"])


@pytest.mark.parametrize(
    ("markers", "changed"),
    [
        (("v_pred",), {"prediction_type": "v_prediction"}),
        (
            ("v_pred", "ztsnr"),
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
        ),
        (("ztsnr",), {"prediction_type": "epsilon"}),
    ],
)
def test_what_the_denoiser_predicts_is_read_from_the_file(
    tmp_path: Path, markers: tuple[str, ...], changed: dict[str, Any]
) -> None:
    """Under the names of markers without a value, which diffusers passes over."""
    pipeline = miniature_xl()
    pipeline.save_pretrained(tmp_path / "model")
    own = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())
    own |= {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(own))
    (index := tmp_path / "model" / "model_index.json").write_text(
        index.read_text().replace("PNDMScheduler", "EulerDiscreteScheduler")
    )
    file = save_single_file(
        pipeline, tmp_path / "x.safetensors", **{name: torch.tensor([]) for name in markers}
    )
    convert(str(file), str(tmp_path / "folder"), base=str(tmp_path / "model"), report=silent)
    found = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert found | changed == found
    assert found["beta_start"] == own["beta_start"]


def test_a_scheduler_that_cannot_say_what_the_file_says_gives_way(model: Path, tmp_path: Path) -> None:
    """PNDM, which Stable Diffusion 1.5 comes with, rescales no betas."""
    markers = {name: torch.tensor([]) for name in ("v_pred", "ztsnr")}
    file = save_single_file(miniature_pipeline(), tmp_path / "x.safetensors", **markers)
    convert(str(file), str(tmp_path / "folder"), base=str(model), report=silent)
    found = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert (found["_class_name"], found["prediction_type"]) == ("DDIMScheduler", "v_prediction")
    assert found["rescale_betas_zero_snr"] and not found["clip_sample"]


@pytest.mark.parametrize("wanted", ["EulerDiscrete:timestep_spacing=linspace", "DDIM", "PNDM"])
def test_a_scheduler_that_is_named_is_taken_or_refused_and_never_replaced(
    model: Path, tmp_path: Path, wanted: str
) -> None:
    markers = {name: torch.tensor([]) for name in ("v_pred", "ztsnr")}
    file, lines = save_single_file(miniature_pipeline(), tmp_path / "x.safetensors", **markers), []
    arguments: dict[str, Any] = {"base": str(model), "scheduler": wanted, "report": lines.append}
    if wanted == "PNDM":
        with pytest.raises(
            ExportError, match=r"PNDMScheduler is not for this model, .* EulerDiscrete or DDIM$"
        ):
            convert(str(file), str(tmp_path / "folder"), **arguments)
        return
    convert(str(file), str(tmp_path / "folder"), **arguments)
    found = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert found["_class_name"] == f"{wanted.partition(':')[0]}Scheduler" and found["rescale_betas_zero_snr"]
    spacing = "linspace" if "linspace" in wanted else "trailing"
    assert (found["prediction_type"], found["timestep_spacing"]) == ("v_prediction", spacing)
    assert f"the file says v_pred and ztsnr: {found['_class_name']}, v_prediction" in lines


def test_what_a_file_says_of_its_denoiser_holds_for_that_one_alone(
    saved: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    pipeline, model, _ = saved
    marked = save_single_file(pipeline, tmp_path / "x.safetensors", v_pred=torch.tensor([]))
    named = "model.diffusion_model."
    denoiser = {name: one for name, one in load_file(marked).items() if name.startswith(named)}
    save_file(denoiser, plain := tmp_path / "plain.safetensors")
    save_file(denoiser | {"v_pred": torch.tensor([])}, predicting_v := tmp_path / "v.safetensors")
    for file, other, kind in ((marked, plain, "epsilon"), (model, predicting_v, "v_prediction")):
        base = {"base": str(model)} if file == marked else {}
        convert(str(file), str(tmp_path / kind), denoiser=str(other), report=silent, **base)
        assert DiffusionPipeline.from_pretrained(tmp_path / kind).scheduler.config.prediction_type == kind
        assert differ(weights_at(tmp_path / kind), weights_of(pipeline)) == []
    with pytest.raises(ExportError, match="is a denoiser alone"):
        convert(str(predicting_v), str(tmp_path / "other"), base=str(model), report=silent)


@pytest.mark.parametrize(
    ("architecture", "said", "kind"),
    [
        ("stable-diffusion-v1", "v", "v_prediction"),
        ("stable-diffusion-v1", "epsilon", "epsilon"),
        ("stable-diffusion-v2-768-v", "v", "epsilon"),  # as kohya's merges of all of the second version
    ],
)
def test_a_file_says_in_its_metadata_that_it_predicts_v(
    file: Path, model: Path, tmp_path: Path, architecture: str, said: str, kind: str
) -> None:
    told = {"modelspec.architecture": architecture, "modelspec.prediction_type": said}
    save_file(load_file(file), tmp_path / "said.safetensors", told)
    convert(str(tmp_path / "said.safetensors"), str(tmp_path / "folder"), base=str(model), report=silent)
    assert DiffusionPipeline.from_pretrained(tmp_path / "folder").scheduler.config.prediction_type == kind


def test_more_layers_of_a_text_encoder_than_the_configs_name_are_refused(file: Path, tmp_path: Path) -> None:
    """As by the folder of a model whose last one was left out."""
    base = miniature_pipeline()
    layers = base.text_encoder.text_model.encoder.layers
    base.text_encoder.text_model.encoder.layers = layers[:-1]
    base.text_encoder.config.num_hidden_layers = len(layers) - 1
    base.save_pretrained(tmp_path / "skipped")
    why = f"has {len(layers)} layers of a text encoder, where they name {len(layers) - 1}$"
    with pytest.raises(ExportError, match=why):
        convert(str(file), str(tmp_path / "folder"), base=str(tmp_path / "skipped"), report=silent)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_quantized_weights_are_not_taken_for_the_weights(
    file: Path, model: Path, tmp_path: Path, suffix: str
) -> None:
    weights = load_file(file)
    inner = next(name for name in weights if name.endswith("attn1.to_q.weight"))
    encoder = next(name for name in weights if name.endswith("self_attn.q_proj.weight"))
    stem = encoder.removesuffix("weight")
    pipeline = miniature_pipeline()
    lora_for(pipeline, lora := tmp_path / "lora.safetensors")
    down = next(name for name in load_file(lora) if name.endswith("lora_down.weight"))
    for of, name, held in (
        (weights, inner, weights[inner].to(torch.int8)),
        (weights, f"{stem}scale_weight", torch.tensor(2.0)),
        (weights, f"{stem}weight_scale", torch.tensor(2.0)),
        (load_file(lora), down, load_file(lora)[down].to(torch.int8)),
    ):
        quantized = tmp_path / f"quantized{suffix}"
        save_file(of | {name: held}, quantized) if suffix == ".safetensors" else torch.save(
            of | {name: held}, quantized
        )
        options = {"loras": [(str(quantized), 1.0)]} if name == down else {"base": str(model)}
        with pytest.raises(ExportError, match=rf"is quantized, as {re.escape(name)} in it says"):
            convert(
                str(model if name == down else quantized), str(tmp_path / "folder"), report=silent, **options
            )


def test_the_third_text_encoder_of_stable_diffusion_3_may_be_quantized(tmp_path: Path) -> None:
    """It is left out."""
    scales = (
        "text_encoders.t5xxl.transformer.scaled_fp8",
        "text_encoders.t5xxl.transformer.shared.scale_weight",
    )
    save_file({name: torch.tensor([2.0]) for name in scales}, file := tmp_path / "whole.safetensors")
    refuse_quantized(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_what_a_file_says_by_names_without_a_value_is_none_of_its_weights(
    saved: tuple[Any, Path, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    pipeline, model, _ = saved
    weights = {name: one.half() for name, one in pipeline.unet.state_dict().items()}
    save_file(weights | {"v_pred": torch.tensor([], dtype=dtype)}, file := tmp_path / "denoiser.safetensors")
    convert(str(model), str(tmp_path / "folder"), denoiser=str(file), report=silent)
    found = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == weights.keys() and {one.dtype for one in found.values()} == {torch.float16}


def test_what_was_put_in_the_folders_place_meanwhile_stays(model: Path, file: Path, tmp_path: Path) -> None:
    def put(line: str) -> None:
        if line.startswith("writing"):
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "precious.txt").touch()

    with pytest.raises(ExportError, match="folder is there; name a new folder"):
        convert(str(file), str(tmp_path / "folder"), base=str(model), report=put)
    assert (tmp_path / "folder" / "precious.txt").is_file()


@pytest.mark.posix
def test_a_full_disk_is_said_in_words(model: Path, file: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it; safetensors has an error of its own for that."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            ExportError, match=r"cannot be written: .*; make room, or name a folder on another"
        ):
            convert(str(file), str(tmp_path / "folder"), base=str(model), report=silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine-tune.safetensors", "model"]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_lora_is_added_to_the_weights_it_changes(
    saved: tuple[Any, Path, Path], tmp_path: Path, scale: float
) -> None:
    pipeline, model, _ = saved
    added = lora_for(pipeline, tmp_path / "style.safetensors")
    named = f"{tmp_path / 'style.safetensors'}" + ("" if scale == 1 else f"={scale}")
    assert edge_export(["convert", str(model), str(tmp_path / "folder"), "--lora", named]) == 0
    found, before = weights_at(tmp_path / "folder"), weights_of(pipeline)
    assert sorted(differ(found, before)) == sorted(added)
    for name, change in added.items():
        torch.testing.assert_close(found[name], before[name] + scale * change, atol=1e-5, rtol=1e-5)


def test_two_loras_and_a_scheduler_make_one_folder(model: Path, tmp_path: Path) -> None:
    pipeline = miniature_pipeline()
    (model / "README.md").write_text("---\nlicense: openrail\n---\n")
    (model / "routet2i.json").write_text('{"steps": 4}')
    added = lora_for(pipeline, tmp_path / "a=b.safetensors")  # its own name, and no scale
    loras = [(str(tmp_path / "a=b.safetensors"), scale) for scale in (1.0, -0.25)]
    convert(str(model), str(tmp_path / "folder"), loras=loras, scheduler="LCM", report=silent)
    found, before = weights_at(tmp_path / "folder"), weights_of(pipeline)
    for name, change in added.items():
        torch.testing.assert_close(found[name], before[name] + 0.75 * change, atol=1e-5, rtol=1e-5)
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "folder").scheduler, LCMScheduler)
    assert (tmp_path / "folder" / "README.md").read_text() == (model / "README.md").read_text()
    assert (tmp_path / "folder" / "routet2i.json").read_text() == '{"steps": 4}'


@pytest.mark.parametrize("peft_says", [True, False])
@pytest.mark.parametrize(
    ("make", "part", "left_out"),
    [
        (miniature_v3, "transformer", ""),
        (miniature_pipeline, "text_encoder", "text_model."),  # as transformers 5 names its layers
        (miniature_xl, "text_encoder", "text_model."),
    ],
)
def test_a_lora_in_the_layout_that_diffusers_writes_is_added(
    tmp_path: Path,
    make: Callable[[], Any],
    part: str,
    left_out: str,
    peft_says: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With peft's account of the scale beside the weights, and without; offline."""
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", True)
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "model")
    before = weights_of(pipeline)
    found, added, targets = {}, {}, []
    for seed, (name, layer) in enumerate(attentive(getattr(pipeline, part))):
        down, up = matrices(layer, 4, seed)
        targets.append(name.removeprefix(left_out))
        stem = f"{part}.{targets[-1]}"
        found |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        added[f"{part}.{name}.weight"] = (0.5 if peft_says else 1.0) * up @ down
    account = {"r": 4, "lora_alpha": 2, "target_modules": targets, "rank_pattern": {}, "alpha_pattern": {}}
    account = {f"{part}.{key}": value for key, value in account.items()}
    told = {"lora_adapter_metadata": json.dumps(account)} if peft_says else {}
    save_file(found, lora := tmp_path / "style.safetensors", {"format": "pt"} | told)
    convert(str(tmp_path / "model"), str(tmp_path / "folder"), loras=[(str(lora), 1.0)], report=silent)
    after = weights_at(tmp_path / "folder")
    assert sorted(differ(after, before)) == sorted(added)
    for name, change in added.items():
        torch.testing.assert_close(after[name], before[name] + change, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_of_a_dora_in_peft_s_layout_a_share_goes_part_of_the_way(
    model: Path, tmp_path: Path, scale: float
) -> None:
    """As of one in kohya-ss's: peft would stretch the weights wholly, whatever the share."""
    pipeline = miniature_pipeline()
    before = weights_of(pipeline)
    found, added = {}, {}
    for seed, (name, layer) in enumerate(attentive(pipeline.unet)):
        down, up = matrices(layer, 4, seed)
        lengths = 1.5 * layer.weight.data.norm(dim=1)
        stem = f"unet.{name}"
        found |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        found |= {f"{stem}.lora_magnitude_vector": lengths, f"{stem}.alpha": torch.tensor(2.0)}
        whole = layer.weight.data + 0.5 * up @ down
        added[f"{stem}.weight"] = whole * (lengths / whole.norm(dim=1))[:, None] - layer.weight.data
    save_file(found, lora := tmp_path / "style.safetensors")
    convert(str(model), str(tmp_path / "folder"), loras=[(str(lora), scale)], report=silent)
    after = weights_at(tmp_path / "folder")
    assert sorted(differ(after, before)) == sorted(added)
    for name, change in added.items():
        torch.testing.assert_close(after[name], before[name] + scale * change, atol=1e-5, rtol=1e-5)


def test_a_lora_of_the_first_diffusers_names_no_part(model: Path, tmp_path: Path) -> None:
    """It held matrices for the attention of the denoiser, and nothing else."""
    pipeline = miniature_pipeline()
    found, added = {}, {}
    for seed, (name, layer) in enumerate(attentive(pipeline.unet)):
        if not name.endswith(("to_q", "to_k", "to_v")):
            continue
        down, up = matrices(layer, 4, seed)
        block, _, kind = name.rpartition(".")
        stem = f"{block}.processor.{kind}_lora"
        found |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        added[f"unet.{name}.weight"] = up @ down
    torch.save(found, lora := tmp_path / "pytorch_lora_weights.bin")
    convert(str(model), str(tmp_path / "folder"), loras=[(str(lora), 1.0)], report=silent)
    after, before = weights_at(tmp_path / "folder"), weights_of(pipeline)
    assert sorted(differ(after, before)) == sorted(added)
    for name, change in added.items():
        torch.testing.assert_close(after[name], before[name] + change, atol=1e-5, rtol=1e-5)


def lost(end: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del weights[next(name for name in weights if name.endswith(end))]
        return weights

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lost("lora_down.weight"), r"has no \S+lora_down\.weight: it is incomplete"),
        (lost("lora_up.weight"), r"has no \S+lora_up\.weight: it is incomplete"),
        (lambda _: {"x.hada_w1_a": torch.ones(1)}, "is no LoRA that is read here"),
        (lambda _: {}, "is no LoRA that is read here"),
        (lambda weights: weights | {"x.dora_scale": torch.ones(1)}, r"is a DoRA .* scale x\.dora_scale"),
        (lambda weights: {name: weight / 0 for name, weight in weights.items()}, "is damaged: .* no number"),
        (
            lambda weights: weights | {"lora_unet_x.diff": torch.ones(1)},
            r"has 40 of the 41 layers .* lora_unet_x:",
        ),
        (
            lambda weights: weights | {next(iter(weights)).partition(".")[0] + ".a1.weight": torch.ones(1)},
            r"holds \S+\.a1\.weight, a kind of change that is not known here",
        ),
    ],
)
def test_a_lora_that_is_not_whole_or_of_another_kind_is_refused(
    model: Path, tmp_path: Path, change: Any, why: str
) -> None:
    lora = tmp_path / "style.safetensors"
    lora_for(miniature_pipeline(), lora)
    save_file(change(weights_in(lora.read_bytes())), lora)
    with pytest.raises(ExportError, match=why):
        convert(str(model), str(tmp_path / "folder"), loras=[(str(lora), 1.0)], report=silent)
    assert not (tmp_path / "folder").exists()


STEM = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (
            ("lora_A.weight", "lora_B.weight", "lora_mid.weight"),
            rf"holds {STEM}\.lora_mid\.weight, a kind of",
        ),
        (("lora.down.weight", "lora.up.weight", "alpha"), rf"holds {STEM}\.alpha, a kind of change"),
        (
            ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.x"),
            r"holds \S+_vector\.x, a kind of change",
        ),
        (("lora_down.weight", "lora_up.weight", "alpha"), r"is no LoRA .* not all begin with lora_$"),
    ],
)
def test_a_lora_with_names_that_nothing_reads_is_refused(
    model: Path, tmp_path: Path, names: tuple[str, ...], why: str
) -> None:
    """Of them diffusers reads what it knows, and passes over the others or fails without a word of them."""
    down, up = matrices(
        miniature_pipeline().unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q, 4, 0
    )
    held = dict(zip(names, (down, up, torch.ones(4, 4)), strict=True))
    save_file({f"{STEM}.{name}": one for name, one in held.items()}, lora := tmp_path / "style.safetensors")
    with pytest.raises(ExportError, match=why):
        convert(str(model), str(tmp_path / "folder"), loras=[(str(lora), 1.0)], report=silent)
    assert not (tmp_path / "folder").exists()


def test_a_lora_with_layers_that_the_model_does_not_have_is_refused(model: Path, tmp_path: Path) -> None:
    """Of them diffusers warns, and fuses the others."""
    lora = tmp_path / "style.safetensors"
    lora_for(miniature_pipeline(), lora, down_blocks_0="down_blocks_7")
    with pytest.raises(
        ExportError,
        match=r"style.* cannot be fused .*, which has (\d+) of the (?!\1)\d+ layers that it changes",
    ):
        convert(str(model), str(tmp_path / "folder"), loras=[(str(lora), 1.0)], report=silent)
    assert not (tmp_path / "folder").exists()


def test_a_lora_of_another_model_is_refused_in_a_line(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lora = tmp_path / "style.safetensors"
    lora_for(miniature_xl(), lora)
    save_file({name: weight for name, weight in load_file(lora).items() if "lora_unet" in name}, lora)
    assert edge_export(["convert", str(model), str(tmp_path / "folder"), "--lora", str(lora)]) == BAD_INPUT
    error = capfd.readouterr().err
    assert "cannot be fused with this model" in error and "has another size" in error
    assert len(error.splitlines()) == 1


def without(beginning: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {
        name: weight for name, weight in weights.items() if not name.startswith(beginning)
    }


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without("model.diffusion_model.middle_block.1.norm"), "makes no StableDiffusionPipeline .*missing"),
        (
            without("cond_stage_model.transformer.text_model.final"),
            r"no weights text_model\.final_layer_norm\.weight and 1 more of the text_encoder",
        ),
        (
            without("first_stage_model.decoder.mid"),
            "makes no StableDiffusionPipeline .* weights are missing",
        ),
        (without("cond_stage_model."), "is no whole model: it has no weights of a text encoder"),
        (lambda _: {"lora_unet_mid.lora_up.weight": torch.zeros(1)}, "is a LoRA, .* this file with --lora"),
        (lambda _: {}, "is no whole model: it has no weights of a text encoder; .* --autoencoder"),
    ],
)
def test_a_file_that_is_no_whole_model_is_refused(
    model: Path, file: Path, tmp_path: Path, change: Any, why: str
) -> None:
    save_file(change(load_file(file)), file)
    with pytest.raises(ExportError, match=why):
        convert(str(file), str(tmp_path / "folder"), base=str(model), report=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine-tune.safetensors", "model"]


def test_a_file_without_an_autoencoder_gets_that_of_its_base(model: Path, file: Path, tmp_path: Path) -> None:
    weights = without("first_stage_model.")(load_file(file))
    save_file({name: weight.half() for name, weight in weights.items()}, file)
    said: list[str] = []
    convert(str(file), str(tmp_path / "folder"), base=str(model), report=said.append)
    assert said[0] == f"{file} has no autoencoder: taking that of {model}"
    kept = load_file(tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in kept.values()} == {torch.float32}  # as the base has it, not the file
    assert all(
        "vae." not in name
        for name in differ(weights_at(tmp_path / "folder"), weights_of(miniature_pipeline()))
    )


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_the_autoencoder_of_a_base_on_the_hub_stays_in_half_precision(
    model: Path, file: Path, tmp_path: Path, variant: str
) -> None:
    """Also where it is there in half precision alone."""
    save_file(without("first_stage_model.")(load_file(file)), file)
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    halves = {name: weight.half() for name, weight in load_file(weights).items()}
    weights.unlink()
    save_file(halves, weights.with_suffix(f"{variant}.safetensors"))
    converted_from(model, tmp_path, str(file), base="owner/name")
    found = load_file(tmp_path / "folder" / "vae" / weights.name)
    assert {weight.dtype for weight in found.values()} == {torch.float16}
    assert differ(found, halves) == []


def test_a_base_without_an_autoencoder_gives_none(model: Path, file: Path, tmp_path: Path) -> None:
    save_file(without("first_stage_model.")(load_file(file)), file)
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ExportError, match=f"^{model} gives no autoencoder: "):
        convert(str(file), str(tmp_path / "folder"), base=str(model), report=silent)


def test_a_base_with_less_than_the_file_holds_is_refused(model: Path, file: Path, tmp_path: Path) -> None:
    """As that of a model that was distilled to fewer layers: of the others nothing would be said."""
    config = model / "unet" / "config.json"
    told = json.loads(config.read_text()) | {"up_block_types": ["UpBlock2D"] * 2}
    config.write_text(json.dumps(told))
    with pytest.raises(ExportError, match=r"it has \d+ weights of the unet, of which they name \d+$"):
        convert(str(file), str(tmp_path / "folder"), base=str(model), report=silent)


def test_a_base_that_transformers_5_saved_gives_its_tokenizer(
    model: Path, file: Path, tmp_path: Path
) -> None:
    tokenizer = as_transformers_5_saves(model / "tokenizer")
    convert(str(file), str(tmp_path / "folder"), base=str(model), report=silent)
    loaded = complete.pipeline(tmp_path / "folder", torch.float32)
    assert loaded.tokenizer("a cat!").input_ids == tokenizer("a cat!").input_ids


def test_a_base_of_another_family_is_refused_by_what_does_not_fit(file: Path, tmp_path: Path) -> None:
    miniature_xl().save_pretrained(tmp_path / "xl")
    with pytest.raises(ExportError, match=r"makes no StableDiffusionXLPipeline with .*: .* has another size"):
        convert(str(file), str(tmp_path / "folder"), base=str(tmp_path / "xl"), report=silent)


@pytest.mark.parametrize(
    ("name", "bytes_", "why"),
    [
        ("model.gguf", b"x", r"model\.gguf is no file of weights that is read here: .*\.safetensors, \.ckpt"),
        (
            "model.ckpt",
            b"x",
            r"model\.ckpt is cut off or damaged, no file of weights, .* as \.safetensors",
        ),
        ("model.safetensors", b"", "is cut off or damaged: .*; get it again"),
        ("model.safetensors", b"\xff" * 64, "is cut off or damaged: .*; get it again"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(
    model: Path, tmp_path: Path, name: str, bytes_: bytes, why: str
) -> None:
    (tmp_path / name).write_bytes(bytes_)
    for as_model in (True, False):
        options: dict[str, Any] = {} if as_model else {"loras": [(str(tmp_path / name), 1.0)]}
        with pytest.raises(ExportError, match=why):
            convert(
                str(tmp_path / name if as_model else model),
                str(tmp_path / "folder"),
                report=silent,
                **options,
            )


@pytest.mark.parametrize("lora", ["style.safetensors", "./style", "owner/name/more"])
def test_a_mistyped_lora_is_not_looked_for_on_the_hub(model: Path, tmp_path: Path, lora: str) -> None:
    with pytest.raises(ExportError, match=f"^{lora} cannot be loaded as a LoRA: there is no such f"):
        convert(str(model), str(tmp_path / "folder"), loras=[(lora, 1.0)], report=silent)


def converted_from(
    kept: Path, tmp_path: Path, model: str, repository: str = "owner/name", **options: Any
) -> str:
    """What is reported with a hub that has the folder `kept` as this repository; writes the folder `folder`, which
    comes out the same where the hub then says nothing.
    """
    lines: list[str] = []
    with hub(kept, repository) as address, asked_here(address, tmp_path / "cache"):
        convert(model, str(tmp_path / "folder"), report=lines.append, **options)
    with silent_hub() as address, asked_here(address, tmp_path / "cache"):
        convert(model, str(tmp_path / "again"), report=silent, **options)
    assert read_all(tmp_path / "again") == read_all(tmp_path / "folder")
    return "\n".join(lines)


def read_all(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_configs_of_a_single_file_come_from_the_hub(model: Path, file: Path, tmp_path: Path) -> None:
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    for weights in model.rglob("*.safetensors"):
        weights.write_bytes(b"which nobody asks for")
    said = converted_from(model, tmp_path, str(file), base)
    assert said.startswith(f"taking configs and tokenizers from {base}; --base names another model's\n")
    assert differ(weights_at(tmp_path / "folder"), weights_of(miniature_pipeline())) == []


def test_a_model_of_the_hub_keeps_its_cards_and_its_half_precision(tmp_path: Path) -> None:
    pipeline = miniature_pipeline()
    pipeline.unet.half()
    pipeline.save_pretrained(kept := tmp_path / "kept")
    (kept / "README.md").write_text("---\nlicense: openrail\n---\n")
    (kept / "routet2i.json").write_text('{"steps": 4}')
    said = converted_from(kept, tmp_path, "owner/name", scheduler="LCM")
    assert "kept routet2i.json: look whether its steps" in said
    for card in ("README.md", "routet2i.json"):
        assert (tmp_path / "folder" / card).read_text() == (kept / card).read_text()
    parts = {"unet": torch.float16, "vae": torch.float32}
    for part, dtype in parts.items():
        weights = load_file(tmp_path / "folder" / part / "diffusion_pytorch_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {dtype}


@pytest.mark.parametrize("pickled", [True, False])
def test_a_lora_and_an_embedding_come_from_the_hub(model: Path, tmp_path: Path, pickled: bool) -> None:
    pipeline = miniature_pipeline()
    (kept := tmp_path / "kept").mkdir()
    added = lora_for(pipeline, kept / "pytorch_lora_weights.safetensors")
    vector = concept(pipeline, kept / "learned_embeds.safetensors", vectors=1, stated="<catty>")[0]
    for file in [*kept.iterdir()] if pickled else ():
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    options = {"loras": [("owner/name", 1.0)], "embeddings": [("owner/name", "<dotty>")]}
    said = converted_from(kept, tmp_path, str(model), **options)
    assert "adding owner/name: write <dotty> in prompts\n" in said
    made = complete.pipeline(tmp_path / "folder", torch.float32)
    assert torch.equal(learnt(made.tokenizer, made.text_encoder, "<dotty>"), vector)
    assert set(added) <= set(differ(*map(without_tokens, (weights_of(made), weights_of(pipeline)))))


def concept(
    pipeline: Any, file: Path, *, vectors: int = 3, stated: str = "emb_params", halved: bool = False
) -> list[torch.Tensor]:
    """Write a concept of so many vectors for each text encoder to `file`, and return them, in float32."""
    encoders = [part for name, part in networks(pipeline).items() if name.startswith("text_encoder")]
    made = []
    for seed, encoder in enumerate(encoders):
        generator = torch.Generator().manual_seed(seed)
        hidden = encoder.get_input_embeddings().embedding_dim
        made.append(
            torch.randn(vectors, hidden, generator=generator).to(torch.float16 if halved else torch.float32)
        )
    names = (stated,) if len(made) == 1 else ("clip_l", "clip_g")
    save_file(dict(zip(names, made, strict=True)), file)
    return [one.float() for one in made]


def learnt(tokenizer: Any, encoder: Any, name: str) -> torch.Tensor:
    """The vectors that the encoder has for the tokens of `name`."""
    return encoder.get_input_embeddings().weight[tokenizer(name, add_special_tokens=False).input_ids]


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_concept_of_several_vectors_is_drawn_as_diffusers_draws_it(tmp_path: Path, make: Any) -> None:
    """In the prompt and in the negative one, which most of what is passed around is for; under the file's name."""
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "model")
    concept(pipeline, file := tmp_path / "EasyCatty.safetensors", halved=True)
    arguments = [
        "convert",
        str(tmp_path / "model"),
        str(out := tmp_path / "folder"),
        "--embedding",
        str(file),
    ]
    assert edge_export(arguments) == 0
    bundle = export_bundle(out, tmp_path / "bundle", steps=(2,), report=silent)
    diffusers = prepared(load(out))
    drawn = {
        wish: reference_image(diffusers, wish, "dark, EasyCatty", seed=7, steps=2, guidance=3.0)
        for wish in ("two EasyCatty and a dog,EasyCatty", "two easycatty and a dog")
    }
    assert largest_difference(bundle, list(drawn.values())) < 1e-3
    one, other = (reference.colours for reference in drawn.values())
    assert np.abs(one - other).max() > 1e-2, "the vectors say nothing"


def test_what_follows_a_concept_is_heard_where_the_config_names_another_end(tmp_path: Path) -> None:
    """As that of Stable Diffusion XL does: transformers then looks for the end at the largest id."""
    pipeline = miniature_xl()
    pipeline.text_encoder_2.config.eos_token_id = 2
    pipeline.save_pretrained(tmp_path / "model")
    concept(pipeline, file := tmp_path / "catty.safetensors")
    convert(str(tmp_path / "model"), str(tmp_path / "folder"), embeddings=[(str(file), None)], report=silent)
    before, after = load(tmp_path / "model"), load(tmp_path / "folder")
    with torch.no_grad():
        plain = [each.encode_prompt("two red cats", device="cpu")[2] for each in (before, after)]
        catty = [
            after.encode_prompt(f"two catty{more}", device="cpu")[2]
            for more in ("", " and a dog on the moon")
        ]
    assert torch.equal(*plain) and not torch.allclose(*catty, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        (
            lambda weights: weights | {"x": torch.ones(1)},
            None,
            "holds emb_params and x, and an embedding for Stable",
        ),
        (lambda _: {}, None, "holds nothing, and an embedding for StableDiffusionPipeline holds emb_params"),
        (
            lambda weights: {"clip_g": weights["emb_params"], "clip_l": weights["emb_params"].clone()},
            None,
            "holds clip_g and clip_l, .* it was made for another model",
        ),
        (
            lambda weights: {"clip_l": weights["emb_params"]},
            None,
            "holds clip_l, .* it was made for another model",
        ),
        (
            lambda _: {"emb_params": torch.ones(2, 3)},
            None,
            r"holds 2x3 numbers, and a text encoder .* of \d+$",
        ),
        (lambda _: {"emb_params": torch.ones(())}, None, "was made for another model"),
        (
            lambda weights: {"emb_params": weights["emb_params"] / 0},
            None,
            "is damaged: it holds what is no number",
        ),
        (
            lambda weights: weights,
            "<|endoftext|>",
            r"'<\|endoftext\|>' is a token of the model already; .*=NAME$",
        ),
    ],
)
def test_what_is_no_embedding_for_the_model_is_refused(
    model: Path, tmp_path: Path, change: Any, name: str | None, why: str
) -> None:
    concept(miniature_pipeline(), file := tmp_path / "catty.safetensors")
    save_file(change(weights_in(file.read_bytes())), file)
    with pytest.raises(ExportError, match=why):
        convert(str(model), str(tmp_path / "folder"), embeddings=[(str(file), name)], report=silent)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("there", "vectors", "name", "why"),
    [
        ({"Sty": 3}, 1, "Sty", "'Sty' is a token of the model already"),
        ({"Sty": 3}, 1, "Sty_2", "'Sty_2' is a token of the model already"),
        ({"Sty_2": 1}, 3, "Sty", "'Sty_2' is a token of the model already"),
        ({"Sty_3": 1}, 3, "Sty", "'Sty_3' is a token of the model already"),
        ({"Sty": 1}, 1, "Sty_1", "'Sty_1', which would be one more vector of 'Sty'"),
        ({"Sty": 3}, 1, "Sty_3", "'Sty_3', which would be one more vector of 'Sty'"),
        ({"Easy": 3}, 1, "EasyV2", "'EasyV2' beside 'Easy': one is part of the other's name"),
        ({"EasyV2": 1}, 2, "Easy", "'Easy' beside 'EasyV2': one is part of the other's name"),
        ({}, 1, "cat", "'cat' is a token of the model already"),
        (
            {},
            1,
            "Dog",
            "'Dog' is a token of the model already",
        ),  # as dog</w>, and hotdog would be read as two words
        ({}, 1, " ", "'' cannot be written in a prompt"),
        ({}, 1, "a\nb", r"'a\\nb' cannot be written in a prompt"),
    ],
)
def test_a_name_that_would_be_read_as_something_else_is_refused(
    tmp_path: Path, there: dict[str, int], vectors: int, name: str, why: str
) -> None:
    """Of two names that only begin alike diffusers writes out one within the other, in an order of its own."""
    pipeline = miniature_pipeline()
    pipeline.tokenizer.add_tokens("cat")
    for other, count in there.items():
        concept(pipeline, file := tmp_path / "other.safetensors", vectors=count)
        embedding.add(pipeline, file, other)
    concept(pipeline, file := tmp_path / "new.safetensors", vectors=vectors)
    with pytest.raises(ExportError, match=f"{why}.*; give it a(nother)? name with new.safetensors=NAME$"):
        embedding.add(pipeline, file, name)


def test_names_that_only_begin_alike_go_together_where_each_is_one_vector(tmp_path: Path) -> None:
    pipeline = miniature_pipeline()
    concept(pipeline, file := tmp_path / "cat-toy.safetensors", vectors=1)
    pipeline.text_encoder.resize_token_embeddings(2 * len(pipeline.tokenizer))  # as some have room left
    for name in ("cat-toy", "cat-toy-2"):
        assert embedding.add(pipeline, file, name) == name
    assert pipeline.text_encoder.get_input_embeddings().num_embeddings == 2 * (len(pipeline.tokenizer) - 2)
    assert pipeline.tokenizer.tokenize("a cat-toy-2") == ["a</w>", "cat-toy-2"]


def test_a_concept_is_found_in_its_own_capitals_by_a_fast_tokenizer_too(model: Path, tmp_path: Path) -> None:
    """As transformers 5 saves all."""
    as_transformers_5_saves(model / "tokenizer")
    concept(miniature_pipeline(), file := tmp_path / "EasyCatty.safetensors", vectors=3)
    convert(str(model), str(tmp_path / "folder"), embeddings=[(str(file), None)], report=silent)
    bundle = export_bundle(tmp_path / "folder", tmp_path / "bundle", steps=(2,), report=silent)
    assert Tokenizer.open(bundle).encode("a EasyCatty").texts == ["a", *["EasyCatty"] * 3]


def test_an_embedding_of_xl_has_as_many_vectors_for_either_text_encoder(tmp_path: Path) -> None:
    pipeline = miniature_xl()
    concept(pipeline, file := tmp_path / "catty.safetensors", vectors=3)
    weights = weights_in(file.read_bytes())
    save_file(weights | {"clip_g": weights["clip_g"][:2].clone()}, file)
    with pytest.raises(ExportError, match="holds 3 and 2 vectors for the two text encoders"):
        embedding.add(pipeline, file)


def test_what_half_precision_cannot_hold_is_refused(model: Path, tmp_path: Path) -> None:
    pipeline = miniature_pipeline()
    pipeline.text_encoder.half()
    pipeline.save_pretrained(tmp_path / "half")
    concept(pipeline.to(torch.float32), file := tmp_path / "catty.safetensors")
    save_file({"emb_params": 1e6 * load_file(file)["emb_params"]}, file)
    with pytest.raises(ExportError, match=r"text_encoder's \S+ is in half precision no finite number"):
        convert(
            str(tmp_path / "half"), str(tmp_path / "folder"), embeddings=[(str(file), None)], report=silent
        )
    assert not (tmp_path / "folder").exists()


def test_layers_that_are_to_be_skipped_are_left_out(model: Path, tmp_path: Path) -> None:
    """So that no program that runs the model need be told. diffusers counts from 0, and not for negative prompts."""
    out = tmp_path / "folder"
    assert edge_export(["convert", str(model), str(out), "--clip-skip", "2"]) == 0
    shorter, whole = (complete.pipeline(folder, torch.float32) for folder in (out, model))
    asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    expected = whole.encode_prompt("two cats", **asked, clip_skip=1)[0]
    assert torch.equal(shorter.encode_prompt("two cats", **asked)[0], expected)
    assert not torch.equal(whole.encode_prompt("two cats", **asked)[0], expected)
    export_bundle(out, tmp_path / "bundle", steps=(2,), report=silent)


def test_more_layers_than_there_are_and_those_of_two_text_encoders_are_not_skipped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    miniature_xl().save_pretrained(tmp_path / "xl")
    for name, clip_skip, why in (
        ("model", 99, r"the text encoder has \d+ layers: --clip-skip goes from 1 to that"),
        ("xl", 2, "--clip-skip is for models of one text encoder, and StableDiffusionXLPipeline has two"),
    ):
        with pytest.raises(ExportError, match=why):
            convert(str(tmp_path / name), str(tmp_path / "folder"), clip_skip=clip_skip, report=silent)
    for text in ("0", "-1", "two", ""):
        with pytest.raises(SystemExit):
            edge_export(["convert", str(model), str(tmp_path / "folder"), f"--clip-skip={text}"])
        assert "is no layer counted from the last, such as 2" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_an_embedding_without_a_name_and_one_for_stable_diffusion_3_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    concept(miniature_pipeline(), file := tmp_path / "catty.safetensors")
    with pytest.raises(SystemExit):
        edge_export(["convert", str(model), str(tmp_path / "folder"), "--embedding", f"{file}= "])
    assert "names nothing; write FILE=NAME, or FILE alone" in capsys.readouterr().err
    miniature_v3().save_pretrained(tmp_path / "v3")
    with pytest.raises(ExportError, match=r"^StableDiffusion3Pipeline reads no embeddings"):
        convert(str(tmp_path / "v3"), str(tmp_path / "folder"), embeddings=[(str(file), None)], report=silent)


def another(pipeline: Any, **changes: Any) -> Any:
    """A denoiser for `pipeline` with weights of its own, and these changes to its config."""
    _, own = denoiser_of(pipeline)
    config = {key: value for key, value in own.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return type(own)(**(config | changes)).eval()


@pytest.mark.parametrize("make", [miniature_pipeline, miniature_xl, miniature_v3])
def test_a_denoiser_from_a_file_takes_the_place_of_the_models_own(tmp_path: Path, make: Any) -> None:
    """In the half precision that it has, beside parts that are in float32."""
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "model")
    part, _ = denoiser_of(pipeline)
    denoiser = another(pipeline).half()
    save_file(denoiser.state_dict(), file := tmp_path / "few-steps.safetensors")
    for weights in (tmp_path / "model" / part).glob("*.safetensors"):
        weights.write_bytes(b"which nobody reads")
    arguments = ["convert", str(tmp_path / "model"), str(out := tmp_path / "folder"), "--denoiser", str(file)]
    assert edge_export(arguments) == 0
    setattr(pipeline, part, denoiser.float())
    assert differ(weights_at(out), weights_of(pipeline)) == []
    kept = {
        name: {weight.dtype for weight in weights_in(file.read_bytes()).values()}
        for name in (part, "vae")
        for file in (out / name).glob("*.safetensors")
    }
    assert kept == {part: {torch.float16}, "vae": {torch.float32}}


@pytest.fixture
def latent_consistency(tmp_path: Path) -> Path:
    """A denoiser as that of XL is published, which takes the guidance scale as an input, beside a folder `model`."""
    pipeline = miniature_xl()
    pipeline.save_pretrained(tmp_path / "model")
    another(pipeline, time_cond_proj_dim=16).half().save_pretrained(tmp_path / "lcm")
    return tmp_path / "lcm"


def test_a_denoiser_with_a_config_of_its_own_makes_a_model_that_can_be_exported(
    latent_consistency: Path, tmp_path: Path
) -> None:
    model, out = (str(tmp_path / name) for name in ("model", "folder"))
    convert(model, out, denoiser=str(latent_consistency), scheduler="LCM", report=silent)
    made = export_bundle(out, tmp_path / "bundle", steps=(2,), guidance=3.0, report=silent)
    assert made.manifest.guidance_embedding == 16


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_denoiser_comes_from_the_hub(latent_consistency: Path, tmp_path: Path, variant: str) -> None:
    """Also where it is there in half precision alone."""
    weights = latent_consistency / "diffusion_pytorch_model.safetensors"
    kept = weights.rename(weights.with_suffix(f"{variant}.safetensors"))
    said = converted_from(latent_consistency, tmp_path, str(tmp_path / "model"), denoiser="owner/name")
    assert said.startswith("owner/name is no folder here: asking the hub at http://127.0.0.1:")
    found = load_file(tmp_path / "folder" / "unet" / weights.name)
    assert {weight.dtype for weight in found.values()} == {torch.float16}
    assert differ(found, load_file(kept)) == []


def test_faulty_weights_of_the_hub_are_not_replaced_by_those_in_half_precision(
    latent_consistency: Path, tmp_path: Path
) -> None:
    weights = latent_consistency / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(weights, weights.with_suffix(".fp16.safetensors"))
    held = load_file(weights)
    del held["conv_in.weight"]
    save_file(held, weights)
    with pytest.raises(ExportError, match=r"has no weights conv_in\.weight$"):
        converted_from(latent_consistency, tmp_path, str(tmp_path / "model"), denoiser="owner/name")


def test_a_hub_that_is_gone_before_the_weights_came_is_said_to_be_out_of_reach(
    latent_consistency: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with hub(latent_consistency) as address, asked_here(address, cache):
        hf_hub_download("owner/name", "config.json", cache_dir=cache)
    with asked_here(NOBODY, cache), pytest.raises(ExportError, match=r"hub at \S+ cannot be reached"):
        convert(str(tmp_path / "model"), str(tmp_path / "folder"), denoiser="owner/name", report=silent)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_denoiser_may_have_the_names_of_the_first_code(
    saved: tuple[Any, Path, Path], tmp_path: Path, prefix: str
) -> None:
    pipeline, model, _ = saved
    pipeline.unet = another(pipeline)
    save_single_file(pipeline, file := tmp_path / "few-steps.safetensors")
    named = "model.diffusion_model."
    weights = {name: one for name, one in weights_in(file.read_bytes()).items() if name.startswith(named)}
    save_file({prefix + name.removeprefix(named): one for name, one in weights.items()}, file)
    convert(str(model), str(tmp_path / "folder"), denoiser=str(file), report=silent)
    assert differ(weights_at(tmp_path / "folder"), weights_of(pipeline)) == []
    with pytest.raises(ExportError, match=r"is a denoiser alone: .* this file with --denoiser$"):
        convert(str(file), str(tmp_path / "other"), base=str(model), report=silent)


def test_a_single_file_gets_another_denoiser_and_loras(saved: tuple[Any, Path, Path], tmp_path: Path) -> None:
    pipeline, model, file = saved
    pipeline.unet = another(pipeline)
    save_file(pipeline.unet.state_dict(), denoiser := tmp_path / "few-steps.safetensors")
    added = lora_for(pipeline, lora := tmp_path / "style.safetensors")
    convert(
        str(file),
        str(tmp_path / "folder"),
        base=str(model),
        denoiser=str(denoiser),
        loras=[(str(lora), 1.0)],
        report=silent,
    )
    assert sorted(differ(weights_at(tmp_path / "folder"), weights_of(pipeline))) == sorted(added)


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"model." + name: weight for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lost("norm1.weight"), r"no UNet2DConditionModel of .*: it has no weights \S+norm1\.weight$"),
        (lambda weights: weights | {"x": torch.ones(1)}, "no UNet2DConditionModel of .* has no place for x$"),
        (renamed, r"it has no weights \S+ and \d+ more$"),
        (lambda _: {}, r".* has no weights \S+ and \d+ more$"),
        (lambda weights: {"conv_in.bias": weights["conv_in.bias"]}, r".* has no weights \S+ and \d+ more$"),
        (
            lambda _: {"lora_unet_x.lora_up.weight": torch.ones(1)},
            "is no denoiser alone: it is a LoRA; name it with --lora$",
        ),
        (
            lambda _: {"model.diffusion_model.out.0.weight": torch.ones(1)},
            "is no UNet2DConditionModel of this model's config: ",
        ),
        (
            lambda _: {"cond_stage_model.x": torch.ones(1), "model.diffusion_model.x": torch.ones(1)},
            "is no denoiser alone: it is a whole model; name it as MODEL$",
        ),
        (
            lambda _: {"decoder.conv_in.weight": torch.ones(1)},
            "is no denoiser alone: it is an autoencoder; name it with --autoencoder when you export",
        ),
        (
            lambda weights: weights | {"conv_in.bias": weights["conv_in.bias"].int()},
            r"few-steps.safetensors holds weights of torch\.int32, which are not read",
        ),
        (
            lambda weights: weights | {"conv_in.bias": torch.ones(3)},
            r"no UNet2DConditionModel of .*: conv_in\.bias has another size$",
        ),
    ],
)
def test_a_file_that_is_no_denoiser_of_the_model_is_refused(
    model: Path, tmp_path: Path, change: Any, why: str
) -> None:
    save_file(change(another(miniature_pipeline()).state_dict()), file := tmp_path / "few-steps.safetensors")
    with pytest.raises(ExportError, match=why):
        convert(str(model), str(tmp_path / "folder"), denoiser=str(file), report=silent)
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_is_no_denoiser_of_the_model_is_refused(model: Path, tmp_path: Path) -> None:
    xl, v3 = miniature_xl(), miniature_v3()
    for pipeline, name in ((xl, "xl"), (v3, "v3")):
        another(pipeline).save_pretrained(tmp_path / name)
    (tmp_path / "empty").mkdir()
    for name, why in (
        ("xl", r"xl does not suit \S+model: its cross_attention_dim is \d+, and \d+ is wanted$"),
        ("v3", "v3 holds a SD3Transformer2DModel; as a denoiser, UNet2DConditionModel is wanted here$"),
        ("model", r"model holds a whole pipeline: name its denoiser, \S+unet$"),
        ("empty", r"cannot be loaded as a denoiser: \S+empty has no config\.json: save or download"),
        ("absent.safetensors", "cannot be loaded as a denoiser: there is no such file$"),
    ):
        with pytest.raises(ExportError, match=why):
            convert(str(model), str(tmp_path / "folder"), denoiser=str(tmp_path / name), report=silent)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    "name",
    [
        "in_channels",
        "out_channels",
        "cross_attention_dim",
        "addition_embed_type",
        "projection_class_embeddings_input_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
    ],
)
def test_whatever_has_to_suit_the_other_parts_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And where the config of a base leaves it out, it is what diffusers then takes."""
    made = miniature_v3() if name in ("joint_attention_dim", "pooled_projection_dim") else miniature_xl()
    part, own = denoiser_of(made)
    (base := tmp_path / part).mkdir()
    config = {key: value for key, value in own.config.items() if not key.startswith("_")}
    found = SimpleNamespace(config=config | {name: 999})
    monkeypatch.setattr(denoisers.source, "load_part", lambda *_: found)
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=f"its {name} is 999, and {config[name]} is wanted$"):
        denoisers.load(str(tmp_path), part, tmp_path)
    default = inspect.signature(denoisers.CLASSES[part]).parameters[name].default
    found.config[name] = default
    del config[name]
    (base / "config.json").write_text(json.dumps(config))
    assert denoisers.load(str(tmp_path), part, tmp_path) == (found, tmp_path)


def test_a_base_whose_config_makes_no_denoiser_is_named(model: Path, tmp_path: Path) -> None:
    save_file(another(miniature_pipeline()).state_dict(), file := tmp_path / "few-steps.safetensors")
    config = model / "unet" / "config.json"
    told = json.loads(config.read_text())
    for wrong in ({**told, "block_out_channels": None}, {**told, "down_block_types": ["Nope"]}, [1]):
        config.write_text(json.dumps(wrong))
        with pytest.raises(
            ExportError, match=r"^the config of the unet of \S+model makes no UNet2DConditionModel: "
        ):
            convert(str(model), str(tmp_path / "folder"), denoiser=str(file), report=silent)
    config.unlink()
    with pytest.raises(ExportError, match=r"^the config of the unet of .*config\.json"):
        convert(str(model), str(tmp_path / "folder"), denoiser=str(file), report=silent)


def test_a_denoiser_alone_is_no_model(tmp_path: Path) -> None:
    save_file(another(miniature_xl()).state_dict(), file := tmp_path / "few-steps.safetensors")
    with pytest.raises(ExportError, match=r"is a denoiser alone: .* this file with --denoiser$"):
        convert(str(file), str(tmp_path / "folder"), report=silent)


def test_stable_diffusion_3_is_written_without_its_third_text_encoder(tmp_path: Path) -> None:
    """Which the edge does not run."""
    pipeline = miniature_v3()
    pipeline.save_pretrained(tmp_path / "model")
    convert(str(tmp_path / "model"), str(tmp_path / "folder"), report=silent)
    assert differ(weights_at(tmp_path / "folder"), weights_of(pipeline)) == []


def test_what_is_there_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for taken in (tmp_path, model, tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(ExportError, match="is there; name a new folder"):
            convert(str(model), str(taken), report=silent)
    shutil.rmtree(model / "unet")
    with pytest.raises(
        ExportError, match=r"no folder .*unet, which .* names: save or download the whole model again"
    ):
        convert(str(model), str(tmp_path / "folder"), report=silent)
    (empty := tmp_path / "empty").mkdir()
    monkeypatch.chdir(empty)
    with pytest.raises(ExportError, match="is the folder you are in"):
        convert(str(model), ".", report=silent)
    assert not (tmp_path / "folder").exists()


def test_configs_from_elsewhere_are_for_a_single_file(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--base is for a single file"):
        convert(str(model), str(tmp_path / "folder"), base=str(model), report=silent)
