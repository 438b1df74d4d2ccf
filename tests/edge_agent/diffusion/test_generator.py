"""The bundle makes the images that diffusers makes, step by step, and stops when it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import StableDiffusionPipeline
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion import denoiser, plugins, sessions, text_encoder
from edge_agent.diffusion.denoiser import Denoiser
from edge_agent.diffusion.generator import Generator, Image, Step
from edge_agent.diffusion.sessions import Runtime, Session, Stop
from edge_agent.diffusion.text_encoder import TextEncoder
from edge_agent.errors import BundleError, Cancelled, GenerationFailed, InvalidRequest
from edge_agent.manifest import (
    DECODER,
    DENOISER,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TOKENIZER,
    TOKENIZER_2,
    schedule_file,
)
from edge_agent.reader import Reader
from edge_agent.settings import STARTER
from export.diffusion_onnx import export_bundle
from tests.miniature import miniature_pipeline, miniature_xl
from tests.running import as_shown

FUSED_DENOISER = "unet/fused.onnx"  # what the CPU runs
TOLERANCE = 1e-3  # of colours in 0..1, before rounding
PROMPT, NEGATIVE = "two red cats on the beach 🐈", "blurry, dark"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return miniature_pipeline()


@pytest.fixture(scope="module")
def generator(miniature_bundle: Path) -> Generator:
    return Generator(Bundle.open(miniature_bundle), Runtime(threads=1))


def events(
    generator: Generator,
    prompt: str = PROMPT,
    negative: str = NEGATIVE,
    *,
    seed: int = 42,
    steps: int = 4,
    guidance: float = 5.0,
    previews: bool = False,
    size: tuple[int, int] | None = None,
) -> tuple[list[Step], Image]:
    states, negative_states = generator.encode(prompt)[1], generator.encode_negative(negative)
    *progress, image = generator.generate(states, negative_states, seed, steps, guidance, previews, size=size)
    assert isinstance(image, Image)
    assert all(isinstance(step, Step) for step in progress)
    return progress, image


def reference(pipeline: StableDiffusionPipeline, prompt: str, negative: str, **options: float) -> np.ndarray:
    return pipeline(
        prompt,
        negative_prompt=negative,
        num_inference_steps=options["steps"],
        guidance_scale=options["guidance"],
        width=options.get("width"),
        height=options.get("height"),
        generator=torch.Generator("cpu").manual_seed(int(options["seed"])),
        output_type="np",
    ).images[0]


@pytest.mark.parametrize(("passes", "runs"), [("batch", 1), ("separate", 2)])
def test_an_image_gives_memory_back_after_the_last_step_and_after_decoding(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, passes: Any, runs: int
) -> None:
    """And not before, as each time costs the run behind it. A stop ends every run of them."""
    run, shrunk = Session.run, {"unet": [], "vae_decoder": []}
    stops = set()

    def seen(session: Session, *arguments: Any, **options: Any) -> Any:
        if (part := session.path.parent.name) in shrunk:
            shrunk[part].append(options["shrink"])
            stops.add(options["stop"])
        return run(session, *arguments, **options)

    monkeypatch.setattr(Session, "run", seen)
    monkeypatch.setattr(generator.denoiser, "passes", passes)
    progress, _ = events(generator)
    assert shrunk == {"unet": [False] * (runs * len(progress) - 1) + [True], "vae_decoder": [True]}
    assert None not in stops and len(stops) == 1
    stops.clear()
    events(generator, previews=True)
    assert None not in stops and len(stops) == 1


def test_every_graph_is_watched_with_its_weights() -> None:
    """Those that were checked: other bytes would be loaded after the next idle minutes."""
    bundle = Bundle.open(STARTER)
    generator, reader = Generator(bundle, Runtime(threads=1)), Reader.open(bundle, 0.5, Runtime(threads=1))
    for session in (*generator.sessions, *reader.sessions):
        name = session.path.relative_to(bundle.folder).as_posix()
        assert session._files.states == bundle.files_of(name)
        assert all(state.sha256 for state in session._files.states.values())


def test_pixels_are_rounded_to_the_nearest_number_that_a_byte_holds() -> None:
    colours = np.asarray([[[0.0, 0.4 / 255, 0.6 / 255], [127.6 / 255, 254.6 / 255, 1.0]]], np.float32)
    assert Image(colours).pixels.tolist() == [[[0, 0, 1], [128, 255, 255]]]


def test_a_preview_has_the_colours_that_the_bundle_maps_latents_to(bundle_copy: Path) -> None:
    """Each channel adds its row to the constant; what is beyond black or white is black or white."""
    _, states = Generator(Bundle.open(bundle_copy), Runtime(threads=1)).encode(PROMPT)
    seen = {}
    for name, rows in {
        "constant": [[0.0, 0.0, 0.0]] * 4 + [[0.2, 1.5, -0.5]],
        "second": [[0.0, 0.0, 0.0], [1e6, -1e6, 0.0], *[[0.0, 0.0, 0.0]] * 2, [0.0, 0.0, 0.4]],
    }.items():
        write_manifest(bundle_copy, latent_to_rgb=rows)
        generator = Generator(Bundle.open(bundle_copy), Runtime(threads=1))
        step = next(generator.generate(states, states, 42, 4, 1.0, previews=True))
        assert isinstance(step, Step) and step.preview is not None and step.preview.shape == (64, 64, 3)
        seen[name] = step.preview
    assert (seen["constant"] == (51, 255, 0)).all()
    red, green, blue = seen["second"].transpose(2, 0, 1)
    assert (blue == 102).all() and (red.astype(int) + green == 255).mean() > 0.9 and len({*red.flat}) > 1


@pytest.mark.parametrize("small", [True, False])
def test_a_small_text_encoder_adds_and_normalises_in_two_steps(
    small: bool, miniature_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Onnxruntime takes any name of what it shall not fuse, also one that it does not know."""
    optimised, real = tmp_path / "optimised.onnx", plugins._Session

    def noted(path: str, options: Any, **named: Any) -> Any:
        options.optimized_model_filepath = str(optimised)
        return real(path, options, **named)

    monkeypatch.setattr(plugins, "_Session", noted)
    if not small:
        monkeypatch.setattr(text_encoder, "SMALL_BYTES", 0)
    sizes = {"batch_size": 1, "sequence_length": 77}
    TextEncoder(Bundle.open(miniature_bundle), Runtime(threads=1, sizes=sizes))
    fused = {node.op_type for node in onnx.load(optimised).graph.node}
    assert ("SkipLayerNormalization" in fused) is not small


