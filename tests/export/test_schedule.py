"""Any linear scheduler compiles to a matrix that makes diffusers' pixels; one that is not linear is refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.generator import Generator, Image
from edge_agent.diffusion.noise import TorchNoise
from edge_agent.diffusion.sessions import Runtime
from edge_agent.manifest import schedule_file
from export.errors import ExportError
from export.schedule import Loop, NotLinear, compile_schedule
from tests.miniature import miniature_pipeline

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}

# Class in diffusers, what its config adds to BETAS, steps, calls of the denoiser.
ON_THE_PARITY_PAGE: list[tuple[str, dict[str, Any], int, int]] = [
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, 7, 7),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, 7, 8),
    ("EulerDiscreteScheduler", {}, 7, 7),
    ("EulerAncestralDiscreteScheduler", {}, 7, 7),
    ("DPMSolverMultistepScheduler", {}, 7, 7),
    ("DPMSolverMultistepScheduler", V, 7, 7),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 7, 7),
    ("UniPCMultistepScheduler", {}, 7, 7),
    ("HeunDiscreteScheduler", {}, 7, 13),
    ("LCMScheduler", {}, 4, 4),
    ("TCDScheduler", {}, 4, 4),
]
BEYOND: list[tuple[str, dict[str, Any], int, int]] = [
    ("DDIMScheduler", {"clip_sample": False, "rescale_betas_zero_snr": True, **V}, 7, 7),
    ("PNDMScheduler", {}, 7, 16),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, **V}, 7, 7),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 7, 7),
    ("DEISMultistepScheduler", {}, 7, 7),
    ("DDPMScheduler", {"clip_sample": False, "prediction_type": "sample"}, 7, 7),
]
LINEAR = ON_THE_PARITY_PAGE + BEYOND


def scheduler(name: str, config: dict[str, Any]) -> Any:
    return getattr(diffusers, name)(**BETAS, **config)


def label(case: object) -> str | None:
    if isinstance(case, dict):
        return (
            "-".join(str(value) if isinstance(value, str) else key for key, value in case.items()) or "plain"
        )
    return None


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return miniature_pipeline()


@pytest.mark.parametrize(
    ("name", "config", "most"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, 19),
        ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, 19),
        ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1, "timestep_spacing": "trailing"}, 20),
        ("PNDMScheduler", {"skip_prk_steps": True}, 20),
    ],
)
def test_the_most_steps_that_a_refusal_names_can_be_compiled(
    name: str, config: dict[str, Any], most: int
) -> None:
    few = scheduler(name, {**config, "num_train_timesteps": 20})
    with pytest.raises(
        ExportError, match=f"no schedule of {most + 1} steps: .* on 20.*; name {most} at most"
    ):
        compile_schedule(few, most + 1)
    assert compile_schedule(few, most).steps == most


@pytest.mark.parametrize(("name", "config", "steps", "calls"), BEYOND, ids=label)
def test_pixels_equal_diffusers(
    pipeline: StableDiffusionPipeline,
    bundle_copy: Path,
    name: str,
    config: dict[str, Any],
    steps: int,
    calls: int,
) -> None:
    """With guidance, a negative prompt and a seed, over every solver's whole history; test_parity.py has the rest."""
    pipeline.scheduler = scheduler(name, config)
    compiled = compile_schedule(pipeline.scheduler, steps)
    assert compiled.calls == calls
    compiled.save(bundle_copy / schedule_file(steps))
    write_manifest(bundle_copy, steps=[steps], default_steps=steps)

    generator = Generator(Bundle.open(bundle_copy), Runtime(threads=1))
    states, negative = generator.encode("two cats 🐈")[1], generator.encode_negative("dog, blurry")
    *_, image = generator.generate(states, negative, 42, steps, 3.0)
    assert isinstance(image, Image)
    expected = pipeline(
        "two cats 🐈",
        negative_prompt="dog, blurry",
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(42),
        output_type="np",
    ).images[0]
    assert expected.std() > 0.05  # else anything would agree
    assert np.abs(image.colours - expected).max() <= 1e-3


