"""A finished float32 bundle becomes a smaller one: half precision, or eight bits.

- fp16: weights and arithmetic in half precision; inputs and outputs of every graph stay float32. Half the bytes
  everywhere; faster where the processor computes in half precision (GPUs), not on x86-64, where onnxruntime widens
  the weights again while loading.
- int8: weights of matrix products in eight bits, their inputs scaled as they come (dynamic); convolutions between
  quantize/dequantize pairs whose ranges are those of calibration prompts, run through the float32 bundle (static).
  Weights use seven of the eight bits: processors without VNNI add products in pairs of 16 bits, which eight overflow.

Both are made with onnxruntime's own tools. What a smaller bundle lost is measured against the float32 one, on prompts
that calibrated nothing, and one that is grossly off is refused.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.transformers.float16 import convert_float_to_float16

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.generator import Generator, Image
from edge_agent.diffusion.sessions import Array, Session
from edge_agent.errors import GenerationFailed
from edge_agent.manifest import DENOISER, FUSED, PREDICTOR, Size
from export import attention, graph_file, source
from export.errors import ExportError, reason
from export.terminal import Report, say

DTYPES = ("fp32", "fp16", "int8")

# Of everyday things, in the lengths that people write. The first calibrate, the others compare.
CALIBRATION_PROMPTS = (
    "a cat",
    "two dogs on a beach",
    "a red apple left of a tiny guitar",
    "portrait of an old sailor, oil painting",
    "a house in the snow at night",
    "an astronaut riding a horse, photograph, high detail",
    "three owls above a boat",
    "a bowl of fruit on a wooden table, soft light",
    "a castle on a hill, fantasy art, trending, dramatic sky",
    "a robot",
    "a big moon, a small house and two trees",
    "street in the rain with neon signs",
)
COMPARISON_PROMPTS = (
    "a small balloon in the snow",
    "a bicycle under a rainbow, seen from far away",
    "portrait of a young woman reading a book",
    "four bananas",
)

# Of the power of the float32 images about their mean, how much the difference may have. An image that has nothing to do
# with the other differs by twice that power. In half precision the difference must stay unseen: a thousandth is 40 dB
# below the picture, about what JPEG at a high quality does. Eight bits may change details and not the picture: at a
# tenth, 20 dB, shapes begin to move.
BOUNDS = {"fp16": 1e-3, "int8": 1e-1}

# Half precision ends at 65504, and other prompts go further than those that were tried. Whether a value overflows shows
# only where arithmetic is in half precision: on a CPU the images are right, and not a number on a GPU.
HALF_RANGE = 65504 / 2

HALF_CALLS = 8  # of one graph, to see how large its values grow
MAX_CALLS = 96  # of one graph, spread over all of the calibration prompts: ranges are known long before
_MASK = 1e38  # what is larger stands for infinity: attention masks add the lowest float32, in fp16 -65504
_COMPARISON_SEED = 4000
_GRAPH = PurePosixPath(DENOISER).name  # in every folder that has one

Feeds = dict[str, Array]


@dataclass(frozen=True)
class Loss:
    """What a smaller bundle's images differ by from the float32 one's."""

    largest: float  # of any colour in 0..1, before rounding
    psnr: float  # dB over all images; rounding to eight bits alone is 58.9
    share: float  # power of the difference over that of the float32 images about their mean

    @classmethod
    def between(
        cls, images: Sequence[NDArray[np.float32]], references: Sequence[NDArray[np.float32]]
    ) -> Loss:
        """Of images [H, W, 3] in 0..1, in the same order and of one size."""
        found, wanted = np.stack(images).astype(np.float64), np.stack(references).astype(np.float64)
        difference = found - wanted
        power = float(np.mean(difference**2))
        about_mean = wanted - wanted.mean(axis=(1, 2), keepdims=True)
        own = float(np.mean(about_mean**2))
        return cls(
            float(np.abs(difference).max()),
            float("inf") if power == 0 else -10 * float(np.log10(power)),
            0.0 if power == 0 else power / max(own, np.finfo(np.float64).tiny),
        )

    @classmethod
    def worst(cls, images: Sequence[NDArray[np.float32]], references: Sequence[NDArray[np.float32]]) -> Loss:
        """Of the size whose images lost the most."""
        pairs = list(zip(images, references, strict=True))
        losses = [
            cls.between(*zip(*(pair for pair in pairs if pair[1].shape == shape), strict=True))
            for shape in dict.fromkeys(reference.shape for reference in references)
        ]
        return max(losses, key=lambda loss: loss.share)

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.1e}, PSNR {self.psnr:.1f} dB, {self.share:.1e} of the picture"
        )


def shrink(
    folder: str | os.PathLike[str],
    dtype: str,
    *,
    keep: Collection[str] = (),
    prompts: Sequence[str] | None = None,
    bound: float | None = None,
    report: Report = say,
) -> Loss:
    """Turn the graphs of the float32 bundle in `folder` into `dtype`, in place, and state them in its manifest.

    A graph whose values half precision could not hold stays float32, as if `keep` named it. Work on a copy: where this
    raises, some graphs are converted and others not. A predictor stays as it is. The model digest changes, so a
    calibration that was in the bundle no longer is for it.

    Args:
        dtype: "fp16" or "int8".
        keep: the parts that stay float32, by folder: "text_encoder", "unet", "vae_decoder", ...
        prompts: make the ranges for int8, where they are CALIBRATION_PROMPTS if None; the closer to what will be asked
            the better. For fp16 they show how large values grow; if None, the images that are compared do.
        bound: see BOUNDS, where it is taken from when None.
        report: gets one line for each graph, and the loss.

    Raises:
        BundleError: the bundle cannot be opened.
        ExportError: a graph is not float32 or cannot be converted, `keep` names a part that is not there, no graph
            can be in half precision, or the images are grossly off or not finite.
    """
    root = Path(folder)
    bundle = Bundle.open(root)
    graphs = _graphs(bundle, keep)
    if dtype not in BOUNDS:
        raise ExportError(f"no smaller dtype {dtype!r}; there are {', '.join(BOUNDS)}")
    calls, watched = (MAX_CALLS, _has_convolutions) if dtype == "int8" else (HALF_CALLS, lambda _graph: True)
    paths = {bundle.path(name) for name in graphs if watched(root / name)}
    with _recorded(paths) as seen:
        references = _images(bundle)
    if dtype == "int8" or prompts is not None:
        with _recorded(paths) as seen:
            for _ in drawn(bundle, prompts or CALIBRATION_PROMPTS, seed=0):
                pass
    feeds = {path: _spread(found, calls) for path, found in seen.items()}
    shrunk: list[str] = []
    for name in graphs:
        before = graph_file.size(root / name)
        _refuse_converted(root / name)
        part = str(Path(name).parent)
        if dtype == "fp16":
            try:
                _to_half(root / name, feeds[bundle.path(name)])
            except _BeyondHalf as beyond:
                report(f"{part} stays in float32: {beyond}")
                continue
        else:
            _to_eight_bits(root / name, feeds.get(bundle.path(name), []))
        if (fused := (root / name).with_name(FUSED)).exists():  # over the weights of before
            fused.unlink()
            attention.fuse(root / name)
        after = graph_file.size(root / name)
        report(f"{part}: {before / 1e6:.1f} MB in fp32, {after / 1e6:.1f} MB in {dtype}")
        shrunk.append(part)
    if not shrunk:
        raise ExportError(
            f"no part is left to be in {dtype}, beside those that stay in float32; leave --dtype out"
        )
    write_manifest(root, dtypes={**(bundle.manifest.dtypes or {}), **dict.fromkeys(shrunk, dtype)})
    try:
        loss = Loss.worst(_images(Bundle.open(root)), references)
    except GenerationFailed as error:
        raise ExportError(
            f"in {dtype}: {error.message}; keep the part that overflows in fp32 with --keep"
        ) from error
    report(f"{dtype} against fp32: {loss}")
    allowed = BOUNDS[dtype] if bound is None else bound
    if not loss.share <= allowed:
        raise ExportError(
            f"in {dtype} the images lose {loss.share:.1e} of the picture where {allowed:.0e} is allowed; keep a part "
            f"({', '.join(shrunk)}) in fp32 with --keep"
        )
    return loss


def _graphs(bundle: Bundle, keep: Collection[str]) -> list[str]:
    """Paths of the graphs to convert, relative to the bundle."""
    every = [name for name in bundle.graphs if name != PREDICTOR and not name.endswith(FUSED)]
    parts = {str(Path(name).parent) for name in every}
    if unknown := sorted(set(keep) - parts):
        raise ExportError(f"the bundle has no {', '.join(unknown)}; its parts are {', '.join(sorted(parts))}")
    return [name for name in every if str(Path(name).parent) not in keep]


def _images(bundle: Bundle) -> list[NDArray[np.float32]]:
    """Of the comparison prompts, as the edge makes them: at least one of each size."""
    sizes = bundle.manifest.sizes
    count = max(len(COMPARISON_PROMPTS), len(sizes))
    prompts = [COMPARISON_PROMPTS[number % len(COMPARISON_PROMPTS)] for number in range(count)]
    return list(drawn(bundle, prompts, _COMPARISON_SEED, sizes))


def drawn(
    bundle: Bundle, prompts: Sequence[str], seed: int, sizes: Sequence[Size] = ()
) -> Iterator[NDArray[np.float32]]:
    """An image of each prompt, of those sizes in turn, or of the default's: ranges that are found in such images make
    the same weights whatever other sizes there are.
    """
    manifest = bundle.manifest
    generator = Generator(bundle)
    negative = generator.encode_negative("")
    for number, prompt in enumerate(prompts):
        _, states = generator.encode(prompt)
        steps, guidance = manifest.default_steps, manifest.default_guidance
        size = sizes[number % len(sizes)] if sizes else None
        *_, image = generator.generate(states, negative, seed + number, steps, guidance, size=size)
        assert isinstance(image, Image)
        yield image.colours


def _spread(calls: Sequence[Feeds], most: int) -> Sequence[Feeds]:
    """As many of the calls, or all: every k-th, going round, k having no divisor in common with their number, and so
    none with the number of a prompt's. Each prompt then gives other steps, until all have taken part.
    """
    count = len(calls)
    every = max(1, -(-count // most))
    while math.gcd(every, count) > 1:
        every += 1
    return [calls[number * every % count] for number in range(min(count, most))]


@contextmanager
def _recorded(graphs: Collection[Path]) -> Iterator[Mapping[Path, list[Feeds]]]:
    """The inputs of every run of `graphs` in this block, or of what runs in their place: a fused one has the same.

    The way from a prompt to what a graph is really given is the runtime's own, so the runtime is watched at the one
    place that all its calls pass.
    """
    calls: dict[Path, list[Feeds]] = {}
    run = Session.run

    def watched(self: Session, inputs: Mapping[str, Array], **options: Any) -> list[Array]:
        path = self.path.with_name(_GRAPH)
        if path in graphs:
            calls.setdefault(path, []).append(dict(inputs))
        return run(self, inputs, **options)

    Session.run = watched  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Session.run = run  # type: ignore[method-assign]


class _Feeds(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Hands recorded inputs to onnxruntime's calibration, in the types that the graph asks for."""

    def __init__(self, graph: Path, feeds: Sequence[Feeds]) -> None:
        inputs = onnx.load(graph, load_external_data=False).graph.input
        self._dtypes = {
            one.name: onnx.helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type) for one in inputs
        }
        self._left = iter(feeds)

    def get_next(self) -> Feeds | None:
        """The next call's inputs, None after the last."""
        feeds = next(self._left, None)
        if feeds is None:
            return None
        return {name: np.asarray(value, self._dtypes[name]) for name, value in feeds.items()}


