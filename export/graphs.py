"""The graphs of a bundle: traced by optimum one after the other, and made for one shape where that is asked.

optimum cannot trace an AutoencoderTiny, whose config lacks what it asks for; that decoder is described here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from numpy.typing import NDArray
from onnx import numpy_helper

from edge_agent.manifest import TRANSFORMER, Size
from export.errors import ExportError, reason
from export.pipeline import drop_origin
from export.source import quiet
from export.support import denoiser_of
from export.terminal import Report
from export.tokenizer_json import PROBES

_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}

# What a bundle takes of a pipeline besides its graphs, so that optimum's own pipeline loads it too.
_COMPANIONS = ("scheduler", "tokenizer", "tokenizer_2")

MASKED = -60.0
"""What an exported text encoder adds to a score that softmax is to make nothing of, in place of the lowest number there
is. Of that onnxruntime's softmax makes denormal numbers, with which a CPU counts at a fraction of its speed: they
cost three percent of the encoder's time at Stable Diffusion 1.5's size, an eighth at the starter's. A weight of e^-60
is lost in float32's rounding all the same, unless the score is larger than the others by 44; and it is no denormal
number, unless the score is smaller than the largest by 27. With -80 seven would do, and scores differ by as much. An
encoder whose scores are louder keeps the lowest number: it is compared on PROBES."""

TOLD_APART = 1e-5
"""Of the largest state: what a milder mask may change, where the float32 of another order of sums changes as much."""


def trace(
    pipeline: Any, folder: Path, sizes: Sequence[Size], report: Report, *, consume: bool = False
) -> None:
    """Write the graphs of `pipeline` with their configs, its scheduler and tokenizers into `folder`.

    The graphs run images of other sizes too, but for a transformer, which has positions for `sizes` alone. `report`
    gets one line for each graph, with seconds and size. With `consume` each part loses its weights once they are in its
    graph, which is there beside the largest part then and not beside all of them.

    Raises:
        ExportError: a graph cannot be traced.
        OSError: the disk is full, for one.
    """
    with quiet(), _made_for(sizes, pipeline):
        # Here, because importing it takes seconds that a refusal should not cost.
        from optimum.exporters.onnx.convert import export
        from optimum.exporters.utils import get_diffusion_models_for_export

        try:
            models = get_diffusion_models_for_export(pipeline)
        except Exception as error:  # torch and optimum fail in many ways
            raise ExportError(f"optimum cannot trace the pipeline: {reason(error)}") from error
    del models["vae_encoder"]  # text to image never encodes an image
    if isinstance(pipeline.vae, AutoencoderTiny):
        models["vae_decoder"] = _tiny_decoder(*models["vae_decoder"])
    if isinstance(pipeline, StableDiffusionXLPipeline):  # the others take no notice of these
        _fold_spread(models["vae_decoder"][0])
    for name, (model, config) in models.items():
        began = time.perf_counter()
        try:
            with quiet(), _made_for(sizes, pipeline):
                # Validation is ours: the whole pipeline is compared, not graph by graph on random inputs.
                export(model, config=config, output=folder / name / "model.onnx")
        except OSError:
            raise  # a full disk says so itself
        except Exception as error:  # torch and optimum fail in many ways
            raise ExportError(f"optimum cannot trace the {name}: {reason(error)}") from error
        if name.startswith("text_encoder"):
            _mask_mildly(
                folder / name / "model.onnx", getattr(pipeline, name.replace("text_encoder", "tokenizer"))
            )
        if hasattr(model, "save_config"):
            model.save_config(folder / name)
        else:
            model.config.save_pretrained(folder / name)
        if consume:
            model.to("meta")
        written = sum(path.stat().st_size for path in (folder / name).iterdir())
        report(f"{name:<14} {time.perf_counter() - began:6.1f} s {written / 1e6:9.1f} MB")
    for name in _COMPANIONS:
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).save_pretrained(folder / name)
    pipeline.save_config(folder)
    drop_origin(folder)


def _mask_mildly(path: Path, tokenizer: Any) -> None:
    """Have the text encoder at `path` mask with MASKED in place of its type's lowest number, if nothing tells."""
    model = onnx.load(path, load_external_data=False)  # masks are made of small constants in the graph
    constants = [
        attribute.t
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.HasField("t") and attribute.t.data_location != onnx.TensorProto.EXTERNAL
    ]
    for constant in constants:
        values = numpy_helper.to_array(constant)
        if values.dtype.kind == "f" and (values == np.finfo(values.dtype).min).any():
            masked = np.maximum(values, values.dtype.type(MASKED))
            constant.CopyFrom(numpy_helper.from_array(masked, constant.name))
    mild = path.with_name("mild.onnx")  # beside it, where its weights are looked for
    onnx.save(model, mild)
    del model
    hard = _states(path, tokenizer)
    alike = [
        np.abs(ours - theirs).max() <= TOLD_APART * np.abs(theirs).max()
        for ours, theirs in zip(_states(mild, tokenizer), hard, strict=True)
    ]
    if all(alike):
        mild.replace(path)
    else:
        mild.unlink()


