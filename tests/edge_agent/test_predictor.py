from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edge_agent.errors import BundleError, GenerationFailed
from edge_agent.predictor import Predictor
from edge_agent.superiority import METRICS
from export.errors import ExportError
from export.mixture import Ensemble, Mixture, Shape
from export.predictor_onnx import TOLERANCE, export

WIDTH, TOKENS, VOCABULARY = 16, 20, 50
IDS, KNOWN = np.arange(TOKENS)[None], {"vocabulary": VOCABULARY, "met": 15}


def made_up(**parts: Any) -> Ensemble:
    torch.manual_seed(0)
    mixtures = [Mixture(Shape(WIDTH, len(METRICS), kept=5, **parts)) for _ in range(2)]
    for mixture in mixtures:
        for weights in mixture.parameters():  # some begin as zeros
            torch.nn.init.normal_(weights, std=0.3)
    states, edge, cloud = (
        torch.randn(100, WIDTH) * 3 + 1,
        torch.rand(9, len(METRICS)),
        torch.rand(9, len(METRICS)),
    )
    for mixture in mixtures:
        mixture.start_from(states, torch.arange(mixture.shape.met), edge, cloud)
    return Ensemble(mixtures).eval()


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictor") / "model.onnx"
    export(made_up(words=4, **KNOWN), path, TOKENS)
    return path


@pytest.mark.parametrize(
    "parts", [{}, {"selection": False}, {"dual_gate": False}, {"words": 4, **KNOWN}, {"sentence": 8, **KNOWN}]
)
def test_the_graph_says_what_torch_says(tmp_path: Path, parts: dict[str, Any]) -> None:
    mixture = made_up(**parts)
    assert export(mixture, tmp_path / "model.onnx", TOKENS) <= TOLERANCE
    predictor = Predictor.load(tmp_path / "model.onnx", WIDTH)
    states = torch.randn(1, TOKENS, WIDTH)
    mask = torch.arange(TOKENS) % 3 > 0
    with torch.no_grad():
        expected = mixture(states[:, mask], mask[None, mask], torch.from_numpy(IDS)[:, mask])
    made = predictor.predict(states.numpy(), np.flatnonzero(mask).tolist(), IDS)
    for ours, theirs in zip((made.edge, made.cloud, made.pull), expected, strict=True):
        np.testing.assert_allclose(ours, theirs[0].numpy(), atol=TOLERANCE, rtol=0)


def test_a_prediction_has_a_quality_a_metric_and_a_pull_a_token(graph: Path) -> None:
    states = np.random.default_rng(0).standard_normal((1, TOKENS, WIDTH), np.float32)
    made = Predictor.load(graph).predict(states, range(1, 9), IDS)
    assert len(made.edge) == len(made.cloud) == len(METRICS)
    assert all(0 < quality < 1 for quality in made.edge + made.cloud)
    assert np.shape(made.pull) == (8, len(METRICS))
    read = np.count_nonzero(made.pull, axis=0)  # each mixture keeps five tokens of its own choice
    assert ((read >= 5) & (read < 2 * 5)).all()


def test_a_prompt_length_other_than_the_exported_one_is_fine(graph: Path) -> None:
    states = np.random.default_rng(0).standard_normal((1, 40, WIDTH), np.float32)
    predictor, ids = Predictor.load(graph), np.tile(IDS, 2)
    np.testing.assert_allclose(
        predictor.predict(states, range(6), ids).edge,
        predictor.predict(states[:, :TOKENS], range(6), ids[:, :TOKENS]).edge,
        atol=1e-6,
    )


def test_a_graph_for_other_states_is_refused_by_name(graph: Path) -> None:
    with pytest.raises(
        BundleError, match=f"{graph.name} reads token states of size 16; this bundle's have size 32"
    ):
        Predictor.load(graph, 32)


def test_states_of_another_size_are_refused(graph: Path) -> None:
    with pytest.raises(GenerationFailed):
        Predictor.load(graph).predict(np.zeros((1, TOKENS, 3), np.float32), range(TOKENS), IDS)


@pytest.mark.parametrize(
    ("shapes", "number", "why"),
    [
        ([(1, 9), (1, 10), (1, TOKENS, 10)], 0.5, "gave the shapes"),
        ([(1, 10), (10,), (1, TOKENS, 10)], 0.5, "gave the shapes"),
        ([(1, 10), (1, 10), (1, 3, 10)], 0.5, "gave the shapes"),
        ([(1, 10), (1, 10), (1, TOKENS, 10)], np.nan, "not finite"),
        ([(1, 10), (1, 10), (1, TOKENS, 10)], np.inf, "not finite"),
    ],
)
def test_what_is_no_prediction_is_told_of_by_the_graphs_name(
    graph: Path, monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]], number: float, why: str
) -> None:
    predictor = Predictor.load(graph)
    made = [np.full(shape, number, np.float32) for shape in shapes]
    monkeypatch.setattr(predictor.session, "run", lambda _: made)
    with pytest.raises(GenerationFailed, match=rf"model\.onnx gave .*{why.removeprefix('gave ')}"):
        predictor.predict(np.zeros((1, TOKENS, WIDTH), np.float32), range(TOKENS), IDS)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_number_that_is_not_finite_is_no_prediction(
    graph: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    predictor = Predictor.load(graph)
    made = [np.full(shape, 0.5, np.float32) for shape in ((1, 10), (1, 10), (1, TOKENS, 10))]
    made[place][..., -1] = np.nan
    monkeypatch.setattr(predictor.session, "run", lambda _: made)
    with pytest.raises(GenerationFailed, match=r"model\.onnx gave numbers that are not finite"):
        predictor.predict(np.zeros((1, TOKENS, WIDTH), np.float32), range(TOKENS), IDS)


def test_a_predictor_of_other_metrics_is_refused_by_name(tmp_path: Path) -> None:
    """Its numbers would be taken for those of ours in the same places."""
    shapes = {"edge": (1, 9), "cloud": (1, 9), "pull": (1, 1, 9)}
    values = {name: numpy_helper.from_array(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    kinds = {"states": TensorProto.FLOAT, "mask": TensorProto.BOOL, "ids": TensorProto.INT64}
    model = helper.make_graph(
        [helper.make_node("Constant", [], [name], value=value) for name, value in values.items()],
        "made",
        [
            helper.make_tensor_value_info(name, kind, [1, "tokens", *([WIDTH] if name == "states" else [])])
            for name, kind in kinds.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(model, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    with pytest.raises(BundleError, match=r"model\.onnx predicts 9 metrics; this version compares 10"):
        Predictor.load(path)


def test_a_file_that_is_no_predictor_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        Predictor.load(tmp_path / "model.onnx")


def test_a_predictor_of_an_earlier_version_is_refused_with_what_to_do(graph: Path, tmp_path: Path) -> None:
    model = onnx.load(graph)
    del model.graph.input[[node.name for node in model.graph.input].index("ids")]
    model.graph.initializer.append(onnx.numpy_helper.from_array(IDS, "ids"))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(
        BundleError, match=r"an earlier version is made anew with `edge-export train`.*label`"
    ):
        Predictor.load(tmp_path / "model.onnx")


def test_an_ablation_with_one_metric_does_not_get_into_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="ablation"):
        export(Ensemble([Mixture(Shape(WIDTH, 1))]), tmp_path / "model.onnx", TOKENS)
    assert not (tmp_path / "model.onnx").exists()
