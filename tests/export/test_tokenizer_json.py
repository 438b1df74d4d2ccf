"""The tokenizer.json that the edge reads gives the ids that transformers' CLIPTokenizer gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import BertTokenizer, CLIPTokenizer, CLIPTokenizerFast

from edge_agent.tokens import Tokenizer
from export import tokenizer_json
from export.errors import ExportError
from tests.miniature import miniature_tokenizer


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return miniature_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ours(slow: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("written")
    tokenizer_json.convert(slow).save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """As StableDiffusionPipeline asks for them."""
    return list(tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids)


@pytest.mark.parametrize("text", [*tokenizer_json.PROBES, "<|STARTOFTEXT|> A <|EndOfText|> cat"], ids=ascii)
def test_ids_equal_clips(slow: CLIPTokenizer, ours: Tokenizer, text: str) -> None:
    assert ours.encode(text).ids[0].tolist() == ids(slow, text)


# Blocks whose properties have not changed for many versions of Unicode: libraries differ on newer ones.
SETTLED = st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Z"), max_codepoint=0x24FF)
EMOJI = st.sampled_from("🐈🌙🏖👍🏽👩\u200d🔥❤\ufe0f✨🇩🇪")


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.one_of(SETTLED, EMOJI, st.sampled_from("abc 'sΣσ猫"))))
def test_ids_equal_clips_on_any_settled_text(slow: CLIPTokenizer, ours: Tokenizer, text: str) -> None:
    assert ours.encode(text).ids[0].tolist() == ids(slow, text)


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_a_tokenizer_that_pads_or_cuts_off_in_front_does_so_here(tmp_path: Path, side: str) -> None:
    tokenizer = miniature_tokenizer(tmp_path)
    setattr(tokenizer, side, "left")
    converted = Tokenizer(tokenizer_json.convert(tokenizer), 77)
    for text in ("a red cat", "word " * 300 + "cat"):
        assert converted.encode(text).ids[0].tolist() == ids(tokenizer, text)


def test_a_fast_tokenizer_is_taken_as_it_is(slow: CLIPTokenizer, tmp_path: Path) -> None:
    slow.save_pretrained(tmp_path)
    fast = CLIPTokenizerFast.from_pretrained(tmp_path)
    converted = Tokenizer(tokenizer_json.convert(fast), 77)
    for text in tokenizer_json.PROBES:
        assert converted.encode(text).ids[0].tolist() == ids(fast, text)


def test_a_conversion_that_differs_is_refused_naming_the_text(tmp_path: Path) -> None:
    """A tokenizer that does something more than CLIP's is not silently replaced by CLIP's."""

    class Shouting(CLIPTokenizer):
        def _tokenize(self, text: str) -> list[str]:
            return [*super()._tokenize(text), "a</w>"]

    miniature_tokenizer(tmp_path)
    other = Shouting(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=77)
    with pytest.raises(ExportError, match="differs from Shouting on the text"):
        tokenizer_json.convert(other)


@pytest.mark.parametrize("fast", [False, True])
def test_tokens_that_were_added_are_found_where_the_tokenizer_finds_them(tmp_path: Path, fast: bool) -> None:
    """As textual inversion adds them; the slow tokenizer knows them in their own case alone."""
    tokenizer = miniature_tokenizer(tmp_path)
    if fast:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = CLIPTokenizerFast.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<Catty>", "sks"])
    converted = Tokenizer(tokenizer_json.convert(tokenizer), 77)
    for text in ("a <Catty> of sks on the beach", "a SKS Sks, two<catty>s<Catty>", "sks"):
        encoded = converted.encode(text)
        assert encoded.ids[0].tolist() == ids(tokenizer, text)
    assert (encoded.texts, encoded.own) == (["sks"], [1])


def test_a_token_that_takes_blanks_along_is_shown_without_them(tmp_path: Path) -> None:
    tokenizer = miniature_tokenizer(tmp_path)
    tokenizer.add_tokens(AddedToken("sks", lstrip=True, rstrip=True))
    encoded = Tokenizer(tokenizer_json.convert(tokenizer), 77).encode("a  sks  cat")
    assert encoded.ids[0].tolist() == ids(tokenizer, "a  sks  cat")
    assert encoded.texts == ["a", "sks", "cat"]


def test_a_conversion_that_loses_an_added_token_is_refused(tmp_path: Path) -> None:
    class Forgetting(CLIPTokenizer):
        def tokenize(self, text: str, **options: object) -> list[str]:
            return super().tokenize(text.replace("<catty>", "cat"), **options)

    miniature_tokenizer(tmp_path)
    other = Forgetting(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=77)
    tokenizer_json.convert(other)
    other.add_tokens("<catty>")
    with pytest.raises(ExportError, match="differs from Forgetting on the text 'a <catty>"):
        tokenizer_json.convert(other)


def test_a_fast_tokenizer_that_the_edge_would_not_read_is_refused(
    slow: CLIPTokenizer, tmp_path: Path
) -> None:
    slow.save_pretrained(tmp_path)
    fast = CLIPTokenizerFast.from_pretrained(tmp_path)
    fast.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(
        ExportError, match="read a CLIPTokenizerFast like this: its normalizer has other steps"
    ):
        tokenizer_json.convert(fast)


def test_another_kind_of_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(ExportError, match="BertTokenizer is not supported"):
        tokenizer_json.convert(BertTokenizer(str(tmp_path / "vocab.txt")))