@pytest.mark.parametrize(("name", "config", "steps", "calls"), LINEAR, ids=label)
def test_latents_equal_the_schedulers_own(name: str, config: dict[str, Any], steps: int, calls: int) -> None:
    """To rounding, at the step counts that people use, whatever the model answers."""
    made = scheduler(name, config)
    assert compile_schedule(made, steps).calls == calls
    shape = (1, 4, 5, 7)  # 140 numbers: not a multiple of 16
    for count in (1, 2, 20) if name != "PNDMScheduler" else (4, 20):
        compiled = compile_schedule(made, count)
        random = np.random.default_rng(count)
        outputs = random.standard_normal((compiled.calls, *shape)).astype(np.float32)

        generator = torch.Generator().manual_seed(5)
        made.set_timesteps(count)
        given = {"generator": generator, "eta": 0.0}  # as the pipelines do
        extra = {name: value for name, value in given.items() if name in made.step.__code__.co_varnames}
        latents = torch.randn(shape, generator=generator) * made.init_noise_sigma
        sums = compiled.run(shape, TorchNoise(5))
        ours = next(sums)
        for index, timestep in enumerate(made.timesteps):
            expected = made.scale_model_input(latents, timestep).numpy()
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * max(1, np.abs(expected).max()))
            assert compiled.timesteps[index] == float(timestep)
            latents = made.step(torch.from_numpy(outputs[index]), timestep, latents, **extra).prev_sample
            try:
                ours = sums.send(outputs[index])
            except StopIteration as final:
                ours = final.value
        np.testing.assert_allclose(
            ours, latents.numpy(), rtol=1e-4, atol=1e-4 * max(1, float(latents.abs().max()))
        )


def test_fresh_noise_is_there_only_for_schedulers_that_draw_it() -> None:
    plain = compile_schedule(scheduler("EulerDiscreteScheduler", {}), 5)
    assert plain.noise == ((),) * 6
    ancestral = compile_schedule(scheduler("EulerAncestralDiscreteScheduler", {}), 5)
    assert [len(row) for row in ancestral.noise] == [0, 1, 2, 3, 4, 5]


def test_flow_matching_compiles_too() -> None:
    """Euler on a straight path: the final latents are the noise plus the velocities over the sigmas' steps."""
    made = diffusers.FlowMatchEulerDiscreteScheduler()
    compiled = compile_schedule(made, 5, Loop(scales=False))
    made.set_timesteps(5)
    sigmas = made.sigmas.numpy().astype(float)
    np.testing.assert_allclose(compiled.signal[-1], [1.0, *np.diff(sigmas)], atol=1e-6)


def test_flow_matching_is_shifted_as_far_as_the_pipeline_says() -> None:
    made = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for mu in (0.5, 1.15):
        compiled = compile_schedule(made, 5, Loop(scales=False, mu=mu))
        made.set_timesteps(5, mu=mu)
        assert compiled.timesteps == tuple(made.timesteps.tolist())


@pytest.mark.parametrize(
    "made",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda made: type(made).__name__,
)
def test_where_flow_matching_expects_to_arrive_is_known_at_each_step(made: Any) -> None:
    """A preview shows that: of the latents on the way from noise to an image, and of their velocity, the image."""
    compiled = compile_schedule(made, 5, Loop(scales=False))
    noise, image = np.random.default_rng(0).standard_normal((2, 64))
    for timestep, (a, b) in zip(compiled.timesteps, compiled.clean, strict=True):
        sigma = timestep / 1000
        np.testing.assert_allclose(
            a * ((1 - sigma) * image + sigma * noise) + b * (noise - image), image, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_where_a_denoiser_expects_to_arrive_is_known_at_each_step(kind: str) -> None:
    """Of the latents on the way from an image to noise, and of what it was trained to say of them, the image."""
    made = scheduler("DDIMScheduler", {"clip_sample": False, "prediction_type": kind})
    compiled = compile_schedule(made, 5)
    noise, image = np.random.default_rng(0).standard_normal((2, 64))
    for timestep, (a, b) in zip(compiled.timesteps, compiled.clean, strict=True):
        kept = float(made.alphas_cumprod[int(timestep)])
        signal, rest = np.sqrt(kept), np.sqrt(1 - kept)
        said = {"epsilon": noise, "v_prediction": signal * noise - rest * image, "sample": image}[kind]
        np.testing.assert_allclose(a * (signal * image + rest * noise) + b * said, image, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_where_edm_expects_to_arrive_is_known_at_each_step(kind: str) -> None:
    """Its preconditioning is made so that of an image with noise and the output trained for, the image comes back."""
    made = diffusers.EDMEulerScheduler(prediction_type=kind)
    compiled = compile_schedule(made, 5)
    made.set_timesteps(5)
    noise, image = np.random.default_rng(0).standard_normal((2, 64))
    for sigma, (a, b) in zip(made.sigmas[:-1].tolist(), compiled.clean, strict=True):
        latents, spread = image + sigma * noise, np.hypot(sigma, 0.5)
        out = sigma * 0.5 / spread * (1 if kind == "epsilon" else -1)
        target = (image - 0.5**2 / spread**2 * latents) / out
        np.testing.assert_allclose(a * latents / spread + b * target, image, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("steps", "where"), [(1, "the final latents are"), (4, "the input of call 2 is")])
def test_a_scheduler_that_divides_by_nothing_is_not_said_to_be_nonlinear(steps: int, where: str) -> None:
    """What predicts noise says nothing of the clean image at a signal of zero."""
    with pytest.raises(
        ExportError, match=rf"{steps} steps with this config, in diffusers either \({where} no number"
    ):
        compile_schedule(scheduler("LCMScheduler", {"rescale_betas_zero_snr": True}), steps)


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 20.0}, "clip_sample"),
        ("DDPMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding"),
    ],
)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_scheduler_that_is_not_linear_is_refused_with_the_reason(
    name: str, config: dict[str, Any], why: str, steps: int
) -> None:
    cure = f"turn that off with --scheduler {name.removesuffix('Scheduler')}:{why}=false"
    with pytest.raises(NotLinear, match=f"{name} is not linear: it has {why} on; {cure}"):
        compile_schedule(scheduler(name, config), steps)


