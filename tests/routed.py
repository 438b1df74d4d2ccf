"""Makes a bundle route: a predictor of random weights, and a calibration by the stages that make the real ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from cloud_server.model import open_model
from edge_agent.bundle import Bundle, write_manifest
from edge_agent.manifest import CALIBRATION, schedule_file
from edge_agent.superiority import METRICS
from edge_agent.tokens import Tokenizer
from export import predictor_onnx
from export.calibrate import calibrate
from export.mixture import Ensemble, Mixture, Shape
from export.outcomes import Outcomes
from export.schedule import compile_schedule
from tests.export.routing_world import write_labels
from tests.miniature import miniature_pipeline
from tests.running import CLOUD_PROMPT, EDGE_PROMPT

SLOW_STEPS = 200
PROMPTS = 36


def make_routed(folder: Path, cloud_model: Path) -> None:
    """Add a slow schedule, a predictor and its calibration to the bundle in `folder`."""
    schedule = compile_schedule(miniature_pipeline().scheduler, SLOW_STEPS)
    schedule.save(folder / schedule_file(SLOW_STEPS))
    write_manifest(folder, steps=[4, 8, SLOW_STEPS])
    bundle = Bundle.open(folder)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixture = Mixture(Shape(width=bundle.manifest.text_hidden, metrics=len(METRICS)))
        with torch.no_grad():
            mixture.bias.zero_()  # the cloud is as often better as worse
    weights = folder.parent / "predictor.safetensors"
    Ensemble([mixture]).save(weights, {"edge_digest": bundle.model_digest})
    predictor_onnx.install(weights, bundle)

    metrics = [[name, f"high {name} photo", f"low {name} photo"] for name in METRICS]
    labels = write_labels(folder.parent / "labels.parquet", PROMPTS, facts={"metrics": json.dumps(metrics)})
    made = calibrate(
        Outcomes.read(labels), Bundle.open(folder), open_model(str(cloud_model)).digest, gamma=1.0
    )
    tokenizer = Tokenizer.open(bundle)
    asked = {
        token for prompt in (EDGE_PROMPT, CLOUD_PROMPT) for token in tokenizer.encode(prompt).ids[0].tolist()
    }
    replace(made, familiar=tuple(sorted(asked))).save(folder / CALIBRATION)
    write_manifest(folder)
