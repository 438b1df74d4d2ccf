"""A single file of weights, or a model and LoRAs, becomes a diffusers folder, which all other commands read.

    python -m export.convert MODEL FOLDER [--base MODEL] [--lora FILE[=SCALE]] [--scheduler NAME]

diffusers converts and fuses; this refuses what it passes over: a weight that the file lacks, and layers of a LoRA
that the model does not have.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from huggingface_hub import hf_hub_download

from cloud_server import complete
from export import folder
from export import pipeline as pipelines
from export.arguments import ended_cleanly
from export.errors import ExportError, reason
from export.scheduler import choose_scheduler
from export.terminal import say

Report = Callable[[str], None]

CARDS = ("README.md", "routet2i.json")
"""What a model's folder says of it beside its parts: its licence, and what the cloud server makes by default."""

_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
_OTHER_SIZE = re.compile(r"(?:because|size mismatch for) (\S+?):? (?:expected shape|copying a param)")
_DOWN = re.compile(r"lora_A\.|\.down\.")  # one of the two matrices of each layer that a LoRA changes


def convert(
    model: str,
    out: str,
    *,
    base: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    scheduler: str | None = None,
    report: Report = say,
) -> None:
    """Write `model` as a diffusers folder at `out`, in half precision where its weights are.

    Args:
        model: a .safetensors file of a whole model, a folder that diffusers saved, or a hub id.
        out: the folder to write.
        base: where configs and tokenizers of a single file come from, a folder or hub id; the hub's, of the model that
            diffusers takes the file to descend from, if None.
        loras: files or hub ids, each with the scale that its changes are fused with.
        scheduler: another than the model's own, see `export.scheduler`.
        report: gets one line for each step.

    Raises:
        ExportError: `model` lacks weights or is of an unsupported class, a LoRA does not fit it, the scheduler is none,
            or `out` is taken or cannot be written. Nothing is left at `out`.
    """
    target = Path(out).resolve()
    folder.refuse_unusable(target, "the model")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ExportError(f"{target} is there; name a new folder")
    with folder.beside(target, report) as partial:
        if Path(model).is_file():
            pipeline = _from_single_file(Path(model), base, report)
        elif base is not None:
            raise ExportError(f"--base is for a single file, and {model} is none: it has its own configs")
        else:
            made = pipelines.class_of(model, report)
            pipeline = pipelines.load(model, without_t5=made is StableDiffusion3Pipeline, report=report)
        if scheduler is not None:
            with pipelines.quiet():
                pipeline.scheduler = choose_scheduler(pipeline.scheduler, scheduler)
        dtype = _dtype(Path(model))
        for lora, scale in loras:
            report(f"fusing {lora}" + ("" if scale == 1 else f", {scale:g} of it"))
            _fuse(pipeline, lora, scale)
        report(f"writing {type(pipeline).__name__}")
        with pipelines.quiet():
            pipeline.to(dtype=dtype).save_pretrained(partial)
        pipelines.drop_origin(partial)
        for card in CARDS:
            if Path(model, card).is_file():
                shutil.copyfile(Path(model, card), partial / card)
        folder.open_to_all(partial)
        folder.move(partial, target)
    report(f"wrote {target}")


def _from_single_file(file: Path, base: str | None, report: Report) -> Any:
    """The pipeline whose weights `file` holds, on the CPU in float32."""
    names = _names(file)
    if all("lora" in name for name in names):
        raise ExportError(
            f"{file} is a LoRA, which changes a model: name that model, and this file with --lora"
        )
    if base is None:
        base = fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
        report(f"taking configs and tokenizers from {base}; --base names another model's")
    made = pipelines.class_of(base, report)
    try:
        with pipelines.quiet(), complete.bars_on_terminals_alone():
            pipeline = made.from_single_file(str(file), config=base, **pipelines.left_out(made))
    except Exception as error:  # each part's library fails in its own way
        raise ExportError(
            f"{file} makes no {made.__name__} with the configs of {base}: {_why(error)}"
        ) from error
    for part, network in pipeline.components.items():
        if isinstance(network, torch.nn.Module):
            missing = [name for name, weight in network.named_parameters() if weight.is_meta]
            if missing:
                more = f" and {len(missing) - 1} more" if missing[1:] else ""
                raise ExportError(f"{file} has no weights {missing[0]}{more} of the {part}; get it again")
    # How files say what no config beside them could.
    if "v_pred" in names:
        said = "prediction_type=v_prediction"
        if "ztsnr" in names:
            said += ",rescale_betas_zero_snr=true,timestep_spacing=trailing"
        pipeline.scheduler = choose_scheduler(
            pipeline.scheduler, f"{type(pipeline.scheduler).__name__}:{said}"
        )
    return pipeline


