"""Hard negatives of a prompt: the same sentence with one thing wrong, for the optional metric *Adherence*.

A CLIP that tells "a cat left of two dogs" from "a cat left of three dogs", "a fox left of two dogs" and "a cat right
of two dogs" by the picture has read the prompt, not just its topic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256

from export.starter.sprites import OBJECTS
from export.starter.world import NUMBERS, Group, Scene, plural

FAULTS = ("object", "count", "relation")
OPPOSITES = {"left": "right", "above": "below", "over": "under", "top": "bottom"}
OPPOSITES |= {there: here for here, there in OPPOSITES.items()}
_NUMBERS = "|".join([*NUMBERS.values(), "an?", "the", r"\d+"])


@dataclass(frozen=True)
class Negative:
    """One sentence that is wrong, and in which of FAULTS."""

    text: str
    fault: str


def hard_negatives(text: str, scene: Scene) -> tuple[Negative, ...]:
    """Of a prompt that asks for ``scene``: one with each group's object exchanged, one with each group's count wrong,
    one with the relation turned round. A fault whose words the prompt does not use is left out.

    The exchange is chosen by a hash of the prompt: the same in every run.
    """
    made = []
    for place, group in enumerate(scene.groups):
        made.append(Negative(_exchanged(text, group, _other(text, scene, place)), "object"))
        made.append(Negative(_recounted(text, group), "count"))
    if scene.relation is not None:
        words = rf"\b({'|'.join(OPPOSITES)})\b(?! the stars)"  # "under the stars" is a place
        turned = re.sub(words, lambda word: OPPOSITES[word[1].lower()], text, flags=re.I)
        made.append(Negative(turned, "relation"))
    return tuple(negative for negative in made if negative.text != text)


def _other(text: str, scene: Scene, place: int) -> str:
    taken = {group.name for group in scene.groups}
    vowel = scene.groups[place].name[0] in "aeio"  # "an apple" becomes "an owl", not "an cat"
    others = [name for name in OBJECTS if name not in taken]
    # Three objects begin with a vowel: a scene of all of them leaves none that its article fits.
    free = [name for name in others if (name[0] in "aeio") == vowel] or others
    return free[int.from_bytes(sha256(f"{place} {text}".encode()).digest()[:4], "big") % len(free)]


def _noun(group: Group) -> str:
    # A look-alike's name may hold a common one's: the "apple" of "green apple" is none.
    return rf"(?<!green )\b{group.name if group.count == 1 else plural(group.name)}\b"


def _exchanged(text: str, group: Group, other: str) -> str:
    return re.sub(_noun(group), other if group.count == 1 else plural(other), text, count=1, flags=re.I)


def _recounted(text: str, group: Group) -> str:
    """One becomes two, two three, three two, four three."""
    number = {1: 2, 2: 3, 3: 2, 4: 3}[group.count]
    words = rf"\b(?:{_NUMBERS})\b((?: \w+)?) {_noun(group)}"
    return re.sub(words, rf"{NUMBERS[number]}\1 {plural(group.name)}", text, count=1, flags=re.I)
