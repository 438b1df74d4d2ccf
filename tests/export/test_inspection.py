"""What the inspector sees, on the shipped weights and real pictures, and what is made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from export import inspection
from export.errors import ExportError
from export.inspection import Verdict, kappa, kind_of, verdict
from export.label import main as label
from export.outcomes import Outcomes
from export.prompts import Prompt, router_prompts
from export.starter.inspector import WEIGHTS, Inspector, Seen, Sight
from export.starter.world import Group, Scene, render, sample_scenes
from tests.export.routing_world import write_labels
from tests.miniature import save_miniature

COUNTS = {
    "train": 2,
    "validation": 2,
    "calibration": 2,
    "test": 3,
    "combinations": 0,
    "wording": 0,
    "free-form": 10,
}


@pytest.fixture(scope="module")
def inspector() -> Inspector:
    return Inspector()


@pytest.fixture(scope="module")
def rendered() -> tuple[list[Scene], list[Image.Image]]:
    rng = np.random.default_rng(3)
    scenes = sample_scenes("validation", 60, seed=3)
    return scenes, [Image.fromarray(render(scene, rng)) for scene in scenes]


def test_it_finds_what_is_there_and_nothing_else_in_scenes_it_has_not_met(inspector, rendered):
    scenes, images = rendered
    sights = inspector.look(images)
    assert np.mean([verdict(s, scene).strict for s, scene in zip(sights, scenes, strict=True)]) > 0.9
    for shift in (1, 2, 3):
        others = scenes[shift:] + scenes[:shift]
        wrong = [
            verdict(s, o).strict for s, o, scene in zip(sights, others, scenes, strict=True) if o != scene
        ]
        assert np.mean(wrong) < 0.05


def test_it_counts_what_is_there_and_not_what_scenes_usually_show(inspector):
    rng = np.random.default_rng(0)
    rights = []
    for name in ("apple", "cat", "car"):
        four = render(Scene((Group(name, 4),)), rng)
        three = four.copy()
        three[32:, 32:] = four[:1, :1]  # one corner wiped
        sights = inspector.look([Image.fromarray(three)])
        rights.append(len([seen for seen in sights[0].objects if seen.name == name]) == 3)
    assert all(rights)


def sight(*objects: tuple[str, float, float], background: str = "beach") -> Sight:
    return Sight(tuple(Seen(name, x, y, 20.0, 0.99) for name, x, y in objects), background)


ASKED = Scene((Group("cat"), Group("dog", 2)), "beach", "left of")


@pytest.mark.parametrize(
    ("seen", "strict", "share"),
    [
        (sight(("cat", 16, 32), ("dog", 48, 16), ("dog", 48, 48)), True, 1.0),
        (sight(("cat", 16, 32), ("dog", 48, 16), ("dog", 48, 48), ("owl", 5, 5)), True, 1.0),
        (sight(("cat", 16, 32), ("dog", 48, 32)), False, 0.75),
        (sight(("cat", 48, 32), ("dog", 16, 16), ("dog", 16, 48)), False, 0.75),
        (sight(("cat", 46, 32), ("dog", 48, 16), ("dog", 48, 48)), False, 0.75),
        (sight(("cat", 16, 32), ("dog", 48, 16), ("dog", 48, 48), background="snow"), False, 0.75),
        (sight(("cat", 16, 32), ("cat", 20, 50), ("dog", 48, 16), ("dog", 48, 48)), False, 0.75),
        (sight(), False, 0.25),
    ],
    ids=[
        "all",
        "one more",
        "one too few",
        "mirrored",
        "side by side no more",
        "elsewhere",
        "one too many",
        "empty",
    ],
)
def test_everything_asked_for_has_to_be_there(seen, strict, share):
    found = verdict(seen, ASKED)
    assert found.strict is strict
    assert found.share == pytest.approx(share)


def test_a_plain_background_need_not_be_asked_for_and_no_relation_where_there_is_none():
    found = verdict(sight(("cat", 32, 32)), Scene((Group("cat"),)))
    assert found == Verdict((True,), (True,), None, None)
    assert kind_of(Scene((Group("cat"),))) == "one object"
    assert kind_of(Scene((Group("cat", 3),))) == "several of a kind"
    assert kind_of(ASKED) == "two kinds"


def test_kappa_is_agreement_beyond_chance():
    one = np.array([True] * 25 + [False] * 25)
    other = np.array([True] * 20 + [False] * 5 + [True] * 10 + [False] * 15)
    assert kappa(one, other) == pytest.approx(0.4)  # Cohen's own example: 0.7 agree, 0.5 by chance
    assert kappa(one, one) == 1
    assert kappa(one, ~one) == -1


def test_sentences_of_one_scene_are_drawn_together(tmp_path):
    """Else saying a scene in more sentences would narrow the interval."""
    scenes = [Scene((Group(name),), "snow") for name in ("cat", "dog", "owl", "car")]
    right = Verdict((True,), (True,), None, True)
    wrong = Verdict((True,), (False,), None, True)

    def lines(sentences):
        prompts = {
            place: Prompt(place, f"{place}", "test", 1, scenes[place % len(scenes)])
            for place in range(sentences * len(scenes))
        }
        seen = {
            (model, place, 0): right if place % len(scenes) < 2 else wrong
            for place in prompts
            for model in ("edge", "cloud")
        }
        said = {key: (one.strict, one.share) for key, one in seen.items()}
        return prompts, seen, inspection.of_models(said, prompts)

    prompts, seen, many = lines(sentences=9)
    few = lines(sentences=1)[-1]
    assert "| all | 36 | 4 | 0.50 [0.00, 1.00] |" in many[-1]
    assert [row.split("|")[3:] for row in many] == [row.split("|")[3:] for row in few]
    entries = [
        {
            "model": "edge",
            "prompt_id": place,
            "seed": 0,
            "objects": 1,
            "counts": 1,
            "everything": 1,
            "chose": 0,
        }
        for place in prompts
    ]
    audit = tmp_path / "audit.json"
    audit.write_text(json.dumps({"images": entries}))
    assert all("0.50 [0.00, 1.00]" in line for line in inspection.against_eye(seen, prompts, audit)[1:])


def test_the_report_is_of_all_that_the_labels_say_and_not_of_the_images_at_hand_alone():
    table = pa.table(
        {"model": ["edge", "edge", "cloud"], "prompt_id": [7, 7, 7], "seed": [0, 1, 0]}
        | {"inspected": [1.0, float("nan"), 0.0], "inspected_share": [1.0, float("nan"), 0.5]}
    )
    said = inspection.verdicts(table)
    assert said == {("edge", 7, 0): (1.0, 1.0), ("cloud", 7, 0): (0.0, 0.5)}
    prompts = {7: Prompt(7, "a cat in the snow", "test", 1, Scene((Group("cat"),), "snow"))}
    assert inspection.of_models(said, prompts)[-1].startswith("| all | 1 | 1 | 1.00")


def test_a_picture_of_another_size_and_weights_that_are_none_are_refused(inspector, tmp_path):
    with pytest.raises(ExportError, match="64x64 pixels, not 32x64"):
        inspector.look([Image.new("RGB", (32, 64))])
    with pytest.raises(ExportError, match=r"edge-export starter inspector"):
        Inspector(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(ExportError, match=r"edge-export starter inspector"):
        Inspector(tmp_path)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, miniature_bundle) -> Path:
    """Labels of a few prompts by two random pipelines of 64 pixels and the starter judge, with their images."""
    root = tmp_path_factory.mktemp("labelled")
    for seed, name in enumerate(("edge", "cloud")):
        folder = save_miniature(root / name, seed=seed)
        (folder / "routet2i.json").write_text(json.dumps({"steps": 4, "guidance_scale": 5.0}))
    arguments = [f"--{split}={number}" for split, number in COUNTS.items()]
    models = ["--cloud", str(root / "cloud"), "--bundle", str(miniature_bundle)]
    out = ["--out", str(root / "labels.parquet"), "--parts", str(root / "parts")]
    assert label([*models, *out, *arguments, "--measured-draws", "2", "--ceiling-draws", "2"]) == 0
    # Pictures of the world in place of a random model's: every cloud picture shows what was asked for, no edge one.
    rng = np.random.default_rng(0)
    scenes = {prompt.prompt_id: prompt.scene for prompt in router_prompts(COUNTS)}
    for file in (root / "parts" / "images").glob("*.npz"):
        model, _, first, last, _ = file.stem.split("-")
        painted = [
            render((scenes[i] if model == "cloud" else None) or Scene((Group("crown", 4),)), rng)
            for i in range(int(first), int(last) + 1)
        ]
        np.savez_compressed(file, images=np.stack(painted))
    return root


def test_the_labels_get_the_verdicts_of_every_image_and_lose_nothing(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "RESAMPLES", 20)
    monkeypatch.setattr(inspection, "RENDERED", 8)
    labels = Path(shutil.copy(labelled / "labels.parquet", tmp_path))
    before = pq.read_table(labels)
    report = tmp_path / "inspector.md"
    images = labelled / "parts" / "images"
    assert inspection.main([str(labels), str(images), "--report", str(report)]) == 0
    after = pq.read_table(labels)
    assert after.select(before.column_names).equals(before)
    digest = inspection.Inspector().digest.encode()
    assert after.schema.metadata == before.schema.metadata | {b"inspector_digest": digest}
    outcomes = Outcomes.read(labels)
    test = outcomes.split("test")
    assert test.cloud_inspected.mean() == 1 and test.edge_inspected.mean() == 0
    unknown = [prompt.prompt_id for prompt in router_prompts(COUNTS) if prompt.scene is None]
    said = ~np.isnan(outcomes.cloud_inspected).all(axis=1)
    assert (said == ~np.isin(outcomes.ids, unknown)).all() and not said.all()
    assert "| all | 3 | 3 | 0.00 [0.00, 0.00] | 1.00 [1.00, 1.00] |" in report.read_text()
    command = f"edge-export inspect {labels.as_posix()} {images.as_posix()} --report {report.as_posix()}"
    assert f"Made by `{command}`.\n" in report.read_text()
    again = inspection.main([str(labels), str(images)])
    assert again == 0 and pq.read_table(labels).equals(after)


def test_the_last_prompt_is_known_where_an_earlier_one_was_left_out(labelled):
    """As those are of which the cloud withheld a picture."""
    outcomes = Outcomes.read(labelled / "labels.parquet")
    left = outcomes.where(outcomes.ids != outcomes.ids[outcomes.splits == "train"].min())
    assert inspection.prompts_of(left).keys() == set(left.ids.tolist())


def test_an_image_that_is_not_there_leaves_its_verdict_empty(labelled, tmp_path):
    labels = Path(shutil.copy(labelled / "labels.parquet", tmp_path))
    images = Path(shutil.copytree(labelled / "parts" / "images", tmp_path / "images"))
    for file in images.glob("*-1-*.npz"):
        file.unlink()
    assert inspection.main([str(labels), str(images)]) == 0
    test = Outcomes.read(labels).split("test")
    assert np.isnan(test.cloud_inspected[:, 1]).all() and not np.isnan(test.cloud_inspected[:, 0]).any()


def test_an_image_that_is_gone_keeps_the_verdict_it_had(labelled, tmp_path):
    labels = Path(shutil.copy(labelled / "labels.parquet", tmp_path))
    images = Path(shutil.copytree(labelled / "parts" / "images", tmp_path / "images"))
    assert inspection.main([str(labels), str(images)]) == 0
    before = pq.read_table(labels)
    for file in images.glob("*-1-*.npz"):
        file.unlink()
    assert inspection.main([str(labels), str(images)]) == 0
    assert pq.read_table(labels).equals(before)
    # Of another inspector it keeps nothing.
    facts = before.schema.metadata | {b"inspector_digest": b"another"}
    pq.write_table(before.replace_schema_metadata(facts), labels)
    assert inspection.main([str(labels), str(images)]) == 0
    test = Outcomes.read(labels).split("test")
    assert np.isnan(test.cloud_inspected[:, 1]).all() and not np.isnan(test.cloud_inspected[:, 0]).any()
    assert pq.read_table(labels).schema.metadata == before.schema.metadata, "the verdicts are its own"


def test_labels_of_other_prompts_than_the_starters_have_nothing_to_look_for(tmp_path):
    labels = write_labels(tmp_path / "labels.parquet", 12)
    with pytest.raises(ExportError, match="knows the starter's scenes only, and these labels are of other"):
        inspection.main([str(labels), str(tmp_path)])


def test_images_of_other_models_half_a_piece_and_no_images_are_refused(labelled, tmp_path):
    labels = Path(shutil.copy(labelled / "labels.parquet", tmp_path))
    before = labels.read_bytes()
    with pytest.raises(ExportError, match="holds no images"):
        inspection.main([str(labels), str(tmp_path)])
    images = Path(shutil.copytree(labelled / "parts" / "images", tmp_path / "images"))
    piece = next(images.glob("cloud-*.npz"))
    whole = piece.read_bytes()
    piece.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=f"{piece.name} is not a piece"):
        inspection.main([str(labels), str(images)])
    piece.write_bytes(whole)
    (images / "made_with.json").write_text(json.dumps({"edge_digest": "another", "cloud_digest": "another"}))
    with pytest.raises(ExportError, match="images of other models"):
        inspection.main([str(labels), str(images)])
    (images / "made_with.json").write_bytes(b"")
    with pytest.raises(ExportError, match=r"made_with\.json is damaged .*: remove .* label again"):
        inspection.main([str(labels), str(images)])
    assert labels.read_bytes() == before
