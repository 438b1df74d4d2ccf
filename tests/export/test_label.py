import io
import json
import re
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessor

from cloud_server import model as cloud_models
from edge_agent.bundle import Bundle
from edge_agent.diffusion.generator import Generator
from edge_agent.superiority import METRICS
from export import evaluate as evaluation
from export import label, pieces
from export.__main__ import main as edge_export
from export.diffusion_onnx import export_bundle
from export.errors import ExportError
from export.metrics import load_metrics
from export.outcomes import ADHERENCE, INSPECTION, INSPECTOR, SPLITS, Outcomes
from export.painter import BundlePainter, Painter, Picture, cloud_model
from export.prompts import SHARES, Prompt, numbered_lines, own_prompts, router_prompts
from export.quality import Judge
from export.starter.tokenizer import MAX_LENGTH
from tests.miniature import forget, miniature_pipeline, miniature_xl, save_miniature
from tests.random_clip import save_clip

SEEING = {"side": 64, "tokens": MAX_LENGTH}  # as the starter's judge
CARD = {"steps": 2, "guidance_scale": 2.0, "width": 96, "height": 64}  # not the size that the weights name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random cloud pipeline of few steps, and a random judge. The edge model is the miniature bundle."""
    root = tmp_path_factory.mktemp("models")
    folder = save_miniature(root / "cloud", seed=1)
    (folder / "routet2i.json").write_text(json.dumps(CARD))
    save_clip(root / "judge", **SEEING)
    return root


COUNTS = {
    "train": 3,
    "validation": 2,
    "calibration": 2,
    "test": 2,
    "combinations": 1,
    "wording": 1,
    "free-form": 1,
}


def named(models, bundle, out):
    return [
        *("--cloud", str(models / "cloud"), "--judge", str(models / "judge")),
        *("--bundle", str(bundle), "--out", str(out)),
    ]


def arguments(models, bundle, out, *more):
    return [
        *named(models, bundle, out),
        *(f"--{split}={number}" for split, number in COUNTS.items()),
        *("--edge-draws", "4", "--measured-draws", "2", "--ceiling-draws", "3", *more),
    ]


def pictures(out, model):
    """Prompt id -> the first picture that was kept of it, float32 [H, W, 3]."""
    found = {}
    for file in out.with_suffix(".parts").glob(f"images/{model}-0-*.npz"):
        with np.load(file) as kept:
            first = int(file.stem.split("-")[2])
            found |= {
                first + place: picture for place, picture in enumerate(kept["images"].astype(np.float32))
            }
    return found


def test_the_matrix_holds_every_prompt_model_and_seed_and_says_what_it_was_made_with(few):
    outcomes = Outcomes.read(few)
    assert [np.sum(outcomes.splits == split) for split in SPLITS] == [3, 2, 2, 2, 1, 1, 1]
    for seeds, learnt in ((outcomes.edge_seeds, 4), (outcomes.cloud_seeds, 1)):
        drawn = (~np.isnan(seeds[..., 0])).sum(axis=1)
        images = {split: np.unique(drawn[outcomes.splits == split]).tolist() for split in SPLITS}
        assert images == {split: [{"train": learnt, "test": 3}.get(split, 2)] for split in SPLITS}
    assert {"edge_digest", "cloud_digest", "metrics", "judge_digest"} <= {
        key.decode() for key in pq.read_schema(few).metadata
    }


def test_an_interrupted_run_goes_on_and_ends_with_the_same_matrix(
    few, models, miniature_bundle, tmp_path, monkeypatch, capsys
):
    cut = tmp_path / "cut.parquet"
    paint, painted = Painter.paint, []

    def interrupted(self, prompts, seeds):
        if len(painted) == 1:
            raise KeyboardInterrupt
        painted.append(prompts)
        return paint(self, prompts, seeds)

    with monkeypatch.context() as patch:
        patch.setattr(Painter, "paint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            label.main(arguments(models, miniature_bundle, cut))
    assert "finished pieces are kept" in capsys.readouterr().out
    assert not cut.exists()
    assert label.main(arguments(models, miniature_bundle, cut)) == 0
    assert pq.read_table(cut).equals(pq.read_table(few))


def test_it_says_first_what_will_be_made_and_which_judge_is_none_in_a_pipe_too(
    models, miniature_bundle, tmp_path, monkeypatch
):
    """What a pipe holds back is said too late, hours later."""
    pipe, piped = io.BytesIO(), {}
    judge = models / "judge"

    def opened(_judge):
        piped["judge"] = pipe.getvalue().decode()
        return Judge(judge)

    def stopped(*_):
        piped["generate"] = pipe.getvalue().decode()
        raise KeyboardInterrupt

    monkeypatch.setattr(label, "Judge", opened)
    monkeypatch.setattr(label, "generate", stopped)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe))
    command = arguments(models, miniature_bundle, tmp_path / "labels.parquet")
    command[command.index("--judge") : command.index("--judge") + 2] = []
    with pytest.raises(KeyboardInterrupt):
        label.main(command)
    assert piped["judge"].endswith("name a CLIP by --judge\n")
    # By the edge 4 of each of 3 prompts to learn from, by the cloud 1; 2 of each of 7 others, 3 of 2 tests.
    told = "images to make: 32 by the edge, 23 by the cloud; to judge: 55\n"
    assert piped["generate"] == piped["judge"] + told


