"""A bundle that is not what its manifest says is refused, and the message names the file."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_agent import manifest as manifest_module
from edge_agent.bundle import Bundle, mode_of, put_file, write_manifest
from edge_agent.errors import BundleError, NewerBundle, NotABundle
from edge_agent.graph_files import FileState, file_states
from edge_agent.manifest import (
    CALIBRATION,
    DECODER,
    DENOISER,
    MANIFEST,
    SCHEMA_VERSION,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TOKENIZER,
    TOKENIZER_2,
    TRANSFORMER,
    AddedConditioning,
    JointConditioning,
    schedule_file,
)
from tests.external import move_weights
from tests.running import as_shown

EVERY_BUNDLE_HAS = (TOKENIZER, TEXT_ENCODER, DENOISER, DECODER, schedule_file(4), schedule_file(8))


ENTRY = {"bytes": 1, "sha256": "0" * 64}


def edit(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_files(folder: Path, **entries: Any) -> None:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit(folder, files=files | entries)


def test_a_whole_bundle_opens_and_states_its_facts(miniature_bundle: Path) -> None:
    bundle = Bundle.open(miniature_bundle)
    manifest = bundle.manifest
    assert (manifest.name, manifest.licence) == ("miniature", "Apache-2.0")
    assert (manifest.width, manifest.height) == (64, 64)
    assert (manifest.latent_channels, manifest.latent_height, manifest.latent_width) == (4, 8, 8)
    assert (manifest.steps, manifest.default_steps, manifest.default_guidance) == ((4, 8), 4, 5.0)
    assert (manifest.text_tokens, manifest.text_hidden) == (77, 32)
    assert all(bundle.path(name).is_file() for name in EVERY_BUNDLE_HAS)
    assert bundle.calibration is None
    assert bundle.predictor is None


def test_step_counts_are_listed_in_their_order_however_they_were_written(bundle_copy: Path) -> None:
    edit(bundle_copy, steps=[8, 4])
    assert Bundle.open(bundle_copy).manifest.steps == (4, 8)


@pytest.mark.parametrize("name", EVERY_BUNDLE_HAS)
def test_a_missing_file_is_named(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    with pytest.raises(BundleError, match=f"{as_shown(name)} is missing"):
        Bundle.open(bundle_copy, verify=False)


@pytest.mark.parametrize("name", EVERY_BUNDLE_HAS)
def test_a_required_file_that_is_not_listed_is_named(bundle_copy: Path, name: str) -> None:
    files = json.loads((bundle_copy / MANIFEST).read_text())["files"]
    del files[name]
    edit(bundle_copy, files=files)
    with pytest.raises(BundleError, match=f"does not list {name}"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", EVERY_BUNDLE_HAS)
def test_a_file_of_another_size_is_named_without_reading_it(bundle_copy: Path, name: str) -> None:
    content = (bundle_copy / name).read_bytes()
    (bundle_copy / name).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{as_shown(name)} has {len(content) - 1} bytes"):
        Bundle.open(bundle_copy, verify=False)
    (bundle_copy / name).write_bytes(content + b"x")
    with pytest.raises(BundleError, match=f"{as_shown(name)} has {len(content) + 1} bytes"):
        Bundle.open(bundle_copy, verify=False)


@pytest.mark.parametrize("name", EVERY_BUNDLE_HAS)
def test_one_altered_bit_is_found(bundle_copy: Path, name: str) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{as_shown(name)} does not match its sha256"):
        Bundle.open(bundle_copy)


def test_a_folder_in_a_files_place_is_named(bundle_copy: Path) -> None:
    (bundle_copy / DECODER).unlink()
    (bundle_copy / DECODER).mkdir()
    with pytest.raises(BundleError, match=f"{as_shown(DECODER)} is not a plain file"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/hostname",
        "a/../../outside",
        "a\\..\\b",
        "C:x",
        "",
        "a//b",
        "./a",
        "a\x1bb",
        "a" * 201,
        "unet/" + "🐈" * 50,  # 200 bytes behind the folder's name
        "unet/*/_ORT_MEM_ADDR_/*",
        *(f"unet/a{mark}b" for mark in '"<>|?'),
        "unet./a",
        "a ",
        "Con",
        "nul.bin",
        "aux",
        "unet/com¹.txt",
        "unet/com1.tar.gz",
        "LPT9 .txt",
    ],
)
def test_a_path_that_could_lead_outside_or_that_windows_refuses_is_refused(
    bundle_copy: Path, name: str
) -> None:
    (bundle_copy.parent / "outside").write_text("x")
    edit_files(bundle_copy, **{name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match="not a plain path inside the bundle"):
        Bundle.open(bundle_copy)


@pytest.mark.posix
@pytest.mark.parametrize("linked", [DENOISER, "unet", MANIFEST])
def test_a_symbolic_link_is_refused_by_name(bundle_copy: Path, tmp_path: Path, linked: str) -> None:
    """Even one to the very same bytes: they could be others a moment later."""
    moved = (bundle_copy / linked).rename(tmp_path / "elsewhere")
    (bundle_copy / linked).symlink_to(moved)
    for read in (Bundle.open, write_manifest):
        with pytest.raises(BundleError, match=f"{as_shown(linked)} is a symbolic link"):
            read(bundle_copy)


@pytest.mark.posix
def test_the_bundle_folder_itself_may_be_a_link(miniature_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(miniature_bundle)
    assert Bundle.open(tmp_path / "current").digest == Bundle.open(miniature_bundle).digest


def test_a_newer_schema_says_what_to_do(bundle_copy: Path) -> None:
    edit(bundle_copy, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(
        NewerBundle, match=rf"manifest\.json has schema version {SCHEMA_VERSION + 1} .*update edge-agent"
    ):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"schema_version": 0}, "schema version"),
        ({"schema_version": "1"}, "schema_version"),
        ({"width": 64.5}, "width"),
        ({"width": 0}, "width"),
        ({"latent_scaling": 0}, "latent_scaling"),
        ({"name": None}, "name"),
        ({"steps": []}, "steps"),
        ({"steps": [4, "8"]}, "steps"),
        ({"steps": [True, 4, 8]}, "steps"),
        ({"text_tokens": True}, "text_tokens must be a int"),
        ({"steps": [4, 8, 16]}, r"schedules/16\.json"),
        ({"default_steps": 16}, "default_steps"),
        ({"guidance_embedding": "8"}, "guidance_embedding"),
        ({"guidance_embedding": 2}, "guidance_embedding"),
        ({"guidance_embedding": 10**9}, "guidance_embedding"),
        ({"latent_channels": 10**9, "latent_to_rgb": None}, "latents of more than 67,108,864 numbers"),
        (
            {"latent_channels": 17, "latent_to_rgb": None, "other_sizes": [[1 << 14, 1 << 14]]},
            "latents of more than 67,108,864 numbers",
        ),
        ({"dtypes": ["fp16"]}, "dtypes must be"),
        ({"dtypes": {"unet": "bf16"}}, "dtypes must be of fp16, int8, by folder"),
        ({"dtypes": {"unet": "fp16", "vae_decoder": "bf16"}}, "dtypes must be of fp16, int8, by folder"),
        ({"other_sizes": []}, "other_sizes must list up to 100 pairs"),
        ({"other_sizes": [[96]]}, "other_sizes must list up to 100 pairs"),
        ({"other_sizes": [[96, "64"]]}, "other_sizes must list up to 100 pairs"),
        ({"other_sizes": [[96, 1 << 20]]}, "other_sizes must list up to 100 pairs"),
        ({"other_sizes": [[8 * side, 8] for side in range(1, 102)]}, "other_sizes must list up to 100 pairs"),
        ({"other_sizes": [[96, 60]]}, "other_sizes must be multiples of 8"),
        ({"other_sizes": [[96, 64], [64, 64]]}, "other_sizes must be others than width and height"),
        ({"other_sizes": [[96, 64], [96, 64]]}, "other_sizes must .* each named once"),
        ({"latent_to_rgb": [[0.1, 0.2, 0.3]] * 4}, "5 rows"),
        ({"latent_to_rgb": [[0.1, 0.2]] * 5}, "rows of three numbers"),
        ({"latent_to_rgb": [["red", 0, 0]] * 5}, "latent_to_rgb must list numbers"),
        ({"added": {"text_output": "a", "pooled_output": "b", "time_ids": [1]}}, "zero_negative"),
        ({"added": {"text_output": "\x1b[2J"}}, "text_output must be printable"),
        ({"added": {"text_output": "a", "pooled_output": "b\n"}}, "pooled_output must be printable"),
        ({"files": []}, "files"),
        ({"files": {"a": 1}}, "a must hold"),
        ({"files": {"a": {"bytes": "1", "sha256": ""}}}, "bytes"),
        ({"files": {"a": {"bytes": -1, "sha256": "0" * 64}}}, "bytes, from 0 to"),
        ({"files": {"a": {"bytes": 1, "sha256": "0" * 63}}}, "sha256 in hex"),
        ({"files": {"a": {"bytes": 1, "sha256": "0" * 65}}}, "sha256 in hex"),
        ({"files": {"a": {"bytes": 1, "sha256": "A" * 64}}}, "sha256 in hex"),
        ({"files": {MANIFEST: {"bytes": 1, "sha256": "0" * 64}}}, "whose place another file has"),
        ({"files": {f"{MANIFEST}/a": ENTRY}}, "whose place another file has"),
        ({"files": {"a": ENTRY, "a/b/c": ENTRY}}, "'a/b/c', whose place another file has"),
        ({"files": {f"{n}.json": ENTRY for n in range(1001)}}, "1,001 files"),
        (
            {"files": {"a.json": ENTRY | {"bytes": 1 << 27}}},
            "a.json has 134,217,728 bytes; .* at most 67,108,864",
        ),
        ({"default_guidance": float("nan")}, "default_guidance must be a finite number"),
        ({"latent_scaling": 10**400}, "latent_scaling must be a finite number"),
        ({"width": 10**400}, "width must be from 1 to"),
        ({"width": 1 << 15}, "width must be from 1 to 16384"),
        ({"height": 1 << 15}, "height must be from 1 to 16384"),
        ({"width": 128}, "a decoder makes no 128 x 64 pixels"),
        ({"latent_height": 9}, "a decoder makes no 64 x 64 pixels of"),
        ({"text_tokens": 10**8}, "text_tokens must be from 1 to 16384"),
        ({"steps": [4, 8, 10**400]}, "steps"),
        ({"latent_to_rgb": [[10**400, 0, 0]] * 5}, "latent_to_rgb must list numbers"),
        ({"files": {"a": {"bytes": 10**400, "sha256": "0" * 64}}}, "bytes, from 0 to"),
        ({"name": "red\x1b[31m"}, "name must be printable"),
    ],
)
def test_a_manifest_with_a_wrong_fact_names_it(bundle_copy: Path, changes: dict[str, Any], what: str) -> None:
    edit(bundle_copy, **changes)
    with pytest.raises(BundleError, match=rf"manifest\.json.*{what}"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\xfe", b'{"schema_version": 1', b"[" * 200_000, b" " * 2_000_000]
)
def test_a_manifest_that_is_not_json_is_named(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(bundle_copy)


@pytest.mark.posix
def test_a_manifest_that_is_a_pipe_is_not_waited_for(bundle_copy: Path) -> None:
    (bundle_copy / MANIFEST).unlink()
    os.mkfifo(bundle_copy / MANIFEST)
    with pytest.raises(BundleError, match=r"manifest\.json is not a plain file"):
        Bundle.open(bundle_copy)


def test_a_folder_that_is_no_bundle_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="it is a file, not a folder"):
        Bundle.open(tmp_path / "file")
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(NotABundle, match=r"has no manifest\.json"):
        Bundle.open(tmp_path)


@pytest.mark.posix
@pytest.mark.parametrize("place", ["{}", "unet/{}"])
def test_a_place_that_no_file_system_has_is_refused_by_name(bundle_copy: Path, place: str) -> None:
    """The manifest's limit is below what most take for one name; what else a file system refuses is told, too."""
    with pytest.raises(BundleError, match=r"x/manifest\.json cannot be read: File name too long"):
        Bundle.open(bundle_copy / place.format("x" * 300))


