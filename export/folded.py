"""The ensemble as the graph computes it: the same numbers in a fraction of the operations.

A decision's time is that of the operations, not of their sizes. So all members are computed at once; what is linear in
a token's state and its word becomes one matrix product and one row of a table; scales, biases and the mean over members
go into the weights next to them. One prompt at a time, and of it only the tokens that are its own. Large weights are an
exception: onnxruntime lays a matrix out for its product when it loads a graph, but a stack of them in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from export.mixture import Ensemble, Mixture, Shape, Together

_TO_LOGITS = torch.tensor([[1.0, 1.0], [-0.5, 0.5]])
"""From (level, gap) to the logits of (edge, cloud)."""


class Folded(nn.Module):
    """``states [1, L, d], mask [1, L], ids [1, L] -> edge [1, M], cloud [1, M], pull [1, L, M]``.

    The L tokens are the prompt's own. Of a prompt that has none it takes any one, with a mask that is false.
    """

    @torch.no_grad()
    def __init__(self, ensemble: Ensemble, tokens: int) -> None:
        """For prompts of up to ``tokens`` tokens."""
        super().__init__()
        members: list[Mixture] = list(ensemble.members)
        shape = ensemble.shape
        first = members[0].inputs  # of all: they have learnt from the same prompts
        self.shape, self.count = shape, len(members)

        def columns(of: Callable[[Mixture], Tensor]) -> tuple[Tensor, Tensor]:
            """What weights [d + words, n] of every member make of a state and of each row's word, side by side."""
            parts = [(one, *of(one).split([shape.width, shape.words])) for one in members]
            states = torch.cat([state for _, state, _ in parts], dim=1)
            none = torch.zeros(1 + shape.met, states.shape[1])
            words = [one.words @ word for one, _, word in parts if one.words is not None]
            return states, torch.cat(words, dim=1) if words else none

        # With one more expert, "none of them", whose scores are zeros.
        read = [columns(lambda one: nn.functional.pad(one.embedding.T, (0, 1)))]
        read += [columns(lambda one: one.projection().transpose(0, 1).flatten(1))]
        self.together = None
        if together := [one.together for one in members if one.together is not None]:
            self.together = _Together(together, shape, tokens)
            weights = torch.cat([one.narrow.weight.T for one in together], dim=1)
            read += [(weights, torch.cat([one.words for one in together], dim=1))]
        self.widths = [states.shape[1] for states, _ in read]
        states, words = (torch.cat(part, dim=1) for part in zip(*read, strict=True))
        # The mean is not folded into the words: where it is large, both are, and cancel out to few digits.
        self.mean, self.row = first.mean, first.row
        self.states, self.words = states / first.deviation[:, None], words

        # sigmoid(x) - 1/2 = tanh(x / 2) / 2
        self.shared = torch.cat([one.shared for one in members]) / 2
        self.head = torch.cat([one.head for one in members]) @ _TO_LOGITS / (2 * self.count)
        bias = torch.stack([one.bias for one in members]).mean(dim=0)
        self.bias = (bias @ _TO_LOGITS).T.reshape(1, -1)
        self.nothing = torch.zeros(shape.kept, self.count * shape.metrics)

    def forward(self, states: Tensor, mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the class says."""
        m = self.shape.metrics
        rows = self.row[ids[0]] if self.shape.met else torch.zeros_like(ids[0])
        scores, narrow, *rest = ((states[0] - self.mean) @ self.states + self.words[rows]).split(
            self.widths, dim=-1
        )
        gates = torch.softmax(scores.reshape(-1, self.count, m + 1), dim=-1)[..., :-1]
        gates = gates.reshape(-1, self.count * m)
        if self.shape.selection:
            least = torch.cat([gates, self.nothing]).topk(self.shape.kept, dim=0).values[-1:]
            gates = torch.where(gates >= least, gates, 0.0)
        narrow = narrow.reshape(-1, self.count * m, self.shape.rank).transpose(0, 1)
        votes = torch.tanh(narrow @ self.shared) @ self.head  # [members M, L, 2]
        votes = (votes * gates.T[..., None]).reshape(self.count, m, -1, 2).sum(dim=0)
        terms = votes.permute(1, 2, 0).reshape(-1, 2 * m)  # the edge's logits, then the cloud's
        if self.together is not None:
            terms = terms + self.together(*rest)
        terms = terms * mask.reshape(-1, 1)
        edge, cloud = torch.sigmoid(terms.sum(dim=0, keepdim=True) + self.bias).split(m, dim=-1)
        low, high = terms.split(m, dim=-1)
        return edge, cloud, (high - low)[None]


class _Together(nn.Module):
    """``[L, members s] -> [L, 2 M]``: from the tokens' states and words, narrowed, to terms of the logits."""

    def __init__(self, parts: list[Together], shape: Shape, tokens: int) -> None:
        super().__init__()
        self.count, width = len(parts), shape.sentence
        self.width, self.heads, self.metrics = width, Together.HEADS, shape.metrics

        def apart(of: Callable[[Together], Tensor]) -> nn.ParameterList:
            return nn.ParameterList([of(one) for one in parts])

        def stacked(of: Callable[[Together], Tensor]) -> Tensor:
            return torch.stack([of(one) for one in parts])

        def linear(layer: nn.Module, scale: Tensor | None = None) -> Tensor:
            weights: Tensor = layer.weight.T
            return weights if scale is None else weights * scale[:, None]

        places = torch.arange(tokens).clamp_max(Together.POSITIONS - 1)
        self.positions = torch.cat([one.positions[places] for one in parts], dim=1)
        quiet = torch.ones(3 * width)
        quiet[:width] = (width // self.heads) ** -0.5  # of the queries
        self.qkv = apart(lambda one: linear(one.qkv, one.norm1.weight) * quiet)
        self.proj = apart(lambda one: linear(one.proj))
        self.fc1 = apart(lambda one: linear(one.fc1, one.norm2.weight))
        self.fc1_bias = stacked(lambda one: one.fc1.bias[None])
        self.fc2 = apart(lambda one: linear(one.fc2))
        say = stacked(lambda one: linear(one.out)).unflatten(-1, (self.metrics, 2)) @ _TO_LOGITS / self.count
        self.out = torch.cat([stacked(lambda one: linear(one.pool)), say.transpose(2, 3).flatten(2)], dim=-1)

    def forward(self, inside: Tensor) -> Tensor:
        inside = inside + self.positions[: inside.shape[0]]
        inside = inside.reshape(-1, self.count, self.width).transpose(0, 1)
        read = _times(nn.functional.layer_norm(inside, (self.width,)), self.qkv)
        read = read.reshape(self.count, -1, 3 * self.heads, self.width // self.heads).transpose(1, 2)
        query, key, value = read.split(self.heads, dim=1)
        heard = torch.softmax(query @ key.transpose(2, 3), dim=-1) @ value
        inside = inside + _times(heard.transpose(1, 2).reshape(self.count, -1, self.width), self.proj)
        wide = _times(nn.functional.layer_norm(inside, (self.width,)), self.fc1) + self.fc1_bias
        inside = inside + _times(torch.relu(wide), self.fc2)
        weights, said = (inside @ self.out).split([1, 2 * self.metrics], dim=-1)
        return (torch.softmax(weights, dim=1) * said).sum(dim=0)


def _times(stack: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``[members, L, n]``, each member's times its own of ``matrices [n, m]``."""
    if len(matrices) == 1:
        return stack @ matrices[0]
    return torch.cat([one @ matrix for one, matrix in zip(stack.split(1), matrices, strict=True)])
