"""What an app asks for: an image request, and the checks it passes before anything is computed."""

from __future__ import annotations

import random
import re
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, cast

from edge_agent.errors import DeadlinePassed, InvalidRequest, UnknownApp
from edge_agent.money import MAX_MICRO_USD


class Routing(Enum):
    """The caller's wish: AUTO leaves the route to the policy."""

    AUTO = "auto"
    LOCAL_ONLY = "local_only"
    CLOUD_ONLY = "cloud_only"


class Privacy(Enum):
    """LOCAL_ONLY: nothing of this prompt may leave the device."""

    NORMAL = "normal"
    LOCAL_ONLY = "local_only"


MEDIA_TYPE = "image/png"
"""The one format images are made in."""

SEED_BITS = 32
"""Seeds are unsigned numbers of this size, as the noise's MT19937 takes them."""

MAX_SEED = 2**SEED_BITS - 1

MAX_ID_CHARS = 128
"""Longest request id and app name, in characters: they are keys in the ledger and in two services' logs."""

MAX_OFFSET = 2**63 - 1
"""Of a byte in an image: a signed 64-bit integer on the wire."""

MAX_GUIDANCE = 50.0
"""Largest guidance scale that is taken."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]+")
_APP = re.compile(r"[ -~]+")

_VISIBLE = re.compile(
    "[^\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""What shows: no white space, no Default_Ignorable_Code_Point of https://www.unicode.org/reports/tr44/, no mark of an
annotation and no empty braille. Joiners, selectors and tags are of these, and a part of many emoji, which have
something else that shows."""

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""https://www.w3.org/TR/trace-context/#traceparent-header"""


