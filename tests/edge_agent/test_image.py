"""The file an app gets holds the pixels as they were made, and the facts of their making."""

from __future__ import annotations

import io

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo

from edge_agent.image import encode_png, with_facts

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
FACTS = {"prompt": "a cat, 猫 🐈\n= two lines", "seed": 7, "prs": "0.412345", "crédit": "né"}


def opened(png: bytes) -> PIL.Image.Image:
    image = PIL.Image.open(io.BytesIO(png))
    image.load()
    return image


def test_facts_are_read_back_and_pixels_stay_as_they_are() -> None:
    image = opened(with_facts(encode_png(PIXELS), FACTS))
    assert image.text == {name: str(value) for name, value in FACTS.items()}
    assert np.array_equal(np.asarray(image), PIXELS)


def test_a_files_own_texts_give_way_and_its_other_chunks_stay() -> None:
    theirs = PngInfo()
    theirs.add_text("prompt", "forged")
    theirs.add_itxt("comment", "bought from me")
    theirs.add_text("zipped", "z" * 1000, zip=True)
    camera = PIL.Image.Exif()
    camera[PIL.ExifTags.Base.ImageDescription] = "forged"
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, "PNG", pnginfo=theirs, dpi=(72, 72), exif=camera)
    image = opened(with_facts(file.getvalue(), {"prompt": "mine"}))
    assert image.text == {"prompt": "mine"}
    assert not image.getexif()
    assert "dpi" in image.info
    assert np.array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("tail", [b"", b"x", b"\xff" * 20])
@pytest.mark.parametrize("cut", [0, 4, 9, 12])
def test_what_decoders_forgive_at_the_end_of_a_file_is_forgiven_here(cut: int, tail: bytes) -> None:
    png = encode_png(PIXELS)
    made = with_facts(png[: len(png) - cut] + tail, FACTS)
    assert np.array_equal(np.asarray(opened(made)), PIXELS)
    assert cut or made == with_facts(png, FACTS)  # what lies behind the end is not handed on


def test_a_preview_is_shrunk_and_never_enlarged() -> None:
    assert opened(encode_png(PIXELS, longest_side=40)).size == (40, 24)
    assert opened(encode_png(PIXELS, longest_side=400)).size == (80, 48)