def _has_convolutions(graph: Path) -> bool:
    return any(node.op_type == "Conv" for node in onnx.load(graph, load_external_data=False).graph.node)


def _refuse_converted(graph: Path) -> None:
    """Nothing is gained by rounding what is rounded, and the float32 images would not be what they claim."""
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT8):
            raise ExportError(f"{graph} is not float32: export the model again with --dtype fp32")


class _BeyondHalf(Exception):
    """A graph computes with values that half precision may not hold; the message says which."""


def _to_half(graph: Path, feeds: Sequence[Feeds]) -> None:
    """Raises _BeyondHalf, and leaves the graph as it was."""
    with _rewritten(graph), source.quiet():
        if feeds and (largest := _largest_value(graph, feeds)) > HALF_RANGE:
            raise _BeyondHalf(
                f"it computes with values up to {largest:.2g}, above half of 65504, where half precision ends"
            )
        # By its path: shapes of graphs above 2 GiB can only be inferred from a file.
        model = convert_float_to_float16(str(graph), keep_io_types=True)
        graph_file.save(model, graph)


def _largest_value(graph: Path, feeds: Sequence[Feeds]) -> float:
    """The largest magnitude of any float tensor in the graph while it runs on `feeds`, but for masks.

    onnxruntime's own calibration would tell as well, but takes a time that grows with the square of the nodes.
    """
    watcher = graph.with_name("watched.onnx")  # beside the graph it finds the weights that lie there
    options = ort.SessionOptions()
    # In the order in which they stand there. In its own, onnxruntime leaves what watches for the end.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    try:
        _write_watcher(graph, watcher)
        session = ort.InferenceSession(watcher, options, providers=["CPUExecutionProvider"])
    finally:
        watcher.unlink(missing_ok=True)
    magnitudes = np.abs([session.run(None, inputs) for inputs in _Feeds(graph, feeds)])
    return float(magnitudes[magnitudes < _MASK].max(initial=0.0))


