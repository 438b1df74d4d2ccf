"""The prompts a router learns from and is measured on, split by what they are for.

Scenes of `train`, `validation`, `calibration` and `test` are disjoint as they are said, and no generator, judge or
inspector was trained on them; what is asked for in another order, "A left of B" as "B right of A" or "A, B and C" as
"C, A and B", may lie in two splits (`never_learnt`). Three more splits ask how far a router carries: `combinations`
pairs objects that no router split pairs, `wording` says scenes in sentences of its own, and `free-form` was written by
hand, outside the grammar (``free_form.json``). All of these are of the starter's world; `own_prompts` are whatever
people write.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import ExportError
from export.starter.world import Group, Scene, caption, sample_scene

PROMPTS = {
    "train": 22400,
    "validation": 400,
    "calibration": 800,
    "test": 2400,
    "combinations": 100,
    "wording": 100,
    "free-form": 60,
}
SHARES = {"train": 70, "validation": 10, "calibration": 10, "test": 10}
"""Of a hundred prompts of one's own, how many fall to each split."""
FEWEST = 2  # prompts of each of these splits, without which a later stage has nothing to work on
FREE_FORM = Path(__file__).parent / "free_form.json"
SEED = 32
REPEATING = 2800
"""Training prompts that are drawn as they come. Each after them says a scene that none before it says: sentences of one
scene share what it gains, so a router learns from scenes."""
CEILING_PROMPTS = 300
"""The first of the split test, of which `edge-export label` makes more images than of the others."""
IDS_A_SPLIT = 100_000  # of the starter's prompts; each split's begin at a multiple of it, none at 0
HELD_OUT_PAIRS = 10  # one in so many pairs of objects appears in `combinations` alone


@dataclass(frozen=True)
class Prompt:
    """One prompt and what is known of it beforehand."""

    prompt_id: int
    text: str
    split: str
    objects: int
    """How many objects it asks for."""
    scene: Scene | None
    """What its picture must show; None for a prompt that asks for what the world does not have."""


def router_prompts(number: Mapping[str, int]) -> list[Prompt]:
    """``number`` distinct prompts a split. A larger number keeps the prompts of a smaller one, with their ids."""
    prompts = []
    for index, split in enumerate(PROMPTS):
        wanted = number.get(split, 0)
        drawn = _free_form(wanted) if split == "free-form" else _drawn(split, wanted, (SEED, index))
        for place, (text, objects, scene) in enumerate(drawn):
            prompts.append(Prompt(_first_id(index) + place, text, split, objects, scene))
    return prompts


def _first_id(index: int) -> int:
    """Of the starter's prompts of the split that stands at ``index`` in PROMPTS."""
    return (index + 1) * IDS_A_SPLIT


def own_prompts(file: Path) -> list[Prompt]:
    """The prompts in ``file``, one a line, each in the split that a hash of its text gives.

    More lines at its end leave all before them in their split, with their ids. Raises ExportError when it is not text
    in UTF-8, holds a prompt twice, or leaves a split with fewer than FEWEST.
    """
    first: dict[str, int] = {}
    counts = Counter(dict.fromkeys(SHARES, 0))
    prompts = []
    for number, text in numbered_lines(file):
        read = as_read(text)
        if read in first:
            raise ExportError(
                f"{file}: line {number} is line {first[read]} again, {text!r}: remove one, or a router is measured on "
                "what it learnt"
            )
        first[read] = number
        split = _split_of(text)
        # A million for each split: seeds are a thousand times the id and end at 2**32.
        prompt_id = list(SHARES).index(split) * 1_000_000 + counts[split]
        prompts.append(Prompt(prompt_id, text, split, objects=0, scene=None))
        counts[split] += 1
    for split, count in counts.items():
        if count < FEWEST:
            raise ExportError(
                f"{file}: {count} of its {len(prompts)} prompts fall to the split {split!r}, which needs {FEWEST} at "
                f"least: write more prompts, {SHARES[split]} in a hundred go there"
            )
    return prompts


