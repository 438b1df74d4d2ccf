"""The parity table: how far the edge's pixels are from diffusers', for each class of pipelines and each scheduler.

    python -m tests.export.parity        (or `make parity`) measures it and writes docs/parity.md

Pipelines are seeded miniatures with random weights, see `tests.miniature`. Each set of graphs is traced once; the
schedulers of a column lie in one bundle, each under a step count of its own.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.sessions import Runtime
from edge_agent.manifest import schedule_file
from export import support
from export.diffusion_onnx import export_bundle
from export.reference import difference, reference_image
from export.schedule import compile_schedule
from tests.miniature import (
    BETAS,
    miniature_edm,
    miniature_lcm,
    miniature_pipeline,
    miniature_tiny_autoencoder,
    miniature_v2,
    miniature_v3,
    miniature_xl,
)

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
COMMAND = "make parity"
TOLERANCE = 1e-3
PROMPT, NEGATIVE, SEED = "two red cats on the beach 🐈", "dog, blurry", 42
FEWEST_STEPS = 4
"""Of the first scheduler; each after it has one step more, because a bundle keeps one schedule for a step count."""


SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "DDIM": (diffusers.DDIMScheduler, {**BETAS, "clip_sample": False, "steps_offset": 1}),
    "PNDM": (diffusers.PNDMScheduler, {**BETAS, "skip_prk_steps": True, "steps_offset": 1}),
    "Euler": (diffusers.EulerDiscreteScheduler, BETAS),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, BETAS),
    "DPM-Solver++ 2M": (diffusers.DPMSolverMultistepScheduler, BETAS),
    "DPM-Solver++ 2M Karras": (diffusers.DPMSolverMultistepScheduler, {**BETAS, "use_karras_sigmas": True}),
    "UniPC": (diffusers.UniPCMultistepScheduler, BETAS),
    "Heun": (diffusers.HeunDiscreteScheduler, BETAS),
    "LCM": (diffusers.LCMScheduler, BETAS),
    "TCD": (diffusers.TCDScheduler, BETAS),
    "EDM Euler": (diffusers.EDMEulerScheduler, {}),
    "EDM DPM-Solver++ 2M": (diffusers.EDMDPMSolverMultistepScheduler, {"solver_type": "midpoint"}),
    "flow-match Euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
    "flow-match Heun": (diffusers.FlowMatchHeunDiscreteScheduler, {}),
}
EDM = ("EDM Euler", "EDM DPM-Solver++ 2M")
FLOW_MATCHING = ("flow-match Euler", "flow-match Heun")
BY_NOISE = tuple(name for name in SCHEDULERS if name not in EDM + FLOW_MATCHING)


@dataclass(frozen=True)
class Column:
    """One class of models as people use it."""

    make: Callable[[], Any]
    guidance: float
    changes: dict[str, Any] = field(default_factory=dict)  # to every scheduler that has betas
    schedulers: tuple[str, ...] = BY_NOISE  # that diffusers' own pipeline runs


def tiny() -> diffusers.StableDiffusionPipeline:
    """The miniature, decoded by a tiny autoencoder."""
    pipeline = miniature_pipeline()
    pipeline.vae = miniature_tiny_autoencoder()
    return pipeline


COLUMNS = {
    "SD 1.x": Column(miniature_pipeline, 5.0),
    "SD 2.x": Column(miniature_v2, 5.0, {"prediction_type": "v_prediction"}),
    "SD 2.x, zero SNR": Column(
        miniature_v2,
        5.0,
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        tuple(name for name in BY_NOISE if name not in ("PNDM", "Heun")),  # which rescale no betas
    ),
    "SD-Turbo": Column(miniature_v2, 0.0, {"timestep_spacing": "trailing"}),
    "SD 1.x, tiny autoencoder": Column(tiny, 5.0),
    "LCM": Column(miniature_lcm, 8.5, schedulers=("LCM",)),
    "SDXL": Column(miniature_xl, 5.0),
    "SDXL-Turbo": Column(miniature_xl, 0.0, {"timestep_spacing": "trailing"}),
    "Playground 2.5": Column(miniature_edm, 3.0, schedulers=EDM),
    "SD 3": Column(
        miniature_v3,
        5.0,
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        ("DPM-Solver++ 2M", "UniPC", *FLOW_MATCHING),
    ),
}


class Parity:
    """Traces what it needs when it is asked, and keeps it in `folder`. `there` are bundles that need no tracing."""

    def __init__(self, folder: Path, there: dict[Callable[[], Any], Path] | None = None) -> None:
        self._folder = folder
        self._there = there or {}
        self._traced: dict[Callable[[], Any], tuple[Any, Path]] = {}
        self._loaded: dict[str, tuple[Any, Generator, dict[str, Any]]] = {}

    def measure(self, column: str, scheduler: str) -> tuple[float, float]:
        """Largest difference of any colour in 0..1 before rounding, and the least deviation of a reference image.

        Where there is guidance, of an image with a negative prompt and one without.
        """
        pipeline, generator, schedulers = self._load(column)
        pipeline.scheduler = schedulers[scheduler]
        steps = FEWEST_STEPS + list(SCHEDULERS).index(scheduler)
        guidance = COLUMNS[column].guidance
        negatives = (NEGATIVE, "") if guidance > 1 and support.kind(pipeline).takes_negative else ("",)
        references = [
            reference_image(pipeline, PROMPT, negative, SEED, steps, guidance) for negative in negatives
        ]
        return (
            max(difference(generator, reference) for reference in references),
            min(float(reference.colours.std()) for reference in references),
        )

    def bundle(self, column: str) -> tuple[Any, Path]:
        """The column's torch pipeline and the bundle that it was exported to."""
        return self._trace(COLUMNS[column].make)

    def _load(self, title: str) -> tuple[Any, Generator, dict[str, Any]]:
        if title not in self._loaded:
            column = COLUMNS[title]
            pipeline, bundle = self._trace(column.make)
            folder = Path(shutil.copytree(bundle, self._folder / f"column-{len(self._loaded)}"))
            schedulers, counts = {}, []
            for count, (name, (made, config)) in enumerate(SCHEDULERS.items(), start=FEWEST_STEPS):
                if name in column.schedulers:
                    changes = column.changes if config else {}
                    schedulers[name] = made(**config, **changes)
                    compiled = compile_schedule(schedulers[name], count, support.kind(pipeline).loop)
                    compiled.save(folder / schedule_file(count))
                    counts.append(count)
            write_manifest(folder, steps=counts, default_steps=counts[0])
            self._loaded[title] = (pipeline, Generator(Bundle.open(folder), Runtime(threads=1)), schedulers)
        return self._loaded[title]

    def _trace(self, make: Callable[[], Any]) -> tuple[Any, Path]:
        if make not in self._traced:
            pipeline, folder = make(), self._folder / f"graphs-{len(self._traced)}"
            if make in self._there:
                folder = self._there[make]
            else:
                export_bundle(pipeline, folder, steps=(FEWEST_STEPS,), report=lambda _line: None)
            self._traced[make] = (pipeline, folder)
        return self._traced[make]