def _fuse(pipeline: Any, lora: str, scale: float) -> None:
    file = str(_lora_file(lora))
    try:
        with pipelines.quiet(logging.ERROR):
            changes = sum(_DOWN.search(name) is not None for name in pipeline.lora_state_dict(file)[0])
            pipeline.load_lora_weights(file, adapter_name="lora")
            changed = sum(
                "lora" in getattr(layer, "lora_A", {})
                for network in pipeline.components.values()
                if isinstance(network, torch.nn.Module)
                for layer in network.modules()
            )
            pipeline.fuse_lora(lora_scale=scale)
            pipeline.unload_lora_weights()
    except Exception as error:  # each part's library fails in its own way
        raise ExportError(f"{lora} cannot be fused with this model: {_why(error)}") from error
    if changed < changes:
        raise ExportError(
            f"{lora} cannot be fused with this model, which has {changed} of the {changes} layers that it changes: it "
            "was made for another"
        )


def _why(error: Exception) -> str:
    if isinstance(error, NotImplementedError):  # of torch, which cannot copy what is not there
        return "weights are missing"
    found = _OTHER_SIZE.search(str(error))
    return f"{found[1]} has another size" if found else reason(error)


def _lora_file(lora: str) -> Path:
    """Where `lora` lies: itself, or what the repository of that name on the hub holds, under the name diffusers writes.

    Raises ExportError where there is no such file.
    """
    file = Path(lora)
    if not file.exists():
        pipelines.refuse_mistyped(lora, "a LoRA")
        try:
            with pipelines.quiet(), complete.bars_on_terminals_alone():
                return Path(hf_hub_download(lora, LORA_WEIGHT_NAME_SAFE))
        except Exception as error:  # the hub's library fails in its own ways
            raise ExportError(
                f"{lora} cannot be loaded as a LoRA: it is no file here, and {pipelines.from_hub(error)}"
            ) from error
    _names(file)
    return file


def _names(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        raise ExportError(
            f"{file} is no .safetensors file; one that is pickled, such as a .ckpt, is not read"
        )
    try:
        with safetensors.safe_open(file, "pt") as weights:
            return list(weights.keys())
    except safetensors.SafetensorError as error:
        raise ExportError(f"{file} is cut off or damaged: {reason(error)}; get it again") from error


def _dtype(model: Path) -> torch.dtype:
    """Half precision where no weight is in float32; what is fused is rounded to it."""
    found = set()
    for file in [model] if model.is_file() else model.rglob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as weights:
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118, it is no dict
    halves = [_HALVES[name] for name in sorted(found & _HALVES.keys())]
    return halves[0] if halves and "F32" not in found else torch.float32


def _lora(text: str) -> tuple[str, float]:
    name, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        share = float(scale)
    except ValueError:
        share = math.nan
    if not math.isfinite(share):
        raise argparse.ArgumentTypeError(f"{scale!r} is no scale; write FILE=0.8")
    return name, share


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage; returns the exit code. Raises ExportError for what it refuses."""
    parser = argparse.ArgumentParser(prog="edge-export convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a fine-tune's .safetensors file, or, to fuse LoRAs with, a folder that diffusers saved or a hub id",
    )
    parser.add_argument("out", metavar="FOLDER", help="folder to write, of a diffusers pipeline")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="folder or hub id of the model that a single file descends from, whose configs and tokenizers it shares; "
        "by default found out from its weights, and fetched from the hub",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_lora,
        dest="loras",
        metavar="FILE[=SCALE]",
        help="a LoRA to fuse with the model, wholly or to a share such as 0.8: a file, or a hub id; may repeat",
    )
    parser.add_argument(
        "--scheduler",
        metavar="NAME[:KEY=VALUE,...]",
        help="another diffusers scheduler, from the model's own config with these changes; an LCM's LoRA wants LCM",
    )
    options = vars(parser.parse_args(argv))
    with ended_cleanly():
        convert(options.pop("model"), options.pop("out"), **options)
    return 0


if __name__ == "__main__":
    from export.__main__ import run

    raise SystemExit(run(main))
