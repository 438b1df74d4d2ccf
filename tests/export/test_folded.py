from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from export.folded import Folded
from export.mixture import Ensemble, Mixture, Shape, Together

TOKENS = 12
SHAPE = Shape(width=16, metrics=3, kept=4, rank=2, hidden=8)
FULL = replace(SHAPE, words=4, sentence=8, vocabulary=20, met=9)


def ensemble_of(shape: Shape, members: int) -> Ensemble:
    """Mixtures of random weights, those that begin as zeros too."""
    torch.manual_seed(0)
    mixtures = [Mixture(shape) for _ in range(members)]
    states, ids = 2 + 3 * torch.randn(50, shape.width), torch.arange(5, 5 + shape.met)
    with torch.no_grad():
        for mixture in mixtures:
            mixture.start_from(states, ids, torch.rand(20, shape.metrics), torch.rand(20, shape.metrics))
            for weights in mixture.parameters():
                if len(weights.unique()) == 1:
                    torch.nn.init.normal_(weights)
    return Ensemble(mixtures).eval()


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        replace(SHAPE, selection=False),
        replace(SHAPE, dual_gate=False),
        replace(FULL, sentence=0),
        FULL,
    ],
    ids=["plain", "no selection", "single gate", "words", "all"],
)
def test_folded_the_ensemble_says_the_same_of_every_prompt(shape: Shape, members: int) -> None:
    ensemble = ensemble_of(shape, members)
    folded = Folded(ensemble, TOKENS)
    for own in range(TOKENS + 1):  # fewer than an expert keeps, more, and none
        count = max(1, own)
        prompt = (
            torch.randn(1, count, shape.width),
            torch.full((1, count), own > 0),
            torch.randint(20, (1, count)),
        )
        with torch.no_grad():
            for ours, theirs in zip(folded(*prompt), ensemble(*prompt), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_states_far_from_zero_and_states_that_never_vary_cost_no_digits() -> None:
    ensemble = ensemble_of(FULL, 1)
    for mean, deviation in ((10_000.0, 1.0), (0.5, 1e-6)):
        inputs = ensemble.members[0].inputs
        inputs.mean[0], inputs.deviation[0] = mean, deviation
        states = torch.randn(1, TOKENS, SHAPE.width)
        states[..., 0] = mean + deviation * states[..., 0]
        prompt = (states, torch.ones(1, TOKENS, dtype=torch.bool), torch.randint(20, (1, TOKENS)))
        with torch.no_grad():
            for ours, theirs in zip(Folded(ensemble, TOKENS)(*prompt), ensemble(*prompt), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_beyond_the_last_place_tokens_share_it() -> None:
    ensemble, count = ensemble_of(FULL, 2), Together.POSITIONS + 2
    prompt = (
        torch.randn(1, count, 16),
        torch.ones(1, count, dtype=torch.bool),
        torch.randint(20, (1, count)),
    )
    with torch.no_grad():
        for ours, theirs in zip(Folded(ensemble, count)(*prompt), ensemble(*prompt), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_every_part_of_it_is_felt() -> None:
    prompt = (torch.randn(1, 7, 16), torch.ones(1, 7, dtype=torch.bool), torch.arange(4, 11)[None])
    said = Folded(ensemble_of(FULL, 3), TOKENS)(*prompt)[0]
    for name, weights in ensemble_of(FULL, 3).named_parameters():
        other = ensemble_of(FULL, 3)
        with torch.no_grad():
            other.get_parameter(name).add_(torch.randn_like(weights))
        assert not torch.equal(Folded(other, TOKENS)(*prompt)[0], said), name
