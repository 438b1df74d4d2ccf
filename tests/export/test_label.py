import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPProcessor

from edge_agent.superiority import METRICS
from export import label
from export.errors import ExportError
from export.outcomes import INSPECTION, INSPECTOR, SPLITS, Outcomes
from export.quality import Judge, load_metrics
from export.starter.judge import new_judge
from export.starter.tokenizer import train_tokenizer
from tests.miniature import save_miniature

CARDS = {
    "edge": {"steps": 4, "guidance_scale": 5.0},  # as the miniature bundle
    "cloud": {"steps": 2, "guidance_scale": 2.0},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random pipelines of few steps, and a random judge."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("edge", "cloud")):
        folder = save_miniature(root / name, seed=seed)
        (folder / "routet2i.json").write_text(json.dumps(CARDS[name]))
    tokenizer = train_tokenizer(root / "tokenizer", ["a cat on a beach", "high definition photo"] * 5)
    torch.manual_seed(0)
    new_judge(tokenizer).save_pretrained(root / "judge")
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64)
    CLIPProcessor(images, tokenizer).save_pretrained(root / "judge")
    return root


def arguments(models, bundle, out, *more):
    return [
        *("--edge", str(models / "edge"), "--cloud", str(models / "cloud"), "--judge", str(models / "judge")),
        *("--bundle", str(bundle), "--out", str(out), "--train", "3", "--validation", "2"),
        *("--calibration", "2", "--test", "2", "--combinations", "1", "--wording", "1", "--free-form", "1"),
        *("--measured-draws", "2", "--ceiling-draws", "3", *more),
    ]


def test_the_matrix_holds_every_prompt_model_and_seed_and_says_what_it_was_made_with(
    models, miniature_bundle, tmp_path
):
    out = tmp_path / "labels.parquet"
    assert label.main(arguments(models, miniature_bundle, out)) == 0
    outcomes = Outcomes.read(out)
    assert [np.sum(outcomes.splits == split) for split in SPLITS] == [3, 2, 2, 2, 1, 1, 1]
    drawn = (~np.isnan(outcomes.edge_seeds[..., 0])).sum(axis=1)
    images = {split: np.unique(drawn[outcomes.splits == split]).tolist() for split in SPLITS}
    assert images == {split: [{"train": 1, "test": 3}.get(split, 2)] for split in SPLITS}
    assert {"edge_digest", "cloud_digest", "metrics", "judge_digest"} <= {
        key.decode() for key in pq.read_schema(out).metadata
    }


def test_an_interrupted_run_goes_on_and_ends_with_the_same_matrix(
    models, miniature_bundle, tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
    assert label.main(arguments(models, miniature_bundle, whole)) == 0
    paint, painted = label.Painter.paint, []

    def interrupted(self, prompts, seeds):
        if len(painted) == 2:  # the bundle's check was the first
            raise KeyboardInterrupt
        painted.append(prompts)
        return paint(self, prompts, seeds)

    with monkeypatch.context() as patch:
        patch.setattr(label.Painter, "paint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            label.main(arguments(models, miniature_bundle, cut))
    assert not cut.exists()
    assert label.main(arguments(models, miniature_bundle, cut)) == 0
    assert pq.read_table(cut).equals(pq.read_table(whole))


def test_another_judge_measures_the_same_images_without_generating_them_again(
    models, miniature_bundle, tmp_path, monkeypatch
):
    out, other = tmp_path / "labels.parquet", tmp_path / "other"
    assert label.main(arguments(models, miniature_bundle, out)) == 0
    shutil.copytree(models / "judge", other)
    torch.manual_seed(1)
    new_judge(CLIPProcessor.from_pretrained(other).tokenizer).save_pretrained(other)
    monkeypatch.setattr(label, "Painter", None)
    before = pq.read_table(out)
    assert label.main(arguments(models, miniature_bundle, out, "--judge", str(other))) == 0
    after = pq.read_table(out)
    assert after["seed"].equals(before["seed"])
    assert not after["detail"].equals(before["detail"])


def test_an_earlier_matrix_is_extended_without_making_its_images_again(
    models, miniature_bundle, tmp_path, monkeypatch
):
    earlier, whole, out = (tmp_path / f"{name}.parquet" for name in ("earlier", "whole", "out"))
    more = ("--train", "5", "--test", "3")
    monkeypatch.setattr(label, "PIECE", 1)  # a larger batch may round otherwise
    assert label.main(arguments(models, miniature_bundle, earlier)) == 0
    table = pq.read_table(earlier)
    for name in INSPECTION:  # as `edge-export inspect` adds them
        table = table.append_column(name, pa.array(np.full(len(table), 0.5, np.float32)))
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {INSPECTOR: "abc"}), earlier)
    assert label.main(arguments(models, miniature_bundle, whole, *more)) == 0
    paint, painted = label.Painter.paint, []

    def noted(self, prompts, seeds):
        painted.extend(prompts)
        return paint(self, prompts, seeds)

    monkeypatch.setattr(label.Painter, "paint", noted)
    assert label.main(arguments(models, miniature_bundle, out, *more, "--extend", str(earlier))) == 0
    made, expected = pq.read_table(out), pq.read_table(whole)
    assert made.select(expected.column_names).equals(expected)
    assert made.schema.metadata[INSPECTOR.encode()] == b"abc"
    assert made[INSPECTION[0]].null_count == len(made) - len(table) > 0
    known = set(pq.read_table(earlier)["prompt"].to_pylist())
    assert len(set(painted[1:]) - known) == 3  # the bundle's check was the first
    assert len(painted[1:]) == 2 * (2 + 3) and known.isdisjoint(painted[1:])


