"""An image from the cloud: what is asked for, and the answer, checked as it comes in."""

from __future__ import annotations

import asyncio
import hashlib
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from PIL import Image, UnidentifiedImageError

from edge_agent.errors import CloudLied
from edge_agent.image import SIGNATURE, Progress
from edge_agent.request import ImageRequest
from routet2i.cloud.v1 import cloud_pb2
from routet2i.image.v1 import image_pb2

MAX_IMAGE_BYTES = 64 * 2**20
"""Largest image taken. A 2048 x 2048 PNG of noise in 24 bits has 12 MiB."""

MAX_PIXEL_BYTES, MAX_OTHER_BYTES = 8, 2**20
"""Largest for its size: noise in four channels of 16 bits, and what a PNG carries beside its pixels."""

MAX_PREVIEW_BYTES = 2**18
"""Largest preview passed on. A 256 x 256 PNG of noise in 24 bits has 0.2 MiB."""

STAGES = ("queue", "generate", "png")
"""Of an image in the cloud, as its server names them; others' timings are not passed on."""


@dataclass(frozen=True)
class CloudAccepted:
    """The cloud has taken the request. `charged_micro_usd` is its price, the digest that of its model."""

    queue_position: int
    charged_micro_usd: int
    model_digest: str


@dataclass(frozen=True)
class CloudImage:
    """A PNG of the size and seed that were asked for, and what else the cloud says of its making."""

    png: bytes
    steps: int
    guidance_scale: float
    model_digest: str
    charged_micro_usd: int
    timings_ms: Mapping[str, float]


class ImageStream:
    """The answer to one call, checked as it comes in. With `redelivery` nothing is offered for it: it was paid for."""

    def __init__(self, request: ImageRequest, ceiling_micro_usd: int, *, redelivery: bool = False) -> None:
        self.request = request
        self.redelivery = redelivery
        self._ceiling_micro_usd = ceiling_micro_usd
        self._offer_micro_usd = 0 if redelivery else ceiling_micro_usd
        own = math.prod(request.size) * MAX_PIXEL_BYTES + MAX_OTHER_BYTES
        self._max_image_bytes = min(MAX_IMAGE_BYTES, own)
        self.accepted: CloudAccepted | None = None
        self.received = bytearray()
        self._begun = False  # whether the call under way has been accepted

    def wire_request(self) -> cloud_pb2.GenerateRequest:
        """What to ask for next: the image, or what is left of it."""
        self._begun = False
        return _wire_request(self.request, self._offer_micro_usd, len(self.received))

    async def take(
        self, response: cloud_pb2.GenerateResponse | None
    ) -> CloudAccepted | Progress | CloudImage | None:
        """The event in `response`; None for a piece of the image, or what is told again. Raises CloudLied."""
        if response is None:  # what gRPC makes of bytes that it cannot decode
            raise CloudLied("the cloud sent a message that cannot be read")
        kind = response.WhichOneof("event")
        if (kind == "accepted") is self._begun:
            raise CloudLied(f"the cloud sent {kind} where it may not")
        if kind == "accepted":
            return self._accept(response.accepted)
        if kind == "progress":
            return self._progress(response.progress)
        if kind == "image_chunk":
            self._append(response.image_chunk)
            return None
        if kind == "result":
            return await self._image(response.result)
        return None  # an event of a later version of the wire

    def _accept(self, answer: cloud_pb2.Accepted) -> CloudAccepted | None:
        """None where the rest of an image is accepted, as the image was before."""
        self._begun = True
        price, before = answer.charged_micro_usd, self.accepted
        if not 0 <= price <= self._ceiling_micro_usd:
            raise CloudLied(
                f"the cloud's price is {price} micro-dollars, and {self._ceiling_micro_usd} were offered"
            )
        self.accepted = CloudAccepted(answer.queue_position, price, checked_digest(answer.model_digest))
        if before is None:
            return self.accepted
        if (price, self.accepted.model_digest) != (before.charged_micro_usd, before.model_digest):
            raise CloudLied("the rest of the cloud's image is of another price or model")
        return None

    def _progress(self, progress: image_pb2.Progress) -> Progress | None:
        """None for what is none, and no preview where it is not what was asked for: the image may be right all the
        same.
        """
        if not 1 <= progress.step <= progress.steps:
            return None
        preview = progress.preview if self.request.preview else b""
        if len(preview) > MAX_PREVIEW_BYTES or not preview.startswith(SIGNATURE):
            return Progress(progress.step, progress.steps, None)
        return Progress(progress.step, progress.steps, preview)

    def _append(self, chunk: image_pb2.ImageChunk) -> None:
        if chunk.offset != len(self.received):
            raise CloudLied(f"the cloud sent byte {chunk.offset} where byte {len(self.received)} is due")
        if len(self.received) + len(chunk.data) > self._max_image_bytes:
            raise CloudLied(f"the cloud's image exceeds {self._max_image_bytes} bytes")
        self.received += chunk.data

    async def _image(self, result: cloud_pb2.Result) -> CloudImage:
        accepted = cast(CloudAccepted, self.accepted)
        if result.request_id != self.request.request_id:
            raise CloudLied("the cloud's result is another request's")
        if not 0 <= result.charged_micro_usd <= accepted.charged_micro_usd:
            raise CloudLied(
                f"the cloud charged {result.charged_micro_usd} micro-dollars after it had accepted at "
                f"{accepted.charged_micro_usd}"
            )
        info, png = result.image, bytes(self.received)
        self._check_facts(info, accepted)
        # Hashing and decoding take tens of milliseconds for a large image: not on the event loop.
        await asyncio.to_thread(_check_png, png, info.sha256, self.request.size)
        return CloudImage(
            png=png,
            steps=info.steps,
            guidance_scale=info.guidance_scale,
            model_digest=accepted.model_digest,
            charged_micro_usd=result.charged_micro_usd,
            timings_ms={
                timing.stage: timing.milliseconds
                for timing in result.timings
                if timing.stage in STAGES and 0 <= timing.milliseconds < math.inf
            },
        )

    def _check_facts(self, info: image_pb2.ImageInfo, accepted: CloudAccepted) -> None:
        """Raises CloudLied where the image was not made as it was asked for, or not by the model that accepted it."""
        asked, guidance = self.request, info.guidance_scale
        facts = {
            "seed": (info.seed, asked.seed),
            "number of steps": (info.steps, asked.steps),
            "model": (info.model_digest, accepted.model_digest),
        }
        wrong = [name for name, (told, wanted) in facts.items() if wanted not in (None, told)]
        # The wire carries 32 bits of it.
        wanted = guidance if asked.guidance_scale is None else asked.guidance_scale
        if not (math.isfinite(guidance) and math.isclose(guidance, wanted, rel_tol=1e-6)):
            wrong.append("guidance scale")
        if wrong:
            raise CloudLied(f"the cloud's image has another {wrong[0]} than was asked for")