@pytest.mark.parametrize("place", ["weights.bin", "more/weights.bin"])
def test_weights_that_the_manifest_does_not_list_are_refused_by_name(bundle_copy: Path, place: str) -> None:
    """Nothing would tell whether they are whole, and onnxruntime would read them."""
    weights = bundle_copy / "unet" / place
    weights.parent.mkdir(exist_ok=True)
    move_weights(bundle_copy / DENOISER, weights, place)
    write_manifest(bundle_copy)
    files = json.loads((bundle_copy / MANIFEST).read_text())["files"]
    del files[f"unet/{place}"]
    edit(bundle_copy, files=files)
    with pytest.raises(
        BundleError, match=rf"{as_shown(DENOISER)} has weights in '{place}', which is no file below"
    ):
        Bundle.open(bundle_copy, verify=False)
    write_manifest(bundle_copy)
    assert set(Bundle.open(bundle_copy).files_of(DENOISER)) == {bundle_copy / DENOISER, weights}


def test_weights_that_are_an_address_in_memory_are_refused_by_name(bundle_copy: Path) -> None:
    """Up to 1.23.2 onnxruntime reads what is there, whatever lies at the place that has the same name."""
    place = "_ORT_MEM_ADDR_/weights.bin"
    (bundle_copy / "unet" / place).parent.mkdir()
    move_weights(bundle_copy / DENOISER, bundle_copy / "unet" / place, place)
    write_manifest(bundle_copy)
    words = rf"{as_shown(DENOISER)} has weights in '{place}', which is no file below"
    with pytest.raises(BundleError, match=words):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("place", ["../../outside.bin", "{outside}", "../vae_decoder/model.onnx", "", "."])