def nothing_missing(_painters, images, wanted):
    assert all(pieces.images_file(images, piece).exists() for piece in wanted)


def test_another_judge_measures_the_same_images_without_generating_them_again(
    relabelled, tmp_path, monkeypatch
):
    out, command, _ = relabelled
    other = save_clip(tmp_path / "other", **SEEING, seed=1)
    monkeypatch.setattr(label, "generate", nothing_missing)
    before = pq.read_table(out)
    assert label.main([*command, "--judge", str(other)]) == 0
    after = pq.read_table(out)
    assert after["seed"].equals(before["seed"])
    assert not after["detail"].equals(before["detail"])


def test_an_earlier_matrix_is_extended_without_making_its_images_again(
    models, miniature_bundle, tmp_path, monkeypatch
):
    earlier, whole, out = (tmp_path / f"{name}.parquet" for name in ("earlier", "whole", "out"))
    few = [f"--{split}=0" for split in COUNTS] + ["--train=1", "--validation=1", "--test=1"]
    more = [*few, "--train=3", "--test=2"]
    monkeypatch.setattr(pieces, "PIECE", 1)  # a larger batch may round otherwise
    assert label.main(arguments(models, miniature_bundle, earlier, *few)) == 0
    table = pq.read_table(earlier)
    for name in INSPECTION:  # as `edge-export inspect` adds them
        table = table.append_column(name, pa.array(np.full(len(table), 0.5, np.float32)))
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {INSPECTOR: "abc"}), earlier)
    assert label.main(arguments(models, miniature_bundle, whole, *more)) == 0
    painted = []
    for kind in (Painter, BundlePainter):

        def noted(self, prompts, seeds, paint=kind.paint):
            painted.extend(prompts)
            return paint(self, prompts, seeds)

        monkeypatch.setattr(kind, "paint", noted)
    assert label.main(arguments(models, miniature_bundle, out, *more, "--extend", str(earlier))) == 0
    made, expected = pq.read_table(out), pq.read_table(whole)
    assert made.select(expected.column_names).equals(expected)
    assert made.schema.metadata[INSPECTOR.encode()] == b"abc"
    assert made[INSPECTION[0]].null_count == len(made) - len(table) > 0
    known = set(pq.read_table(earlier)["prompt"].to_pylist())
    assert len(set(painted) - known) == 3
    assert len(painted) == (4 + 1) * 2 + 2 * 3 and known.isdisjoint(
        painted
    )  # 2 learnt from, 3 images of a test


def test_a_matrix_of_another_judge_or_without_a_column_is_not_extended(
    few, models, miniature_bundle, tmp_path
):
    earlier, out = Path(shutil.copy(few, tmp_path / "earlier.parquet")), tmp_path / "out.parquet"
    extending = arguments(models, miniature_bundle, out, "--extend", str(earlier))
    with pytest.raises(ExportError, match="has no adherence"):
        label.main([*extending, "--adherence"])
    table = pq.read_table(earlier)
    facts = table.schema.metadata | {b"judge_digest": b"0"}
    pq.write_table(table.replace_schema_metadata(facts), earlier)
    with pytest.raises(ExportError, match="does not have this judge_digest"):
        label.main(extending)


def test_of_a_matrix_with_another_model_the_other_ones_images_are_taken_over(
    few, models, miniature_bundle, tmp_path, monkeypatch, capsys
):
    other, out = shutil.copytree(models / "cloud", tmp_path / "other"), tmp_path / "out.parquet"
    (other / "routet2i.json").write_text(json.dumps(CARD | {"steps": 3}))
    extending = arguments(models, miniature_bundle, out, "--cloud", str(other), "--extend")
    with monkeypatch.context() as patch:
        patch.setattr(label, "BundlePainter", None)  # whoever opens it fails
        assert label.main([*extending, str(few)]) == 0
    assert "another cloud_digest: the images of the edge alone are taken over" in capsys.readouterr().out
    before, after = Outcomes.read(few), Outcomes.read(out)
    np.testing.assert_array_equal(after.edge_seeds, before.edge_seeds)
    assert np.nanmax(np.abs(after.cloud_seeds - before.cloud_seeds)) > 0
    assert after.facts["cloud_digest"] != before.facts["cloud_digest"]
    table = pq.read_table(few)
    neither = table.schema.metadata | {b"edge_digest": b"0", b"cloud_digest": b"0"}
    pq.write_table(table.replace_schema_metadata(neither), tmp_path / "neither.parquet")
    with pytest.raises(ExportError, match="does not have this cloud_digest or edge_digest"):
        label.main([*extending, str(tmp_path / "neither.parquet")])


