"""A prompt's tokens, their own text, and which of them are the prompt's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizersTokenizer

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.errors import BundleError
from edge_agent.tokens import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(miniature_bundle: Path) -> Tokenizer:
    return Tokenizer.load(miniature_bundle / "tokenizer")


def test_start_end_and_padding_are_not_the_prompts_own(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the Red moon")
    assert tokens.ids.shape == (1, 77)
    assert tokens.ids.dtype == np.int64
    assert tokens.own == [1, 2, 3]
    assert tokens.texts == ["the", "Red", "moon"]
    assert not tokens.truncated


def test_a_prompt_without_a_token_is_the_prompt_that_never_had_it(tokenizer: Tokenizer) -> None:
    whole, less = tokenizer.encode("the Red moon"), tokenizer.encode("the moon")
    cut = whole.without(whole.own[1])
    np.testing.assert_array_equal(cut.ids, less.ids)
    assert cut.texts == less.texts
    assert cut.own == less.own == [1, 2]
    assert cut.without(1).without(1).own == []


def test_a_prompt_of_two_tokenizers_loses_the_token_in_both_and_a_cut_off_one_stays_cut_off(
    bundle_copy: Path, tokenizer: Tokenizer
) -> None:
    edit(bundle_copy / "tokenizer", "padding", pad_id=7)
    both = Tokenizer.load(bundle_copy / "tokenizer", second=tokenizer)  # which pads with another
    cut, less = both.encode("the Red moon").without(2), both.encode("the moon")
    assert cut.ids_2 is not None and less.ids_2 is not None
    np.testing.assert_array_equal(cut.ids_2, less.ids_2)
    assert not cut.truncated
    long = tokenizer.encode("the " + "cat " * 80).without(1)  # what did not fit does not move up
    assert long.truncated
    assert long.own == [*range(1, 75)] and long.texts == ["cat"] * 74


@pytest.mark.parametrize("direction", ["Right", "Left"])
def test_a_token_less_is_padding_more_on_the_side_where_the_file_has_it(
    bundle_copy: Path, direction: str
) -> None:
    folder = bundle_copy / "tokenizer"
    edit(folder, "padding", direction=direction, pad_id=7)
    tokenizer = Tokenizer.load(folder)
    for whole, position, less in (
        ("the Red moon", 1, "the moon"),
        ("the Red moon", 0, "Red moon"),
        ("cat " * 75, 74, "cat " * 74),  # no padding, from which to learn what it is
    ):
        tokens, expected = tokenizer.encode(whole), tokenizer.encode(less)
        cut = tokens.without(tokens.own[position])
        np.testing.assert_array_equal(cut.ids, expected.ids)
        assert (cut.own, cut.texts) == (expected.own, expected.texts)
        np.testing.assert_array_equal(cut.without(cut.own[0]).ids, expected.without(expected.own[0]).ids)


def test_an_empty_prompt_has_no_tokens_of_its_own(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("")
    assert tokens.own == tokens.texts == []
    assert tokens.ids.shape == (1, 77)


def test_a_concept_of_several_vectors_is_as_many_tokens(miniature_bundle: Path) -> None:
    """In every place of its name, as far as they fit; names that only begin alike are left alone."""
    file = TokenizersTokenizer.from_file(str(miniature_bundle / "tokenizer" / "tokenizer.json"))
    named = ["<catty>", *(f"<catty>_{number}" for number in range(1, 30)), "<cat>"]
    file.add_tokens([AddedToken(name, normalized=False) for name in named])
    reader = Tokenizer(file, 77)
    id_of = file.get_vocab()
    tokens = reader.encode("the<catty> moon <cat>")
    assert tokens.texts == ["the", *["<catty>"] * 30, "moon", "<cat>"]
    assert tokens.ids[0, 2:32].tolist() == [id_of[name] for name in named[:30]]
    assert reader.encode("moon").texts == ["moon"]
    often = reader.encode("<catty>" * 1_000)
    assert often.truncated
    assert often.ids[0, 1:76].tolist() == [id_of[name] for name in named[:30] * 3][:75]


def test_a_concept_whose_name_begins_with_anothers_is_told_from_it(miniature_bundle: Path) -> None:
    """Whatever its characters mean in a pattern."""
    file = TokenizersTokenizer.from_file(str(miniature_bundle / "tokenizer" / "tokenizer.json"))
    named = ["(cat*", "(cat*_1", "(cat*s", "(cat*s_1"]
    file.add_tokens([AddedToken(name, normalized=False) for name in named])
    tokens = Tokenizer(file, 77).encode("the (cat* and (cat*s")
    assert tokens.texts == ["the", *["(cat*"] * 2, "and", *["(cat*s"] * 2]
    id_of = file.get_vocab()
    assert tokens.ids[0, [2, 3, 5, 6]].tolist() == [id_of[name] for name in named]


def test_a_concept_has_as_many_vectors_as_each_of_two_tokenizers_learnt(miniature_bundle: Path) -> None:
    def reader(vectors: int, second: Tokenizer | None = None) -> tuple[Tokenizer, list[int]]:
        file = TokenizersTokenizer.from_file(str(miniature_bundle / "tokenizer" / "tokenizer.json"))
        named = ["<catty>", *(f"<catty>_{number}" for number in range(1, vectors))]
        file.add_tokens([AddedToken(name, normalized=False) for name in named])
        return Tokenizer(file, 77, second), [file.token_to_id(name) for name in (*named, "moon</w>")]

    second, theirs = reader(3)
    first, ours = reader(2, second)
    tokens = first.encode("<catty> moon")
    assert tokens.ids_2 is not None
    assert tokens.ids[0, 1:4].tolist() == ours and tokens.ids_2[0, 1:5].tolist() == theirs


def test_a_thousand_added_tokens_are_no_reason_to_refuse_a_file(bundle_copy: Path) -> None:
    path = bundle_copy / "tokenizer" / "tokenizer.json"
    document = json.loads(path.read_bytes())
    document["added_tokens"] += [
        document["added_tokens"][0] | {"content": f"<{number:040}>", "id": 5000 + number}
        for number in range(1000)
    ]
    path.write_text(json.dumps(document))
    assert Tokenizer.load(path.parent).encode(f"the <{7:040}>").texts == ["the", f"<{7:040}>"]


@pytest.mark.parametrize("direction", ["right", "left"])
def test_of_a_concept_as_many_vectors_are_written_out_as_fit_at_the_end_that_is_kept(
    miniature_bundle: Path, direction: str
) -> None:
    """Of many names with many vectors each, a prompt's text would take gigabytes."""
    file = TokenizersTokenizer.from_file(str(miniature_bundle / "tokenizer" / "tokenizer.json"))
    file.enable_truncation(77, direction=direction)
    vectors = {name: [name, *(f"{name}_{number}" for number in range(1, 30))] for name in ("<a>", "<b>")}
    file.add_tokens([AddedToken(name, normalized=False) for names in vectors.values() for name in names])
    reader = Tokenizer(file, 77)
    prompt = "<a> <b> " * 500
    id_of = file.get_vocab()
    whole = [id_of[name] for names in (vectors["<a>"], vectors["<b>"]) * 3 for name in names]
    kept = whole[:75] if direction == "right" else whole[-75:]
    assert reader.encode(prompt).ids[0, 1:76].tolist() == kept
    assert len(reader._written_out(prompt)) < 3 * len(prompt)