class ImageRequest(NamedTuple):  # `validate` copies it in a quarter of a dataclass's time
    """One image, as an app asks for it. None means: not said. `validate` fills in seed and size; steps and
    guidance scale stay None, because each model has defaults of its own.

    `width` and `height` are in pixels, `seed` is in 0..MAX_SEED, `max_price_micro_usd` in micro-dollars.
    `resume_offset` is the number of image bytes that the caller already has. `deadline` is a reading of
    `time.monotonic()`, in seconds; None means no deadline. `named`: the id is the caller's own, who may repeat it.
    """

    request_id: str
    prompt: str
    app: str = "default"
    negative_prompt: str = ""
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    media_type: str = MEDIA_TYPE
    privacy: Privacy = Privacy.NORMAL
    routing: Routing = Routing.AUTO
    max_price_micro_usd: int | None = None
    preview: bool = False
    traceparent: str = ""
    resume_offset: int = 0
    deadline: float | None = None
    named: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, of a request that `validate` has seen."""
        return cast("tuple[int, int]", (self.width, self.height))

    @property
    def local_only(self) -> bool:
        """True when this request must not reach the cloud, whichever way the caller said it."""
        return self.routing is Routing.LOCAL_ONLY or self.privacy is Privacy.LOCAL_ONLY


@dataclass(frozen=True)
class Limits:
    """What can be served: the bundle's sizes and step counts, and the settings' bounds.

    `sizes` are (width, height) in pixels; the first one is the default. `apps` lists who may call; None lets
    everyone.
    """

    sizes: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    max_prompt_chars: int = 2_000
    apps: frozenset[str] | None = None


def validate(
    request: ImageRequest,
    limits: Limits,
    *,
    draw_seed: Callable[[], int] = lambda: random.getrandbits(SEED_BITS),  # a seed is no secret
    monotonic: Callable[[], float] = time.monotonic,
) -> ImageRequest:
    """`request` with its seed drawn and its size filled in, both where they were None; nothing else is
    changed.

    Raises InvalidRequest (naming the field), UnknownApp or DeadlinePassed.
    """
    check_request_id(request.request_id)
    check_app(request.app)
    if limits.apps is not None and request.app not in limits.apps:
        raise UnknownApp(f"the app {request.app!r} is not among those the settings allow; add it to `apps`")
    if request.deadline is not None and request.deadline <= monotonic():
        raise DeadlinePassed("the deadline had passed before the request was looked at; allow more time")
    if not _VISIBLE.search(request.prompt):
        raise InvalidRequest(
            "the prompt is empty, or nothing of it can be seen; say what the image should show",
            field="prompt",
        )
    _check_text(request.prompt, "prompt", limits.max_prompt_chars)
    _check_text(request.negative_prompt, "negative_prompt", limits.max_prompt_chars)
    if request.routing is Routing.CLOUD_ONLY and request.local_only:
        raise InvalidRequest(
            "cloud_only and privacy local_only exclude each other; drop one of them", field="privacy"
        )
    if request.media_type != MEDIA_TYPE:
        raise InvalidRequest(
            f"images are made as {MEDIA_TYPE}, not {request.media_type!r}", field="media_type"
        )
    if request.traceparent and not _TRACEPARENT.fullmatch(request.traceparent):
        raise InvalidRequest("not a W3C traceparent (00-<32 hex>-<16 hex>-<2 hex>)", field="traceparent")
    _check_range(request.seed, "seed", MAX_SEED)
    _check_range(request.max_price_micro_usd, "max_price_micro_usd", MAX_MICRO_USD)
    _check_range(request.resume_offset, "resume_offset", MAX_OFFSET)
    width, height = _size(request, limits)
    if request.steps is not None and request.steps not in limits.steps:
        have = ", ".join(map(str, limits.steps))
        raise InvalidRequest(
            f"{request.steps} steps are not compiled into this bundle; it has {have}", field="steps"
        )
    guidance = request.guidance_scale
    if guidance is not None and not 0 <= guidance <= MAX_GUIDANCE:  # also refuses NaN
        raise InvalidRequest(
            f"guidance_scale must be between 0 and {MAX_GUIDANCE:g}, not {guidance:.9g}",
            field="guidance_scale",
        )
    seed = draw_seed() if request.seed is None else request.seed
    return request._replace(seed=seed, width=width, height=height)


def check_request_id(name: str) -> None:
    """Raises InvalidRequest for what can name no request."""
    _check_name(name, "request_id", _REQUEST_ID, "letters, digits and . _ : - only")


def check_app(name: str) -> None:
    """Raises InvalidRequest for what no request can give as its app."""
    _check_name(name, "app", _APP, "printable ASCII characters only")


def _check_name(name: str, field: str, pattern: re.Pattern[str], holds: str) -> None:
    if not name:
        raise InvalidRequest(f"{field} is empty", field=field)
    if len(name) > MAX_ID_CHARS:
        raise InvalidRequest(
            f"{field} has {len(name)} characters; at most {MAX_ID_CHARS} are taken", field=field
        )
    if not pattern.fullmatch(name):
        raise InvalidRequest(f"{field} may hold {holds}", field=field)


def _check_text(text: str, field: str, max_chars: int) -> None:
    if len(text) > max_chars:
        raise InvalidRequest(
            f"the {field} has {len(text):,} characters; at most {max_chars:,} are taken: shorten it",
            field=field,
        )
    if text.isprintable():  # nearly every prompt, and quicker to see
        return
    for position, character in enumerate(text):
        category = unicodedata.category(character)
        # Format characters (Cf) stay: the zero-width joiner is part of many emoji.
        if category == "Cs":
            what = "half of a surrogate pair, which is not text"
        elif category == "Cc" and character not in "\t\n":
            what = "a control character"
        else:
            continue
        raise InvalidRequest(
            f"character {position + 1} of the {field}, U+{ord(character):04X}, is {what}; remove it",
            field=field,
        )


def _check_range(value: int | None, field: str, maximum: int) -> None:
    if value is not None and not 0 <= value <= maximum:
        raise InvalidRequest(f"{field} must be between 0 and {maximum}, not {value}", field=field)


def _size(request: ImageRequest, limits: Limits) -> tuple[int, int]:
    """The size of the image: the first of the bundle's sizes that agrees with what the request says of it."""
    for width, height in limits.sizes:
        if request.width in (None, width) and request.height in (None, height):
            return width, height
    have = ", ".join(f"{width}x{height}" for width, height in limits.sizes)
    if request.width is None:
        asked = f"{request.height} pixels high"
    elif request.height is None:
        asked = f"{request.width} pixels wide"
    else:
        asked = f"of {request.width}x{request.height} pixels"
    field = "width" if request.width not in {None, *(width for width, _ in limits.sizes)} else "height"
    raise InvalidRequest(f"this bundle makes no images {asked}; it makes {have}", field=field)
