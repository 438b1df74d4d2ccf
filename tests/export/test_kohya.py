"""What kohya-ss's trainer and LyCORIS write changes the layers that it names, by what its kind means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from export import kohya
from export.errors import ExportError
from tests.miniature import miniature_pipeline, miniature_xl

FILE = Path("style.safetensors")
RANK = 3
Held = dict[str, torch.Tensor]

LINEAR = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
POINT = "down_blocks_0_attentions_0_proj_in"  # of Stable Diffusion 1.x a convolution of one point
CONVOLUTION = "mid_block_resnets_0_conv1"


@pytest.fixture
def pipeline() -> Any:
    return miniature_pipeline()


def layer_of(pipeline: Any, name: str) -> Any:
    return next(layer for known, layer in pipeline.unet.named_modules() if known.replace(".", "_") == name)


def some(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def outer_and_inner(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return some(len(weight), RANK), some(RANK, weight[0].numel())


def lora(weight: torch.Tensor) -> tuple[Held, torch.Tensor]:
    up, down = outer_and_inner(weight)
    points = [1] * (weight.dim() - 2)
    held = {
        "lora_up.weight": up.reshape(*up.shape, *points),
        "lora_down.weight": down.reshape(RANK, *weight.shape[1:]),
    }
    return held, up @ down


def lora_with_core(weight: torch.Tensor) -> tuple[Held, torch.Tensor]:
    """Three convolutions, of which the one in the middle alone sees neighbours."""
    up, down, core = some(len(weight), RANK, 1, 1), some(RANK, weight.shape[1], 1, 1), some(RANK, RANK, 3, 3)
    seen = torch.eye(weight.shape[1]).reshape(
        weight.shape[1], weight.shape[1], 1, 1
    )  # one channel each, at one point
    answer = torch.nn.functional.conv2d(seen, down)
    answer = torch.nn.functional.conv2d(
        answer, core, padding=2
    )  # what a point gives to all around it, mirrored
    answer = torch.nn.functional.conv2d(answer, up)
    return (
        {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": core},
        answer.flip(2, 3).transpose(0, 1),
    )


def loha(weight: torch.Tensor) -> tuple[Held, torch.Tensor]:
    (a, b), (c, d) = outer_and_inner(weight), (some(RANK, len(weight)).T, some(weight[0].numel(), RANK).T)
    held = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    return held, (a @ b) * (c @ d)


def lokr(weight: torch.Tensor) -> tuple[Held, torch.Tensor]:
    """Of two whole factors: blocks of the second, each times a number of the first."""
    first = some(2, 2)
    second = some(len(weight) // 2, weight.shape[1] // 2, *weight.shape[2:])
    rows = [torch.cat([number * second for number in row], dim=1) for row in first]
    return {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(7.0)}, torch.cat(rows)


def loha_with_core(weight: torch.Tensor) -> tuple[Held, torch.Tensor]:
    held, change = {}, 1.0
    for number in 1, 2:
        factors, part = lora_with_core(weight * number)
        held[f"hada_w{number}_a"] = number * factors["lora_up.weight"].flatten(1).T
        held[f"hada_w{number}_b"] = factors["lora_down.weight"].flatten(1)
        held[f"hada_t{number}"] = factors["lora_mid.weight"]
        change = change * number * part
    return held, change


def lokr_with_core(weight: torch.Tensor) -> tuple[Held, torch.Tensor]:
    first = some(2, 2)
    factors, second = lora_with_core(weight[::2, ::2])
    held = {
        "lokr_w1": first,
        "lokr_w2_a": factors["lora_up.weight"].flatten(1).T,
        "lokr_w2_b": factors["lora_down.weight"].flatten(1),
        "lokr_t2": factors["lora_mid.weight"],
    }
    return held, torch.cat([torch.cat([number * second for number in row], dim=1) for row in first])


def lokr_in_parts(weight: torch.Tensor) -> tuple[Held, torch.Tensor]:
    a, b = some(2, RANK), some(RANK, 2)
    c, d = some(len(weight) // 2, RANK), some(RANK, weight[0].numel() // 2)
    rows = [torch.cat([number * (c @ d) for number in row], dim=1) for row in a @ b]
    return {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d}, torch.cat(rows)


def whole(weight: torch.Tensor) -> tuple[Held, torch.Tensor]:
    return {"diff": some(*weight.shape)}, some(*weight.shape)


def fused(pipeline: Any, changes: dict[str, Held], scale: float = 1.0) -> Any:
    """A copy of `pipeline` with the changes to layers of these names."""
    changed = copy.deepcopy(pipeline)
    weights = {f"{layer}.{kind}": weight for layer, held in changes.items() for kind, weight in held.items()}
    kohya.fuse(changed, FILE, weights, scale)
    return changed


KINDS: list[Callable[[torch.Tensor], tuple[Held, torch.Tensor]]] = [lora, loha, lokr, lokr_in_parts, whole]


@pytest.mark.parametrize("name", [LINEAR, POINT, CONVOLUTION])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_changed_by_what_its_factors_make(pipeline: Any, kind: Any, name: str) -> None:
    before = layer_of(pipeline, name).weight.data
    held, change = kind(before)
    for alpha, share in (None, 1.0), (0.0, 0.0), (2, 2 / RANK), (1.5, 1.5 / RANK):
        told = held if alpha is None else {"alpha": torch.tensor(alpha)} | held
        if kind in (lokr, whole):
            told, share = held, 1.0  # which have no rank
        after = layer_of(fused(pipeline, {f"lora_unet_{name}": told}, 0.5), name).weight.data
        torch.testing.assert_close(after, before + 0.5 * share * change.reshape(before.shape))


@pytest.mark.parametrize("kind", [lora_with_core, loha_with_core, lokr_with_core])
def test_a_convolution_may_have_a_core_between_its_factors(pipeline: Any, kind: Any) -> None:
    before = layer_of(pipeline, CONVOLUTION).weight.data
    held, change = kind(before)
    after = layer_of(fused(pipeline, {f"lora_unet_{CONVOLUTION}": held}), CONVOLUTION).weight.data
    torch.testing.assert_close(after, before + change)


@pytest.mark.parametrize("name", [LINEAR, CONVOLUTION])
@pytest.mark.parametrize("by_outputs", [True, False])
def test_a_dora_stretches_what_a_lora_makes(pipeline: Any, name: str, by_outputs: bool) -> None:
    """Each output's or each input's weights, to the length that it says; a share of it goes part of the way."""
    before = layer_of(pipeline, name).weight.data
    held, change = lora(before)
    place = 0 if by_outputs else 1
    lengths = some(before.shape[place]).abs()
    shape = [1] * before.dim()
    shape[place] = -1
    held["dora_scale"] = lengths.reshape(shape)
    wanted = (before + change.reshape(before.shape)).clone().transpose(0, place)
    for row, length in zip(wanted, lengths, strict=True):
        row *= length / row.square().sum().sqrt()
    wanted = wanted.transpose(0, place)
    for scale in 1.0, 0.25:
        after = layer_of(fused(pipeline, {f"lora_unet_{name}": held}, scale), name).weight.data
        torch.testing.assert_close(after, before + scale * (wanted - before))


def test_norms_and_biases_are_changed_too(pipeline: Any) -> None:
    norm, layer = "mid_block_resnets_0_norm1", CONVOLUTION
    width, outputs = len(layer_of(pipeline, norm).weight), len(layer_of(pipeline, layer).bias)
    changes = {
        f"lora_unet_{norm}": {"w_norm": some(width), "b_norm": some(1, width)[0]},
        f"lora_unet_{layer}": {
            "diff": some(*layer_of(pipeline, layer).weight.shape),
            "diff_b": some(outputs),
        },
    }
    changed = fused(pipeline, changes, 2.0)
    for name, held in changes.items():
        before, after = (layer_of(one, name.removeprefix("lora_unet_")) for one in (pipeline, changed))
        weight, bias = held.values()
        torch.testing.assert_close(after.weight.data, before.weight.data + 2 * weight)
        torch.testing.assert_close(after.bias.data, before.bias.data + 2 * bias)


@pytest.mark.parametrize(
    ("name", "in_first_code"),
    [
        ("conv_in", "input_blocks_0_0"),
        ("time_embedding_linear_1", "time_embed_0"),
        ("add_embedding_linear_2", "label_emb_0_2"),
        ("down_blocks_0_resnets_0_time_emb_proj", "input_blocks_1_0_emb_layers_1"),
        ("mid_block_attentions_0_proj_in", "middle_block_1_proj_in"),
        ("conv_out", "out_2"),
    ],
)
def test_a_layer_is_known_by_its_name_in_the_first_code(name: str, in_first_code: str) -> None:
    """Which the trainer writes for XL."""
    pipeline = miniature_xl()
    before = layer_of(pipeline, name).weight.data
    for known_as in (name, in_first_code):
        changed = fused(pipeline, {f"lora_unet_{known_as}": {"diff": torch.ones(before.shape)}})
        assert torch.equal(layer_of(changed, name).weight.data, before + 1)


def test_a_layer_of_a_text_encoder_is_known_by_its_shorter_name_too(pipeline: Any) -> None:
    """Of transformers 5, which has `encoder` where earlier ones have `text_model.encoder`."""
    layer = pipeline.text_encoder.text_model.encoder.layers[0].self_attn.q_proj
    before = layer.weight.data.clone()
    change = {"lora_te1_encoder_layers_0_self_attn_q_proj.diff": torch.ones(before.shape)}
    kohya.fuse(pipeline, Path("style.safetensors"), change, 1.0)
    assert torch.equal(layer.weight.data, before + 1)


@pytest.mark.parametrize(
    "lost", ["lora_up.weight", "hada_w1_b", "hada_w2_a", "lokr_w1_b", "lokr_w2_a", "lokr_w1"]
)
def test_a_change_without_one_of_its_factors_is_refused(pipeline: Any, lost: str) -> None:
    weight = layer_of(pipeline, LINEAR).weight.data
    kind = next(kind for kind in KINDS if lost in kind(weight)[0])
    held, _ = kind(weight)
    del held[lost]
    with pytest.raises(ExportError, match=rf"has no lora_unet_{LINEAR}\.{lost}\w*: it is incomplete"):
        fused(pipeline, {f"lora_unet_{LINEAR}": held})


def test_a_layer_with_nothing_but_its_alpha_is_refused(pipeline: Any) -> None:
    with pytest.raises(ExportError, match=rf"has no lora_unet_{LINEAR}\.lora_up\.weight: it is incomplete"):
        fused(pipeline, {f"lora_unet_{LINEAR}": {"alpha": torch.tensor(1)}})


def test_a_bias_for_a_layer_that_has_none_is_refused(pipeline: Any) -> None:
    with pytest.raises(ExportError, match=f"whose lora_unet_{LINEAR} has another size"):
        fused(pipeline, {f"lora_unet_{LINEAR}": {"diff_b": torch.ones(8)}})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [True, False])
def test_a_change_of_another_size_is_refused(pipeline: Any, kind: Any, transposed: bool) -> None:
    """Even where it has as many weights."""
    name = LINEAR.replace("attn1_to_q", "ff_net_2")
    held, _ = kind(layer_of(pipeline, name).weight.data.T if transposed else torch.ones(6, 6))
    with pytest.raises(ExportError, match=f"whose lora_unet_{name} has another size"):
        fused(pipeline, {f"lora_unet_{name}": held})