def test_a_name_that_ends_in_one_and_stands_for_nothing_is_a_token_like_others(
    miniature_bundle: Path,
) -> None:
    file = TokenizersTokenizer.from_file(str(miniature_bundle / "tokenizer" / "tokenizer.json"))
    file.add_tokens([AddedToken("<catty>_1", normalized=False)])
    assert Tokenizer(file, 77).encode("<catty>_1 moon").texts == ["<catty>_1", "moon"]


def test_an_emoji_is_the_text_of_each_of_its_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a 🐈")
    assert tokens.texts == ["a", "🐈", "🐈", "🐈", "🐈"]


def test_a_prompt_that_fits_exactly_is_not_truncated_and_one_more_word_is(tokenizer: Tokenizer) -> None:
    fits = tokenizer.encode("cat " * 75)
    assert len(fits.own) == 75
    assert not fits.truncated
    more = tokenizer.encode("cat " * 76)
    assert more.truncated
    np.testing.assert_array_equal(more.ids, fits.ids)
    assert more.ids[0, -1] == tokenizer.encode("").ids[0, -1]  # the end token is kept


@pytest.mark.parametrize("direction", ["Right", "Left"])
def test_padding_is_what_the_file_says(bundle_copy: Path, direction: str) -> None:
    folder = bundle_copy / "tokenizer"
    edit(folder, "padding", direction=direction, pad_id=7)
    library = TokenizersTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    for prompt in ("", "the Red moon", "cat " * 80):
        tokens, expected = tokenizer.encode(prompt), library.encode(prompt)
        assert tokens.ids.tolist() == [expected.ids]
        assert tokens.own == [
            place for place, special in enumerate(expected.special_tokens_mask) if not special
        ]


@pytest.mark.parametrize("without", [("truncation",), ("padding",), ("truncation", "padding")])
def test_a_tokenizer_without_a_length_is_refused(bundle_copy: Path, without: tuple[str, ...]) -> None:
    path = bundle_copy / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | dict.fromkeys(without)))
    with pytest.raises(BundleError, match=r"tokenizer\.json must pad and truncate"):
        Tokenizer.load(path.parent)


