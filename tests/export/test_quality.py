import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from edge_agent.superiority import METRICS
from export.errors import ExportError
from export.quality import VIEWS, Judge
from export.starter.shipped import STARTER_JUDGE, STARTER_LABELS
from export.starter.tokenizer import train_tokenizer
from tests.random_clip import SIDE, save_clip


def test_a_clip_of_another_size_and_tokenizer_measures_pictures_of_any_size(tmp_path):
    judge = Judge(save_clip(tmp_path))
    pictures = [Image.new("RGB", size, "teal") for size in ((64, 64), (300, 200))]
    scores = judge.quality(pictures)
    assert scores.shape == (2, len(METRICS))
    assert ((scores > 0) & (scores < 1)).all()
    # More tokens than the text model has places for: cut off, and no error.
    (adheres,) = judge.adherence_of(judge.look(pictures[:1]), ["a cat " * 40], [["a dog " * 40]])
    assert 0 < adheres < 1


def test_a_score_is_the_mean_over_pictures_moved_against_the_patches():
    judge, side, move = Judge(), 64, 2
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (side, side, 3), np.uint8)
    framed = np.pad(wide, ((move, move), (move, move), (0, 0)), mode="edge")

    def seen(start):
        view = Image.fromarray(np.ascontiguousarray(framed[start : start + side, start : start + side]))
        pixels = judge.processor(images=[view], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return torch.nn.functional.normalize(judge.clip.get_image_features(pixel_values=pixels), dim=-1)

    patch = judge.clip.config.vision_config.patch_size
    assert [round(part * patch) for part in VIEWS] == [-2, -1, 0, 1, 2]
    mean = torch.stack([seen(start) for start in range(2 * move + 1)]).mean(0)
    scores = judge.quality([Image.fromarray(wide)])
    np.testing.assert_allclose(scores, judge.quality_of(mean), atol=1e-5)
    assert np.abs(scores - judge.quality_of(seen(move))).max() > 1e-3


def test_other_views_are_another_judge(monkeypatch):
    before = Judge().digest
    monkeypatch.setattr("export.quality.VIEWS", (0,))
    assert Judge().digest != before


def test_judges_that_differ_have_digests_that_differ(tmp_path):
    assert Judge(save_clip(tmp_path)).digest != Judge().digest


def test_the_starters_judge_is_the_one_that_measured_the_shipped_labels():
    assert Judge().digest.encode() == pq.read_schema(STARTER_LABELS).metadata[b"judge_digest"]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("preprocessor_config.json", {"image_mean": [0.9] * 3}),
        ("preprocessor_config.json", {"resample": 0}),
        ("tokenizer_config.json", {"bos_token": "a</w>"}),
    ],
)
def test_the_same_weights_with_other_preprocessing_are_told_apart(file, change, tmp_path):
    folder = save_clip(tmp_path / "one")
    before, same = Judge(folder), Judge(shutil.copytree(folder, tmp_path / "two"))
    assert (same.digest, same.preprocessing) == (before.digest, before.preprocessing)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))
    after = Judge(folder)
    assert after.digest == before.digest and after.preprocessing != before.preprocessing


def test_a_damaged_clip_is_refused_in_a_line(tmp_path):
    folder = save_clip(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(
        ExportError, match=r"cannot be opened as a CLIP \(.*\): name a folder or hub id"
    ) as refused:
        Judge(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("error", [ValueError(), KeyError("clip")])
def test_an_error_that_says_little_is_told_by_its_kind(error, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(CLIPModel, "from_pretrained", fail)
    with pytest.raises(ExportError, match=type(error).__name__):
        Judge(tmp_path)


def test_a_clip_in_half_precision_measures_in_float32(tmp_path):
    folder = save_clip(tmp_path)
    CLIPModel.from_pretrained(folder).half().save_pretrained(folder)
    assert {weight.dtype for weight in Judge(folder).clip.parameters()} == {torch.float32}


def test_an_image_processor_of_another_size_is_refused(tmp_path):
    with pytest.raises(ExportError, match="image processor"):
        Judge(save_clip(tmp_path, processed=SIDE // 2))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    save_clip(tmp_path)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(STARTER_JUDGE / name, tmp_path / name)
    with pytest.raises(ExportError, match="another model's"):
        Judge(tmp_path)


def as_first_released(folder):
    """The configuration says that a sentence ends with the id 2, whatever its end is."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_clip_as_first_released_is_taken_and_reads_as_one_that_names_its_end(tmp_path):
    folder = save_clip(tmp_path)
    now = Judge(folder)
    before = Judge(as_first_released(folder))
    assert before.clip.config.text_config.eos_token_id == 2
    assert torch.equal(before.directions, now.directions)


@pytest.mark.parametrize("change", ["fewer tokens", "another end"])
def test_a_tokenizer_of_another_model_is_refused_by_a_clip_as_first_released(change, tmp_path):
    folder = as_first_released(save_clip(tmp_path / "clip"))
    words = ["a photo of the sea", "sharp", "blurry"]
    if change == "fewer tokens":
        other = train_tokenizer(tmp_path / "other", words[2:] * 4)
        assert len(other) < len(CLIPProcessor.from_pretrained(folder, use_fast=False).tokenizer)
        other.save_pretrained(folder)
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "a</w>"}))
    with pytest.raises(ExportError, match=r"another model's: .* has \d+ and the largest id"):
        Judge(folder)


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path):
    save_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="no weights text_model"):
        Judge(tmp_path)


@pytest.mark.parametrize(
    "missing", ["config.json", "model.safetensors", "preprocessor_config.json", "vocab.json"]
)
def test_a_folder_without_one_of_its_files_is_refused(missing, tmp_path):
    save_clip(tmp_path)
    (tmp_path / missing).unlink()
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(ExportError, match="name a folder or hub id"):
        Judge(tmp_path)


def test_the_starter_s_judge_gives_the_same_scores_alone_and_in_a_batch():
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(3)]
    judge = Judge()
    together = judge.quality(pictures)
    alone = np.concatenate([judge.quality([picture]) for picture in pictures])
    assert np.allclose(together, alone, atol=1e-5)
