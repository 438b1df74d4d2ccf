"""The recipe itself, cut down to two steps a stage: that its parts fit together, not that they learn."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from edge_agent.superiority import METRICS
from export.__main__ import main as edge_export
from export.errors import ExportError
from export.quality import Judge
from export.starter import autoencoder, chain, denoiser, inspector, judge, sketch, text_encoder
from export.starter.card import read_records, write_card
from export.starter.size import EDGE, SKETCHES
from export.starter.training import UNFINISHED


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Every training stage, two steps long."""
    folder = tmp_path_factory.mktemp("work")
    patch = pytest.MonkeyPatch()
    patch.setattr(denoiser, "SCENES", 64)
    patch.setattr(autoencoder, "BATCH", 2)
    patch.setattr(autoencoder, "MEASURED", 4)
    patch.setattr(sketch, "NUMBER", 8)
    patch.setattr(sketch, "BATCH", 2)
    patch.setattr(judge, "RULED", 1)
    patch.setattr(judge, "SKETCHED", 2)
    patch.setattr(judge, "BATCH", 6)
    patch.setattr(text_encoder, "BATCH", 4)
    patch.setattr(text_encoder, "MEASURED", 8)
    patch.setattr(inspector, "BATCH", 4)
    patch.setattr(inspector, "SCENES", 8)
    try:
        assert autoencoder.train(folder, steps=2)
        assert autoencoder.train_decoder(folder, steps=2)
        assert text_encoder.train(folder, EDGE, steps=2)
        assert denoiser.train(folder, replace(EDGE, batch=4), steps=2)
        for size in SKETCHES:
            assert denoiser.train(folder, replace(size, batch=4), steps=2)
        assert judge.train(folder, steps=2)
        assert inspector.train(folder, steps=2)
    finally:
        patch.undo()
    return folder


