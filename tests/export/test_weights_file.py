"""Weights are read from what torch pickled as from a .safetensors, and nothing else that is in there is made."""

from __future__ import annotations

import zipfile
from collections import UserList, defaultdict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export import weights_file
from export.convert import convert
from export.errors import ExportError
from tests.export.test_convert import concept, differ, lora_for, silent, weights_at, weights_of
from tests.miniature import miniature_pipeline, miniature_xl
from tests.single_file import save_single_file

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


class Callback:
    """Of a trainer that is not installed where its files are read; it was a key, and held settings."""

    def __init__(self, patience: int) -> None:
        self.patience = patience


class SettingsDict(dict[str, Any]):
    """Of a trainer, with entries and attributes."""


class LossesList(list[float]):
    """Of a trainer."""


class Opener:
    """Writes a file where it is unpickled by anything that makes what it is told to."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    miniature_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_read_from_any_form_that_torch_has_written(
    tmp_path: Path, suffix: str, zipped: bool
) -> None:
    file = tmp_path / f"weights{suffix}"
    torch.save({"epoch": 3, "state_dict": WEIGHTS}, file, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(file) == zipped
    found = weights_file.read(file)
    assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
    assert weights_file.types(file) == {"a": torch.float32, "b": torch.float16}


def test_nothing_but_weights_is_made_of_what_was_pickled(tmp_path: Path) -> None:
    """Neither what would run, nor what needs a library that is not here."""
    held = {
        "callbacks": {Callback: Callback(3)},
        "opener": Opener(tmp_path / "opened"),
        "state_dict": WEIGHTS,
    }
    torch.save(held, file := tmp_path / "trained.ckpt")
    allowed = set(torch.serialization.get_safe_globals())
    assert weights_file.read(file).keys() == WEIGHTS.keys()
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert not (tmp_path / "opened").exists()
    torch.load(file, weights_only=False)  # what it does to whoever trusts it
    assert (tmp_path / "opened").exists()


def test_containers_of_other_classes_beside_weights_are_passed_over(tmp_path: Path) -> None:
    settings = SettingsDict(steps=3)
    settings.frozen = True  # type: ignore[attr-defined]
    beside = [defaultdict(int, {"steps": 3}), settings, LossesList([0.5, 0.25]), deque([0.5], maxlen=2)]
    beside += [torch.nn.ParameterList([torch.zeros(1)]), UserList([0.5])]
    torch.save({"beside": beside, "state_dict": WEIGHTS}, file := tmp_path / "trained.ckpt")
    assert weights_file.read(file).keys() == WEIGHTS.keys()


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (Opener(Path("opened")), "holds no weights"),
        ([torch.ones(2)], "holds no weights"),
        ({"epoch": 3}, "holds no weights"),
        ({"a": torch.ones(2, dtype=torch.int8)}, r"holds weights of torch\.int8, which are not read"),
        (torch.nn.Linear(2, 2), "holds no weights"),
    ],
)
def test_a_pickled_file_without_weights_is_refused(tmp_path: Path, held: Any, why: str) -> None:
    torch.save(held, file := tmp_path / "x.pt")
    with pytest.raises(ExportError, match=rf"x\.pt {why}"):
        weights_file.read_floating(file)


def test_a_pickled_file_that_holds_itself_is_refused(tmp_path: Path) -> None:
    held: dict[str, Any] = dict(WEIGHTS)
    held["state_dict"] = held
    torch.save(held, file := tmp_path / "x.ckpt")
    with pytest.raises(ExportError, match=r"x\.ckpt holds no weights"):
        weights_file.types(file)


def test_tensors_whose_numbers_are_not_there_are_passed_over(tmp_path: Path) -> None:
    odd = {"meta": torch.ones(2, device="meta"), "sparse": torch.eye(2).to_sparse()}
    torch.save(odd | {"a": torch.nn.Parameter(WEIGHTS["a"])}, file := tmp_path / "x.pt")
    found = weights_file.read(file)
    assert found.keys() == {"a"} and not found["a"].requires_grad


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("left", [0, 1, 300])
def test_a_pickled_file_that_is_cut_off_is_refused(tmp_path: Path, left: int, zipped: bool) -> None:
    torch.save(WEIGHTS, file := tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ExportError, match=r"x\.pt is cut off or damaged"):
        weights_file.read(file)


@pytest.mark.parametrize("make", [miniature_pipeline, miniature_xl])
def test_a_checkpoint_becomes_a_folder_of_the_same_weights(tmp_path: Path, make: Any) -> None:
    """As they were trained: among much else, in half precision."""
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "model")
    weights = load_file(save_single_file(pipeline.to(torch.float16), tmp_path / "fine-tune.safetensors"))
    torch.save(
        {"callbacks": {Callback: Callback(3)}, "state_dict": weights}, file := tmp_path / "fine-tune.ckpt"
    )
    convert(str(file), str(tmp_path / "folder"), base=str(tmp_path / "model"), report=silent)
    assert differ(weights_at(tmp_path / "folder"), weights_of(pipeline.to(torch.float32))) == []
    found = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in found.values()} == {torch.float16}


def test_a_lora_may_be_pickled(model: Path, tmp_path: Path) -> None:
    pipeline = miniature_pipeline()
    added = lora_for(pipeline, tmp_path / "style.safetensors")
    torch.save(load_file(tmp_path / "style.safetensors"), file := tmp_path / "style.pt")
    convert(str(model), str(tmp_path / "folder"), loras=[(str(file), 1.0)], report=silent)
    assert set(differ(weights_at(tmp_path / "folder"), weights_of(pipeline))) == set(added)


@pytest.mark.parametrize("container", [dict, torch.nn.ParameterDict])
def test_an_embedding_of_the_webui_has_its_files_name(model: Path, tmp_path: Path, container: Any) -> None:
    """The one in it is what it was called while it was trained. Until 2022 its vectors were in a ParameterDict."""
    vectors = concept(miniature_pipeline(), tmp_path / "catty.safetensors")[0]
    held = {
        "string_to_token": {"*": 265},
        "string_to_param": container({"*": torch.nn.Parameter(vectors)}),
        "name": "run-3",
    }
    torch.save(held, file := tmp_path / "catty.pt")
    said: list[str] = []
    convert(str(model), str(tmp_path / "folder"), embeddings=[(str(file), None)], report=said.append)
    assert f"adding {file}: write catty in prompts" in said
    assert (tmp_path / "folder" / "tokenizer" / "added_tokens.json").read_text().count("catty") == len(
        vectors
    )


def test_a_part_that_is_pickled_in_half_precision_stays_in_half_precision(
    model: Path, tmp_path: Path
) -> None:
    """In folders of when there were no .safetensors."""
    weights = load_file(old := model / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save({name: weight.half() for name, weight in weights.items()}, old.with_suffix(".bin"))
    old.unlink()
    convert(str(model), str(tmp_path / "folder"), scheduler="LCM", report=silent)
    found = load_file(tmp_path / "folder" / "unet" / old.name)
    assert {weight.dtype for weight in found.values()} == {torch.float16}
