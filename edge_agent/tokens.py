"""From a prompt to token ids, with the text each token stands for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as TokenizersTokenizer

from edge_agent.bundle import Bundle
from edge_agent.errors import BundleError, printable
from edge_agent.manifest import MAX_TEXT_TOKENS, TOKENIZER, TOKENIZER_2

FILE = "tokenizer.json"

MOST_STATED = 5_000
"""Characters, as JSON, of what a file states besides its words: four times CLIP's. The library copies some of it, such
as the text of its padding, for every token.
"""

MOST_PIECES = 8
"""Of a template. One that puts start and end around a prompt has three."""

MOST_WORD = 100
"""Characters of the longest word that WordPiece takes, as BERT's: it tries all parts of one."""

MOST_ADDED = 100_000_000
"""Squares of the lengths of the tokens that were added to a vocabulary, in all. So the library takes longer to learn
them: one of 10,000 characters takes it three seconds, of a million eight hours.
"""

_KINDS: Mapping[str, tuple[str, set[str]]] = {
    "normalizer": ("normalizers", {"BertNormalizer", "NFC", "Replace", "Lowercase"}),
    "pre_tokenizer": ("pretokenizers", {"BertPreTokenizer", "ByteLevel", "Split", "WhitespaceSplit"}),
    "post_processor": (
        "processors",
        {"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"},
    ),
    "model": ("", {"BPE", "WordPiece"}),
}
"""Of each part of a file what a sequence of steps is called there, and the steps of CLIP's and BERT's tokenizers."""


class Tokens(NamedTuple):
    """One prompt in L positions, padding included, of which T are its own."""

    ids: NDArray[np.int64]  # [1, L]
    # T; positions of the prompt's own tokens, in order: not of start, end and padding. To be read only.
    own: list[int]
    # T; the prompt's characters that its own tokens stand for. To be read only.
    texts: list[str]
    truncated: bool  # the prompt had more tokens than fit
    padding: int  # its id
    padded_in_front: bool  # and not behind
    # [1, L], the same prompt as the second tokenizer reads it, where the model has two (Stable Diffusion XL, 3).
    ids_2: NDArray[np.int64] | None = None
    padding_2: int = 0  # its id there

    def without(self, position: int) -> Tokens:
        """The prompt less its own token at `position` of L; the others close up, as if it had never been written."""

        def cut(ids: NDArray[np.int64], padding: int) -> NDArray[np.int64]:
            left = np.delete(ids, position, axis=1)
            return np.insert(left, 0 if self.padded_in_front else left.shape[1], padding, axis=1)

        place = self.own.index(position)
        before, after = self.own[:place], self.own[place + 1 :]
        if self.padded_in_front:
            before = [earlier + 1 for earlier in before]
        else:
            after = [later - 1 for later in after]
        return self._replace(
            ids=cut(self.ids, self.padding),
            own=before + after,
            texts=self.texts[:place] + self.texts[place + 1 :],
            ids_2=None if self.ids_2 is None else cut(self.ids_2, self.padding_2),
        )