def page(parity: Parity) -> str:
    """The text of docs/parity.md, measured."""
    rows = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for scheduler in SCHEDULERS:
        cells = [
            f"{parity.measure(title, scheduler)[0]:.1e}" if scheduler in column.schedulers else "–"
            for title, column in COLUMNS.items()
        ]
        rows.append([scheduler, *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# Does the edge make diffusers' pictures?

The largest difference of any colour in 0..1, before rounding to bytes, between the picture that a bundle makes
with numpy and onnxruntime and the picture that diffusers makes with torch: same weights, prompt, negative prompt,
seed and scheduler, {FEWEST_STEPS} to {FEWEST_STEPS + len(SCHEDULERS) - 1} steps, float32 on a CPU. With guidance,
the larger difference of two pictures, one with a negative prompt and one without. At most {TOLERANCE:.0e} is allowed;
one step of a byte is 3.9e-3. The test suite measures every cell anew.

{table}

–: diffusers' own pipeline of the class does not run the scheduler, or draws no image with it: Stable Diffusion 3 is
trained by flow matching and Playground 2.5 by EDM, the others are not, `LatentConsistencyModelPipeline` runs LCM
alone, and PNDM and Heun rescale no betas.

Written by `{COMMAND}`, on seeded miniatures of each class with random weights (`tests/miniature.py`). SD 1.x and
SD 2.x are `StableDiffusionPipeline` with guidance. The second has OpenCLIP's text encoder, which pads with a token
of its own, and a denoiser with linear projections, other numbers of attention heads in each block
and v-prediction. With zero SNR its betas are rescaled to end in nothing but noise; Euler begins with 4,096 times as
much of it as there is image, for which float32 has few digits left. SD-Turbo has the same networks, which predict
noise, without guidance and with trailing timesteps.
LCM is `LatentConsistencyModelPipeline`, which takes the guidance scale as an input of its network. SDXL is
`StableDiffusionXLPipeline` with two text encoders and added conditioning, SDXL-Turbo the same without guidance and
with trailing timesteps. Playground 2.5 is an SDXL whose latents have a mean and a deviation for each channel. SD 3 is
`StableDiffusion3Pipeline` without its third text encoder: a transformer that attends to tokens and latents together,
the prompt as one vector of both encoders, and latents of 16 channels; its DPM-Solver++ and UniPC take flow matching's
sigmas. The tiny autoencoder is `AutoencoderTiny`.
"""


def shape(text: str) -> list[list[str]]:
    """Title row, scheduler names and which cells are filled: what must agree between page and code."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[re.sub(r"^\d\.\de[-+]\d\d$", "measured", cell) for cell in row] for row in rows]


def expected_shape() -> list[list[str]]:
    """The shape that the page must have."""
    head = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    body = [
        [name, *("measured" if name in column.schedulers else "–" for column in COLUMNS.values())]
        for name in SCHEDULERS
    ]
    return [" | ".join(row).strip("| ").split(" | ") for row in head + body]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        PAGE.write_text(page(Parity(Path(scratch))), encoding="utf-8")