def test_weights_that_lie_outside_the_graphs_folder_are_refused_by_name(
    bundle_copy: Path, tmp_path: Path, place: str
) -> None:
    """Onnxruntime 1.23 reads them, and they may be others a moment later."""
    place = place.format(outside=tmp_path / "outside.bin")
    move_weights(bundle_copy / DENOISER, tmp_path / "outside.bin", place)
    write_manifest(bundle_copy)
    words = rf"{as_shown(DENOISER)} has weights in {re.escape(repr(place))}, which is no file below"
    with pytest.raises(BundleError, match=words):
        Bundle.open(bundle_copy)


def test_a_graphs_size_is_that_of_its_own_folder(bundle_copy: Path) -> None:
    """Not of another whose name begins alike: how many threads it gets hangs on it."""
    before = Bundle.open(bundle_copy).size_of(TEXT_ENCODER)
    for name, size in ((TEXT_ENCODER_2, 10_000), ("text_encoder/weights.bin", 100)):
        (bundle_copy / name).parent.mkdir(exist_ok=True)
        (bundle_copy / name).write_bytes(bytes(size))
    write_manifest(bundle_copy)
    manifest = manifest_module.parse_unfinished((bundle_copy / MANIFEST).read_bytes(), "")
    assert Bundle(bundle_copy, manifest, "", {}).size_of(TEXT_ENCODER) == before + 100