@pytest.mark.parametrize(
    ("prompt", "negative", "seed", "steps", "guidance"),
    [
        (PROMPT, NEGATIVE, 42, 4, 5.0),
        (PROMPT, "", 42, 8, 7.5),
        (PROMPT, NEGATIVE, 2**32 - 1, 4, 1.0),  # no guidance: the negative prompt takes no part
        (PROMPT, NEGATIVE, 0, 4, 0.5),
        ("word " * 200, "一只猫", 7, 4, 1.5),
    ],
)
def test_pixels_equal_diffusers(
    pipeline: StableDiffusionPipeline,
    generator: Generator,
    prompt: str,
    negative: str,
    seed: int,
    steps: int,
    guidance: float,
) -> None:
    _, image = events(generator, prompt, negative, seed=seed, steps=steps, guidance=guidance)
    expected = reference(pipeline, prompt, negative, seed=seed, steps=steps, guidance=guidance)
    assert image.colours.shape == (64, 64, 3)
    assert np.abs(image.colours - expected).max() <= TOLERANCE
    assert image.pixels.dtype == np.uint8
    assert np.abs(image.pixels - np.round(expected * 255)).max() <= 1


@pytest.mark.parametrize("mapped", [True, False])
def test_images_of_other_sizes_equal_diffusers_and_so_do_their_previews_sizes(
    pipeline: StableDiffusionPipeline, bundle_copy: Path, mapped: bool
) -> None:
    rows = [[0.1, 0.2, 0.3]] * 5 if mapped else None
    write_manifest(bundle_copy, other_sizes=[(96, 64), (64, 112)], latent_to_rgb=rows)
    generator = Generator(Bundle.open(bundle_copy), Runtime(threads=1))
    for width, height in ((96, 64), (64, 64), (64, 112)):
        progress, image = events(generator, size=(width, height), previews=True)
        expected = reference(
            *(pipeline, PROMPT, NEGATIVE), seed=42, steps=4, guidance=5.0, width=width, height=height
        )
        assert image.colours.shape == (height, width, 3)
        assert np.abs(image.colours - expected).max() <= TOLERANCE
        previews = [step.preview.shape for step in progress if step.preview is not None]
        assert previews and set(previews) == {(height, width, 3)}


