"""Every place that a graph's tensors name is found, wherever they are in it, and nothing else is read."""

from __future__ import annotations

import random
import tracemalloc
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper

from edge_agent.errors import BundleError
from edge_agent.manifest import DECODER
from edge_agent.weights import locations
from tests.external import name_weights


def tensor(location: str) -> TensorProto:
    made = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1])
    name_weights(made, location)
    return made


def attributes(prefix: str, inner: GraphProto) -> list[AttributeProto]:
    sparse = [
        onnx.SparseTensorProto(values=tensor(f"{prefix}.values{n}"), indices=tensor(f"{prefix}.indices{n}"))
        for n in (1, 2)
    ]
    return [
        AttributeProto(name="t", t=tensor(f"{prefix}.t"), tensors=[tensor(f"{prefix}.tensors")]),
        AttributeProto(name="g", g=inner, graphs=[GraphProto(initializer=[tensor(f"{prefix}.graphs")])]),
        AttributeProto(name="s", sparse_tensor=sparse[0], sparse_tensors=[sparse[1]]),
    ]


EXPECTED = {
    *("initializer", "sparse.values", "sparse.indices", "inner", "training", "algorithm"),
    *(f"node.{place}" for place in ("t", "tensors", "graphs", "values1", "indices1", "values2", "indices2")),
}


@pytest.fixture
def everywhere() -> ModelProto:
    """Tensors in each place where onnx.proto has one."""
    model = ModelProto(ir_version=8)
    model.graph.initializer.append(tensor("initializer"))
    model.graph.sparse_initializer.add(values=tensor("sparse.values"), indices=tensor("sparse.indices"))
    inner = GraphProto(initializer=[tensor("inner")])
    model.graph.node.add(op_type="If").attribute.extend(attributes("node", inner))
    model.training_info.add(
        initialization=GraphProto(initializer=[tensor("training")]),
        algorithm=GraphProto(initializer=[tensor("algorithm")]),
    )
    return model


def read(folder: Path, content: bytes) -> set[str]:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return locations(path)


def test_tensors_are_found_wherever_a_model_may_have_them(everywhere: ModelProto, tmp_path: Path) -> None:
    assert read(tmp_path, everywhere.SerializeToString()) == EXPECTED


def test_a_graph_in_a_graph_in_a_graph_is_read_to_the_last(tmp_path: Path) -> None:
    graph = GraphProto(initializer=[tensor("deep")])
    for _ in range(25):
        graph = GraphProto(node=[helper.make_node("If", [], [], then_branch=graph)])
    assert read(tmp_path, ModelProto(graph=graph).SerializeToString()) == {"deep"}


def test_what_may_be_without_end_is_refused_by_name(tmp_path: Path) -> None:
    """The one would hold up whoever loads it; of calls of the other onnxruntime makes nodes until memory is full."""
    inner = [GraphProto(node=[helper.make_node(loop, [], [])]) for loop in ("Loop", "Scan", "SequenceMap")]
    loops = [
        ModelProto(graph=GraphProto(node=[helper.make_node("If", [], [], then_branch=x)])) for x in inner
    ]
    functions = ModelProto(functions=[onnx.FunctionProto(name="f", node=[helper.make_node("g", [], [])])])
    for model in (*loops, functions):
        with pytest.raises(BundleError, match=r"model\.onnx has a loop or functions"):
            read(tmp_path, model.SerializeToString())


def test_a_graph_that_was_compiled_is_refused_by_name(tmp_path: Path) -> None:
    """It may name a file that no tensor does, and the provider opens it."""
    compiled = helper.make_node("EPContext", [], [], domain="com.microsoft", ep_cache_context="../../x.bin")
    with pytest.raises(BundleError, match=r"model\.onnx was compiled for one device"):
        read(tmp_path, ModelProto(graph=GraphProto(node=[compiled])).SerializeToString())


@pytest.mark.parametrize("field", [b"\x3a\x00", b"\x08\x01"])  # an empty graph, and a number
def test_what_only_takes_time_and_memory_to_look_through_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: bytes
) -> None:
    """Empty messages took 66 times the file's size in memory."""
    monkeypatch.setattr("edge_agent.weights.MOST_FIELDS", 1_000)
    assert read(tmp_path, field * 1_000) == set()
    with pytest.raises(BundleError, match=r"model\.onnx has more parts than any graph"):
        read(tmp_path, field * 1_001)


