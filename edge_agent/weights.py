"""Where an ONNX graph says that its weights lie: in the files that its tensors name as their external data.

onnxruntime opens those files wherever they are. What can be without end is refused on the way: a loop, whose count may
be anything, and functions of the model's own, whose calls onnxruntime writes out, which a few lines bring to billions
of nodes. So is what a provider compiled, which it reads from a file that no tensor names. The export makes none of
these. Only the few fields that lead to names are read, off protobuf's wire format, so that weights inside the graph,
which may be gigabytes, are neither read nor copied; and the edge does without the onnx package.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from edge_agent.errors import BundleError

# Field numbers of onnx.proto: the messages that lead to tensors, wherever a graph may have them.
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "ExternalData"},
    "ExternalData": {},
}
_FUNCTIONS = 25  # of Model
_OPERATOR = 4  # of Node
_LOOPS = (b"Loop", b"Scan", b"SequenceMap")
_COMPILED = b"EPContext"

MOST_FIELDS = 1 << 22
"""Of a graph that are looked at: three hundred times those of the starter's denoiser. Each takes a microsecond, and one
that leads on 130 bytes of memory, where the file has but two.
"""

_KEY, _VALUE = 1, 2  # of ExternalData
_LOCATION = b"location"

# Wire types.
_VARINT, _EIGHT_BYTES, _SIZED, _GROUP, _GROUP_END, _FOUR_BYTES = 0, 1, 2, 3, 4, 5


def locations(graph: Path) -> set[str]:
    """The places that the tensors of the graph file name, as they are written there.

    A file that is not ONNX is read as far as it goes: onnxruntime takes none of it.

    Raises OSError, and BundleError where it has loops or functions, was compiled, or has more than MOST_FIELDS.
    """
    found: set[str] = set()
    budget = iter(range(MOST_FIELDS))
    if graph.stat().st_size == 0:  # what is empty cannot be mapped
        return found
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        messages = [("Model", 0, len(content))]
        while messages:  # no recursion: how deep graphs lie in graphs is up to whoever wrote them
            message, start, end = messages.pop()
            inside = _INSIDE[message]
            entry = {}  # of a field that is there twice the last counts
            try:
                for number, begins, ends in _fields(content, start, end, budget):
                    operator = content[begins:ends] if message == "Node" and number == _OPERATOR else b""
                    if operator in _LOOPS or (message == "Model" and number == _FUNCTIONS):
                        raise BundleError(
                            f"{graph} has a loop or functions, which may be without end; export it again"
                        )
                    if operator == _COMPILED:
                        raise BundleError(
                            f"{graph} was compiled for one device, and may read any file; export it again"
                        )
                    if number in inside:
                        messages.append((inside[number], begins, ends))
                    elif message == "ExternalData":
                        entry[number] = content[begins:ends]
            except OverflowError as error:
                raise BundleError(
                    f"{graph} has more parts than any graph of an image model; export it again"
                ) from error
            except ValueError:
                return found
            if entry.get(_KEY) == _LOCATION:
                # As file systems' names are decoded: replaced, what is no UTF-8 would look like another file's name.
                found.add(entry.get(_VALUE, b"").decode(errors="surrogateescape"))
    return found


def _fields(content: mmap.mmap, at: int, end: int, budget: Iterator[int]) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of each sized field of the message in content[at:end]. Raises ValueError where it is none,
    and OverflowError where the `budget`, of which each field takes one, is spent.

    No parser of protobuf's takes what is refused here: what it took and we did not, we would have missed.
    """
    groups = 0  # that are open; what is in them is none of the message's fields
    while at < end:
        if next(budget, None) is None:
            raise OverflowError
        tag, at = _varint(content, at, end)
        kind = tag & 7
        if kind == _SIZED:
            size, at = _varint(content, at, end)
            if at + size > end:
                raise ValueError("a field goes on beyond its message")
            if not groups:
                yield (tag & 0xFFFFFFFF) >> 3, at, at + size  # of a tag's bits C++ drops those beyond
            at += size
        elif kind == _VARINT:
            _, at = _varint(content, at, end)
        elif kind == _FOUR_BYTES:
            at += 4
        elif kind == _EIGHT_BYTES:
            at += 8
        elif kind == _GROUP:
            groups += 1
        elif kind == _GROUP_END and groups:
            groups -= 1
        else:
            raise ValueError("no such field")
    if at > end or groups:
        raise ValueError("a field goes on beyond its message")


def _varint(content: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number, and where it ends. Raises ValueError where it does not."""
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number without end")