class Tokenizer:
    """A tokenizer.json that carries its own padding and truncation, as the export writes it."""

    def __init__(
        self,
        tokenizer: TokenizersTokenizer,
        length: int,
        second: Tokenizer | None = None,
        path: Path = Path(FILE),
    ) -> None:
        """`tokenizer`, read from `path`, pads and truncates every prompt to `length`. It is taken over, and pads no
        longer.
        """
        self._path = path
        # Padding is done here: the library makes an object of every token, and most of a short prompt's are padding.
        padding = tokenizer.padding or {}
        tokenizer.no_padding()
        self._padding = padding["pad_id"]
        self._nothing = np.full((1, length), self._padding, np.int64)
        self._at_the_end = padding["direction"] == "left"
        self._cut_in_front = (tokenizer.truncation or {}).get("direction") == "left"
        self._tokenizer = tokenizer
        self._second = second
        self.length = length
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self._concepts = concepts(added, length)
        self._concept_of = {vector: name for name, vectors in self._concepts.items() for vector in vectors}

    @classmethod
    def open(cls, bundle: Bundle) -> Tokenizer:
        """The bundle's tokenizer, with its second one where it has two.

        Raises:
            BundleError: a file cannot be read, or it does not make the tokens that the manifest asks for.
        """
        wanted = bundle.manifest.text_tokens
        second = cls.load(bundle.path(TOKENIZER_2).parent, wanted=wanted) if bundle.manifest.second else None
        return cls.load(bundle.path(TOKENIZER).parent, second, wanted)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], second: Tokenizer | None = None, wanted: int | None = None
    ) -> Tokenizer:
        """Read `tokenizer.json` in `folder`; `second` reads the same prompts, see `Tokens.ids_2`. `wanted` is how many
        tokens it has to make, where that is known.

        Raises:
            BundleError: the file cannot be read, `check` refuses it, or it does not pad and truncate every prompt to
                that length, or to one of at most MAX_TEXT_TOKENS.
        """
        path = Path(folder) / FILE
        try:
            text = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        with _refused(path):
            # Before the library has any of it, which ends the process where memory does not do.
            check(json.loads(text))
            tokenizer = TokenizersTokenizer.from_buffer(text)
            if not tokenizer.get_vocab_size():
                raise ValueError("it has no words")
        length = (tokenizer.truncation or {}).get("max_length")
        padding = tokenizer.padding or {}
        if not length or length != padding.get("length") or length % (padding["pad_to_multiple_of"] or 1):
            raise BundleError(f"{path} must pad and truncate to one length; export the bundle again")
        # Before it reads anything: for a length beyond memory the library ends the process.
        if wanted is not None and length != wanted:
            raise BundleError(f"{path} makes {length} tokens, the manifest asks for {wanted}")
        if length > MAX_TEXT_TOKENS:
            raise BundleError(f"{path} makes {length} tokens; a prompt has at most {MAX_TEXT_TOKENS}")
        with _refused(path):
            # With start and end too long: some settings only fail on such a text.
            tokenizer.encode("a " * length)
        return cls(tokenizer, int(length), second, path)

    @property
    def vocabulary(self) -> int:
        """One more than the largest id."""
        ids: dict[str, int] = self._tokenizer.get_vocab()
        return 1 + max(ids.values())

    @property
    def largest(self) -> tuple[int, ...]:
        """The largest id that a prompt can have, here and in the second tokenizer where there is one."""
        # Start, end and padding have ids of their own in the file, which need not be the vocabulary's.
        own = max(self.vocabulary - 1, *self.encode("").ids[0].tolist())
        return (own, *self._second.largest) if self._second else (own,)

    def encode(self, prompt: str) -> Tokens:
        """Tokens of `prompt`, which must be valid Unicode (`edge_agent.request` refuses lone surrogates).

        What is made of several tokens, such as an emoji, or a concept of several vectors, is the text of each of them.

        Raises BundleError where the file is not one that reads this prompt.
        """
        second = self._second.encode(prompt) if self._second else None
        if any(concept in prompt for concept in self._concepts):
            prompt = self._written_out(prompt)
        with _refused(self._path):
            encoding = self._tokenizer.encode(prompt)
        found, ids = encoding.ids, self._nothing.copy()
        if len(found) > self.length:  # what stands around a prompt may be more than the library knows of
            raise BundleError(f"{self._path} makes more than {self.length} tokens; export the bundle again")
        first = self.length - len(found) if self._at_the_end else 0
        ids[0, first : first + len(found)] = found
        own: list[int] = []
        texts: list[str] = []
        marked = zip(encoding.special_tokens_mask, encoding.offsets, strict=True)
        for position, (special, (start, end)) in enumerate(marked, first):
            if not special:
                own.append(position)
                text = prompt[start:end]
                texts.append(self._concept_of.get(text, text))
        tokens = Tokens(ids, own, texts, bool(encoding.overflowing), self._padding, self._at_the_end)
        return tokens._replace(ids_2=second.ids, padding_2=second.padding) if second else tokens

    def _written_out(self, prompt: str) -> str:
        """`prompt` with the tokens of all vectors of a concept in the place of its name, as diffusers reads it."""
        with _refused(self._path):
            encoding = self._tokenizer.encode(prompt)
        # Of those that do not fit no vector would.
        names = sorted(self._concepts.keys() & encoding.tokens, key=len, reverse=True)
        if not names:
            return prompt
        parts = re.split(f"({'|'.join(map(re.escape, names))})", prompt)  # every second is a name
        places, room = range(1, len(parts), 2), self.length
        for place in reversed(places) if self._cut_in_front else places:
            if room <= 0:  # more do not fit, and would take memory
                break
            vectors = self._concepts[parts[place]]
            parts[place] = " ".join(vectors)
            room -= len(vectors)
        return "".join(parts)