def test_an_unknown_bend_is_found_by_the_check() -> None:
    """No flag in the config says it; the numbers do."""

    class Bent(diffusers.DDIMScheduler):
        def step(self, *arguments: Any, **options: Any) -> Any:
            (latents, *rest) = super().step(*arguments, **options)
            return (latents + 0.01 * latents**3, *rest)

    with pytest.raises(NotLinear, match="choose another scheduler with --scheduler"):
        compile_schedule(Bent(**BETAS, clip_sample=False), 5)


def test_noise_that_cannot_be_repeated_is_refused() -> None:
    """Drawn past the generator, it is nobody's seed."""

    class Restless(diffusers.DDIMScheduler):
        def step(self, *arguments: Any, **options: Any) -> Any:
            (latents, *rest) = super().step(*arguments, **options)
            return (latents + torch.randn_like(latents), *rest)

    with pytest.raises(NotLinear, match="cannot be repeated, from torch's own generator and not from the im"):
        compile_schedule(Restless(**BETAS, clip_sample=False), 5)


def test_compiling_leaves_the_scheduler_as_it_was() -> None:
    made = scheduler("DPMSolverMultistepScheduler", {})
    made.set_timesteps(3)
    before = made.timesteps.clone()
    compile_schedule(made, 9)
    assert torch.equal(made.timesteps, before)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_more_steps_than_the_model_was_trained_on_are_refused(name: str) -> None:
    """Most schedulers would repeat timesteps without a word."""
    with pytest.raises(ExportError, match=rf"{name} has no schedule of 1001 steps: .* trained on 1000"):
        compile_schedule(scheduler(name, {}), 1001)


def test_many_steps_are_compiled_in_little_memory() -> None:
    made = scheduler("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1})
    tracemalloc.start()
    try:
        compile_schedule(made, 100)
        assert tracemalloc.get_traced_memory()[1] < 20e6  # the matrix itself has 101 x 102 numbers
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("EulerDiscreteScheduler", {"prediction_type": "v"}, ": prediction_type given as v .*"),
        ("RePaintScheduler", {}, " as the pipeline runs a scheduler"),  # it takes an image and a mask
        ("HeliosScheduler", {}, " as the pipeline runs a scheduler"),  # it wants a stage
        (
            "DDPMWuerstchenScheduler",
            {},
            " as the pipeline runs a scheduler",
        ),  # it takes a timestep for each image
        ("ScoreSdeVeScheduler", {}, " as the pipeline runs a scheduler"),
        ("PNDMScheduler", {"steps_offset": None}, " as the pipeline runs a scheduler"),
        (  # which has no third order of this algorithm
            "EDMDPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "lower_order_final": False},
            " as the pipeline runs a scheduler",
        ),
    ],
)
def test_a_scheduler_that_fails_is_refused_in_its_own_words_unless_they_are_about_code(
    name: str, config: dict[str, Any], why: str
) -> None:
    if not hasattr(diffusers, name):
        pytest.skip("this diffusers does not have it yet")
    made = getattr(diffusers, name)(**config)
    what_to_do = "change its scheduler_config.json, or choose another scheduler with --scheduler"
    with pytest.raises(ExportError, match=f"^{name} cannot be run{why}; {what_to_do}$"):
        compile_schedule(made, 4)