def test_only_what_was_read_is_known_by_its_sha256(miniature_bundle: Path) -> None:
    """A file that is replaced later may be taken for another of the same sha256, and for none that nobody checked."""
    for verify in (True, False):
        states = Bundle.open(miniature_bundle, verify=verify).files_of(DECODER)
        assert {bool(state.sha256) for state in states.values()} == {verify}


def test_files_that_no_graph_names_may_lie_in_a_bundle(bundle_copy: Path) -> None:
    for folder in (bundle_copy, bundle_copy / "vae_decoder"):
        (folder / ".DS_Store").write_bytes(b"x")
    assert set(Bundle.open(bundle_copy).files_of(DECODER)) == {bundle_copy / DECODER}


def test_a_file_that_the_manifest_does_not_list_is_not_handed_out(bundle_copy: Path) -> None:
    (bundle_copy / "stray.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"does not list stray\.onnx"):
        Bundle.open(bundle_copy).path("stray.onnx")


def test_adding_a_predictor_changes_the_digest_and_not_the_model_digest(bundle_copy: Path) -> None:
    """A calibration names the models that it was made for, and lies in the bundle itself."""
    before = Bundle.open(bundle_copy)
    (bundle_copy / CALIBRATION).parent.mkdir()
    (bundle_copy / CALIBRATION).write_text("{}")
    write_manifest(bundle_copy)
    after = Bundle.open(bundle_copy)
    assert after.model_digest == before.model_digest
    assert after.digest != before.digest
    assert after.manifest.steps == before.manifest.steps
    with pytest.raises(BundleError, match=r"calibration\.json is not a calibration"):
        _ = after.calibration


@pytest.mark.parametrize("name", EVERY_BUNDLE_HAS)
def test_the_model_digest_depends_on_every_part_of_the_models(bundle_copy: Path, name: str) -> None:
    before = Bundle.open(bundle_copy).model_digest
    (bundle_copy / name).write_bytes((bundle_copy / name).read_bytes() + b" ")
    write_manifest(bundle_copy)
    assert Bundle.open(bundle_copy).model_digest != before


@pytest.mark.parametrize("name", [TOKENIZER_2, TEXT_ENCODER_2, TRANSFORMER])
def test_the_model_digest_depends_on_what_only_some_models_have(bundle_copy: Path, name: str) -> None:
    """A calibration that was made for one transformer must not be taken for another's."""
    digests = set()
    (bundle_copy / name).parent.mkdir()
    for content in (b"one", b"two"):
        (bundle_copy / name).write_bytes(content)
        write_manifest(bundle_copy)
        digests.add(manifest_module.parse_manifest((bundle_copy / MANIFEST).read_bytes(), "").model_digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("fact", "told_apart"),
    [
        ({"default_steps": 8}, True),
        ({"default_guidance": 7.5}, True),
        ({"latent_scaling": 0.5}, True),
        ({"guidance_embedding": 8}, True),
        ({"name": "renamed"}, False),
        ({"dtypes": {"unet": "int8"}}, False),  # the file's sha256 tells
        ({"latent_to_rgb": [[0.1, 0.2, 0.3]] * 5}, False),  # previews only
        ({"other_sizes": [[96, 64]]}, False),  # other pictures
    ],
)
def test_the_model_digest_depends_on_the_facts_that_change_the_picture(
    bundle_copy: Path, fact: dict[str, Any], told_apart: bool
) -> None:
    before = Bundle.open(bundle_copy).model_digest
    write_manifest(bundle_copy, **fact)
    assert (Bundle.open(bundle_copy).model_digest != before) is told_apart


STARTER_DIGEST = "e1bb40b1bf6cd650e2c56c0eb067f034bd4e77da13c46e638011788ba29d889d"


def test_what_a_newer_schema_adds_changes_no_older_bundles_digest() -> None:
    """A calibration made for schema 1 names its models by it. The sum is of the manifest alone."""
    manifest = json.loads((Path(__file__).parent / "schema_1_manifest.json").read_bytes())
    assert manifest["schema_version"] == 1
    parsed = manifest_module.parse_unfinished(json.dumps(manifest).encode(), Path("manifest.json"))
    assert parsed.model_digest == STARTER_DIGEST


def test_a_bundle_is_written_in_the_oldest_schema_that_can_run_it(bundle_copy: Path) -> None:
    write_manifest(bundle_copy, latent_to_rgb=[[0.1, 0.2, 0.3]] * 5)
    assert json.loads((bundle_copy / MANIFEST).read_text())["schema_version"] == 1
    write_manifest(bundle_copy, guidance_embedding=8)
    assert json.loads((bundle_copy / MANIFEST).read_text())["schema_version"] == 2
    manifest = Bundle.open(bundle_copy).manifest
    assert (manifest.guidance_embedding, manifest.latent_to_rgb) == (8, ((0.1, 0.2, 0.3),) * 5)


def test_a_bundle_with_added_conditioning_must_have_the_second_encoder(bundle_copy: Path) -> None:
    added = AddedConditioning("hidden_states.1", "text_embeds", (64.0, 64.0, 0.0, 0.0, 64.0, 64.0), True)
    write_manifest(bundle_copy, added=added)
    with pytest.raises(BundleError, match=f"does not list {TOKENIZER_2}"):
        Bundle.open(bundle_copy)
    for name in (TOKENIZER_2, TEXT_ENCODER_2):
        (bundle_copy / name).parent.mkdir()
        (bundle_copy / name).write_bytes(b"x")
    write_manifest(bundle_copy)
    assert Bundle.open(bundle_copy).manifest.added == added


JOINT = JointConditioning("hidden_states.1", "text_embeds", positions=333, hidden=64)


def test_a_bundle_with_joint_conditioning_has_a_transformer_in_the_place_of_the_unet(
    bundle_copy: Path,
) -> None:
    write_manifest(bundle_copy, joint=JOINT)
    assert json.loads((bundle_copy / MANIFEST).read_text())["schema_version"] == 3
    for name in (TOKENIZER_2, TEXT_ENCODER_2, TRANSFORMER):
        with pytest.raises(BundleError, match=f"does not list {name}"):
            Bundle.open(bundle_copy)
        (bundle_copy / name).parent.mkdir()
        (bundle_copy / name).write_bytes(b"x")
        write_manifest(bundle_copy)
    (bundle_copy / DENOISER).unlink()
    write_manifest(bundle_copy)
    assert Bundle.open(bundle_copy).manifest.joint == JOINT


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"positions": 76}, "positions of joint must be from 77 to 16384"),
        ({"positions": 10**9}, "positions of joint must be from 77 to 16384"),
        ({"hidden": 31}, "hidden of joint must be from 32 to"),
        ({"hidden": "64"}, "hidden must be a int"),
        ({"text_output": None}, "text_output must be a str"),
        ({"text_output": "\x1b[2J"}, "text_output must be printable"),
        ({"pooled_output": "a\nb"}, "pooled_output must be printable"),
    ],
)
def test_joint_conditioning_that_no_transformer_has_is_refused(
    bundle_copy: Path, change: dict[str, Any], why: str
) -> None:
    write_manifest(bundle_copy, joint=JOINT)
    document = json.loads((bundle_copy / MANIFEST).read_text())
    document["joint"] |= change
    (bundle_copy / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match=why):
        Bundle.open(bundle_copy)