def test_a_size_that_the_bundle_does_not_have_is_refused_naming_those_it_has(bundle_copy: Path) -> None:
    write_manifest(bundle_copy, other_sizes=[(96, 64)])
    generator = Generator(Bundle.open(bundle_copy), Runtime(threads=1))
    with pytest.raises(InvalidRequest, match="64x64, 96x64, not 64x96") as refused:
        events(generator, size=(64, 96))
    assert refused.value.field == "width"


@pytest.mark.parametrize("graph", [FUSED_DENOISER, DECODER])
def test_a_graph_made_for_one_size_is_refused_where_the_manifest_names_others(
    bundle_copy: Path, graph: str
) -> None:
    path = bundle_copy / graph
    model = onnx.load(path, load_external_data=False)
    for name in ("height", "width", "latent_height", "latent_width"):
        make_dim_param_fixed(model.graph, name, 8)
    onnx.save(model, path)
    write_manifest(bundle_copy)
    Generator(Bundle.open(bundle_copy))
    write_manifest(bundle_copy, other_sizes=[(96, 64)])
    with pytest.raises(BundleError, match=rf"{as_shown(graph)}: .* has the shape"):
        Generator(Bundle.open(bundle_copy))


def test_every_part_of_a_request_changes_the_image(generator: Generator) -> None:
    """Without this, equal pixels could mean that the miniature does not listen."""
    _, base = events(generator)
    for other in (
        events(generator, prompt="moon")[1],
        events(generator, negative="")[1],
        events(generator, seed=43)[1],
        events(generator, guidance=2.0)[1],
        events(generator, steps=8)[1],
    ):
        assert np.abs(other.colours - base.colours).max() > 20 * TOLERANCE


def test_the_same_request_gives_the_same_bits(generator: Generator) -> None:
    np.testing.assert_array_equal(events(generator)[1].colours, events(generator)[1].colours)