@pytest.mark.parametrize("strategy", [{"Fixed": 64}, {"Fixed": 80}, "BatchLongest"])
def test_a_tokenizer_that_pads_to_another_length_than_it_truncates_to_is_refused(
    bundle_copy: Path, strategy: Any
) -> None:
    edit(bundle_copy / "tokenizer", "padding", strategy=strategy)
    with pytest.raises(BundleError, match=r"tokenizer\.json must pad and truncate to one length"):
        Tokenizer.load(bundle_copy / "tokenizer")


def edit(folder: Path, part: str, **changes: Any) -> None:
    replace(folder, part, json.loads((folder / "tokenizer.json").read_bytes())[part] | changes)


def replace(folder: Path, part: str, state: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {part: state}))


@pytest.mark.parametrize(
    ("padding", "truncation"),
    [
        ({"strategy": {"Fixed": 10**8}}, {"max_length": 10**8}),
        ({"pad_to_multiple_of": 10**9}, {}),
    ],
)
def test_a_tokenizer_that_pads_beyond_memory_is_refused_before_it_reads_anything(
    bundle_copy: Path, padding: dict[str, Any], truncation: dict[str, Any]
) -> None:
    """The library would end the process, which no handler catches."""
    edit(bundle_copy / "tokenizer", "padding", **padding)
    edit(bundle_copy / "tokenizer", "truncation", **truncation)
    write_manifest(bundle_copy)
    for load in (
        lambda: Tokenizer.load(bundle_copy / "tokenizer"),
        lambda: Tokenizer.open(Bundle.open(bundle_copy)),
    ):
        with pytest.raises(BundleError, match=r"tokenizer\.json (makes 100000000 tokens|must pad)"):
            load()


def test_a_tokenizer_that_fails_on_prompts_is_refused_when_it_is_loaded(bundle_copy: Path) -> None:
    """On this one, which wants a second prompt, the library panics, which is no Exception."""
    second = {"Sequence": {"id": "B", "type_id": 0}}
    replace(bundle_copy / "tokenizer", "post_processor", TEMPLATE | {"single": [second]})
    with pytest.raises(
        BundleError, match=r"tokenizer\.json is not a tokenizer that works: index out of bounds"
    ):
        Tokenizer.load(bundle_copy / "tokenizer")


PROMPT = {"Sequence": {"id": "A", "type_id": 0}}
START = {"SpecialToken": {"id": "x", "type_id": 0}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [START, PROMPT],
    "pair": [],
    "special_tokens": {"x": {"id": "x", "ids": [1], "tokens": ["x"]}},
}
LONG = "x" * 1_000_000
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
BETWEEN = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}  # all characters
MODEL = {
    "type": "WordPiece",
    "vocab": {"a": 0},
    "unk_token": "a",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
}


@pytest.mark.parametrize(
    ("part", "state", "why"),
    [
        ("normalizer", BETWEEN | {"content": "x" * 100_000}, "several characters in the place"),
        ("normalizer", {"type": "Sequence", "normalizers": [BETWEEN] * 40}, "its normalizer has other steps"),
        ("normalizer", {"type": "Prepend", "prepend": LONG}, "its normalizer has other steps"),
        ("normalizer", {"type": "NFKC"}, "its normalizer has other steps"),
        ("normalizer", {"prepend": LONG}, "'type'"),  # as earlier versions of the library wrote it
        ("normalizer", [LONG], ""),  # which it reads as the same
        ("normalizer", {"type": "Sequence", "normalizers": [[{"Regex": "."}, LONG]]}, ""),
        (
            "normalizer",
            {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
            "its normalizer has other steps",
        ),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [BYTES] * 40},
            "its pre_tokenizer has other steps",
        ),
        ("post_processor", [[PROMPT] * 5, [], {}], ""),
        ("post_processor", TEMPLATE | {"single": [PROMPT] * 2}, "too much around a prompt"),
        ("post_processor", TEMPLATE | {"single": [START] * 8 + [PROMPT]}, "too much around a prompt"),
        (
            "post_processor",
            TEMPLATE | {"special_tokens": {"x": {"id": "x", "ids": [1] * 9, "tokens": ["x"] * 9}}},
            "too much around a prompt",
        ),
        ("post_processor", {"type": "BertProcessing", "sep": [LONG, 1], "cls": [LONG, 1]}, "states too much"),
        ("model", MODEL | {"type": "WordLevel"}, "its model has other steps"),
        ("model", MODEL | {"max_input_chars_per_word": 101}, "words of more than 100 characters"),
        ("model", MODEL | {"continuing_subword_prefix": LONG}, "states too much"),
        ("model", MODEL | {"unk_token": LONG, "vocab": {LONG: 0}}, "states too much"),
    ],
)
def test_a_tokenizer_that_makes_too_much_of_a_prompt_is_refused_before_it_reads_anything(
    bundle_copy: Path, part: str, state: Any, why: str
) -> None:
    """The library would end the process, or be at it for minutes."""
    replace(bundle_copy / "tokenizer", part, state)
    with pytest.raises(BundleError, match=rf"tokenizer\.json is not a tokenizer that works: .*{why}"):
        Tokenizer.load(bundle_copy / "tokenizer")


