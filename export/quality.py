"""How good an image is: contrastive metrics, each a pair of texts, measured with any CLIP; and, optional, Adherence.

q(I, m) = sigmoid(CLIP(I, m+) - CLIP(I, m-)), CLIP being the scaled cosine similarity (RouteT2I, arXiv 2411.13787).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor, CLIPTextConfig, PreTrainedTokenizerBase

from cloud_server import hub
from export.errors import ExportError, reason
from export.metrics import load_metrics
from export.starter.shipped import STARTER_JUDGE

LEGACY_END = 2
"""The end's id in the configuration of CLIP's first releases, whatever it is: with it transformers takes the largest id
of a sentence for the end."""

VIEWS = (-0.25, -0.125, 0, 0.125, 0.25)
"""Where a CLIP's patches begin, in patches down and right: it is asked of each picture so moved, and the mean counts.

A fault that a border between patches cuts looks other than one within a patch. The judge before told spoiled pictures
from whole ones better so, by damages it knew (severity 0.3): d' 1.88, of one view 1.78, of three 1.87. Damages it had
not met were looked at too before five were chosen: of 600 pictures realism fell in 95.3 %, with one view in 93.0, with
three in 94.5 or, moved twice as far, 95.0.
"""


class Judge:
    """Measures images with the CLIP in ``model``, a folder or a hub id, of any size and with any tokenizer of its own.

    Raises ExportError where it is none, or its parts do not belong together.
    """

    def __init__(self, model: Path | str = STARTER_JUDGE) -> None:
        self.metrics = load_metrics()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        clip, self.processor = _open(model)
        try:
            self.clip = clip.to(self.device).eval()
        except torch.OutOfMemoryError as error:
            raise ExportError(
                f"{model} does not fit the GPU's memory: free some, or name a smaller CLIP"
            ) from error
        self.digest = _digest(self.clip)
        texts = [text for metric in self.metrics for text in (metric.positive, metric.negative)]
        read = self._read(texts)
        self.directions = read[0::2] - read[1::2]  # [M, D]: a score is then one product
        try:
            self.quality([Image.new("RGB", (64, 64))])
        except (ValueError, RuntimeError) as error:
            raise ExportError(
                f"{model}: its image processor makes pictures that its vision model does not take ({reason(error)})"
            ) from error
        self.preprocessing = _preprocessing(self.processor, texts)

    def quality(self, images: Sequence[Image.Image]) -> np.ndarray:
        """float32 [N, M] in (0, 1), a row an image, a column a metric."""
        return self.quality_of(self.look(images))

    def look(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """What is seen of each image, [N, D]: the mean of its views' unit features. A product with it is the views'."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        height, width = pixels.shape[-2:]
        patch = self.clip.config.vision_config.patch_size
        moves = sorted({round(part * patch) for part in VIEWS})
        margin = max(moves)
        framed = F.pad(pixels, [margin] * 4, mode="replicate") if margin else pixels
        total = torch.zeros((), device=self.device)
        for start in (margin + move for move in moves):
            view = framed[..., start : start + height, start : start + width]
            with torch.inference_mode():
                seen = self.clip.get_image_features(pixel_values=view)
                total = total + seen / seen.norm(dim=-1, keepdim=True)
        return total / len(moves)

    def quality_of(self, seen: torch.Tensor) -> np.ndarray:
        """`quality` of what `look` has seen."""
        with torch.inference_mode():
            return torch.sigmoid(seen @ self.directions.T).float().cpu().numpy()

    def adherence_of(
        self, seen: torch.Tensor, prompts: Sequence[str], negatives: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """float32 [N] in (0, 1): how much more each image is like its prompt than like the prompt's hard negatives.

        The mean over the negatives of sigmoid(CLIP(I, prompt) - CLIP(I, negative)): 0.5 is an image, or a CLIP, that
        does not tell them apart. NaN for a prompt without negatives. ``seen`` is of `look`.
        """
        scores = np.full(len(prompts), np.nan, np.float32)
        said = list(
            dict.fromkeys(text for row in zip(prompts, negatives, strict=True) for text in (row[0], *row[1]))
        )
        place = {text: index for index, text in enumerate(said)}
        read = self._read(said)
        with torch.inference_mode():
            for row, (prompt, wrong) in enumerate(zip(prompts, negatives, strict=True)):
                if wrong:
                    better = read[place[prompt]] - read[[place[text] for text in wrong]]
                    scores[row] = torch.sigmoid(better @ seen[row]).mean().item()
        return scores

    def _read(self, texts: Sequence[str]) -> torch.Tensor:
        """Scale * unit features of each text, [T, D]."""
        length = min(
            self.processor.tokenizer.model_max_length, self.clip.config.text_config.max_position_embeddings
        )
        tokens = self.processor(
            text=list(texts), padding=True, max_length=length, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            read = self.clip.get_text_features(
                input_ids=tokens["input_ids"].to(self.device),
                attention_mask=tokens["attention_mask"].to(self.device),
            )
            return self.clip.logit_scale.exp() * read / read.norm(dim=-1, keepdim=True)


def _open(model: Path | str) -> tuple[CLIPModel, CLIPProcessor]:
    try:
        kept = hub.out_of_reach(model)
        clip, found = CLIPModel.from_pretrained(model, output_loading_info=True, local_files_only=kept)
        clip = clip.float()  # the option that says so is called otherwise in transformers 4 and 5
        processor = CLIPProcessor.from_pretrained(model, use_fast=False, local_files_only=kept)
    except Exception as error:  # each part's library fails in its own way
        raise ExportError(
            f"{model} cannot be opened as a CLIP ({reason(error)}): name a folder or hub id with a CLIP, "
            "its tokenizer and its image processor"
        ) from error
    if missing := sorted(found["missing_keys"]):  # transformers would draw them at random
        raise ExportError(f"{model} is no CLIP: it has no weights {missing[0]} and {len(missing) - 1} more")
    text, tokenizer = clip.config.text_config, processor.tokenizer
    if not _belong_together(text, tokenizer):
        end = (
            f"the largest id (its configuration's {LEGACY_END})"
            if _is_legacy(text, tokenizer)
            else text.eos_token_id
        )
        raise ExportError(
            f"{model}: its tokenizer is another model's: {len(tokenizer)} tokens, end {tokenizer.eos_token_id}, where "
            f"the text model has {text.vocab_size} and {end}"
        )
    return clip, processor


def _belong_together(text: CLIPTextConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    if not _is_legacy(text, tokenizer):
        return len(tokenizer) <= text.vocab_size and text.eos_token_id == tokenizer.eos_token_id
    # Such a model has no place for tokens that were added, and what it takes for the end has to be it.
    ids = tokenizer("a picture")["input_ids"]
    return len(tokenizer) == text.vocab_size and max(ids) == ids[-1] == tokenizer.eos_token_id


def _is_legacy(text: CLIPTextConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    return text.eos_token_id == LEGACY_END != tokenizer.eos_token_id


def _preprocessing(processor: CLIPProcessor, texts: Sequence[str]) -> str:
    """SHA-256 of what becomes of a made-up picture and of the texts before the model sees them, and of the vocabulary.

    Of what is done, not of the files that say so: these differ from release to release, and mean the same.
    """
    colours = np.arange(97 * 131 * 3).astype(np.uint8).reshape(97, 131, 3)  # to be resized, and cropped
    pixels = processor(images=[Image.fromarray(colours)], return_tensors="np")["pixel_values"]
    ids = [processor.tokenizer(text)["input_ids"] for text in texts]
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(pixels.tobytes() + repr((pixels.shape, ids, vocabulary)).encode()).hexdigest()


def _digest(model: CLIPModel) -> str:
    """SHA-256 of the weights, wherever they were loaded from, and of VIEWS: who measured is part of a measurement."""
    summed = hashlib.sha256(repr(VIEWS).encode())
    for name, tensor in sorted(model.state_dict().items()):
        summed.update(name.encode())
        summed.update(tensor.cpu().numpy().tobytes())
    return summed.hexdigest()