def test_a_model_has_one_kind_of_conditioning(bundle_copy: Path) -> None:
    with pytest.raises(BundleError, match="no model has joint conditioning besides"):
        write_manifest(bundle_copy, joint=JOINT, guidance_embedding=8)
    added = AddedConditioning("hidden_states.1", "text_embeds", (64.0,) * 6, True)
    with pytest.raises(BundleError, match="no model has joint conditioning besides"):
        write_manifest(bundle_copy, joint=JOINT, added=added)


def test_other_sizes_are_for_models_that_can_be_told_of_them(bundle_copy: Path) -> None:
    added = AddedConditioning("hidden_states.1", "text_embeds", (64.0,) * 5, True)
    with pytest.raises(BundleError, match="with other_sizes, time_ids must be those of an image's size"):
        write_manifest(bundle_copy, other_sizes=[[96, 64]], added=added)


def test_a_manifest_with_unknown_or_missing_facts_is_not_written(bundle_copy: Path) -> None:
    before = (bundle_copy / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="has no colour"):
        write_manifest(bundle_copy, colour="blue")
    with pytest.raises(BundleError, match="default_steps"):
        write_manifest(bundle_copy, default_steps=5)
    assert (bundle_copy / MANIFEST).read_bytes() == before
    (bundle_copy / MANIFEST).unlink()
    with pytest.raises(BundleError, match="name"):
        write_manifest(bundle_copy, width=64)
    assert not (bundle_copy / MANIFEST).exists()


