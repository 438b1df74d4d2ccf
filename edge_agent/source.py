"""Where a bundle comes from: a folder, a web server or the hub.

A source hands out manifest.json, and then every file that it lists, from any byte on. What it hands out is verified by
`edge_agent.pull`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from edge_agent.bundle import Bundle
from edge_agent.disk import READ_BYTES
from edge_agent.errors import InvalidRequest, SourceRefused
from edge_agent.hub_source import HubSource
from edge_agent.manifest import MANIFEST, MAX_MANIFEST_BYTES, FileEntry
from edge_agent.settings import expanded
from edge_agent.web_source import MODEL_INDEX, WebSource, check_address, unexported


class Source(Protocol):
    """Where a bundle comes from. Both methods raise PullFailed; the first one also BundleError."""

    @property
    def place(self) -> str:
        """What errors call it."""

    def manifest(self) -> bytes:
        """manifest.json, or so much of it that it is seen to be too large."""

    def read(self, name: str, entry: FileEntry, offset: int) -> tuple[int, Iterator[bytes]]:
        """The file's bytes from `offset` on, or from the byte that comes first in the answer."""


def source_of(text: str, environment: Mapping[str, str]) -> Source:
    """The source that `text` names: a folder, http(s)://..., or hf:OWNER/NAME[@REVISION].

    HF_ENDPOINT and HF_TOKEN of the environment say where the hub is and who asks, as does the file of `hf auth login`.
    Raises InvalidRequest.
    """
    if not text:
        raise InvalidRequest("the source is empty; name a folder, https://... or hf:OWNER/NAME")
    if text.startswith("hf:"):
        return HubSource(text, environment)
    if "://" in text:
        check_address(text, "the source", "others see the command line")
        return WebSource(text)
    folder = expanded(text)
    try:
        there = folder.is_dir()
    except OSError:  # a name that no folder can have
        there = False
    if not there:
        raise InvalidRequest(
            f"there is no folder {text}; a bundle on a web server is written https://..., one on the hub hf:OWNER/NAME"
        )
    return FolderSource(folder)


class FolderSource:
    """A bundle folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

    def manifest(self) -> bytes:
        """manifest.json of a folder whose files are all there, plain, and of the sizes it says."""
        if not (self.folder / MANIFEST).exists() and (self.folder / MODEL_INDEX).is_file():
            raise unexported(self.place, self.place)
        Bundle.open(self.folder, verify=False)
        return b"".join(self._blocks(MANIFEST, 0, MAX_MANIFEST_BYTES))

    def read(self, name: str, entry: FileEntry, offset: int) -> tuple[int, Iterator[bytes]]:
        """The file's bytes from `offset` on."""
        return offset, self._blocks(name, offset, entry.bytes)

    def _blocks(self, name: str, start: int, end: int) -> Iterator[bytes]:
        try:
            if not (self.folder / name).is_file():  # by now: to open a pipe would wait for ever
                raise SourceRefused(f"{self.folder / name} is gone, or no plain file any more; pull again")
            with (self.folder / name).open("rb") as file:
                file.seek(start)
                while start < end and (block := file.read(min(READ_BYTES, end - start))):
                    start += len(block)
                    yield block
        except OSError as error:
            raise SourceRefused(f"{self.folder / name} cannot be read: {error.strerror}") from error