@pytest.mark.parametrize(
    ("part", "changes", "why"),
    [
        ("truncation", {"stride": 70}, "reads what does not fit several times"),
        ("padding", {"pad_token": LONG}, "states too much"),
        ("model", {"end_of_word_suffix": LONG}, "states too much"),
    ],
)
def test_a_setting_that_takes_too_much_memory_is_refused_before_anything_is_read(
    bundle_copy: Path, part: str, changes: dict[str, Any], why: str
) -> None:
    edit(bundle_copy / "tokenizer", part, **changes)
    with pytest.raises(BundleError, match=rf"tokenizer\.json is not a tokenizer that works: it {why}"):
        Tokenizer.load(bundle_copy / "tokenizer")


def test_a_tokenizer_of_berts_kind_is_read(bundle_copy: Path) -> None:
    words = {word: number for number, word in enumerate(("[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s"))}
    document = {
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
        | {"strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
        "model": MODEL | {"unk_token": "[UNK]", "vocab": words},
    }
    for part, state in document.items():
        replace(bundle_copy / "tokenizer", part, state)
    tokens = Tokenizer.load(bundle_copy / "tokenizer").encode("The cats")
    assert tokens.ids[0, :5].tolist() == [1, 3, 4, 5, 2]
    assert tokens.texts == ["The", "cat", "s"]


def test_added_tokens_that_take_the_library_hours_are_refused(bundle_copy: Path) -> None:
    path = bundle_copy / "tokenizer" / "tokenizer.json"
    document = json.loads(path.read_bytes())
    document["added_tokens"].append(document["added_tokens"][0] | {"content": "x" * 1_000_000, "id": 5000})
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"tokenizer\.json .* added tokens are too long"):
        Tokenizer.load(path.parent)


def test_what_the_library_quotes_of_a_file_steers_no_terminal(bundle_copy: Path) -> None:
    replace(bundle_copy / "tokenizer", "version", "\x1b[2J")
    with pytest.raises(BundleError, match=r"Unknown tokenizer version '\?\[2J'") as refused:
        Tokenizer.load(bundle_copy / "tokenizer")
    assert refused.value.message.isprintable()


def test_a_tokenizer_that_fails_on_a_prompt_alone_is_told_of_by_name(bundle_copy: Path) -> None:
    """It reads what it is tried on when it is loaded. Of what it has no word for the library raises an Exception."""
    replace(bundle_copy / "tokenizer", "model", MODEL | {"unk_token": "missing"})
    tokenizer = Tokenizer.load(bundle_copy / "tokenizer")
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer that works: .*UNK"):
        tokenizer.encode("zebra")


def test_a_tokenizer_that_puts_more_around_a_prompt_than_it_says_is_refused(bundle_copy: Path) -> None:
    replace(bundle_copy / "tokenizer", "post_processor", TEMPLATE | {"single": [START] * 7 + [PROMPT]})
    edit(bundle_copy / "tokenizer", "padding", strategy={"Fixed": 5})
    edit(bundle_copy / "tokenizer", "truncation", max_length=5)
    with pytest.raises(BundleError, match=r"tokenizer\.json makes more than 5 tokens"):
        Tokenizer.load(bundle_copy / "tokenizer").encode("a cat")


def test_the_largest_id_is_the_vocabularys_unless_padding_has_a_larger_one(
    bundle_copy: Path, tokenizer: Tokenizer
) -> None:
    assert tokenizer.largest == (tokenizer.vocabulary - 1,)
    edit(bundle_copy / "tokenizer", "padding", pad_id=70_000)
    padded = Tokenizer.load(bundle_copy / "tokenizer", second=tokenizer)
    assert padded.largest == (70_000, tokenizer.vocabulary - 1)


def test_a_tokenizer_without_words_is_refused(bundle_copy: Path) -> None:
    """There is no largest id among none."""
    replace(bundle_copy / "tokenizer", "added_tokens", [])
    edit(bundle_copy / "tokenizer", "model", vocab={}, merges=[], unk_token=None)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer that works: it has no words"):
        Tokenizer.load(bundle_copy / "tokenizer")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_too_little_memory_is_no_fault_of_the_file(
    miniature_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: str) -> None:
        raise MemoryError

    tokenizer = Tokenizer.load(miniature_bundle / "tokenizer")
    monkeypatch.setattr(tokenizer, "_tokenizer", SimpleNamespace(encode=full))
    with pytest.raises(MemoryError):
        tokenizer.encode("a cat")