def test_guidance_in_two_passes_gives_the_picture_of_one(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is faster depends on the provider; the picture does not."""
    batches = []
    run = generator.denoiser.session.run

    def counted(inputs: dict[str, np.ndarray], **options: Any) -> list[np.ndarray]:
        batches.append(len(inputs["sample"]))
        return run(inputs, **options)

    monkeypatch.setattr(generator.denoiser.session, "run", counted)
    together = events(generator, steps=4)[1].colours
    monkeypatch.setattr(generator.denoiser, "passes", "separate")
    apart = events(generator, steps=4)[1].colours
    assert batches == [2] * 5 + [1] * 10
    assert np.abs(apart - together).max() <= 1e-5


def test_only_a_large_denoiser_on_the_cpu_runs_guidance_in_two_passes(
    miniature_bundle: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generator.denoiser.passes == "batch"
    monkeypatch.setattr(sessions, "LARGE_BYTES", 1_000)
    bundle = Bundle.open(miniature_bundle)
    assert Denoiser(bundle, Runtime(threads=1)).passes == "separate"
    other = Runtime(threads=1, providers=("AzureExecutionProvider", "CPUExecutionProvider"))
    assert Denoiser(bundle, other).passes == "batch"


@pytest.mark.parametrize(
    ("model", "limit"),
    [(TextEncoder, (text_encoder, "SMALL_BYTES")), (Denoiser, (denoiser, "SMALL_WORK"))],
)
def test_a_small_model_runs_on_one_thread(
    model: type[TextEncoder] | type[Denoiser],
    limit: tuple[object, str],
    miniature_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def threads() -> int:
        opened = model(Bundle.open(miniature_bundle), Runtime(threads=3))
        session = opened.session if isinstance(opened, Denoiser) else opened.sessions[0]
        assert session._session is not None
        return int(session._session.get_session_options().intra_op_num_threads)

    assert threads() == 1
    monkeypatch.setattr(*limit, 1_000)
    assert threads() == 3


def test_progress_counts_every_call_of_the_denoiser(generator: Generator) -> None:
    """PNDM calls it once more than it has steps."""
    progress, _ = events(generator, steps=4)
    assert [(step.k, step.n) for step in progress] == [(k, 5) for k in range(1, 6)]
    assert all(step.preview is None for step in progress)


def test_previews_come_with_every_step_but_the_last_and_approach_the_image(generator: Generator) -> None:
    progress, image = events(generator, steps=8, guidance=1.0, previews=True)
    previews = [step.preview for step in progress]
    assert previews[-1] is None
    shown = [preview for preview in previews if preview is not None]
    assert len(shown) == len(progress) - 1
    distances = [np.abs(preview.astype(float) - image.pixels).mean() for preview in shown]
    assert distances[-1] < 0.5 * distances[0]


def test_a_preview_is_of_what_its_step_expects_to_arrive_at(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clean latents, as the schedule estimates them of the denoiser's input and output."""
    predict, calls, shown = generator.denoiser.predict, [], []

    def seen(latents: np.ndarray, *given: Any, **how: Any) -> np.ndarray:
        calls.append((latents, predict(latents, *given, **how)))
        return calls[-1][1]

    monkeypatch.setattr(generator.denoiser, "predict", seen)
    monkeypatch.setattr(generator, "_preview", lambda latents, *_: shown.append(latents))
    events(generator, previews=True)
    clean = generator._schedules[4].clean
    assert len(shown) == len(calls) - 1 and len({*clean}) > 1
    for (latents, output), (a, b), preview in zip(calls, clean, shown, strict=False):
        np.testing.assert_allclose(preview, a * latents + b * output, rtol=1e-4, atol=1e-4)
        assert preview.dtype == np.float32


def test_a_prompts_states_are_the_text_encoders(
    pipeline: StableDiffusionPipeline, generator: Generator
) -> None:
    tokens, states = generator.encode(PROMPT)
    with torch.no_grad():
        expected = pipeline.text_encoder(torch.from_numpy(tokens.ids))[0].numpy()
    assert states.tokens.shape == (1, 77, 32)
    assert np.abs(states.tokens - expected).max() < 1e-4


@pytest.mark.parametrize("after", [0, 2, -1])
def test_a_stop_ends_the_image_and_leaves_the_next_one_alone(generator: Generator, after: int) -> None:
    """Before the first step, between two, or before the decoder, which may take longer than a step."""
    _, states = generator.encode(PROMPT)
    expected = events(generator)[1]
    stop = Stop()
    steps = generator.generate(states, states, 42, 8, 5.0, stop=stop)
    for _ in range(next(steps).n - 1 if after < 0 else after):
        next(steps)
    stop.set()
    with pytest.raises(Cancelled):
        next(steps)
    np.testing.assert_array_equal(events(generator)[1].colours, expected.colours)


def test_a_stop_from_another_thread_ends_a_series_of_images(generator: Generator) -> None:
    """Wherever in a step it strikes."""
    _, states = generator.encode(PROMPT)

    def draw_on(stop: Stop) -> None:
        while True:
            for _ in generator.generate(states, states, 1, 8, 5.0, stop=stop):
                pass

    for delay in (0.001, 0.004, 0.011, 0.023):
        stop = Stop()
        timer = threading.Timer(delay, stop.set)
        timer.start()
        with pytest.raises(Cancelled):
            draw_on(stop)
        timer.join()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_decoder_whose_numbers_are_not_finite_makes_no_image(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """It would be a black or a white one."""
    session = generator.decoder.session
    run = session.run
    monkeypatch.setattr(session, "run", lambda *a, **k: [np.full_like(run(*a, **k)[0], value)])
    with pytest.raises(GenerationFailed, match=f"{as_shown(DECODER)} gave numbers that are not finite"):
        events(generator)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_denoiser_whose_numbers_are_not_finite_makes_no_image(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Nor is the decoder blamed for what it would make of them."""
    monkeypatch.setattr(generator.denoiser, "predict", lambda latents, *_, **__: np.full_like(latents, value))
    with pytest.raises(GenerationFailed, match="the denoiser gave numbers that are not finite; try another"):
        events(generator)


def test_steps_that_are_not_compiled_are_refused_naming_those_there_are(generator: Generator) -> None:
    _, states = generator.encode(PROMPT)
    with pytest.raises(InvalidRequest, match="4, 8, not 5") as refused:
        next(generator.generate(states, states, 1, 5, 5.0))
    assert refused.value.field == "steps"


def test_a_seed_out_of_range_is_refused(generator: Generator) -> None:
    _, states = generator.encode(PROMPT)
    with pytest.raises(InvalidRequest, match="seed") as refused:
        next(generator.generate(states, states, 2**32, 4, 5.0))
    assert refused.value.field == "seed"


@pytest.mark.parametrize(
    ("name", "other"), [(TEXT_ENCODER, DECODER), (FUSED_DENOISER, DECODER), (DECODER, DENOISER)]
)
def test_graphs_in_each_others_places_are_refused_by_name(bundle_copy: Path, name: str, other: str) -> None:
    """Hashes agree here; the signatures do not."""
    (bundle_copy / name).write_bytes((bundle_copy / other).read_bytes())
    write_manifest(bundle_copy)
    with pytest.raises(BundleError, match=as_shown(name)):
        Generator(Bundle.open(bundle_copy))


@pytest.mark.parametrize(
    ("fact", "value", "name"),
    [
        ("text_hidden", 64, TEXT_ENCODER),
        ("latent_channels", 16, FUSED_DENOISER),
        ("text_tokens", 48, TOKENIZER),
    ],
)
def test_facts_that_the_graphs_do_not_share_are_refused_at_start(
    bundle_copy: Path, fact: str, value: int, name: str
) -> None:
    write_manifest(bundle_copy, **{fact: value})
    with pytest.raises(BundleError, match=as_shown(name)):
        Generator(Bundle.open(bundle_copy))


def give_larger_ids(folder: Path) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_bytes())
    document["model"]["vocab"]["cat</w>"] = 100_000
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "open_models", [Generator, lambda bundle: Reader.open(bundle, 0.5)], ids=["to generate", "to decide"]
)
def test_a_tokenizer_of_another_model_is_refused_at_start_naming_both_files(
    bundle_copy: Path, open_models: Callable[[Bundle], object]
) -> None:
    """Not by the first prompt that has such a token."""
    give_larger_ids(bundle_copy / "tokenizer")
    write_manifest(bundle_copy)
    words = f"{as_shown(TOKENIZER)} gives token ids up to 100000, .*{as_shown(TEXT_ENCODER)} fails"
    with pytest.raises(BundleError, match=words):
        open_models(Bundle.open(bundle_copy))


def test_a_text_encoder_that_fails_on_every_id_is_not_laid_to_the_tokenizer(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the provider that lacks something, such as half precision."""

    def fails(session: Session, *_: object, **__: object) -> None:
        raise GenerationFailed(f"onnxruntime failed in {session.path}: requires f16")

    monkeypatch.setattr(Session, "run", fails)
    with pytest.raises(BundleError, match=r"^onnxruntime failed in .*: requires f16$"):
        Generator(Bundle.open(bundle_copy))


def test_an_output_may_have_any_name_that_the_manifest_gives_it(bundle_copy: Path) -> None:
    """As an argument's name, this one would be there twice."""
    model = onnx.load(bundle_copy / TEXT_ENCODER)
    states = Bundle.open(bundle_copy).manifest.text_output
    model.graph.node.append(onnx.helper.make_node("Identity", [states], ["self"]))
    next(output for output in model.graph.output if output.name == states).name = "self"
    onnx.save(model, bundle_copy / TEXT_ENCODER)
    write_manifest(bundle_copy, text_output="self")
    assert TextEncoder(Bundle.open(bundle_copy), Runtime()).sessions[0].outputs == ("self",)


@pytest.mark.parametrize("shape", [(2, 77, 32), (1, 76, 32), (77, 32), (1, 77, 1)])
def test_states_of_another_size_than_the_manifest_says_are_refused(
    miniature_bundle: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    """A graph that leaves its sizes open does not tell before it has run, nor does it keep to those it tells."""
    made = Generator(Bundle.open(miniature_bundle))
    monkeypatch.setattr(made.text_encoder.sessions[0], "run", lambda *_, **__: [np.zeros(shape, np.float32)])
    with pytest.raises(BundleError, match=r"gives states \(.*, the manifest says"):
        made.encode("a cat")


def test_a_second_tokenizer_of_another_model_is_refused_like_the_first(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"steps": (4,), "guidance": 5.0, "name": "xl", "licence": "Apache-2.0"}
    export_bundle(miniature_xl(), tmp_path / "xl", **facts)
    generator = Generator(Bundle.open(tmp_path / "xl"))
    _, second = generator.text_encoder.sessions
    tokens, _ = generator.encode("a cat")
    assert tokens.ids_2 is not None
    states, vector = second.run({"input_ids": tokens.ids_2})
    for other in ([states[:, 1:], vector], [states, vector[0]]):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(second, "run", lambda *_, other=other, **__: other)
            with pytest.raises(BundleError, match="which do not fit together"):
                generator.encode("a cat")
    give_larger_ids(tmp_path / "xl" / "tokenizer_2")
    write_manifest(tmp_path / "xl")
    words = f"{as_shown(TOKENIZER_2)} gives token ids up to .*{as_shown(TEXT_ENCODER_2)} fails"
    with pytest.raises(BundleError, match=words):
        Reader.open(Bundle.open(tmp_path / "xl"), 0.5)


def test_a_schedule_in_anothers_place_is_refused_at_start(bundle_copy: Path) -> None:
    (bundle_copy / schedule_file(8)).write_bytes((bundle_copy / schedule_file(4)).read_bytes())
    write_manifest(bundle_copy)
    with pytest.raises(BundleError, match=r"8\.json is for 4 steps"):
        Generator(Bundle.open(bundle_copy))


def test_half_precision_is_refused_on_an_onnxruntime_that_gets_it_wrong(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.18.1")
    Generator(Bundle.open(bundle_copy))
    write_manifest(bundle_copy, dtypes={"unet": "fp16"})
    with pytest.raises(BundleError, match=r"which onnxruntime 1\.18\.1 gets wrong: install 1\.19 or newer"):
        Generator(Bundle.open(bundle_copy))
