from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from edge_agent.superiority import METRICS
from export.errors import ExportError
from export.evaluate import paired_gaps
from export.outcomes import Outcomes, read_table, write_table
from export.validity import complete
from tests.export.routing_world import write_labels


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    return write_labels(
        tmp_path / "labels.parquet", 12, seeds=3, facts={"cloud_digest": "c0ffee", "unknown": "x"}
    )


def test_the_matrix_holds_every_quality_in_its_place(labels: Path) -> None:
    outcomes = Outcomes.read(labels)
    assert outcomes.edge_seeds.shape == outcomes.cloud_seeds.shape == (12, 3, len(METRICS))
    table = pq.read_table(labels)
    row = table.filter(
        (pc.field("prompt_id") == 7) & (pc.field("model") == "cloud") & (pc.field("seed") == 2)
    )
    assert outcomes.prompts[7] == row["prompt"][0].as_py()
    np.testing.assert_array_equal(outcomes.cloud_seeds[7, 2], [row[name][0].as_py() for name in METRICS])
    np.testing.assert_allclose(outcomes.edge, outcomes.edge_seeds.mean(1), rtol=1e-6)
    assert outcomes.facts == {"cloud_digest": "c0ffee"}


def test_a_matrix_is_written_as_it_was_read_and_its_numbers_byte_by_byte(
    labels: Path, tmp_path: Path
) -> None:
    table, again = read_table(labels), tmp_path / "again.parquet"
    write_table(table, again)
    assert read_table(again).equals(table, check_metadata=True)
    columns = pq.ParquetFile(again).metadata.row_group(0).to_dict()["columns"]
    split = {column["path_in_schema"] for column in columns if "BYTE_STREAM_SPLIT" in column["encodings"]}
    assert split == set(METRICS)


def test_the_order_of_the_rows_does_not_matter(labels: Path) -> None:
    before, table = Outcomes.read(labels), pq.read_table(labels)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), labels)
    after = Outcomes.read(labels)
    assert after.prompts == before.prompts
    np.testing.assert_array_equal(after.edge_seeds, before.edge_seeds)


def test_a_prompt_may_have_more_seeds_than_another(labels: Path) -> None:
    table = pq.read_table(labels)
    pq.write_table(table.filter((pc.field("prompt_id") != 4) | (pc.field("seed") == 1)), labels)
    outcomes = Outcomes.read(labels)
    np.testing.assert_allclose(outcomes.edge[4], outcomes.edge_seeds[4, 0])
    assert np.isnan(outcomes.edge_seeds[4, 1:]).all()
    assert np.isfinite(outcomes.edge).all()


def test_of_a_training_prompt_the_edge_may_have_more_images_than_the_cloud(labels: Path) -> None:
    table, whole = pq.read_table(labels), Outcomes.read(labels)
    learnt = int(whole.ids[whole.splits == "train"][0])
    own = (pc.field("prompt_id") == learnt) & (pc.field("seed") > 0)
    pq.write_table(table.filter(~(own & (pc.field("model") == "cloud"))), labels)
    fewer, row = Outcomes.read(labels), int(np.flatnonzero(whole.ids == learnt)[0])
    np.testing.assert_array_equal(fewer.edge, whole.edge)
    np.testing.assert_allclose(fewer.cloud[row], whole.cloud_seeds[row, 0])
    pq.write_table(table.filter(~(own & (pc.field("model") == "edge"))), labels)
    with pytest.raises(ExportError, match=f"prompt {learnt} has no image of the edge model with seed 1"):
        Outcomes.read(labels)


def with_images(table: pa.Table, count: Mapping[int, int]) -> pa.Table:
    """Of these prompts (id -> images) only the first images of both models."""
    rows = zip(table["prompt_id"].to_pylist(), table["seed"].to_pylist(), strict=True)
    return table.filter(pa.array([seed < count.get(prompt, seed + 1) for prompt, seed in rows]))


@pytest.mark.parametrize("compared", [paired_gaps, complete])
def test_a_few_test_prompts_with_fewer_images_are_named_and_lower_nobody(
    tmp_path: Path, compared: Callable[[Outcomes], object]
) -> None:
    labels = write_labels(tmp_path / "labels.parquet", 24, seeds=4)
    table = pq.read_table(labels)
    pq.write_table(with_images(table, {11: 2}), labels)
    with pytest.raises(ExportError, match=r"prompt 11 has 2 of the 4 images .*remove .*, 1 of 4"):
        compared(Outcomes.read(labels).split("test"))


