"""The decision, from prompt to route, beside the bare onnxruntime calls it makes. On one core, without torch.

Its own process is started as `python deploy/bench/decision.py BUNDLE DECISIONS IMAGES`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

from child import Reply, answer, asked
from clock import timed
from edge_agent.agent import Agent, Terms
from edge_agent.budget import Budget
from edge_agent.bundle import Bundle
from edge_agent.cloud import CloudClient
from edge_agent.device import Device
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.sessions import Runtime
from edge_agent.manifest import TEXT_ENCODER
from edge_agent.purchase import Purchases
from edge_agent.quota import Ledger
from edge_agent.reader import Reader
from edge_agent.request import ImageRequest, Limits
from edge_agent.resident import Resident
from errors import BenchError
from estimate import calm, calm_ratio, quantile, ratio_both_ways
from plan import PROMPTS, Plan
from row import Row

GROUP = "decision"
ROUTING_RATE = 0.5
RATIO, PREDICT_MS, DECISION_MS, SHARE_PERCENT = 1.3, 0.5, 3.0, 5.0  # targets
SERIES = ("decision_ms", "bare_ms", "image_ms")
NOBODY = "127.0.0.1:9"  # a cloud that is configured and never called: routing alone opens no connection


def rows(plan: Plan) -> list[Row]:
    """Ratio to the bare calls, the predictor's share in time, the whole in time and beside an image."""
    if Bundle.open(plan.bundle, verify=False).predictor is None:
        raise BenchError(f"{plan.bundle} has no predictor; make one with `edge-export train`")
    found = asked(1, "decision.py", plan.bundle, plan.decisions, plan.images)
    whole, bare = found["decision_ms"], found["bare_ms"]
    stages = {stage: quantile(values).value for stage, values in found["stages_ms"].items()}
    rest = quantile(whole).value - sum(stages.values())
    of_stages = ", ".join(f"{stage} {value:.2f}" for stage, value in stages.items())
    image_ms = quantile(found["image_ms"]).value
    share = quantile([100 * value / image_ms for value in whole])
    predict = [
        sum(pair) for pair in zip(found["stages_ms"]["predict"], found["stages_ms"]["decide"], strict=True)
    ]
    p50 = f"p50 {quantile(whole).value:.2f} ms over {quantile(bare).value:.2f} ms"
    p95 = f"p95 {quantile(whole, 0.95).value:.2f} ms over {quantile(bare, 0.95).value:.2f} ms"
    return [
        Row.at_most(
            GROUP,
            "decision ÷ its bare onnxruntime calls, one core",
            ratio_both_ways(whole, bare),
            "x",
            RATIO,
            note=f"{p50}, {p95}; {of_stages}, quota and threads {rest:.2f} ms",
            calm=calm_ratio(whole, bare),
            details=found,
        ),
        Row.at_most(
            GROUP, "predictor, PRS and policy, p50", quantile(predict), "ms", PREDICT_MS, calm=calm(predict)
        ),
        Row.at_most(GROUP, "whole decision, p95", quantile(whole, 0.95), "ms", DECISION_MS),
        Row.at_most(
            GROUP,
            "decision as a share of an edge image",
            share,
            "%",
            SHARE_PERCENT,
            note=f"an image takes {image_ms:.0f} ms on the same core",
        ),
    ]


async def measure(folder: Path, decisions: int, images: int) -> Reply:
    """Decisions and bare calls in turns, an image now and then. All in milliseconds."""
    bundle = Bundle.open(folder)
    generator = Generator(bundle, Runtime(threads=1))
    reader = Reader(bundle, generator.tokenizer, generator.text_encoder, ROUTING_RATE)
    manifest = bundle.manifest
    bare = bare_calls(bundle)
    with tempfile.TemporaryDirectory() as state:
        ledger = Ledger.open(Path(state) / "quota.sqlite3", (Budget("day", "day", 1_000_000),), ())
        limits = Limits(((manifest.width, manifest.height),), manifest.steps)
        agent = Agent(
            Resident(reader, generator, limits),
            Device(max_queue=1),
            Purchases(ledger, CloudClient(NOBODY)),
            Terms(max_price_micro_usd=10_000, cloud_timeout_s=1.0, png_facts=True),
        )
        found: Reply = {"stages_ms": {}} | {name: [] for name in SERIES}

        async def decide(prompt: str) -> None:
            request = ImageRequest(request_id=uuid.uuid4().hex, prompt=prompt)
            with timed(found["decision_ms"]):
                decision = await agent.route(request)
            for stage, value in decision.timings_ms.items():
                if stage != "total":
                    found["stages_ms"].setdefault(stage, []).append(value)

        def call(prompt: str) -> None:
            with timed(found["bare_ms"]):
                bare[prompt]()

        for prompt in PROMPTS:  # the first calls allocate
            await decide(prompt)
            call(prompt)
        for series in found.values():
            series.clear()
        every = max(1, decisions // images) | 1  # odd, so that either is the first one after an image
        for number in range(decisions):
            prompt = PROMPTS[number // 2 % len(PROMPTS)]  # each both ways
            if number % 2:
                call(prompt)
                await decide(prompt)
            else:
                await decide(prompt)
                call(prompt)
            if number % every == 0:
                with timed(found["image_ms"]):
                    draw(generator, bundle, prompt, seed=number)
        agent.close()
        await agent.device.close()
        ledger.close()
    return found


def bare_calls(bundle: Bundle) -> dict[str, Callable[[], None]]:
    """For each prompt the runs of text encoder and predictor, by onnxruntime as it comes, on inputs that are ready."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    reader = Reader.open(bundle, ROUTING_RATE, Runtime(threads=1))
    encoder = ort.InferenceSession(
        str(bundle.path(TEXT_ENCODER)), options, providers=["CPUExecutionProvider"]
    )
    predictor = ort.InferenceSession(str(bundle.predictor), options, providers=["CPUExecutionProvider"])
    ids_type = np.int32 if encoder.get_inputs()[0].type == "tensor(int32)" else np.int64

    def calls(prompt: str) -> Callable[[], None]:
        tokens = reader.read(prompt).tokens
        output, ids = [bundle.manifest.text_output], {"input_ids": tokens.ids.astype(ids_type)}
        (states,), own = encoder.run(output, ids), tokens.own
        read = {"states": states[:, own], "mask": np.ones((1, len(own)), bool), "ids": tokens.ids[:, own]}

        def run() -> None:
            encoder.run(output, ids)
            predictor.run(["edge", "cloud", "pull"], read)

        return run

    return {prompt: calls(prompt) for prompt in PROMPTS}


def draw(generator: Generator, bundle: Bundle, prompt: str, seed: int) -> None:
    """One image from its prompt, without decision or PNG."""
    manifest = bundle.manifest
    states, negative = generator.encode(prompt)[1], generator.encode_negative("")
    for _ in generator.generate(states, negative, seed, manifest.default_steps, manifest.default_guidance):
        pass


def pin() -> None:
    """Keep this process, and the threads it will start, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


if __name__ == "__main__":
    pin()
    bundle_folder, decision_count, image_count = sys.argv[1:]
    answer(lambda: lambda: asyncio.run(measure(Path(bundle_folder), int(decision_count), int(image_count))))
