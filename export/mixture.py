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

Between the two gates stands nothing that is not linear, so that ``T+ - T- = T (P+ - P-) S``: both signs together can
say what one could. They differ in how they learn. The exported graph therefore carries one folded gate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from export.errors import ExportError

WORDS, SENTENCE = 16, 64
"""Length of the embedding of its own that experts read of a token (32 and 64 ranked the starter's validation prompts no
better), and width of the layer that reads tokens together."""

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


class Together(nn.Module):
    """What tokens say together: one transformer layer, pooled by attention to a level and a gap a metric.

    Weights have a leading dimension of members, one in training: those of an ensemble are computed at once, since a
    decision's time is that of the operations, not of their sizes.
    """

    HEADS = 4
    DROPOUT = 0.1
    HIDDEN = 0.5
    """Share of the tokens whose state it does not see in training."""
    PLACES = 128
    """Tokens beyond so many share the last one's place. CLIP reads 77."""

    def __init__(self, shape: Shape, members: int = 1) -> None:
        super().__init__()
        self.shape, width = shape, shape.sentence

        def linear(inputs: int, outputs: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(members, inputs, outputs) - 1) * inputs**-0.5)

        def of(value: float, *sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.full((members, *sizes), value))

        self.words = nn.Parameter(torch.randn(members, 1 + shape.met, width) * 0.5)
        self.places = nn.Parameter(torch.randn(members, self.PLACES, width) * 0.1)
        self.narrow = linear(shape.width, width)
        self.before, self.between = of(1.0, 1, width), of(1.0, 1, width)
        self.attend, self.merge = linear(width, 3 * width), linear(width, width)
        self.widen, self.widen_bias = linear(width, 2 * width), of(0.0, 1, 2 * width)
        self.back = linear(2 * width, width)
        self.weigh = linear(width, 1)
        self.say = of(0.0, width, 2 * shape.metrics)
        self.dropout = nn.Dropout(self.DROPOUT)
        with torch.no_grad():
            self.words[:, 0] = 0.0  # of tokens that were never met nothing is known

    @classmethod
    def of(cls, parts: Sequence[Together]) -> Together:
        """Several as one, which says the mean of what they say."""
        whole = cls(parts[0].shape, len(parts)).train(parts[0].training)
        states = [part.state_dict() for part in parts]
        whole.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
        return whole

    def forward(self, states: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """``states [B, L, d], mask [B, L], rows [B, L] -> [B, L, M, 2]``, zero outside of the mask."""
        if self.training:
            states = states * (torch.rand(*mask.shape, 1) >= self.HIDDEN)
        width, head = self.shape.sentence, self.shape.sentence // self.HEADS  # numbers, not shapes to compute
        places = self.places[:, torch.arange(mask.shape[1]).clamp_max(self.PLACES - 1)]
        words = self.words[:, rows].transpose(0, 1)  # [B, members, L, width], as all that follows
        inside = self.dropout(states)[:, None] @ self.narrow + self.dropout(words) + places
        query, key, value = (
            part.unflatten(-1, (self.HEADS, head)).transpose(2, 3)
            for part in (nn.functional.layer_norm(inside, (width,)) * self.before @ self.attend).chunk(
                3, dim=-1
            )
        )
        scores = query @ key.transpose(3, 4) * head**-0.5
        heard = torch.softmax(scores.masked_fill(~mask[:, None, None, None], _NOT), dim=-1) @ value
        inside = inside + self.dropout(heard.transpose(2, 3).flatten(3) @ self.merge)
        wide = torch.relu(
            nn.functional.layer_norm(inside, (width,)) * self.between @ self.widen + self.widen_bias
        )
        inside = inside + self.dropout(wide @ self.back)
        weights = torch.softmax((inside @ self.weigh)[..., 0].masked_fill(~mask[:, None], _NOT), dim=-1)
        terms = (weights * mask[:, None])[..., None] * (inside @ self.say)
        return terms.mean(dim=1).unflatten(-1, (self.shape.metrics, 2))


class Mixture(nn.Module):
    """The mixture that the module's docstring describes."""

    def __init__(self, shape: Shape, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        d, m, rank, hidden = shape.width + shape.words, shape.metrics, shape.rank, shape.hidden
        self.register_buffer("mean", torch.zeros(shape.width))
        self.register_buffer("deviation", torch.ones(shape.width))
        # Row 0 is that of all tokens that no training prompt has, and stays zero.
        self.register_buffer("row", torch.zeros(max(shape.vocabulary, 1), dtype=torch.long))
        self.words = nn.Parameter(torch.zeros(1 + shape.met, shape.words)) if shape.words else None
        self.embedding = nn.Parameter(torch.randn(m, d) * 0.5 * d**-0.5)
        self.positive = nn.Parameter(torch.randn(m, d, rank) * d**-0.5)
        self.negative = nn.Parameter(torch.randn(m, d, rank) * d**-0.5) if shape.dual_gate else None
        self.shared = nn.Parameter(torch.randn(m, rank, hidden) * rank**-0.5)
        self.head = nn.Parameter(torch.randn(m, hidden, 2) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(m, 2))
        self.together = Together(shape) if shape.sentence else None
        self.dropout = nn.Dropout(dropout)

    def start_from(self, states: Tensor, ids: Tensor, edge: Tensor, cloud: Tensor) -> None:
        """Standardise by ``states [tokens, d]``, give each of ``ids [tokens]`` its row, and begin by predicting the
        means of ``edge`` and ``cloud`` [N, M].
        """
        if self.shape.met:
            self.row[torch.unique(ids)] = torch.arange(1, 1 + self.shape.met)
        self.mean = states.mean(0)
        self.deviation = states.std(0).clamp_min(1e-6)
        low, high = torch.logit(edge.mean(0), 1e-4), torch.logit(cloud.mean(0), 1e-4)
        with torch.no_grad():
            self.bias.copy_(torch.stack([(low + high) / 2, high - low], dim=-1))

    def gates(self, scores: Tensor, mask: Tensor) -> Tensor:
        """``scores [B, L, M], mask [B, L]`` to each expert's gate for each token; zero for what it does not keep."""
        none = 0 * scores[..., :1]  # concatenated: a graph pads by a dozen operations
        gates = torch.softmax(torch.cat([scores, none], dim=-1), dim=-1)[..., :-1] * mask[..., None]
        if not self.shape.selection:
            return gates
        # Where fewer than K tokens are the prompt's own, the K-th largest gate is zero and every one of them is kept.
        nothing = gates.new_zeros(gates.shape[0], self.shape.kept, gates.shape[2])
        least = torch.cat([gates, nothing], dim=1).topk(self.shape.kept, dim=1).values[:, -1:]
        return gates * (gates >= least)

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

    def read(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``states [B, L, d], ids [B, L]``, standardised and as the rows of their embeddings."""
        rows = self.row[ids] if self.shape.met else torch.zeros_like(ids)
        return (states - self.mean) / self.deviation, rows

    def terms(self, states: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """What the experts let each token add to levels and gaps: ``states [B, L, d], mask [B, L], rows [B, L] ->
        [B, L, M, 2]``, states and rows as `read` gives them.
        """
        tokens = states if self.words is None else torch.cat([states, self.words[rows]], dim=-1)
        if self.training:  # half of a batch is padding, which need not be computed
            own = self.dropout(tokens[mask])
            scores, votes = _padded(own @ self.embedding.T, mask), _padded(self.votes(own), mask)
        else:
            scores = tokens @ self.embedding.T
            votes = self.votes(tokens.flatten(0, 1)).reshape(len(tokens), -1, *self.bias.shape)
        return self.gates(scores, mask)[..., None] * votes

    def forward(self, states: Tensor, mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``states [B, L, d], mask [B, L], ids [B, L] -> edge [B, M], cloud [B, M], pull [B, L, M]``."""
        states, rows = self.read(states, ids)
        terms = self.terms(states, mask, rows)
        if self.together is not None:
            terms = terms + self.together(states, mask, rows)
        return _qualities(terms, self.bias)


class Ensemble(nn.Module):
    """Mixtures of one shape that differ in their seed. Averaging their terms and biases averages out much of what each
    has learnt from the noise of its labels, and leaves a token's pull what it is in one mixture.
    """

    def __init__(self, members: Sequence[Mixture]) -> None:
        super().__init__()
        self.shape = members[0].shape
        parts = [member.together for member in members if member.together is not None]
        self.together = Together.of(parts) if parts else None
        self.members = nn.ModuleList(map(deepcopy, members))
        for member in self.members:
            member.together = None

    def forward(self, states: Tensor, mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``states [B, L, d], mask [B, L], ids [B, L] -> edge [B, M], cloud [B, M], pull [B, L, M]``."""
        states, rows = self.members[0].read(states, ids)  # which all have learnt from the same prompts
        terms = torch.stack([member.terms(states, mask, rows) for member in self.members]).mean(dim=0)
        if self.together is not None:
            terms = terms + self.together(states, mask, rows)
        return _qualities(terms, torch.stack([member.bias for member in self.members]).mean(dim=0))

    def save(self, path: Path, record: Mapping[str, Any]) -> None:
        """Write the weights with the shape and a record of how they were made. Nothing in the file is pickled."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        facts = {"shape": json.dumps(asdict(self.shape)), "members": str(len(self.members))}
        save_file(tensors, path, facts | {"record": json.dumps(record)})

    @classmethod
    def load(cls, path: Path) -> tuple[Ensemble, dict[str, Any]]:
        """The trained mixtures, in evaluation mode, and their record. Raises ExportError when the file is none."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
                shape = Shape(**json.loads(facts["shape"]))
                ensemble = cls([Mixture(shape) for _ in range(int(facts["members"]))])
                ensemble.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ExportError(
                f"{path}: not a trained predictor ({error}); make it with `edge-export train`"
            ) from error
        return ensemble.eval(), json.loads(facts["record"])


def _padded(values: Tensor, mask: Tensor) -> Tensor:
    """``values [T, ...]`` of the T tokens that ``mask [B, L]`` marks, as [B, L, ...] with zeros between."""
    padded = values.new_zeros(*mask.shape, *values.shape[1:])
    return padded.index_put((mask,), values)


def _qualities(terms: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``terms [B, L, M, 2], bias [M, 2] -> edge [B, M], cloud [B, M], pull [B, L, M]``."""
    level, gap = (terms.sum(dim=1) + bias).unbind(-1)
    return torch.sigmoid(level - gap / 2), torch.sigmoid(level + gap / 2), terms[..., 1]