def _write_watcher(graph: Path, watcher: Path) -> None:
    """Write the graph once more, giving in place of its outputs the least and the largest of each float tensor."""
    onnx.shape_inference.infer_shapes_path(str(graph), str(watcher))
    model = onnx.load(watcher, load_external_data=False)
    floats = {
        value.name
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    watched, ends = [], []
    for node in model.graph.node:
        watched.append(node)
        for name in floats.intersection(node.output):
            for kind in ("ReduceMin", "ReduceMax"):  # right behind it: no tensor outlives its use
                ends.append(f"{name}_{kind}")
                watched.append(onnx.helper.make_node(kind, [name], [ends[-1]], keepdims=0))
    del model.graph.node[:]
    model.graph.node.extend(watched)
    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, None) for end in ends
    )
    onnx.save_model(model, watcher)


def _to_eight_bits(graph: Path, feeds: Sequence[Feeds]) -> None:
    """Matrix products first: the ranges of the convolutions are then those they will meet."""
    large = graph_file.size(graph) > graph_file.LARGEST_GRAPH
    with _rewritten(graph) as scratch, source.quiet():
        products = scratch / "products.onnx"
        quantize_dynamic(
            graph,
            products,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
        )
        result = products
        if feeds:
            result = scratch / "convolutions.onnx"
            quantize_static(
                products,
                result,
                _Feeds(products, feeds),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=large,
            )
        graph_file.save(onnx.load(result), graph)


@contextmanager
def _rewritten(graph: Path) -> Iterator[Path]:
    """A scratch folder in the bundle, gone afterwards or with it; what the tools raise becomes one ExportError."""
    with tempfile.TemporaryDirectory(dir=graph.parents[1]) as scratch:
        try:
            yield Path(scratch)
        except (OSError, ExportError, _BeyondHalf):
            raise  # a full disk says so itself
        except Exception as error:  # protobuf, onnx and onnxruntime fail in many ways
            # Of a full disk they say only that what they wrote is damaged.
            if shutil.disk_usage(scratch).free < graph_file.size(graph):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(graph)) from error
            raise ExportError(f"{graph} cannot be converted: {reason(error)}") from error