def _states(path: Path, tokenizer: Any) -> list[NDArray[np.float32]]:
    """All that the text encoder at `path` makes of PROBES."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (ids,) = session.get_inputs()
    made = []
    for probe in PROBES:
        read = tokenizer(probe, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
        made += session.run(None, {ids.name: np.array([read["input_ids"]], _INTEGERS[ids.type])})
    return made


@contextmanager
def _made_for(sizes: Sequence[Size], pipeline: Any) -> Iterator[None]:
    """In this block a transformer is one for images of `sizes`. Its config names the first, where optimum reads the
    size to trace it at, and its table of positions, up to a gigabyte, is cut to what they take of it.
    """
    name, denoiser = denoiser_of(pipeline)
    if name != "transformer":
        yield
        return
    width, height = (side // pipeline.vae_scale_factor for side in sizes[0])
    embedding, own = denoiser.pos_embed, denoiser.config.sample_size
    names = ("pos_embed", "pos_embed_max_size", "height", "width")
    kept = {name: getattr(embedding, name) for name in names}
    patch, square = embedding.patch_size, None
    positions = embedding.cropped_pos_embed(height, width)
    if len(sizes) > 1:  # a square, out of whose middle the graph then cuts those of each size
        square = max(side for size in sizes for side in size) // (pipeline.vae_scale_factor * patch)
        square += (embedding.pos_embed_max_size - square) % 2  # else its middle would not be the table's
        positions = embedding.cropped_pos_embed(square * patch, square * patch)
    denoiser.register_to_config(sample_size=(height, width))
    try:
        for name, value in zip(names, (positions, square, height // patch, width // patch), strict=True):
            setattr(embedding, name, value)
        yield
    finally:
        denoiser.register_to_config(sample_size=own)
        for name, value in kept.items():
            setattr(embedding, name, value)


def freeze(folder: Path, facts: Mapping[str, Any]) -> None:
    """Give the graphs in `folder` the shapes of one image as `facts` state them, and no others: TensorRT wants it."""
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    # The names that optimum gives to the sizes that may vary.
    factor = facts["height"] // facts["latent_height"]
    sizes = {
        "batch_size": 1,
        "sequence_length": facts["text_tokens"],
        "height": facts["latent_height"],
        "width": facts["latent_width"],
        "latent_height": facts["latent_height"],
        "latent_width": facts["latent_width"],
        f"latent_height * {factor}": facts["height"],
        f"latent_width * {factor}": facts["width"],
    }
    for path in sorted(folder.glob("*/model.onnx")):
        model = onnx.load(path, load_external_data=False)
        for value in model.graph.output:
            if value.name == "text_embeds":  # optimum takes the size of this vector for the sequence's
                value.type.tensor_type.shape.dim[1].ClearField("dim_param")
        joint = (
            {"sequence_length": facts["joint"].positions, "step": 1} if path == folder / TRANSFORMER else {}
        )
        for name, size in (sizes | joint).items():
            make_dim_param_fixed(model.graph, name, size)
        onnx.save(model, path)  # weights of more than 2 GB stay in the file beside it


def _fold_spread(vae: Any) -> None:
    """Have the decoder `vae` spread its latents itself where its config names a mean and a deviation for each channel,
    and name none: whoever divides them by the scaling factor, as for any other, need know no more.
    """
    mean, deviation = (vae.config.get(f"latents_{name}") for name in ("mean", "std"))
    if mean is None or deviation is None:
        return
    mean, deviation = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (mean, deviation))
    decode = vae.forward
    vae.forward = lambda latent_sample: decode(latent_sample * deviation + mean)
    vae.register_to_config(latents_mean=None, latents_std=None)


def _tiny_decoder(vae: Any, known: Any) -> tuple[Any, Any]:
    from optimum.exporters.onnx.model_configs import VaeDecoderOnnxConfig

    class TinyDecoderOnnxConfig(VaeDecoderOnnxConfig):  # type: ignore[misc]
        """An AutoencoderTiny names no blocks, only their channels."""

        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            factor = 2 ** (len(vae.config.block_out_channels) - 1)
            axes = {0: "batch_size", 2: f"latent_height * {factor}", 3: f"latent_width * {factor}"}
            return {"sample": axes}

    vae.forward = lambda latent_sample: vae.decode(latent_sample)
    return vae, TinyDecoderOnnxConfig(vae.config, float_dtype=known.float_dtype)
