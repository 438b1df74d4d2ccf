"""The contact sheet: a column a prompt, a row a phase, so that one look shows where each picture came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# Blue and orange stay apart for nearly every eye.
EDGE, CLOUD = "#2f6fb7", "#e07b1a"
COLOURS = {"edge": EDGE, "cloud": CLOUD}

INK, MUTED, PAPER = "#1c1f24", "#6a7078", "#ffffff"

# Pixels.
COLUMNS = 12
TILE = 168
FRAME = 6
GAP = 14
MARGIN = 36
LINE = 22
HEADING = 96
TITLE = 46
FOOT = 8 + 3 * LINE + 20
PROMPT_LINES = 7

MIN_WIDTH = 1150
"""What heading and titles need beside fewer columns."""


@dataclass(frozen=True)
class Tile:
    """A picture and what is written under it. `note`: its reason; `figures`: PRS and cost."""

    picture: Path
    served_by: str
    note: str
    figures: str


@dataclass(frozen=True)
class Section:
    """A phase: its title, a sentence on it, and one tile for each prompt."""

    title: str
    explanation: str
    tiles: Sequence[Tile | None]


def draw(heading: str, prompts: Sequence[str], sections: Sequence[Section]) -> Image.Image:
    """The sheet. More than COLUMNS prompts go on in further bands, each with all sections."""
    bands = [range(start, min(start + COLUMNS, len(prompts))) for start in range(0, len(prompts), COLUMNS)]
    columns = len(bands[0])
    width = max(2 * MARGIN + columns * (TILE + GAP) - GAP, MIN_WIDTH)
    row = TITLE + TILE + FOOT
    heights = [
        LINE * max(len(_lines(prompts[column])) for column in band) + 16 + row * len(sections)
        for band in bands
    ]
    sheet = Image.new("RGB", (width, HEADING + sum(heights) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    _draw_heading(pen, width, heading)
    top = HEADING
    for band, height in zip(bands, heights, strict=True):
        head = height - row * len(sections)
        for place, column in enumerate(band):
            lines = _lines(prompts[column])
            left = MARGIN + place * (TILE + GAP)
            pen.text((left, top + head - 16 - LINE * len(lines)), "\n".join(lines), INK, _font(18), spacing=4)
        for index, section in enumerate(sections):
            _draw_section(sheet, pen, section, band, top + head + index * row)
        top += height
    return sheet


def _draw_heading(pen: ImageDraw.ImageDraw, width: int, heading: str) -> None:
    pen.text((MARGIN, 28), heading, INK, _font(30))
    right = width - MARGIN
    for side, words in (("cloud", "made in the cloud"), ("edge", "made on the edge")):
        right -= int(pen.textlength(words, _font(20)))
        pen.text((right, 36), words, INK, _font(20))
        right -= 32
        pen.rounded_rectangle((right, 36, right + 22, 58), 4, COLOURS[side])
        right -= 30


def _draw_section(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, section: Section, band: range, top: int
) -> None:
    pen.line((MARGIN, top, sheet.width - MARGIN, top), "#d9dce0", 2)
    pen.text((MARGIN, top + 11), section.title, INK, _font(25))
    after = MARGIN + pen.textlength(section.title, _font(25)) + 18
    pen.text((after, top + 15), section.explanation, MUTED, _font(20))
    for place, column in enumerate(band):
        tile = section.tiles[column]
        if tile is not None:
            _draw_tile(sheet, pen, tile, MARGIN + place * (TILE + GAP), top + TITLE)


def _draw_tile(sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, left: int, top: int) -> None:
    colour = COLOURS[tile.served_by]
    pen.rounded_rectangle((left, top, left + TILE - 1, top + TILE - 1), 8, colour)
    inner = TILE - 2 * FRAME
    with Image.open(tile.picture) as opened:
        scale = inner / max(opened.size)
        size = (max(1, round(opened.width * scale)), max(1, round(opened.height * scale)))
        picture = opened.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    sheet.paste(picture, (left + (TILE - size[0]) // 2, top + (TILE - size[1]) // 2))
    pen.text((left, top + TILE + 6), tile.served_by, colour, _font(19), stroke_width=0.4)
    pen.text((left, top + TILE + 7 + LINE), tile.note, INK, _font(18))
    pen.text((left, top + TILE + 7 + 2 * LINE), tile.figures, MUTED, _font(18))


def _lines(prompt: str) -> list[str]:
    """The prompt in lines that fit a column."""
    lines = list(_wrapped(prompt))
    if len(lines) > PROMPT_LINES:
        lines[PROMPT_LINES - 1 :] = [lines[PROMPT_LINES - 1][:-1] + "…"]
    return lines


def _wrapped(prompt: str) -> Iterator[str]:
    font, line = _font(18), ""
    for word in prompt.split():
        rest = word
        if line and font.getlength(f"{line} {rest}") <= TILE:
            line = f"{line} {rest}"
            continue
        if line:
            yield line
        while font.getlength(rest) > TILE:
            fitting = next(n for n in range(len(rest), 0, -1) if font.getlength(rest[:n]) <= TILE or n == 1)
            yield rest[:fitting]
            rest = rest[fitting:]
        line = rest
    if line:
        yield line


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