def test_what_a_crash_left_of_a_manifest_is_not_listed(bundle_copy: Path) -> None:
    (bundle_copy / "manifest.json.partial").write_text("{")
    write_manifest(bundle_copy)
    assert "manifest.json.partial" not in Bundle.open(bundle_copy).manifest.files


def test_a_file_is_put_into_a_finished_bundle_and_another_taken_out(
    bundle_copy: Path, tmp_path: Path
) -> None:
    for name in ("predictor/old.json", "predictor/new.json"):
        made = tmp_path / "made"
        made.write_text(name)
        put_file(bundle_copy, name, made, without="predictor/old.json" if "new" in name else None)
        assert not made.exists()
    assert set(Bundle.open(bundle_copy).manifest.files) >= {DENOISER, "predictor/new.json"}
    assert [path.name for path in (bundle_copy / "predictor").iterdir()] == ["new.json"]


@pytest.mark.posix
def test_what_is_not_there_has_no_mode_whatever_stands_in_its_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert mode_of(tmp_path / "file") != 0
    for name in ("nothing", "file/below", "loop", "nu\0ll"):
        assert mode_of(tmp_path / name) == 0


@pytest.mark.linux
def test_a_folder_whose_name_is_no_utf_8_is_refused(miniature_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"b\xff")
    folder.symlink_to(miniature_bundle)
    with pytest.raises(BundleError, match="not a path in UTF-8"):
        Bundle.open(folder)


