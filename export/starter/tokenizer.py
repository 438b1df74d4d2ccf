"""A byte-level BPE of the starter's own, in the format CLIP's tokenizer reads.

Every byte is in the vocabulary, so any Unicode text has token ids; words of the world become one token each.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, CLIPTokenizerFast

from export.starter.world import caption, sample_scenes

MAX_LENGTH = 40  # tokens, start and end included; the longest caption of the world needs 32
VOCABULARY = 1024
START, END = "<|startoftext|>", "<|endoftext|>"

# CLIP's own splitting of text into words: contractions, letters, single digits, runs of anything else.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train_tokenizer(folder: Path, captions: list[str] | None = None) -> CLIPTokenizer:
    """Learn merges from captions of the generators' split; write vocab.json and merges.txt, load what was written."""
    if captions is None:
        rng = np.random.default_rng(0)
        captions = [caption(scene, rng) for scene in sample_scenes("generators", 20_000, seed=0)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(alphabet) - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # The order CLIP uses: bytes, bytes that end a word, merges, then the two special tokens.
    tokens = [
        *alphabet,
        *(byte + "</w>" for byte in alphabet),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
    )
    made = CLIPTokenizer(
        folder / "vocab.json",
        folder / "merges.txt",
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    )
    made.save_pretrained(folder)
    return made


def token_ids(tokenizer: CLIPTokenizer | CLIPTokenizerFast, prompts: list[str]) -> np.ndarray:
    """int64 [N, MAX_LENGTH], as a StableDiffusionPipeline would make them."""
    return tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="np",
    ).input_ids
