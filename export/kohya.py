"""Changes of single layers as kohya-ss's trainer and LyCORIS write them: LoRA, LoHa, LoKr, DoRA, whole differences.

diffusers reads LoRA alone of these, takes most layers' alpha for all, and knows not every layer by its name there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from export import first_code
from export import pipeline as pipelines
from export.errors import ExportError

Held = dict[str, torch.Tensor]
Product = tuple[torch.Tensor, int | None]

BEGINNING = "lora_"
"""How all names in such a file begin."""

# Differences that are there as they are, and of what.
_WHOLE = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
# By a part's name in a pipeline, how those of its layers do.
_BEGINNINGS = {
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_", "lora_transformer_"),
}


def fuse(pipeline: Any, file: Path, weights: Mapping[str, torch.Tensor], scale: float) -> None:
    """Add the changes in `weights`, which `file` holds, times `scale`, to `pipeline`; all are in float32.

    Raises ExportError where one is not whole, is of a kind that is not known here, or was made for another model.
    """
    changes: dict[str, Held] = defaultdict(dict)
    for name, weight in weights.items():
        layer, _, kind = name.partition(".")
        changes[layer][kind] = weight
    layers = _layers(pipeline)
    if others := sorted(changes.keys() - layers.keys()):
        raise ExportError(
            f"{file} cannot be fused with this model, which has {len(changes) - len(others)} of the {len(changes)} "
            f"layers that it changes, and no {others[0]}: it was made for another, or written in a layout that is not "
            "read here"
        )
    for name, held in changes.items():
        try:
            _change(layers[name], held, scale)
        except KeyError as error:
            raise ExportError(
                f"{file} has no {name}.{error.args[0]}: it is incomplete; get it again"
            ) from error
        except Exception as error:  # torch fails in many ways, and says it at length
            raise ExportError(
                f"{file} cannot be fused with this model, whose {name} has another size: it was made for another"
            ) from error
        if held:
            raise ExportError(f"{file} holds {name}.{min(held)}, a kind of change that is not known here")


def _layers(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The layers of its networks, by all names that they have in such files."""
    found = {}
    for part, network in pipelines.networks(pipeline).items():
        firsts = first_code.unet_names(network) if part == "unet" else {}
        for name, layer in network.named_modules():
            # transformers 5 leaves out `text_model` in the names of a CLIP that ends in no projection.
            known = {name, firsts.get(name, name), name.removeprefix("text_model.")}
            for one in known if hasattr(layer, "weight") else ():
                for beginning in _BEGINNINGS.get(part, ()):
                    found[beginning + one.replace(".", "_")] = layer
    return found


def _change(layer: Any, held: Held, scale: float) -> None:
    """Change the weights of `layer` by what it takes out of `held`, which is all where it is known.

    Raises KeyError, naming what `held` lacks, and otherwise where it is of another size.
    """
    weight = layer.weight.data
    whole = [kind for kind in _WHOLE if kind in held]
    for kind in whole:
        own = getattr(layer, _WHOLE[kind]).data
        own += scale * _shaped(held.pop(kind), own)
    alpha = held.pop("alpha", None)
    products = [made for product in (_lora, _loha, _lokr) if (made := product(held)) is not None]
    if not products and not whole and not held:
        raise KeyError("lora_up.weight")
    for change, rank in products:
        change = _shaped(change, weight) * (1.0 if alpha is None or rank is None else float(alpha) / rank)
        if (length := held.pop("dora_scale", None)) is not None:
            change = _stretched(weight + change, length) - weight
        weight += scale * change


def _shaped(change: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`change` in the shape of `weight`. Raises ValueError or RuntimeError where it is for other outputs or inputs."""
    if len(change) != len(weight):
        raise ValueError(f"{len(change)} outputs in place of {len(weight)}")
    return change.reshape(weight.shape)


# Each makes a change, with the weights' elements in order, and its rank of factors that it takes out of what is held;
# None where there are none of its own. LoHa is the product of two changes' elements, LoKr Kronecker's product.


def _lora(held: Held) -> Product | None:
    if not {"lora_down.weight", "lora_up.weight"} & held.keys():
        return None
    up, down = held.pop("lora_up.weight").flatten(1), held.pop("lora_down.weight").flatten(1)
    core = held.pop("lora_mid.weight", None)
    return _joined(up if core is None else up.T, down, core), len(down)


def _loha(held: Held) -> Product | None:
    if not any(kind.startswith("hada_") for kind in held):
        return None
    rank = len(held["hada_w1_b"])
    return _factor(held, "hada", 1) * _factor(held, "hada", 2), rank


def _lokr(held: Held) -> Product | None:
    if not any(kind.startswith("lokr_") for kind in held):
        return None
    ranks = [len(held[kind]) for kind in ("lokr_w1_b", "lokr_w2_b") if kind in held]
    first, second = _factor(held, "lokr", 1), _factor(held, "lokr", 2)
    made = torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second.contiguous())
    return made, ranks[0] if ranks else None  # whole factors have no rank, and are not scaled


def _factor(held: Held, way: str, number: int) -> torch.Tensor:
    """One of the two of LoHa or LoKr, which may be made of two smaller ones, and a core between them."""
    whole = f"{way}_w{number}"
    if whole in held:
        return held.pop(whole)
    return _joined(held.pop(f"{whole}_a"), held.pop(f"{whole}_b"), held.pop(f"{way}_t{number}", None))


def _joined(outer: torch.Tensor, inner: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """[O, R] times [R, I]; where there is a core of [R, R, ...], by Tucker's decomposition [R, O], it, and [R, I]."""
    if core is None:
        return outer @ inner.flatten(1)
    return torch.einsum("ij...,io,jn->on...", core, outer, inner.flatten(1))


def _stretched(weight: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Of DoRA: `weight` with its columns, or rows, of that length."""
    across = [place for place in range(weight.dim()) if length.shape[place] == 1]
    return weight * (length / torch.linalg.vector_norm(weight, dim=across, keepdim=True))
