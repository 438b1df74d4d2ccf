"""The predictor's model: a mixture of experts, one a metric, with token selection and a dual gate.

Follows RouteT2I (arXiv 2411.13787). For the states ``T[t]`` of a prompt's own tokens and the expert of metric ``m``

1. gate       ``A[t, m] = softmax over experts of T[t] . E_m``; the expert keeps the K tokens with the largest gate;
2. dual gate  ``T+[t] = T[t] P+_m S_m`` and ``T-[t] = T[t] P-_m S_m``, the second factor shared by both signs;
3. contrast   ``C[t] = sigmoid(T+[t] - T-[t])``: does this token help or hurt this metric;
4. head       of each metric, read from the contrasts of the tokens kept.

What the paper leaves open, and is chosen here:

- The softmax runs over the experts *and one more choice, none of them* (logit 0). A token's gate is then its own
  affair: it does not change when another token is deleted, and it still means something with one expert only.
- The head is a sum over tokens, ``logit = bias + sum_t A[t, m] (C[t] - 1/2) . w_m``. A contrast of one half is
  undecided and adds nothing; what one token adds is what is lost without it. Two such sums a metric, one for the
  *level* of both models and one for the *gap* between them, give ``edge = sigmoid(level - gap / 2)`` and
  ``cloud = sigmoid(level + gap / 2)``. The gap is the smaller signal and the one that routes: it has weights of its
  own.
- A token may be read with an *embedding of its own* beside its state, the same wherever the word stands. The encoder
  writes each word into its neighbours' states: from states alone much of what a word does is learnt of others. Zero for
  tokens that training never met, of which the state speaks alone. The paper reads states only (``words=0``).
- What words say *together* is read by a transformer layer over the prompt's tokens, pooled by attention. Pooling is a
  sum too: each token's part of it is one more term of the token's. In training the layer sees only the words of some
  tokens and not their states, so that it learns of words what can be learnt of words. The paper has none
  (``sentence=0``).
- ``pull[t, m]`` is the token's term in the gap's sum: ``logit(cloud) - logit(edge) = bias + sum_t pull[t]`` exactly.
  Training asks more of it (``Recipe.deletion_weight``): to be what the gap loses when the token is deleted and the rest
  encoded again, without the token's traces in its neighbours' states.

Between the two gates stands nothing that is not linear, so that ``T+ - T- = T (P+ - P-) S``: both signs together can
say what one could. They differ in how they learn. The exported graph therefore carries one folded gate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from export.errors import ExportError, reason

WORDS, SENTENCE = 16, 128
"""Length of the embedding of its own that experts read of a token (32 and 64 ranked validation prompts of earlier
labels no better), and width of the layer that reads tokens together: of half as many prompts two mixtures learnt to a
validation loss of 3.41 with 64, of 3.08 with 128, of 3.18 with 192."""

_NOT = -1e9  # a score that softmax makes nothing of


@dataclass(frozen=True)
class Shape:
    """Sizes of the mixture; ``selection`` and ``dual_gate`` switch parts of it off for ablations."""

    width: int
    """d, length of one token state."""
    metrics: int
    """Experts: one a metric; one in all for the single-metric ablation."""
    kept: int = 16
    """K. Half of the starter's captions have up to 14 tokens of their own and are kept whole; of the longest, with 22
    to 30, the words that say what is in the picture fit and those that only decorate the sentence do not."""
    rank: int = 8
    """l. Difficulty has a handful of sources, and l(2d + h) weights an expert are learnt from thousands of prompts."""
    hidden: int = 32
    """h. As many contrasts a token as the head may weigh; four times l, beyond which validation did not gain."""
    selection: bool = True
    dual_gate: bool = True
    words: int = 0
    """Length of the embedding that each token has of its own; 0 for none."""
    sentence: int = 0
    """Width of the layer that reads the tokens together, and of the embeddings it has of them; 0 for none."""
    vocabulary: int = 0
    """Ids that the tokenizer gives, where there are embeddings."""
    met: int = 0
    """How many of them are in the training prompts: only those have embeddings."""


class Own:
    """Where in a batch of padded prompts their own tokens are. Half of a batch is padding: what is done to each
    token by itself is not done there.
    """

    def __init__(self, mask: Tensor) -> None:
        """``mask [B, L]`` is true on the T tokens."""
        self.mask = mask
        self.index = mask.flatten().nonzero()[:, 0]  # [T]
        self.prompts = self.index // mask.shape[1]  # [T]
        self.positions = (mask.cumsum(1) - 1)[mask]  # [T], the first in its prompt in position 0
        # [B, L], added to what softmax weighs.
        self.silence = torch.zeros(mask.shape).masked_fill_(~mask, _NOT)

    def padded(self, values: Tensor) -> Tensor:
        """``[T, n] -> [B, L, n]``, with zeros between."""
        flat = values.new_zeros(self.mask.numel(), values.shape[1]).index_copy(0, self.index, values)
        return flat.unflatten(0, tuple(self.mask.shape))

    def packed(self, values: Tensor) -> Tensor:
        """``[B, L, ...] -> [T, ...]``."""
        return values.flatten(0, 1).index_select(0, self.index)

    def summed(self, values: Tensor) -> Tensor:
        """``[T, n] -> [B, n]``, over the tokens of each prompt."""
        return values.new_zeros(len(self.mask), values.shape[1]).index_add(0, self.prompts, values)


class Inputs(nn.Module):
    """What is read of a token: its state, standardised, and the row that embeddings have for its word."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape.width))
        self.register_buffer("deviation", torch.ones(shape.width))
        # Row 0 is that of all tokens that no training prompt has.
        self.register_buffer("row", torch.zeros(max(shape.vocabulary, 1), dtype=torch.long))
        self.met = shape.met

    def start_from(self, states: Tensor, ids: Tensor) -> None:
        """Standardise by ``states [tokens, d]``, and give each of ``ids [tokens]`` its row."""
        if self.met:
            self.row[torch.unique(ids)] = torch.arange(1, 1 + self.met)
        self.mean = states.mean(0)
        self.deviation = states.std(0).clamp_min(1e-6)

    def forward(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``states [T, d], ids [T]``, standardised and as rows."""
        rows = self.row[ids] if self.met else torch.zeros_like(ids)
        return (states - self.mean) / self.deviation, rows


class Dropout(nn.Module):
    """`nn.Dropout`, which on a CPU draws its bits one after the other and takes three times as long."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, values: Tensor) -> Tensor:
        """``values``, in training some of them zero and the rest larger."""
        if not self.training or not self.share:
            return values
        return values * (torch.rand_like(values) >= self.share) / (1 - self.share)


class Together(nn.Module):
    """What tokens say together: one transformer layer, pooled by attention."""

    HEADS = 4
    DROPOUT = 0.1
    POSITIONS = 128
    """Tokens beyond so many share the last one's position. CLIP reads 77."""

    def __init__(self, shape: Shape, outputs: int, masked: float) -> None:
        """Says `outputs` numbers; `masked` is the share of the tokens whose state it does not see in training."""
        super().__init__()
        self.masked, width = masked, shape.sentence
        self.words = nn.Parameter(torch.randn(1 + shape.met, width) * 0.5)
        self.positions = nn.Parameter(torch.randn(self.POSITIONS, width) * 0.1)
        self.narrow = nn.Linear(shape.width, width, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.pool = nn.Linear(width, 1, bias=False)
        self.out = nn.Linear(width, outputs, bias=False)
        self.dropout = Dropout(self.DROPOUT)
        with torch.no_grad():
            self.words[0] = 0.0  # of tokens that were never met nothing is known
            self.out.weight.zero_()

    def forward(self, states: Tensor, rows: Tensor, own: Own) -> Tensor:
        """``states [T, d], rows [T] -> [T, outputs]``, a term of each token; what is said is their sum."""
        if self.training and self.masked:
            states = states * (torch.rand(len(states), 1) >= self.masked)
        positions = self.positions.index_select(0, own.positions.clamp_max(self.POSITIONS - 1))
        inside = self.narrow(states) + self.words.index_select(0, rows) + positions
        query, key, value = (
            part.unflatten(-1, (self.HEADS, -1)).transpose(1, 2)
            for part in own.padded(self.qkv(self.norm1(inside))).chunk(3, dim=-1)
        )
        # Added, and to half as many numbers scaled, as both ways back cost as much again.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3) + own.silence[:, None, None]
        heard = scores.softmax(dim=-1) @ value
        inside = inside + self.dropout(self.proj(own.packed(heard.transpose(1, 2).flatten(2))))
        inside = inside + self.dropout(self.fc2(torch.relu(self.fc1(self.norm2(inside)))))
        weights = (own.padded(self.pool(inside)) + own.silence[..., None]).softmax(dim=1)
        terms: Tensor = own.packed(weights) * self.out(inside)
        return terms


class Mixture(nn.Module):
    """The mixture that the module's docstring describes."""

    def __init__(self, shape: Shape, *, dropout: float = 0.0, masked: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        d, m, rank, hidden = shape.width + shape.words, shape.metrics, shape.rank, shape.hidden
        self.inputs = Inputs(shape)
        self.words = nn.Parameter(torch.zeros(1 + shape.met, shape.words)) if shape.words else None
        self.embedding = nn.Parameter(torch.randn(m, d) * 0.5 * d**-0.5)
        self.positive = nn.Parameter(torch.randn(m, d, rank) * d**-0.5)
        self.negative = nn.Parameter(torch.randn(m, d, rank) * d**-0.5) if shape.dual_gate else None
        self.shared = nn.Parameter(torch.randn(m, rank, hidden) * rank**-0.5)
        self.head = nn.Parameter(torch.randn(m, hidden, 2) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(m, 2))
        self.together = Together(shape, 2 * m, masked) if shape.sentence else None
        self.dropout = Dropout(dropout)

    def start_from(self, states: Tensor, ids: Tensor, edge: Tensor, cloud: Tensor) -> None:
        """Read as `Inputs.start_from` says, and begin by predicting the means of ``edge`` and ``cloud`` [N, M]."""
        self.inputs.start_from(states, ids)
        low, high = torch.logit(edge.mean(0), 1e-4), torch.logit(cloud.mean(0), 1e-4)
        with torch.no_grad():
            self.bias.copy_(torch.stack([(low + high) / 2, high - low], dim=-1))

    def gates(self, tokens: Tensor, own: Own) -> Tensor:
        """Each expert's gate for each of ``tokens [T, d + words]``, [T, M]; zero for what it does not keep."""
        scores = tokens @ self.embedding.T
        gates = torch.softmax(nn.functional.pad(scores, (0, 1)), dim=-1)[:, :-1]
        if not self.shape.selection or own.mask.shape[1] <= self.shape.kept:
            return gates
        # Where fewer than K tokens are the prompt's own, the K-th largest gate is zero and every one of them is kept.
        least = own.padded(gates).topk(self.shape.kept, dim=1).values[:, -1]
        return gates * (gates >= least[own.prompts])

    def projection(self) -> Tensor:
        """Both signs' first factor folded into one, [M, d, l]."""
        return self.positive if self.negative is None else self.positive - self.negative

    def votes(self, tokens: Tensor) -> Tensor:
        """What each of ``tokens [T, d + words]`` would add to levels and gaps if its gate were one, [T, M, 2]."""
        m, d, rank = self.positive.shape
        narrow = tokens @ self.projection().permute(1, 0, 2).reshape(d, m * rank)
        # One matrix product an expert, [M, T, l] x [M, l, h], in place of one a token.
        contrast = torch.sigmoid(narrow.reshape(-1, m, rank).transpose(0, 1) @ self.shared)
        return ((contrast - 0.5) @ self.head).transpose(0, 1)

    def terms(self, states: Tensor, ids: Tensor, own: Own) -> Tensor:
        """What each token adds to levels and gaps: ``states [T, d], ids [T] -> [T, M, 2]``."""
        states, rows = self.inputs(states, ids)
        own_words = [] if self.words is None else [self.words.index_select(0, rows)]
        tokens = self.dropout(torch.cat([states, *own_words], dim=-1))
        terms = self.gates(tokens, own)[..., None] * self.votes(tokens)
        if self.together is not None:
            terms = terms + self.together(states, rows, own).unflatten(1, tuple(self.bias.shape))
        return terms

    def forward(self, states: Tensor, mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``states [B, L, d], mask [B, L], ids [B, L] -> edge [B, M], cloud [B, M], pull [B, L, M]``."""
        own = Own(mask)
        return _qualities(self.terms(own.packed(states), own.packed(ids), own), self.bias, own)


class Ensemble(nn.Module):
    """Mixtures of one shape that differ in their seed. Averaging their terms and biases averages out much of what each
    has learnt from the noise of its labels, and leaves a token's pull what it is in one mixture.
    """

    def __init__(self, members: Sequence[Mixture]) -> None:
        super().__init__()
        self.shape = members[0].shape
        self.members = nn.ModuleList(members)

    def forward(self, states: Tensor, mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``states [B, L, d], mask [B, L], ids [B, L] -> edge [B, M], cloud [B, M], pull [B, L, M]``."""
        own = Own(mask)
        states, ids = own.packed(states), own.packed(ids)
        terms = torch.stack([member.terms(states, ids, own) for member in self.members]).mean(0)
        return _qualities(terms, torch.stack([member.bias for member in self.members]).mean(0), own)

    def save(self, path: Path, record: Mapping[str, Any]) -> None:
        """Write the weights with the shape and a record of how they were made. Nothing in the file is pickled."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        facts = {"shape": json.dumps(asdict(self.shape)), "members": str(len(self.members))}
        # Written by Python, whose error of a full disk is known everywhere: safetensors has one of its own.
        path.write_bytes(safetensors.torch.save(tensors, facts | {"record": json.dumps(record)}))

    @classmethod
    def load(cls, path: Path) -> tuple[Ensemble, dict[str, Any]]:
        """The trained mixtures, in evaluation mode, and their record. Raises ExportError when the file is none."""
        if not path.is_file():
            raise ExportError(
                f"there is no file {path}; name the predictor.safetensors that `edge-export train` wrote"
            )
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
                shape = Shape(**json.loads(facts["shape"]))
                ensemble = cls([Mixture(shape) for _ in range(int(facts["members"]))])
                ensemble.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                record = json.loads(facts["record"])
            if not isinstance(record, dict):
                raise ValueError("its record is no JSON object")
        except (OSError, SafetensorError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ExportError(
                f"{path}: not a trained predictor ({reason(error)}); make it with `edge-export train`"
            ) from error
        return ensemble.eval(), record


def _qualities(terms: Tensor, bias: Tensor, own: Own) -> tuple[Tensor, Tensor, Tensor]:
    """``terms [T, M, 2], bias [M, 2] -> edge [B, M], cloud [B, M], pull [B, L, M]``."""
    level, gap = (own.summed(terms.flatten(1)).unflatten(1, tuple(bias.shape)) + bias).unbind(-1)
    return torch.sigmoid(level - gap / 2), torch.sigmoid(level + gap / 2), own.padded(terms[..., 1])