def test_two_processes_share_a_run_and_the_last_one_writes_the_matrix(
    models, miniature_bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr(pieces, "PIECE", 4)
    out, opened, threads = tmp_path / "labels.parquet", BundlePainter, []

    def noted(bundle, number):
        threads.append(number)
        return opened(bundle, 1)

    monkeypatch.setattr(label, "BundlePainter", noted)
    monkeypatch.setattr(label.torch, "set_num_threads", threads.append)
    monkeypatch.setattr(label.os, "cpu_count", lambda: 8)
    assert label.main(arguments(models, miniature_bundle, out, "--share", "1/2")) == 1
    assert not out.exists()
    assert label.main(arguments(models, miniature_bundle, out, "--share", "2/2")) == 0
    assert len(Outcomes.read(out)) == 12
    assert threads == [4] * 4  # of torch and of the edge, in either process


def test_labels_of_other_models_are_not_mixed_in(models, miniature_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 4)
    out = tmp_path / "labels.parquet"
    label.main(arguments(models, miniature_bundle, out, "--share", "1/2"))
    other = shutil.copytree(models / "cloud", tmp_path / "other")
    (other / "routet2i.json").write_text(json.dumps(CARD | {"steps": 3}))
    with pytest.raises(ExportError, match="other models"):
        label.main(arguments(models, miniature_bundle, out, "--cloud", str(other)))


@pytest.fixture
def relabelled(few, models, miniature_bundle, tmp_path):
    """Labels and their pieces, the same command, and the options that name a judge of other preprocessing."""
    out, judge = Path(shutil.copy(few, tmp_path)), tmp_path / "judge"
    shutil.copytree(few.with_suffix(".parts"), out.with_suffix(".parts"))
    shutil.copytree(models / "judge", judge)
    config = json.loads((judge / "preprocessor_config.json").read_text())
    (judge / "preprocessor_config.json").write_text(json.dumps(config | {"image_mean": [0.9] * 3}))
    return out, arguments(models, miniature_bundle, out), ("--judge", str(judge))


def test_pieces_that_were_preprocessed_otherwise_are_not_mixed_in(relabelled, tmp_path, monkeypatch):
    out, command, other = relabelled
    with pytest.raises(ExportError, match="measurements of other metrics or preprocessing: remove it"):
        label.main([*command, *other])
    shutil.rmtree(next(out.with_suffix(".parts").glob("*[!s]/")))
    before = pq.read_table(out)
    with pytest.raises(ExportError, match="does not have this judge_preprocessing"):
        label.main([*command, *other, "--extend", str(out)])
    monkeypatch.setattr(label, "generate", nothing_missing)
    assert label.main([*command, *other]) == 0
    assert not pq.read_table(out)["detail"].equals(before["detail"])


def test_cloud_images_of_another_number_format_are_not_mixed_in(
    relabelled, models, miniature_bundle, tmp_path, monkeypatch, capsys
):
    out, command, _ = relabelled
    with pytest.raises(ExportError, match="or of the cloud's in another dtype: remove it"):
        label.main([*command, "--cloud-dtype", "bfloat16"])
    again = arguments(models, miniature_bundle, tmp_path / "again.parquet", "--cloud-dtype", "bfloat16")
    monkeypatch.setattr(label, "BundlePainter", None)  # whoever opens it fails
    assert label.main([*again, "--extend", str(out)]) == 0
    assert "another cloud_dtype: the images of the edge alone are taken over" in capsys.readouterr().out
    files = (out, tmp_path / "again.parquet")
    assert [pq.read_table(file).schema.metadata[b"cloud_dtype"] for file in files] == [
        b"float32",
        b"bfloat16",
    ]
    before, after = map(Outcomes.read, files)
    np.testing.assert_array_equal(after.edge_seeds, before.edge_seeds)
    assert np.nanmax(np.abs(after.cloud_seeds - before.cloud_seeds)) > 0


@pytest.mark.posix
def test_pictures_that_found_no_room_leave_nothing_on_the_disk(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    piece = pieces.Piece(0, "edge", 0, tuple(router_prompts({"test": 1})))
    picture = pieces.Picture(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            pieces.keep_pictures(tmp_path, piece, [picture])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_what_a_process_was_writing_when_it_was_killed_is_no_piece(tmp_path):
    piece = pieces.Piece(0, "edge", 0, tuple(router_prompts({"test": 1})))
    pieces.keep_pictures(tmp_path, piece, [pieces.Picture(np.zeros((64, 64, 3), np.uint8))])
    (whole,) = tmp_path.iterdir()
    (tmp_path / f".1-{whole.name}").write_bytes(whole.read_bytes()[:100])
    assert len(list(pieces.all_pictures(tmp_path))) == 1


@pytest.mark.parametrize("fact", [label.PREPROCESSING, pieces.CLOUD_DTYPE])
def test_pieces_and_a_matrix_that_say_nothing_of_what_was_not_recorded_yet_are_gone_on_with(
    relabelled, monkeypatch, fact
):
    """On a CPU the cloud's number format was what it still is."""
    out, command, _ = relabelled
    (made_with,) = out.with_suffix(".parts").glob("*[!s]/made_with.json")
    facts = json.loads(made_with.read_text())
    made_with.write_text(json.dumps({name: facts[name] for name in facts if name != fact}))
    table = pq.read_table(out)
    stated = {name: told for name, told in table.schema.metadata.items() if name != fact.encode()}
    earlier = out.with_name("earlier.parquet")
    pq.write_table(table.replace_schema_metadata(stated), earlier)
    monkeypatch.setattr(label, "measure", None)
    assert label.main([*command, "--extend", str(earlier)]) == 0
    assert pq.read_table(out).equals(table)
    assert json.loads(made_with.read_text()) == facts


@pytest.fixture(scope="module")
def few(models, miniature_bundle, tmp_path_factory):
    """Labels of the prompts of COUNTS."""
    out = tmp_path_factory.mktemp("few") / "labels.parquet"
    assert label.main(arguments(models, miniature_bundle, out)) == 0
    return out


def test_the_edges_pictures_are_those_that_the_bundle_serves(few, miniature_bundle):
    generator, facts = Generator(Bundle.open(miniature_bundle)), Bundle.open(miniature_bundle).manifest
    kept = pictures(few, "edge")
    for prompt in router_prompts(COUNTS)[:4]:
        _, states = generator.encode(prompt.text)
        made = generator.generate(
            states,
            generator.encode_negative(""),
            1000 * prompt.prompt_id,
            facts.default_steps,
            facts.default_guidance,
        )
        *_, image = made
        assert np.abs(kept[prompt.prompt_id] - image.pixels).max() <= 1  # rounding


def test_the_clouds_pictures_are_of_the_size_steps_and_guidance_of_its_card(few, models):
    pipeline = StableDiffusionPipeline.from_pretrained(models / "cloud", safety_checker=None)
    kept = pictures(few, "cloud")
    for prompt in router_prompts(COUNTS)[:4]:
        seed = torch.Generator("cpu").manual_seed(1000 * prompt.prompt_id)
        (image,) = pipeline(
            prompt.text,
            width=96,
            height=64,
            num_inference_steps=2,
            guidance_scale=2.0,
            generator=seed,
        ).images
        assert kept[prompt.prompt_id].shape == (64, 96, 3)
        assert np.abs(kept[prompt.prompt_id] - np.asarray(image)).max() <= 1  # rounding


@pytest.mark.parametrize("kind", ["xl", "half precision"])
def test_whatever_the_export_makes_is_labelled_as_it_is(models, tmp_path, kind):
    """With its own default steps, guidance, size and scheduler, none of which the model's folder states."""
    pipeline = miniature_xl() if kind == "xl" else miniature_pipeline()
    more = {} if kind == "xl" else {"dtype": "fp16", "scheduler": "DPMSolverMultistep", "sizes": [(96, 64)]}
    bundle = export_bundle(
        pipeline, tmp_path / "bundle", steps=(2,), guidance=3.0, report=lambda _: None, **more
    )
    none = [f"--{split}=0" for split in COUNTS]
    assert (
        label.main([*arguments(models, bundle.folder, tmp_path / "labels.parquet"), *none, "--train=2"]) == 0
    )


def test_a_prompt_whose_picture_the_cloud_withholds_is_left_out_of_both_models(
    models, miniature_bundle, tmp_path, monkeypatch, capsys
):
    paint = Painter.paint
    withheld = router_prompts(COUNTS)[1]

    def checked(self, prompts, seeds):
        made = paint(self, prompts, seeds)
        return [
            replace(one, withheld=True) if seed == 1000 * withheld.prompt_id else one
            for one, seed in zip(made, seeds, strict=True)
        ]

    monkeypatch.setattr(Painter, "paint", checked)
    out = tmp_path / "labels.parquet"
    for _ in range(2):  # also from the pictures that are kept
        assert label.main(arguments(models, miniature_bundle, out)) == 0
        assert "left out 1 of 12 prompts: the cloud's safety checker" in capsys.readouterr().out
        assert withheld.text not in Outcomes.read(out).prompts
        assert len(Outcomes.read(out)) == 11
        shutil.rmtree(next(out.with_suffix(".parts").glob("*[!s]/")))


def test_where_a_picture_of_every_prompt_is_withheld_there_are_no_labels(few, tmp_path, monkeypatch):
    table = pq.read_table(few)
    for name in METRICS:
        nothing = pa.nulls(len(table), pa.float32())
        table = table.set_column(table.column_names.index(name), name, nothing)
    prompts = [SimpleNamespace(prompt_id=number) for number in set(table["prompt_id"].to_pylist())]
    monkeypatch.setattr(label, "measurements", lambda *_: table)
    out = tmp_path / "labels.parquet"
    with pytest.raises(ExportError, match="no prompt is left to route"):
        label._assembled(out, tmp_path, [SimpleNamespace(prompts=prompts)], {})
    assert not out.exists()


def test_what_cannot_be_measured_of_a_picture_is_nothing_and_no_number(tmp_path, monkeypatch):
    """Where it was withheld, or nobody knows what could be wrong with it."""
    prompts = [
        SimpleNamespace(prompt_id=n, text=f"{n}", split="test", objects=1, scene=None) for n in range(3)
    ]
    black = np.zeros((8, 8, 3), np.uint8)
    seen = [Picture(black), Picture(black, withheld=True), Picture(black)]
    monkeypatch.setattr(label, "kept_pictures", lambda *_: seen)
    judge = SimpleNamespace(
        metrics=load_metrics(),
        look=len,
        quality_of=lambda count: np.full((count, len(METRICS)), 0.5),
        adherence_of=lambda *_: np.array([0.5, 0.5, np.nan], np.float32),
    )
    piece = SimpleNamespace(prompts=prompts, seeds=[0, 1, 2], model="edge")
    table = label.measure(piece, tmp_path, judge, adherence=True)
    assert {tuple(table[name].to_pylist()) for name in METRICS} == {(0.5, None, 0.5)}
    assert table[ADHERENCE].to_pylist() == [0.5, None, None]


def test_what_a_safety_checker_blanks_is_told_from_a_black_picture(models):
    painter = Painter(cloud_model(str(models / "cloud")))
    painter.pipeline.safety_checker = lambda images, **_: (images, [False, True])
    painter.pipeline.feature_extractor = CLIPImageProcessor()
    assert [one.withheld for one in painter.paint(["a cat", "a dog"], [0, 1])] == [False, True]


def test_the_cloud_model_computes_in_what_the_cloud_server_is_told(models):
    """What it then draws is what is judged."""
    cloud = cloud_model(str(models / "cloud"))
    made = {
        dtype: Painter(cloud, dtype=dtype).paint(["a cat"], [1])[0].pixels
        for dtype in ("auto", "float32", "bfloat16")
    }
    np.testing.assert_array_equal(made["auto"], made["float32"])
    assert (made["bfloat16"] != made["float32"]).any()


def test_only_one_model_is_in_memory_and_makes_few_images_at_once(
    models, miniature_bundle, tmp_path, monkeypatch
):
    cloud, sizes = [], []
    opened, loaded, called = (
        BundlePainter.__init__,
        Painter.__init__,
        StableDiffusionPipeline.__call__,
    )

    def noted(self, *given):
        cloud.append(weakref.ref(self))
        loaded(self, *given)

    def alone(self, *given):
        assert cloud[0]() is None
        opened(self, *given)

    def counted(self, prompts, **options):
        sizes.append(len(prompts))
        return called(self, prompts, **options)

    monkeypatch.setattr(Painter, "__init__", noted)
    monkeypatch.setattr(BundlePainter, "__init__", alone)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counted)
    assert label.main(arguments(models, miniature_bundle, tmp_path / "labels.parquet", "--batch", "2")) == 0
    assert max(sizes) == 2


OWN = [f"a photo of thing {number}" for number in range(60)]


def test_own_prompts_are_parted_by_their_text_and_more_of_them_move_none(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(OWN) + "\n")
    before = own_prompts(file)
    assert [prompt.text for prompt in before] == OWN
    assert {prompt.split for prompt in before} == set(SHARES)
    assert {(prompt.objects, prompt.scene) for prompt in before} == {(0, None)}
    file.write_text(
        "\ufeff" + "\n\n".join([*OWN, *(f"more {number}" for number in range(2000))]), encoding="utf-8"
    )
    after = own_prompts(file)
    assert after[: len(before)] == before
    assert len({prompt.prompt_id for prompt in after}) == len(after) == 2060
    assert max(prompt.prompt_id for prompt in after) * 1000 + 999 < 2**32
    for split, share in SHARES.items():
        assert sum(prompt.split == split for prompt in after) == pytest.approx(20.6 * share, rel=0.2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a cat\n\na dog\n a cat \n", "line 4 is line 1 again, 'a cat'"),
        (b"a cat\nA  cat\n", "line 2 is line 1 again, 'A  cat'"),
        (b"a cat\n", "0 of its 1 prompts fall to the split .*, which needs 2 at least"),
        (b"\n \n", "has no prompts"),
        (b"caf\xe9\n", "not text in UTF-8"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_parted_is_refused(tmp_path, content, words, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert edge_export(["label", "--prompts", str(file)]) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.fixture
def begun(models, miniature_bundle, tmp_path, few, monkeypatch):
    """The file of prompts, the labels and the arguments of a run that makes no images: its folder is looked at."""
    file, out = tmp_path / "prompts.txt", tmp_path / "labels.parquet"
    file.write_text("\n".join(OWN))
    monkeypatch.setattr(label, "generate", lambda *_: None)
    monkeypatch.setattr(label, "judged", lambda *_: None)
    own = [*named(models, miniature_bundle, out), "--prompts", str(file)]
    assert label.main(own) == 1
    return file, out, own


def test_what_is_refused_takes_note_of_no_prompts(begun):
    """Or the file, put right, would be taken for another one's."""
    file, out, own = begun
    made_with = next((out.with_suffix(".parts") / pieces.IMAGES).glob("*.json"))
    before = made_with.read_text()
    made_with.write_text(json.dumps(json.loads(before) | {"cloud_digest": "00ff"}))
    file.write_text("\n".join([*OWN, "a typpo"]))
    with pytest.raises(ExportError, match="images of other models"):
        label.main(own)
    made_with.write_text(before)
    file.write_text("\n".join([*OWN, "no typo"]))
    assert label.main(own) == 1


def test_pictures_of_one_file_of_prompts_are_not_taken_for_anothers(begun, models, miniature_bundle, few):
    """They are kept by ids, which are places in the file."""
    file, out, own = begun
    file.write_text("\n".join([*OWN, "one more"]))
    assert label.main(own) == 1
    file.write_text("\n".join(["one before", *OWN]))
    with pytest.raises(
        ExportError, match=r"other prompts \('.*', and not 'one before'\): add new ones at the end"
    ):
        label.main(own)
    with pytest.raises(ExportError, match="pictures of other prompts"):
        label.main(arguments(models, miniature_bundle, out))
    with pytest.raises(ExportError, match="pictures of other prompts"):
        label.main([*named(models, miniature_bundle, few), "--prompts", str(file)])


def test_a_share_that_begins_while_another_does_finds_its_own_prompts(tmp_path, monkeypatch):
    """Of the two things that it looks at the other one has made neither when the first is looked at, and both then."""
    own = [Prompt(number, text, "test", 0, None) for number, text in enumerate(OWN)]
    exists, asked = Path.exists, []

    def meanwhile(path):
        found = exists(path)
        if not asked:
            asked.append(path)
            pieces.note(tmp_path, own)
            pieces.begun(tmp_path / pieces.IMAGES, {})
        return found

    monkeypatch.setattr(Path, "exists", meanwhile)
    pieces.only_for(tmp_path, own)
    assert asked


def test_labels_of_own_prompts_go_through_every_later_stage(models, bundle_copy, tmp_path, monkeypatch):
    """With a cloud that is better at every other prompt: of random models an oracle wins no more than luck."""
    measure = label.measure

    def better_at_some(piece, *how):
        table = measure(piece, *how)
        if piece.model == "cloud":
            better = np.array([0.1 * (prompt.prompt_id % 2) for prompt in piece.prompts])
            for name in METRICS:
                values = np.minimum(table[name].to_numpy() + better, 1).astype(np.float32)
                table = table.set_column(table.column_names.index(name), name, pa.array(values))
        return table

    monkeypatch.setattr(label, "measure", better_at_some)
    monkeypatch.setattr(evaluation, "RESAMPLES", 20)
    file, labels, weights = (tmp_path / name for name in ("prompts.txt", "labels.parquet", "run"))
    file.write_text("\n".join(f"a photo of thing {number}" for number in range(150)))
    of = {split: [prompt.text for prompt in own_prompts(file) if prompt.split == split] for split in SHARES}
    file.write_text("\n".join(text for split in SHARES for text in of[split][: evaluation.FEWEST]))
    whole = named(models, bundle_copy, labels)
    stages = [
        ["label", *whole, "--prompts", file, "--measured-draws", "2", "--ceiling-draws", "2"],
        ["train", labels, bundle_copy, weights, "--seeds", "1", "--steps", "5"],
        ["predictor", weights / "predictor.safetensors", bundle_copy],
        ["calibrate", labels, bundle_copy],
        ["evaluate", labels, bundle_copy, "--out", tmp_path / "evaluation.json"],
    ]
    assert [edge_export([str(argument) for argument in stage]) for stage in stages] == [0] * len(stages)
    assert Bundle.open(bundle_copy).advice == ""
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["prompts"] == report["scenes"] == sum(p.split == "test" for p in own_prompts(file))


def test_a_cloud_model_that_fails_is_named_before_the_edge_makes_anything(
    models, miniature_bundle, tmp_path, capsys
):
    shutil.copytree(models / "judge", tmp_path / "judge")
    shutil.copytree(models / "cloud", tmp_path / "cloud")
    forget(tmp_path / "cloud" / "text_encoder", "text_model.final_layer_norm.bias")
    out = tmp_path / "labels.parquet"
    assert edge_export(["label", *arguments(tmp_path, miniature_bundle, out)]) == 2
    error = capsys.readouterr().err
    assert "cannot be loaded: text_encoder has no weights text_model.final_layer_norm.bias;" in error
    assert not list(tmp_path.rglob("*.npz"))


def test_a_cloud_model_that_wants_more_than_a_prompt_is_named(models, tmp_path):
    folder = shutil.copytree(models / "cloud", tmp_path / "cloud")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionImg2ImgPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match="a StableDiffusionImg2ImgPipeline makes no image of a prompt: "):
        Painter(cloud_model(str(folder))).paint(["a cat"], [1])


def test_memory_that_does_not_suffice_is_told_with_the_option_that_needs_less(
    models, miniature_bundle, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    painter = Painter(cloud_model(str(models / "cloud")), batch=2)
    monkeypatch.setattr(type(painter.pipeline), "__call__", full)
    with pytest.raises(
        ExportError, match=r"2 images at once need; name a smaller --batch than 2\. Finished pieces"
    ):
        painter.paint(["a cat", "a dog", "a cow"], [0, 1, 2])
    monkeypatch.undo()
    monkeypatch.setattr(Judge, "look", full)
    monkeypatch.setattr(Judge, "quality", lambda *_: None)
    with pytest.raises(ExportError, match=r"--judge: .* name a smaller CLIP\. Finished pieces"):
        label.main(arguments(models, miniature_bundle, tmp_path / "labels.parquet"))


def test_the_cloud_model_is_read_for_its_digest_once(models, miniature_bundle, tmp_path, monkeypatch):
    """Gigabytes, for most."""
    taken, digest = [], cloud_models.digest
    monkeypatch.setattr(cloud_models, "digest", lambda folder: taken.append(folder) or digest(folder))
    few = [*(f"--{split}=0" for split in COUNTS), "--train=1"]
    assert label.main(arguments(models, miniature_bundle, tmp_path / "labels.parquet", *few)) == 0
    assert len(taken) == 1


def test_a_cloud_model_that_is_not_there_is_refused_in_one_line(tmp_path, capsys):
    assert (
        edge_export(["label", "--cloud", str(tmp_path / "none"), "--out", str(tmp_path / "l.parquet")]) == 2
    )
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: there is no model folder {tmp_path / 'none'}") and "\n" not in said
    assert "--cloud" in said and "--model" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--draws", "0"], "--draws: must be at least 1, not 0"),
        (["--measured-draws", "0"], "--measured-draws: must be at least 1, not 0"),
        (["--train", "-1"], "--train: must be at least 0, not -1"),
        (
            ["--train", "100001"],
            "--train: must be at most 100000, not 100001",
        ),  # whose ids are the next split's
        (["--batch", "none"], "--batch: invalid number value: 'none'"),
        ([f"--{split}=0" for split in COUNTS], "there is no prompt to label"),
        (["--prompts", "prompts.txt", "--test", "5"], "leave --test out"),
    ],
)
def test_numbers_that_make_no_labels_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as refusal:
        label.main(arguments)
    assert refusal.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("share", ["0/2", "3/2", "half"])
def test_a_share_that_is_none_is_refused(share, capsys):
    with pytest.raises(SystemExit) as refusal:
        label.main(["--share", share])
    assert refusal.value.code == 2
    assert f"'{share}' is no share K/N with K from 1 to N, such as 1/4" in capsys.readouterr().err


def test_a_quality_of_one_view_is_the_sigmoid_of_the_difference_of_two_scaled_cosines(models, monkeypatch):
    monkeypatch.setattr("export.quality.VIEWS", (0,))
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


def test_adherence_is_one_column_more_of_the_same_images_and_off_by_default(relabelled, monkeypatch):
    out, command, _ = relabelled
    before = pq.read_table(out)
    assert ADHERENCE not in before.column_names
    monkeypatch.setattr(label, "generate", nothing_missing)
    assert label.main([*command, "--adherence"]) == 0
    after = pq.read_table(out)
    assert after.drop_columns(ADHERENCE).equals(before)
    measured = after[ADHERENCE].to_numpy()
    assert ((measured > 0) & (measured < 1)).all()


@pytest.mark.parametrize("spoil", [lambda _: b"", lambda whole: whole[:-40], lambda whole: b"PK" + whole])
def test_a_damaged_piece_of_pictures_is_named_and_made_again_once_it_is_removed(relabelled, spoil):
    """The first is what a power loss may leave."""
    out, command, _ = relabelled
    images = out.with_suffix(".parts") / "images"
    shutil.rmtree(next(out.with_suffix(".parts").glob("*[!s]/")))
    piece = next(images.glob("edge-0-*.npz"))
    piece.write_bytes(spoil(piece.read_bytes()))
    with pytest.raises(ExportError, match=f"{piece.name} is damaged .*: remove it, and label again"):
        label.main(command)
    piece.unlink()
    before = pq.read_table(out)
    assert label.main(command) == 0
    assert pq.read_table(out).equals(before)


@pytest.mark.parametrize(
    "spoil", [lambda _: b"", lambda whole: whole[:-40], lambda whole: b"PAR1" + whole[:99]]
)
def test_a_damaged_piece_of_measurements_is_measured_again(relabelled, spoil, monkeypatch, capsys):
    out, command, _ = relabelled
    before = pq.read_table(out)
    (piece,) = out.with_suffix(".parts").glob("*[!s]/edge-0-100000-*.parquet")
    piece.write_bytes(spoil(piece.read_bytes()))
    assert label.main([*command, "--share", "2/2"]) == 1  # the piece is of the other share: still to be made
    capsys.readouterr()
    monkeypatch.setattr(label, "generate", nothing_missing)
    assert label.main(command) == 0
    said = f"pieces that cannot be read, such as {piece}: 1; they are measured again"
    assert capsys.readouterr().out.splitlines()[0] == said
    assert pq.read_table(out).equals(before)


def test_a_damaged_piece_of_measurements_is_taken_over_from_an_earlier_matrix(relabelled, monkeypatch):
    out, command, _ = relabelled
    earlier = Path(shutil.copy(out, out.with_name("earlier.parquet")))
    next(out.with_suffix(".parts").glob("*[!s]/edge-0-*.parquet")).write_bytes(b"")
    monkeypatch.setattr(label, "measure", None)
    assert label.main([*command, "--extend", str(earlier)]) == 0
    assert pq.read_table(out).equals(pq.read_table(earlier))


@pytest.mark.parametrize("content", [b"", b'{"edge_digest": "1', b"\xff\x00", b"[]"])
@pytest.mark.parametrize("folder", ["images", "*[!s]"])
def test_a_damaged_note_of_what_pieces_were_made_with_is_named(relabelled, folder, content):
    out, command, _ = relabelled
    (note,) = out.with_suffix(".parts").glob(f"{folder}/made_with.json")
    note.write_bytes(content)
    with pytest.raises(
        ExportError, match=re.escape(f"{note} is damaged") + ".*this file alone .* label again"
    ):
        label.main(command)
    note.unlink()
    assert label.main(command) == 0


def test_a_line_ends_where_editors_end_it(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\u2028on a mat\r\n\na dog\x0con a log\n", encoding="utf-8", newline="")
    assert numbered_lines(file) == [(1, "a cat\u2028on a mat"), (3, "a dog\x0con a log")]


def test_the_folder_of_the_matrix_is_made_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out, words in (
        ("file/labels.parquet", "cannot be made"),
        (".", "is a folder"),
        ("labels.parts", "the folder of the finished pieces: name another file"),
    ):
        assert edge_export(["label", "--out", str(tmp_path / out)]) == 2
        assert words in capsys.readouterr().err