def test_a_calibration_of_other_metrics_is_refused(routed_bundle: Path, tmp_path: Path) -> None:
    """Its weights would be those of others."""
    folder = Path(shutil.copytree(routed_bundle, tmp_path / "bundle"))
    assert Bundle.open(folder).advice == ""
    calibration = json.loads((folder / CALIBRATION).read_bytes())
    del calibration["recipe"]["predictor_sha256"]  # as earlier versions wrote it
    (folder / CALIBRATION).write_text(json.dumps(calibration))
    write_manifest(folder)
    assert Bundle.open(folder).advice == ""
    calibration["metrics"].reverse()
    (folder / CALIBRATION).write_text(json.dumps(calibration))
    write_manifest(folder)
    with pytest.raises(BundleError, match="the calibration is not of the metrics"):
        _ = Bundle.open(folder).advice


def test_a_file_that_was_written_or_replaced_is_told_from_the_one_before(tmp_path: Path) -> None:
    """Also by as many bytes, and by a copy that keeps its time."""
    file, other = tmp_path / "model.onnx", tmp_path / "other"
    file.write_bytes(b"one")
    before = file_states([file, tmp_path / "missing"])
    assert list(before) == [file] and file_states([file]) == before
    assert not before[file].replaced(FileState.of(file)._replace(sha256="0" * 64))
    file.write_bytes(b"two")
    os.utime(file, ns=(0, before[file][2] + 10**9))
    assert file_states([file]) != before and before[file].replaced(FileState.of(file))
    other.write_bytes(b"two")
    os.utime(other, ns=(0, before[file][2]))
    other.replace(file)
    assert file_states([file]) != before and before[file].replaced(FileState.of(file))
