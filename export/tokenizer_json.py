"""Write a CLIP tokenizer as the one tokenizer.json that runs without transformers, and prove that it is the
same.

transformers' CLIPTokenizer cleans its text in one of two ways: with ftfy where that is installed, otherwise
with BERT's basic tokenizer, which also puts spaces around Chinese characters. The conversion in transformers
knows neither; here the second is rebuilt, and text that ftfy would repair is left out. Besides, BERT's drops characters
that the running Python's Unicode does not know yet, such as the emoji of later years, which the edge reads.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from diffusers.loaders import TextualInversionLoaderMixin
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import CLIPConverter

from edge_agent import tokens
from export.errors import ExportError
from export.source import quiet

# What the written file is compared on: cases, contractions, digits, scripts, combining marks, emoji, blanks,
# controls, the names of special tokens, more than fits.
PROBES = (
    "",
    "A photo of an astronaut riding a horse on Mars, highly detailed, 4k",
    "it's the cat's; they'll say I'm here, you've DON'T",
    "  blanks \t\n around   and between  ",
    "Straße, naïve café, ÅNGSTRÖM, ﬁne ½ Ⅷ İstanbul ΟΔΥΣΣΕΥΣ Σ ǀΣ Α'Σ",
    "cafe\u0301 and a\u0308",
    "一只猫在月亮上 two 猫s ねこ 고양이",
    "кошка на пляже, قطة, חתול, बिल्ली, แมว",
    "🐈 👩‍👩‍👧‍👦 two 🏳️‍🌈flags 👍🏽",
    "100% (really) -- [x] {y} <z> a_b #tag @you $5.00 & more…",
    "wow! so many!! cats !",  # the padding token of Stable Diffusion XL's second tokenizer
    "zero\u200bwidth soft\u00adhyphen no\u00a0break \ufeffmark \u2028line",
    "<|startoftext|> inside <|endoftext|> text",
    "word " * 300,
    "🐈‍⬛" * 100,
)

_CASED, _MARK = r"[\p{Cased}&&\P{Case_Ignorable}]", r"\p{Case_Ignorable}"
_LAST_SIGMA = f"(?<={_CASED}|{_CASED}{_MARK})Σ(?!{_MARK}*{_CASED})"  # Unicode's Final_Sigma


def convert(tokenizer: Any) -> Tokenizer:
    """A tokenizers.Tokenizer that pads and truncates every prompt to the model's length.

    Raises:
        ExportError: the tokenizer is no CLIP tokenizer, its files do not fit together, or the result is not what the
            edge reads, or differs from it on one of `PROBES` or on a token that was added to it.
    """
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        converted = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    elif isinstance(tokenizer, CLIPTokenizer):
        _refuse_unfit(tokenizer)
        try:
            converted = CLIPConverter(tokenizer).converted()
        except Exception as error:  # tokenizers raises nothing more special
            reason = " ".join(str(error).split())
            raise ExportError(f"vocab.json and merges.txt cannot be converted: {reason}") from error
        converted.add_special_tokens(
            [_as_written(token) for token in tokenizer.added_tokens_decoder.values()]
        )
        if tokenizer.fix_text is None:
            converted.normalizer = normalizers.Sequence(
                [
                    normalizers.BertNormalizer(
                        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
                    ),
                    normalizers.NFC(),
                    # Python lowers a sigma at the end of a word differently; tokenizers goes letter by
                    # letter. More than one mark, such as an apostrophe, before it is left out.
                    normalizers.Replace(Regex(_LAST_SIGMA), "ς"),
                    normalizers.Lowercase(),
                ]
            )
    else:
        raise ExportError(
            f"{type(tokenizer).__name__} is not supported; CLIPTokenizer and fast tokenizers are"
        )
    length = tokenizer.model_max_length
    converted.enable_truncation(length, direction=tokenizer.truncation_side)
    converted.enable_padding(
        direction=tokenizer.padding_side,
        length=length,
        pad_id=tokenizer.pad_token_id,
        pad_token=tokenizer.pad_token,
    )
    written = converted.to_str()
    try:
        tokens.check(json.loads(written))
    except ValueError as error:
        raise ExportError(
            f"the edge does not read a {type(tokenizer).__name__} like this: {error}"
        ) from error
    as_read = tokens.Tokenizer(Tokenizer.from_str(written), length)
    _compare(tokenizer, as_read)
    return converted


def unmade(tokenizer: Any) -> list[str]:
    """The tokens of vocab.json that no merge of merges.txt makes; there are none where both are whole.

    A fast tokenizer was made of one file.
    """
    if not isinstance(tokenizer, CLIPTokenizer):
        return []
    made = {"".join(merge) for merge in tokenizer.bpe_ranks}
    special = {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens}
    return [
        token
        for token in tokenizer.encoder
        if len(token.removesuffix("</w>")) > 1 and token not in made and token not in special
    ]


def _refuse_unfit(tokenizer: CLIPTokenizer) -> None:
    known = tokenizer.encoder
    for merge, place in tokenizer.bpe_ranks.items():
        if len(merge) != 2 or not all(token in known for token in (*merge, "".join(merge))):
            raise ExportError(
                f"line {place + 2} of merges.txt, {' '.join(merge)!r}, makes no token of vocab.json: one of the two "
                "files is cut off or of another model; get both again"
            )


def _as_written(token: AddedToken) -> AddedToken:
    """CLIPTokenizer looks for what was added to it, such as a learnt concept's token, before it lowers the text."""
    if token.special:  # its own, which it was made with
        return token
    # Without the blanks that it may take along: they make no ids, and would be shown as the token's own.
    return AddedToken(token.content, normalized=False)


def _probes(tokenizer: Any) -> list[str]:
    """PROBES, and a text with each token that was added: among words, in capitals, against a word, twice."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if not token.special]
    return [
        *PROBES,
        *(f"a {token} on {token.upper()} {token.lower()}, two{token}{token}s" for token in added),
    ]


def _compare(tokenizer: Any, converted: tokens.Tokenizer) -> None:
    fix_text = getattr(tokenizer, "fix_text", None)
    several = tokens.concepts(getattr(tokenizer, "added_tokens_encoder", ()))
    for text in _probes(tokenizer):
        if fix_text is not None and fix_text(text) != text:
            continue
        read = text
        if several:
            with quiet(logging.ERROR):  # it warns of text that is longer than the model reads
                read = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
        expected = tokenizer(
            read, padding="max_length", max_length=converted.length, truncation=True
        ).input_ids
        if converted.encode(text).ids[0].tolist() != expected:
            raise ExportError(
                f"tokenizer.json differs from {type(tokenizer).__name__} on the text {text[:60]!r}"
            )
