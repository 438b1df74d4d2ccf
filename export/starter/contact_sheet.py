"""Edge and cloud side by side on the same prompts, as one picture to look at."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from export.output import check_output, replacing
from export.painter import Painter, cloud_model
from export.prompts import router_prompts
from export.starter.shipped import STARTER_CLOUD, STARTER_EDGE

PROMPTS = 24
COLUMNS = 4
TILE = 128  # pixels; pictures are shown at twice their size
MARGIN, CAPTION = 12, 58
SEED = 5


def sheet(prompts: Sequence[str], edge: Sequence[Image.Image], cloud: Sequence[Image.Image]) -> Image.Image:
    """A cell a prompt: its words above, the edge picture left, the cloud picture right."""
    width, height = 2 * TILE + 4 + MARGIN, TILE + CAPTION + MARGIN
    rows = -(-len(prompts) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    for index, (prompt, *pair) in enumerate(zip(prompts, edge, cloud, strict=True)):
        left, top = MARGIN + index % COLUMNS * width, MARGIN + index // COLUMNS * height
        draw.text((left, top), textwrap.fill(prompt, 38, max_lines=3), "black", font)
        for place, picture in enumerate(pair):
            large = picture.resize((TILE, TILE), Image.Resampling.LANCZOS)
            page.paste(large, (left + place * (TILE + 4), top + CAPTION))
    return page


def graded_prompts() -> list[str]:
    """Test prompts from one object to many: none was seen in training."""
    candidates = router_prompts({"test": 10 * PROMPTS})
    candidates.sort(key=lambda prompt: (len(prompt.scene.groups) if prompt.scene else 0, prompt.objects))
    return [prompt.text for prompt in candidates[:: len(candidates) // PROMPTS][:PROMPTS]]


def main(argv: Sequence[str] | None = None) -> int:
    """The stage's command; exit code 0."""
    parser = argparse.ArgumentParser(prog="edge-export starter contact-sheet", description=__doc__)
    parser.add_argument("--edge", default=str(STARTER_EDGE))
    parser.add_argument("--cloud", default=str(STARTER_CLOUD))
    parser.add_argument("--out", type=Path, default=Path("docs/images/contact-sheet.png"))
    options = parser.parse_args(argv)
    check_output(options.out)
    prompts = graded_prompts()
    seeds = [SEED] * len(prompts)
    pictures = [
        [Image.fromarray(picture.pixels) for picture in Painter(cloud_model(model)).paint(prompts, seeds)]
        for model in (options.edge, options.cloud)
    ]
    with replacing(options.out) as partial:
        sheet(prompts, *pictures).save(partial, optimize=True)
    print(f"{len(prompts)} prompts, edge left, cloud right -> {options.out}")
    return 0