def concepts(added: Collection[str], length: int = MAX_TEXT_TOKENS) -> dict[str, list[str]]:
    """The tokens of each concept that was learnt as several vectors: its name, a token that was added, stands for the
    first, and name_1, name_2, ... for the others. At most `length`, since more do not fit.
    """
    found = {}
    for name in added:
        vectors = [name]
        while len(vectors) < length and (following := f"{name}_{len(vectors)}") in added:
            vectors.append(following)
        if len(vectors) > 1:
            found[name] = vectors
    return found


def check(stated: Any) -> None:
    """Refuse a file that states another tokenizer than those of CLIP's and BERT's kinds, by what it states and before
    the library reads it. These make no more than some ten tokens of a character.

    Raises ValueError, or KeyError, TypeError or AttributeError where it is no tokenizer at all.
    """
    for part, (sequence, kinds) in _KINDS.items():
        if (whole := stated.get(part)) is None:
            continue
        steps = whole[sequence] if whole["type"] == "Sequence" else [whole]
        found = [step["type"] for step in steps]
        # A step that is there again and again may lengthen a text without end.
        if len(kinds.intersection(found)) < len(found):
            raise ValueError(f"its {part} has other steps than {', '.join(sorted(kinds))}, each once")
        for step in steps:
            pieces, special = step.get("single", ()), step.get("special_tokens", {})
            if len(step.get("content", "")) > 1:
                raise ValueError("it puts several characters in the place of others")
            if (
                len(pieces) > MOST_PIECES
                or sum("Sequence" in piece for piece in pieces) > 1
                or any(len(token["ids"]) > 1 for token in special.values())
            ):
                raise ValueError("it puts too much around a prompt")
    model = {name: value for name, value in stated["model"].items() if name not in ("vocab", "merges")}
    if model.get("max_input_chars_per_word", 0) > MOST_WORD:
        raise ValueError(f"it takes words of more than {MOST_WORD} characters")
    rest = {part: stated.get(part) for part in (*_KINDS, "truncation", "padding")} | {"model": model}
    if len(json.dumps(rest)) > MOST_STATED:
        raise ValueError("it states too much besides its words")
    # With a stride, each piece of what does not fit would begin with the end of the last.
    if (stated.get("truncation") or {}).get("stride"):
        raise ValueError("it reads what does not fit several times")
    if sum(len(token["content"]) ** 2 for token in stated.get("added_tokens") or ()) > MOST_ADDED:
        raise ValueError("its added tokens are too long")


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Whatever tokenizers raises becomes a BundleError that names the file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # bare Exception, ValueError, and a panic in Rust, which is no Exception
        # It quotes the file, which may steer a terminal.
        raise BundleError(
            f"{path} is not a tokenizer that works: {printable(str(error))}; export the bundle again"
        ) from error
