"""What a caller asks for, and whether this server serves it."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass

from cloud_server.errors import InvalidRequest

MAX_SEED = 2**32 - 1  # what 32-bit generators on every device take
MAX_GUIDANCE_SCALE = 100.0  # far beyond what any model uses; keeps float16 denoisers finite
MAX_NAME_CHARACTERS = 128  # of request_id and app
MEDIA_TYPE = "image/png"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]+")
# What shows: no white space, no Default_Ignorable_Code_Point (https://www.unicode.org/reports/tr44/), no mark of an
# annotation, no empty braille.
VISIBLE = re.compile(
    "[^\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


@dataclass(frozen=True)
class Limits:
    """What the loaded model and the settings allow, and what stands in where a request is silent.

    Sizes in pixels. `sizes` lists the only (width, height) served; None: any multiple of `side_multiple` up
    to `max_side`.
    """

    width: int
    height: int
    steps: int
    guidance_scale: float
    sizes: tuple[tuple[int, int], ...] | None
    side_multiple: int
    max_side: int
    max_steps: int
    max_prompt_characters: int
    negative_prompt: bool


@dataclass(frozen=True)
class Wish:
    """A request as it came in. None: left to the server."""

    request_id: str
    app: str
    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    media_type: str = ""
    local_only: bool = False
    max_price_micro_usd: int | None = None
    resume_offset: int = 0


@dataclass(frozen=True)
class Spec:
    """A validated image to make: everything the pipeline needs and nothing else."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance_scale: float

    @property
    def shape(self) -> tuple[int, int, bool]:
        """What decides how long one denoising step takes: width, height, and whether guidance doubles it."""
        return self.width, self.height, self.guidance_scale > 1


def check(wish: Wish) -> None:
    """Raises InvalidRequest, naming the field, for what no server serves, whatever its model."""
    check_request_id(wish.request_id)
    if len(wish.app) > MAX_NAME_CHARACTERS:
        raise InvalidRequest(
            f"app has {len(wish.app)} characters; at most {MAX_NAME_CHARACTERS}", field="app"
        )
    _check_text("app", wish.app)
    if wish.local_only:
        raise InvalidRequest(
            "the prompt is marked local-only, or with a privacy that this server does not know: keep it on the device",
            field="privacy",
        )
    if wish.media_type not in ("", MEDIA_TYPE):
        raise InvalidRequest(f"only {MEDIA_TYPE} is served, not {wish.media_type[:40]!r}", field="media_type")
    if wish.max_price_micro_usd is not None and wish.max_price_micro_usd < 0:
        raise InvalidRequest("the price ceiling cannot be negative", field="max_price_micro_usd")
    if wish.resume_offset < 0:
        raise InvalidRequest("resume_offset cannot be negative", field="resume_offset")


def validate(wish: Wish, limits: Limits, drawn_seed: int) -> Spec:
    """The image to make: the server's values where the wish is silent, `drawn_seed` where it has no seed.

    Raises InvalidRequest, naming the field, for everything that cannot be made as asked.
    """
    if not VISIBLE.search(wish.prompt):
        raise InvalidRequest(
            "the prompt is empty, or nothing of it can be seen; say what the picture shows", field="prompt"
        )
    for field, text in (("prompt", wish.prompt), ("negative_prompt", wish.negative_prompt)):
        if len(text) > limits.max_prompt_characters:
            raise InvalidRequest(
                f"{field} has {len(text)} characters; at most {limits.max_prompt_characters}", field=field
            )
        _check_text(field, text, allowed="\t\n")
    if wish.negative_prompt and not limits.negative_prompt:
        raise InvalidRequest("this model takes no negative prompt; leave it out", field="negative_prompt")
    if wish.seed is not None and not 0 <= wish.seed <= MAX_SEED:
        raise InvalidRequest(f"seed must lie between 0 and {MAX_SEED}", field="seed")
    steps = limits.steps if wish.steps is None else wish.steps
    if not 1 <= steps <= limits.max_steps:
        raise InvalidRequest(f"steps is {steps}; 1 to {limits.max_steps} are served", field="steps")
    guidance_scale = limits.guidance_scale if wish.guidance_scale is None else wish.guidance_scale
    if not (math.isfinite(guidance_scale) and 0 <= guidance_scale <= MAX_GUIDANCE_SCALE):
        raise InvalidRequest(
            f"guidance_scale must lie between 0 and {MAX_GUIDANCE_SCALE:g}", field="guidance_scale"
        )
    width, height = _size(wish, limits)
    return Spec(
        prompt=wish.prompt,
        negative_prompt=wish.negative_prompt,
        seed=drawn_seed if wish.seed is None else wish.seed,
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance_scale,
    )


def check_request_id(request_id: str) -> None:
    """Raises InvalidRequest unless this can name a request."""
    if not request_id:
        raise InvalidRequest("request_id is empty; send a unique one, such as a UUID", field="request_id")
    if len(request_id) > MAX_NAME_CHARACTERS:
        raise InvalidRequest(
            f"request_id has {len(request_id)} characters; at most {MAX_NAME_CHARACTERS}", field="request_id"
        )
    if not REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest("request_id may hold A-Z a-z 0-9 . _ : - only", field="request_id")


def _size(wish: Wish, limits: Limits) -> tuple[int, int]:
    width = limits.width if wish.width is None else wish.width
    height = limits.height if wish.height is None else wish.height
    if limits.sizes is not None:
        if (width, height) not in limits.sizes:
            served = ", ".join(f"{w} x {h}" for w, h in limits.sizes)
            field = "height" if any(w == width for w, _ in limits.sizes) else "width"
            raise InvalidRequest(f"{width} x {height} is not served; this model makes {served}", field=field)
        return width, height
    for field, side in (("width", width), ("height", height)):
        if not 0 < side <= limits.max_side or side % limits.side_multiple:
            raise InvalidRequest(
                f"{field} is {side}; served are multiples of {limits.side_multiple} up to {limits.max_side}",
                field=field,
            )
    return width, height


def _check_text(field: str, text: str, allowed: str = "") -> None:
    """Refuses control characters and lone surrogates, saying where the first one stands."""
    for position, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in allowed:
            raise InvalidRequest(
                f"{field} has U+{ord(character):04X} at character {position + 1}, not text; remove it",
                field=field,
            )