def test_a_matrix_of_another_judge_or_without_a_column_is_not_extended(models, miniature_bundle, tmp_path):
    earlier, out = tmp_path / "earlier.parquet", tmp_path / "out.parquet"
    assert label.main(arguments(models, miniature_bundle, earlier)) == 0
    extending = arguments(models, miniature_bundle, out, "--extend", str(earlier))
    with pytest.raises(ExportError, match="has no adherence"):
        label.main([*extending, "--adherence"])
    table = pq.read_table(earlier)
    facts = table.schema.metadata | {b"judge_digest": b"0"}
    pq.write_table(table.replace_schema_metadata(facts), earlier)
    with pytest.raises(ExportError, match="does not have this judge_digest"):
        label.main(extending)


def test_two_processes_share_a_run_and_the_last_one_writes_the_matrix(
    models, miniature_bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr(label, "PIECE", 4)
    out = tmp_path / "labels.parquet"
    assert label.main(arguments(models, miniature_bundle, out, "--share", "1/2")) == 1
    assert not out.exists()
    assert label.main(arguments(models, miniature_bundle, out, "--share", "2/2")) == 0
    assert len(Outcomes.read(out)) == 12


def test_labels_of_other_models_are_not_mixed_in(models, miniature_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(label, "PIECE", 4)
    out = tmp_path / "labels.parquet"
    label.main(arguments(models, miniature_bundle, out, "--share", "1/2"))
    swapped = arguments(models, miniature_bundle, out)
    swapped[3] = str(models / "edge")
    with pytest.raises(ExportError, match="other models"):
        label.main(swapped)


@pytest.mark.parametrize(
    ("weights", "card", "words"),
    [
        ("cloud", CARDS["edge"], "other pictures"),
        ("edge", CARDS["cloud"], "4 steps at guidance 5, and .* says 2 at 2"),
    ],
)
def test_labels_are_not_made_under_the_digest_of_a_bundle_that_makes_other_pictures(
    models, miniature_bundle, tmp_path, weights, card, words
):
    edge = shutil.copytree(models / weights, tmp_path / "edge")
    (edge / "routet2i.json").write_text(json.dumps(card))
    swapped = arguments(models, miniature_bundle, tmp_path / "labels.parquet")
    swapped[1] = str(edge)
    with pytest.raises(ExportError, match=words):
        label.main(swapped)


@pytest.mark.parametrize("share", ["0/2", "3/2", "half"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(SystemExit) as refusal:
        label.main(["--share", share])
    assert refusal.value.code == 2


def test_a_quality_is_the_sigmoid_of_the_difference_of_two_scaled_cosines(models):
    judge = Judge(models / "judge")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with torch.inference_mode():
        inputs = judge.processor(
            text=[judge.metrics[3].positive, judge.metrics[3].negative],
            images=image,
            padding="max_length",
            return_tensors="pt",
        )
        praise, blame = judge.clip(**inputs).logits_per_image[0].tolist()
    expected = 1 / (1 + np.exp(blame - praise))
    assert judge.quality([image])[0, 3] == pytest.approx(expected, abs=1e-5)
    assert tuple(metric.name for metric in judge.metrics) == METRICS


def test_a_file_that_names_a_metric_twice_is_refused(tmp_path):
    entry = {"name": "color", "positive": "a", "negative": "b", "reason": "c"}
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"metrics": [entry, entry]}))
    with pytest.raises(ValueError, match="twice"):
        load_metrics(file)


def test_adherence_is_one_column_more_of_the_same_images_and_off_by_default(
    models, miniature_bundle, tmp_path, monkeypatch
):
    out = tmp_path / "labels.parquet"
    assert label.main(arguments(models, miniature_bundle, out)) == 0
    before = pq.read_table(out)
    assert label.ADHERENCE not in before.column_names
    monkeypatch.setattr(label, "Painter", None)
    assert label.main(arguments(models, miniature_bundle, out, "--adherence")) == 0
    after = pq.read_table(out)
    assert after.drop_columns(label.ADHERENCE).equals(before)
    measured = after[label.ADHERENCE].to_numpy()
    assert ((measured > 0) & (measured < 1)).all()