@pytest.mark.parametrize("shift", [280, 290])
def test_the_first_test_prompts_may_have_more_images_than_the_others_be_these_few_or_many(
    tmp_path: Path, shift: int
) -> None:
    labels = write_labels(tmp_path / "labels.parquet", 24, seeds=4)
    table = pq.read_table(labels)
    moved = pa.array([number + shift for number in table["prompt_id"].to_pylist()], pa.int32())
    table = table.set_column(table.column_names.index("prompt_id"), "prompt_id", moved)
    tests = [shift + 5, shift + 11, shift + 17, shift + 23]  # of 300 and above have two
    pq.write_table(with_images(table, {number: 2 for number in tests if number >= 300}), labels)
    assert Outcomes.read(labels).split("test").common_seeds() == 2
    pq.write_table(with_images(table, {tests[0]: 1, **{n: 2 for n in tests if n >= 300}}), labels)
    with pytest.raises(ExportError, match=f"prompt {tests[0]} has 1 of the 2 images of each model"):
        Outcomes.read(labels).split("test").common_seeds()


def test_a_prompt_is_inspected_whole_or_not_at_all(labels: Path) -> None:
    table = inspected(pq.read_table(labels))
    ids, models, seeds = (table[name].to_pylist() for name in ("prompt_id", "model", "seed"))

    def silent_on(unsaid: Callable[[int, str, int], bool]) -> Outcomes:
        verdicts = [None if unsaid(*row) else 1.0 for row in zip(ids, models, seeds, strict=True)]
        column = pa.array(verdicts, pa.float64())
        pq.write_table(table.set_column(table.column_names.index("inspected"), "inspected", column), labels)
        return Outcomes.read(labels)

    silent_on(lambda *_: False).must_be_inspected_whole()
    silent_on(lambda prompt, *_: prompt == 5).must_be_inspected_whole()
    with pytest.raises(
        ExportError, match="prompt 5 has a verdict on 5 of its 6 images: run `edge-export insp"
    ):
        silent_on(lambda *row: row == (5, "cloud", 2)).must_be_inspected_whole()
    with pytest.raises(ExportError, match="prompt 0 has a verdict on 3 of its 6 images"):
        silent_on(lambda *row: row[1] == "edge").must_be_inspected_whole()
    pq.write_table(with_images(table, {5: 2}), labels)
    Outcomes.read(labels).must_be_inspected_whole()  # images that nobody made lack no verdict