def as_read(text: str) -> str:
    """The prompt as most text encoders read it, to whom capitals and blanks are nothing: equal for equal prompts."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def of_ceiling(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[N]: whether test prompts are of the first CEILING_PROMPTS: ids, of whatever prompts, count a split from a round
    number.
    """
    return np.asarray(ids % IDS_A_SPLIT < CEILING_PROMPTS)


def numbered_lines(file: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, counted from 1. Raises ExportError when there is no such file, it is not
    text in UTF-8, or has none.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ExportError(f"{file} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise ExportError(
            f"{file} cannot be read: {error.strerror or error}; name a file of prompts"
        ) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ExportError(f"{file} has no prompts; write one a line")
    return lines


def _split_of(text: str) -> str:
    place = int.from_bytes(sha256(text.encode()).digest()[:8], "big") % sum(SHARES.values())
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError(place)


def redrawn(ids: NDArray[np.int64], splits: NDArray[np.str_]) -> list[Prompt]:
    """The starter's prompts that the ones of a matrix are among, where those are the starter's; else none.

    ``ids`` and ``splits`` are [N]. Drawing takes longer the more there are.
    """
    number = {}
    for index, split in enumerate(PROMPTS):
        places = ids[splits == split] - _first_id(index)
        if ((places < 0) | (places >= IDS_A_SPLIT)).any():  # prompts of one's own count from other numbers
            return []
        number[split] = int(places.max(initial=-1)) + 1
    return router_prompts(number)


def scenes_by_text(ids: NDArray[np.int64], splits: NDArray[np.str_]) -> dict[str, Scene | None]:
    """What those that are `redrawn` say, by their text."""
    return {prompt.text: prompt.scene for prompt in redrawn(ids, splits)}


def scenes_of(texts: Sequence[str], known: Mapping[str, Scene | None]) -> NDArray[np.int64]:
    """[N]: prompts that ask for the same get the same number, counted from 0; prompts of other worlds one each.

    ``known`` is what `scenes_by_text` gives. "A left of B" and "B right of A" ask for the same, and so do "A, B and C"
    and "C, A and B".
    """
    said = [repr(scene.asked) if (scene := known.get(text)) else text for text in texts]
    _, numbers = np.unique(said, return_inverse=True)
    return numbers.astype(np.int64)


def never_learnt(splits: NDArray[np.str_], scenes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[N]: False for a prompt of another split than train that asks for what a prompt of train asks for.

    Scenes are split by a hash of how they are said, so a few lie on both sides, each time in another order. ``scenes``
    are numbered by `scenes_of`.
    """
    learning = splits == "train"
    return np.asarray(learning | ~np.isin(scenes, scenes[learning]))


def holds_held_out_pair(scene: Scene) -> bool:
    """Whether two of its objects are a pair kept for the split `combinations`."""
    pairs = combinations(sorted(group.name for group in scene.groups), 2)
    return any(sha256("+".join(pair).encode()).digest()[0] % HELD_OUT_PAIRS == 0 for pair in pairs)


def _drawn(split: str, number: int, seed: tuple[int, int]) -> list[tuple[str, int, Scene]]:
    rng = np.random.default_rng(seed)
    hashed = split if split not in ("combinations", "wording") else "test"
    texts: dict[str, Scene] = {}
    said: set[Scene] = set()
    while len(texts) < number:
        scene = sample_scene(rng)
        text = caption(scene, rng, held_out=split == "wording")
        if scene.split != hashed or holds_held_out_pair(scene) != (split == "combinations"):
            continue
        if split == "train" and len(texts) >= REPEATING and scene in said:
            continue
        texts.setdefault(text, scene)
        said.add(scene)
    return [(text, scene.objects, scene) for text, scene in texts.items()]


def _free_form(number: int) -> list[tuple[str, int, Scene | None]]:
    drawn: list[tuple[str, int, Scene | None]] = []
    for entry in json.loads(FREE_FORM.read_text(encoding="utf-8"))[:number]:
        if "groups" in entry:
            groups = tuple(Group(*group) for group in entry["groups"])
            scene = Scene(groups, entry["background"], entry.get("relation"))
            drawn.append((entry["prompt"], scene.objects, scene))
        else:
            drawn.append((entry["prompt"], entry["objects"], None))
    return drawn