def test_the_edge_model_is_a_pipeline_that_diffusers_loads_and_runs(work):
    pipeline = StableDiffusionPipeline.from_pretrained(work / "edge" / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    card = json.loads((work / "edge" / "model" / "routet2i.json").read_text())
    generator = torch.Generator("cpu").manual_seed(0)
    (image,) = pipeline("a cat", num_inference_steps=2, guidance_scale=3.0, generator=generator).images
    assert image.size == (card["width"], card["height"]) == (64, 64)


def test_the_decoder_s_stage_leaves_the_latents_as_they_were(work):
    before = autoencoder.AutoencoderKL.from_pretrained(work / "autoencoder" / "model")
    after = autoencoder.AutoencoderKL.from_pretrained(work / "decoder" / "model")
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(after.encoder.state_dict()[name], value)
    assert after.config.scaling_factor == before.config.scaling_factor
    changed = [
        not torch.equal(v, before.decoder.state_dict()[k]) for k, v in after.decoder.state_dict().items()
    ]
    assert any(changed)


def test_the_judge_is_a_clip_that_measures(work):
    from PIL import Image

    grey = Image.fromarray(np.full((64, 64, 3), 128, np.uint8))
    scores = Judge(work / "judge" / "model").quality([grey])
    assert scores.shape == (1, 10)
    assert ((scores > 0) & (scores < 1)).all()


def test_the_judge_learns_from_pictures_that_the_sketches_painted_anew(work, monkeypatch):
    monkeypatch.setattr(sketch, "NUMBER", 8)
    with np.load(work / "sketch" / "sketches-8.npz") as arrays:  # the judge's stage left them
        assert set(arrays) == {"pictures", "sketched", "harm"}
    kept = sketch.sketches(work)
    assert kept.pictures.shape == kept.sketched.shape == (8, 64, 64, 3)
    assert len(kept.scenes) == 8
    assert (kept.pictures != kept.sketched).any(axis=(1, 2, 3)).all()
    assert kept.harm.shape == (8, len(METRICS))
    assert kept.harm.dtype == np.float32
    assert ((kept.harm >= 0) & (kept.harm <= 1)).all()
    assert kept.harm[:, METRICS.index("realism")].max() > 0  # after two steps


@pytest.mark.posix
def test_the_sketches_take_turns_in_painting(work, tmp_path, monkeypatch):
    monkeypatch.setattr(sketch, "NUMBER", 8)
    monkeypatch.setattr(sketch, "BATCH", 2)
    first, second, third = (size.name for size in SKETCHES)
    (tmp_path / first).mkdir()
    for name in ("record.json", "model"):
        (tmp_path / first / name).symlink_to(work / first / name)
    (tmp_path / second).symlink_to(work / first)  # another model than last time
    (tmp_path / third).symlink_to(work / third)
    before, after = sketch.sketches(work), sketch.sketches(tmp_path)
    assert (before.pictures == after.pictures).all()
    changed = (before.sketched != after.sketched).any(axis=(1, 2, 3))
    assert changed.tolist() == 2 * [False] + 2 * [True] + 4 * [False]


@pytest.mark.posix
def test_the_judge_needs_sketches_and_says_how_to_make_them(work, tmp_path):
    (tmp_path / "decoder").symlink_to(work / "decoder")
    with pytest.raises(ExportError, match="edge-export starter sketch"):
        judge.train(tmp_path, steps=1)


def test_the_inspector_s_weights_are_read_back_and_look(work):
    from PIL import Image

    (sight,) = inspector.Inspector(work / "inspector" / "model").look([Image.new("RGB", (64, 64))])
    assert sight.background in inspector.BACKGROUNDS


def test_the_inspector_needs_an_autoencoder_and_says_whose(tmp_path):
    with pytest.raises(ExportError, match="edge-export starter decoder"):
        inspector.train(tmp_path, steps=1)


def test_the_model_card_tells_the_recipe(work, tmp_path):
    write_card(
        read_records(
            work, ("autoencoder", "decoder", "edge-text", "edge", *chain.SKETCHED, "judge", "inspector")
        ),
        tmp_path / "README.md",
    )
    card = (tmp_path / "README.md").read_text()
    for fact in ("## edge", "| steps | 2 |", "| seed | 11 |", "Licence: Apache-2.0"):
        assert fact in card


def test_a_stage_that_runs_out_of_time_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(autoencoder, "BATCH", 2)
    monkeypatch.setattr(autoencoder, "MEASURED", 4)
    arguments = ["autoencoder", "--work", str(tmp_path), "--steps", "2", "--seconds", "0"]
    assert chain.main(arguments) == UNFINISHED
    assert chain.main(arguments) == 0
    assert (tmp_path / "autoencoder" / "model" / "config.json").exists()


@pytest.mark.posix
def test_the_stage_of_the_sketches_trains_one_after_the_other_and_goes_on(work, tmp_path, monkeypatch):
    monkeypatch.setattr(denoiser, "SCENES", 64)
    monkeypatch.setattr(sketch, "NUMBER", 8)
    monkeypatch.setattr(chain, "SKETCHES", [replace(size, batch=4) for size in SKETCHES])
    for stage in ("decoder", "edge-text"):
        (tmp_path / stage).symlink_to(work / stage)
    arguments = ["sketch", "--work", str(tmp_path), "--steps", "2", "--seconds"]
    assert chain.main([*arguments, "0"]) == UNFINISHED
    assert [(tmp_path / size.name).exists() for size in SKETCHES] == [True, False, False]
    assert chain.main([*arguments, "60"]) == 0
    records = read_records(tmp_path, chain.SKETCHED)
    assert [record["seed"] for record in records.values()] == [size.seed for size in SKETCHES]
    assert [record["steps"] for record in records.values()] == [2, 2, 2]
    assert (tmp_path / "sketch" / "sketches-8.npz").exists()  # painted already when the judge asks for them


@pytest.mark.parametrize(
    ("stage", "before"),
    [
        ("decoder", "autoencoder"),
        ("edge", "decoder"),
        ("cloud", "decoder"),
        ("sketch", "decoder"),
        ("judge", "decoder"),
        ("inspector", "decoder"),
        ("install", "autoencoder"),
    ],
)
def test_a_stage_out_of_order_names_the_one_before_it(stage, before, tmp_path, capsys):
    """And asks no hub for a model that is called as its folder."""
    assert edge_export(["starter", stage, "--work", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"the model '{before}' is not finished: run `edge-export starter {before} --work" in said
    assert not list(tmp_path.iterdir())


def test_a_denoiser_needs_its_text_encoder(work, tmp_path):
    shutil.copytree(work / "decoder", tmp_path / "decoder")
    with pytest.raises(ExportError, match="run `edge-export starter edge-text --work "):
        denoiser.train(tmp_path, EDGE, steps=1)


def test_an_autoencoder_that_is_not_there_is_refused(tmp_path):
    for train in (judge.train, inspector.train):
        with pytest.raises(ExportError, match="name another with --autoencoder"):
            train(tmp_path, autoencoder=tmp_path / "none", steps=1)


def test_an_unknown_stage_is_refused_with_the_ones_there_are(capsys):
    with pytest.raises(SystemExit) as refusal:
        chain.main(["paint"])
    assert refusal.value.code == 2
    assert "autoencoder" in capsys.readouterr().err