def test_a_measurement_that_nobody_declared_is_said_to_count_for_nothing(
    labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(labels)
    beside = ("adherence", "inspected", "inspected_share", "declared", "beauty")
    for name in beside:
        table = table.append_column(name, pa.array([0.5] * len(table)))
    table = table.append_column("note", pa.array(["mine"] * len(table)))
    pq.write_table(measured_by(table, [*METRICS, "declared"]), labels)
    Outcomes.read(labels)
    said = capsys.readouterr().err
    assert "column 'beauty' is not read" in said and said.count("column") == 1


def test_splits_part_the_prompts(labels: Path) -> None:
    outcomes = Outcomes.read(labels)
    train, test = outcomes.split("train"), outcomes.split("test")
    assert (len(train), len(test)) == (6, 2)
    assert not set(train.ids) & set(test.ids)


def change(name: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        return table.set_column(
            table.column_names.index(name), table.schema.field(name), pa.array(values, table[name].type)
        )

    return changed


def typed(table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    column = pc.round(table[name]) if pa.types.is_boolean(kind) else table[name]
    return table.set_column(table.column_names.index(name), name, column.cast(kind))


def reworded(table: pa.Table, prompt_id: int, text: str) -> pa.Table:
    own = pc.equal(table["prompt_id"], prompt_id)
    return table.set_column(
        table.column_names.index("prompt"), "prompt", pc.if_else(own, text, table["prompt"])
    )


def inspected(table: pa.Table) -> pa.Table:
    return table.append_column("inspected", pa.array([1.0] * len(table)))


def measured_by(table: pa.Table, names: Sequence[str]) -> pa.Table:
    return table.replace_schema_metadata({"metrics": json.dumps([[name, "good", "bad"] for name in names])})


def test_optional_metrics_may_follow_the_ten(labels: Path) -> None:
    pq.write_table(measured_by(pq.read_table(labels), [*METRICS, "adherence"]), labels)
    assert Outcomes.read(labels).edge.shape == (12, len(METRICS))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("detail", 3, float("nan")), "not a number at prompt_id 0, model cloud, seed 0"),
        (change("detail", 3, None), "not a number at prompt_id 0, model cloud, seed 0"),
        (change("color", 8, 1.5), r"outside \[0, 1\].*prompt_id 1, model edge, seed 2"),
        (change("seed", 1, 0), "two rows of prompt 0, model edge, seed 0"),
        (change("split", 0, "holdout"), "more than one split"),
        (change("prompt", 0, "another"), "more than one prompt"),
        (change("model", 0, "middle"), "unknown model 'middle'"),
        (
            lambda t: t.filter((pc.field("model") == "edge") | (pc.field("prompt_id") != 5)),
            "prompt 5 has no image of the cloud",
        ),
        (lambda t: t.filter(pc.field("model") == "edge"), "no image of the cloud"),
        (
            # A training prompt, which may have fewer images of the cloud but not none.
            lambda t: t.filter((pc.field("model") == "edge") | (pc.field("prompt_id") != 6)),
            "prompt 6 has no image of the cloud",
        ),
        (
            lambda t: t.filter(
                (pc.field("model") == "edge") | (pc.field("prompt_id") != 5) | (pc.field("seed") != 1)
            ),
            "prompt 5 has no image of the cloud model with seed 1, of the edge model it has",
        ),
        (lambda t: reworded(t, 7, t["prompt"][0].as_py()), "prompts 0 and 7 are both '.*'; remove one"),
        (
            lambda t: reworded(t, 5, f" {t['prompt'][0].as_py().upper()} "),  # a test prompt
            "prompts 0 and 5 are both ' .* ', or as good as: '.*'; remove one",
        ),
        (lambda t: reworded(t, 5, ""), "prompt 5 is empty; remove it"),
        (lambda t: reworded(t, 5, " \t"), "prompt 5 is empty; remove it"),
        (
            lambda t: measured_by(t, ["glamour", *METRICS[1:]]),
            "unknown metric 'glamour'; this version compares",
        ),
        (
            lambda t: measured_by(t, METRICS[::-1]),
            "metrics integrity, layout.*; this version compares definition",
        ),
        (lambda t: t.replace_schema_metadata({"metrics": "[1]"}), "metrics are no list of"),
        (lambda t: t.drop_columns("layout"), "no column 'layout'"),
        (lambda t: t.slice(0, 0), "no rows"),
        (lambda t: typed(t, "detail", pa.string()), "column 'detail' holds string, not numbers"),
        (lambda t: typed(t, "detail", pa.bool_()), "column 'detail' holds bool, not numbers"),
        (lambda t: typed(t, "prompt_id", pa.string()), "column 'prompt_id' holds string, not whole numbers"),
        (lambda t: typed(t, "prompt", pa.binary()), "column 'prompt' holds binary, not text"),
        (change("prompt", 2, None), "row 2 has no prompt"),
        (change("prompt_id", 2, None), "row 2 has no prompt_id"),
        (change("model", 2, None), "row 2 has no model"),
        (
            lambda t: t.append_column("inspected", pa.nulls(len(t), pa.string())),
            "column 'inspected' holds string, not numbers",
        ),
        (
            lambda t: change("inspected", 7, 7.0)(inspected(t)),
            "inspected is 7.0, outside .* at prompt_id 1, model edge, seed 1; remove the columns inspected and insp",
        ),
        (lambda t: change("inspected", 7, -0.5)(inspected(t)), "inspected is -0.5, outside"),
        (
            lambda t: t.append_column("inspected_share", pa.array([1.5] + [1.0] * (len(t) - 1))),
            "inspected_share is 1.5, outside",
        ),
        (
            lambda t: t.replace_schema_metadata({"edge_digest": b"\xff"}),
            "metadata b'edge_digest' is not text in UTF-8",
        ),
    ],
)
def test_labels_with_a_hole_or_a_mistake_are_refused(
    labels: Path, spoil: Callable[[pa.Table], pa.Table], message: str
) -> None:
    pq.write_table(spoil(pq.read_table(labels)), labels)
    with pytest.raises(ExportError, match=message):
        Outcomes.read(labels)


def test_a_file_that_is_not_parquet_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.parquet").write_text("prompt,quality\n")
    for name, why in (("labels.parquet", ": not readable as labels"), ("none.parquet", "; name the labels")):
        with pytest.raises(ExportError, match=f"{name}{why}"):
            Outcomes.read(tmp_path / name)


def test_a_split_without_prompts_is_refused(labels: Path) -> None:
    table = pq.read_table(labels)
    pq.write_table(table.filter(pc.field("split") != "calibration"), labels)
    with pytest.raises(ExportError, match="0 prompts of the split 'calibration'"):
        Outcomes.read(labels).split("calibration")