def test_weights_inside_the_graph_are_none(tmp_path: Path, miniature_bundle: Path) -> None:
    assert locations(miniature_bundle / DECODER) == set()
    made = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[9], raw_data=b"j\x0d\n\x08location")
    assert read(tmp_path, ModelProto(graph=GraphProto(initializer=[made])).SerializeToString()) == set()


def test_gigabytes_inside_the_graph_are_passed_over(tmp_path: Path) -> None:
    """The file is sparse, so that it takes no room; a copy would."""
    size = (1 << 31) - 1_000
    weights = b"\x4a" + varint(size)  # raw_data, behind which a second tensor stands
    head = b"\x2a" + varint(len(weights) + size) + weights
    tail = ModelProto(graph=GraphProto(initializer=[tensor("last")])).graph.SerializeToString()
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.write(b"\x3a" + varint(len(head) + size + len(tail)) + head)
        file.seek(size, 1)
        file.write(tail)
    tracemalloc.start()
    try:
        assert locations(path) == {"last"}
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_what_protobuf_skips_is_skipped(everywhere: ModelProto, tmp_path: Path) -> None:
    """Unknown fields of every kind, groups in groups among them, and numbers longer than they need to be."""
    content = everywhere.SerializeToString()
    group = b"\xa3\x06" + b"\xab\x06" + b"\x3a\x01x" + b"\xac\x06" + b"\xa4\x06"
    unknown = (
        b"\xa0\x06\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01" + b"\xa5\x06abcd" + b"\xa1\x06abcdefgh" + group
    )
    long = varint(0x3A, longer=2) + varint(everywhere.graph.ByteSize(), longer=1)
    content = unknown + content + unknown + long + everywhere.graph.SerializeToString()
    assert ModelProto.FromString(content).training_info == everywhere.training_info
    assert read(tmp_path, content) == EXPECTED
    doubled = b"\x0a\x05other\x12\x01x" + b"\x0a\x08location\x12\x04last"  # of two the last counts
    entry = b"\x6a" + varint(len(doubled)) + doubled
    assert read(tmp_path, b"\x3a" + varint(len(entry) + 2) + b"\x2a" + varint(len(entry)) + entry) == {"last"}


def test_what_a_tag_has_beyond_its_bits_hides_no_field(tmp_path: Path) -> None:
    """In C++ protobuf drops it, so that onnxruntime reads the field."""
    graph = GraphProto(initializer=[tensor("hidden")]).SerializeToString()
    assert read(tmp_path, varint(0x3A | 1 << 35) + varint(len(graph)) + graph) == {"hidden"}


def test_a_place_that_is_no_text_is_told_from_every_name(tmp_path: Path) -> None:
    """Onnxruntime opens the file with these bytes; a manifest can list one with a replacement character in its name."""
    model = ModelProto()
    entry = model.graph.initializer.add().external_data.add(key="location", value="w?.bin")
    assert entry.value
    (place,) = read(tmp_path, model.SerializeToString().replace(b"w?.bin", b"w\xff.bin"))
    assert place != "w\ufffd.bin"
    assert place.encode(errors="surrogateescape") == b"w\xff.bin"


def test_what_is_no_protobuf_is_read_as_far_as_it_goes(everywhere: ModelProto, tmp_path: Path) -> None:
    draw = random.Random(0)
    content = everywhere.SerializeToString()
    assert read(tmp_path, b"") == set()
    for _ in range(300):
        spoilt = bytearray(content[: draw.randrange(len(content))])
        for _ in range(draw.randrange(3)):
            spoilt[draw.randrange(len(spoilt))] = draw.randrange(256)
        found = read(tmp_path, bytes(spoilt))
        model = None
        with suppress(DecodeError):  # onnxruntime would not take it either
            model = ModelProto.FromString(bytes(spoilt))
        named = {
            entry.value
            for made in (model.graph.initializer if model else ())
            for entry in made.external_data
            if entry.key == "location"
        }
        assert named <= found


def varint(value: int, longer: int = 0) -> bytes:
    made = bytearray()
    while value >= 0x80:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(made + bytes([value | 0x80] + [0x80] * (longer - 1) + [0] if longer else [value]))
