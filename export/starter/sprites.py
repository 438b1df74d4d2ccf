"""The sprite pack: the emoji the starter world is built from, cut out of a font once and committed.

Source: Noto Color Emoji (SIL Open Font License 1.1), as Debian packages it in ``fonts-noto-color-emoji``.
Remake the pack with `edge-export starter sprites`; rendering scenes needs the pack alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
PACK = Path(__file__).parent / "sprites" / "sprites.png"

CELL = 96  # pixels; three times the size most sprites have in a scene, so that shrinking is all that happens
COLUMNS = 8
STRIKE = 109  # pixels; the one bitmap size the font carries

OBJECTS: dict[str, str] = {
    # common: every scene draws from these
    "apple": "🍎",
    "orange": "🍊",
    "banana": "🍌",
    "strawberry": "🍓",
    "mushroom": "🍄",
    "cactus": "🌵",
    "sunflower": "🌻",
    "cat": "🐱",
    "dog": "🐶",
    "frog": "🐸",
    "penguin": "🐧",
    "fish": "🐟",
    "car": "🚗",
    "rocket": "🚀",
    "balloon": "🎈",
    "house": "🏠",
    # look-alikes: each is easily taken for one of the above
    "green apple": "🍏",
    "basketball": "🏀",
    "taxi": "🚕",
    "fox": "🦊",
    # rare: seldom seen in training
    "owl": "🦉",
    "crab": "🦀",
    "guitar": "🎸",
    "crown": "👑",
}


def draw(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, trimmed to its own pixels and centred in a transparent CELL x CELL square."""
    canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(canvas).text((STRIKE // 2, STRIKE // 2), emoji, font=font, embedded_color=True)
    sprite = canvas.crop(canvas.getbbox())
    sprite.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(sprite, ((CELL - sprite.width) // 2, (CELL - sprite.height) // 2))
    return cell


def make_pack(font_file: Path, pack: Path) -> None:
    """Write the sprites of OBJECTS, in their order, row by row."""
    font = ImageFont.truetype(font_file, STRIKE)
    rows = -(-len(OBJECTS) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, emoji in enumerate(OBJECTS.values()):
        sheet.paste(draw(emoji, font), (index % COLUMNS * CELL, index // COLUMNS * CELL))
    pack.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(pack, optimize=True)


@cache
def sprite(name: str, size: int) -> np.ndarray:
    """The sprite ``name`` as premultiplied RGBA float32 [size, size, 4] in [0, 1]."""
    index = list(OBJECTS).index(name)
    left, top = index % COLUMNS * CELL, index // COLUMNS * CELL
    cell = _sheet().crop((left, top, left + CELL, top + CELL))
    # "RGBa" is premultiplied: resizing straight alpha would bleed the colour of transparent pixels into edges.
    small = cell.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small, np.float32) / 255


@cache
def _sheet() -> Image.Image:
    return Image.open(PACK).convert("RGBA")


def main(argv: Sequence[str] | None = None) -> int:
    """The stage's command; exit code 0, or 2 when the font is missing."""
    parser = argparse.ArgumentParser(prog="edge-export starter sprites", description=__doc__)
    parser.add_argument(
        "--font", type=Path, default=FONT, help="Noto Color Emoji (default: where Debian puts it)"
    )
    parser.add_argument("--out", type=Path, default=PACK)
    options = parser.parse_args(argv)
    if not options.font.exists():
        parser.error(
            f"{options.font} is not there: install fonts-noto-color-emoji, or name the font with --font"
        )
    make_pack(options.font, options.out)
    print(f"{len(OBJECTS)} sprites -> {options.out}")
    return 0
