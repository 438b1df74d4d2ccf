"""The image in the making, and the file an app gets: a PNG that carries the facts of its making in its text chunks."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

PREVIEW_SIDE = 128
"""Longest side of a preview, in pixels: enough to see what it will become, and small beside the image."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNKS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"eXIf"})


@dataclass(frozen=True)
class Progress:
    """Denoising step `step` of `steps` is done; `preview` is a small PNG, where asked for."""

    step: int
    steps: int
    preview: bytes | None


def encode_png(pixels: NDArray[np.uint8], *, longest_side: int | None = None) -> bytes:
    """PNG of `pixels` [H, W, 3]; where `longest_side` is given, shrunk to it, never enlarged."""
    image = PIL.Image.fromarray(pixels)
    if longest_side is not None:
        image.thumbnail((longest_side, longest_side))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def with_facts(png: bytes, facts: Mapping[str, Any]) -> bytes:
    """`png`, which must be a valid PNG, with `facts` as its only text chunks (iTXt, UTF-8). Pixels stay as they are.

    Keywords are Latin-1 of at most 79 characters, as the PNG specification says (11.3.4.5). Texts that were
    in the file are left out: what the cloud wrote about an image is not what happened here.
    """
    texts = [
        _chunk(b"iTXt", name.encode("latin-1") + b"\0\0\0\0\0" + str(value).encode())
        for name, value in facts.items()
    ]
    header, *others = (data for kind, data in _chunks(png) if kind not in _TEXT_CHUNKS)
    return b"".join((SIGNATURE, header, *texts, *others))


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and whole bytes of each chunk up to the last, IEND; what a file holds behind it, decoders ignore."""
    position, kind = len(SIGNATURE), b""
    while kind != b"IEND" and position + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, position)
        end = position + 12 + length  # length, type, data, checksum
        kind = png[position + 4 : position + 8]
        yield kind, png[position:end]
        position = end


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