def checked_digest(text: str) -> str:
    """A model's digest, as the cloud gives it. Raises CloudLied when it is none."""
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise CloudLied("what the cloud sent as its model's digest is not 64 hex digits")
    return text


def _check_png(png: bytes, sha256: str, asked: tuple[int, int]) -> None:
    """Raises CloudLied unless `png` has this hash and decodes, to its last row, to an image of this size."""
    if hashlib.sha256(png).hexdigest() != sha256:
        raise CloudLied(f"the cloud's {len(png)} bytes have not the sha256 they came with")
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            size = image.size
            if size == asked:  # before any pixel is unpacked
                image.load()
            moves = image.is_animated  # type: ignore[attr-defined]  # of a PNG it says so
    except UnidentifiedImageError as error:  # whose text shows our buffer
        raise CloudLied("what the cloud sent is not a PNG image") from error
    except Exception as error:  # a decoder fed with garbage may raise anything
        raise CloudLied(f"what the cloud sent is not a PNG image: {error}") from error
    if png[12:16] != b"IHDR":  # which decoders forgive
        raise CloudLied("what the cloud sent is not a PNG image: it does not begin with IHDR")
    if moves:  # only its first picture was looked at
        raise CloudLied("what the cloud sent is not a PNG image: it is animated")
    if size != asked:
        raise CloudLied(f"the cloud's image has {size[0]}x{size[1]} pixels instead of {asked[0]}x{asked[1]}")


def _wire_request(
    request: ImageRequest, max_price_micro_usd: int, resume_offset: int
) -> cloud_pb2.GenerateRequest:
    """What the cloud needs to know, and no more: the app's name stays here."""
    if request.local_only:
        raise ValueError("a prompt that may not leave the device was about to be sent to the cloud")
    image = image_pb2.ImageRequest(
        request_id=request.request_id,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        width=request.width,
        height=request.height,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        media_type=request.media_type,
        privacy=image_pb2.PRIVACY_NORMAL,
        max_price_micro_usd=max_price_micro_usd,
        traceparent=request.traceparent,
        resume_offset=resume_offset,
    )
    return cloud_pb2.GenerateRequest(image=image, preview=request.preview)
