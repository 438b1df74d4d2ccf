from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from edge_agent.superiority import relative_superiority
from export.mixture import Mixture, Shape
from export.states import TokenStates
from export.train import Epoch, Examples, Loss, Recipe, Shorter, Trained, knowing, train

RECIPE = Recipe(
    steps=325, batch=32, learning_rate=3e-2, dropout=0.05, gain_weight=3.0, rank_weight=3.0, seeds=1
)
METRICS, WIDTH, WORDS = 3, 24, 30
SHAPE = Shape(WIDTH, METRICS, kept=8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def world(prompts: int, seed: int, mixing: float = 0.0) -> Examples:
    """Prompts of 3 to 8 words; each word has its state and makes the edge model's image so much worse."""
    words = np.random.default_rng(0)
    states, hardness = words.standard_normal((WORDS, WIDTH), np.float32), words.exponential(0.4, WORDS)
    draw = np.random.default_rng(seed)
    chosen = [draw.integers(WORDS, size=draw.integers(3, 9)) for _ in range(prompts)]
    deleted = [int(draw.integers(len(c))) for c in chosen]
    hard = np.array([hardness[c].sum() for c in chosen])[:, None] * np.linspace(0.8, 1.2, METRICS)

    def quality(part: float) -> np.ndarray:
        logits = 1.5 - part * hard + 0.2 * draw.standard_normal(hard.shape)
        return (1 / (1 + np.exp(-logits))).astype(np.float32)

    def read(prompts: list[np.ndarray]) -> TokenStates:
        """As encoders do, each word is written into the others' states."""
        return TokenStates.join([(states[c] + mixing * states[c].sum(0), c) for c in prompts])

    examples = Examples.of(read(chosen), quality(1.0), quality(0.4))
    less = [np.delete(c, place) for c, place in zip(chosen, deleted, strict=True)]
    return examples.beside(read(less), np.array(deleted))


def trained(
    learning: Examples, validating: Examples, recipe: Recipe = RECIPE, shape: Shape = SHAPE, seed: int = 0
) -> Trained:
    *_, last = train(learning, validating, shape, recipe, seed)
    assert isinstance(last, Trained)
    return last


def correlation(run: Trained, test: Examples) -> float:
    """Of predicted with realised PRS."""
    with torch.no_grad():
        edge, cloud, _ = run.mixture(test.states, test.mask, test.ids)
    scale, weights = np.full(METRICS, 0.1), np.full(METRICS, 1 / METRICS)
    prs = [
        relative_superiority(a.numpy(), b.numpy(), scale, weights)
        for a, b in ((edge, cloud), (test.edge, test.cloud))
    ]
    return float(spearmanr(*prs).statistic)


def test_it_learns_which_prompts_the_cloud_does_better_and_not_from_shuffled_labels() -> None:
    learning, validating, test = world(400, 1), world(100, 2), world(200, 3)
    real = correlation(trained(learning, validating), test)
    order = torch.randperm(len(learning), generator=torch.Generator().manual_seed(0))
    shuffled = replace(learning, edge=learning.edge[order], cloud=learning.cloud[order])
    chance = correlation(trained(shuffled, validating), test)
    assert real > 0.8
    assert abs(chance) < 0.4


def test_what_the_states_do_not_say_it_learns_of_the_words_themselves() -> None:
    def mute(examples: Examples) -> Examples:
        return replace(examples, states=torch.zeros_like(examples.states))

    learning, validating, test = (mute(world(*size)) for size in ((400, 1), (100, 2), (200, 3)))
    words = knowing(replace(SHAPE, words=4), learning, WORDS)
    assert correlation(trained(learning, validating, shape=words), test) > 0.8
    without = trained(learning, validating).mixture
    with torch.no_grad():
        edge, _, _ = without(test.states, test.mask, test.ids)
    assert edge.std(dim=0).max() < 1e-6


def test_a_token_s_pull_becomes_what_is_lost_without_it() -> None:
    learning, validating, test = (world(*size, mixing=0.3) for size in ((400, 1), (100, 2), (200, 3)))
    assert test.shorter is not None
    rows, less, error = torch.arange(len(test)), test.shorter, {}
    shape = knowing(replace(SHAPE, words=4), learning, WORDS)
    for weight in (0.0, 3.0):
        recipe = replace(RECIPE, deletions=1.0, deletion_weight=weight)
        mixture = trained(learning, validating, recipe, shape).mixture
        with torch.no_grad():
            pull = mixture(test.states, test.mask, test.ids)[2]
            shorter = mixture(less.states, less.mask, less.ids)[2]
        lost = pull.sum(1) - shorter.sum(1)
        error[weight] = float(((lost - pull[rows, less.deleted]) ** 2).mean() / lost.var())
    assert error[3.0] < error[0.0] / 2


def test_what_the_prompts_less_a_token_would_say_is_not_left_out_in_silence() -> None:
    bare = replace(world(64, 1), shorter=None)
    with pytest.raises(ValueError, match="deletion_weight"):
        list(train(bare, bare, SHAPE, RECIPE, 0))
    assert trained(bare, bare, replace(RECIPE, steps=2, deletion_weight=0.0)).validation_loss > 0


def test_two_prompts_in_the_wrong_order_cost_more_the_more_their_gains_differ_and_only_in_training() -> None:
    gains = torch.tensor([0.0, 0.1, 0.3])
    level = torch.full((3, METRICS), 0.5)
    states, mask, ids = torch.zeros(3, 1, WIDTH), torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 1).long()
    prompts = Examples(states, mask, ids, level, level + gains[:, None])

    class Says(torch.nn.Module):
        """These gains, whatever it reads, each right or wrong by as much as in any other order."""

        def __init__(self, order: list[int]) -> None:
            super().__init__()
            self.cloud = level + gains[order, None]

        def forward(self, *read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return level, self.cloud, torch.zeros(3, 1, METRICS)

    def cost(order: list[int], mode: bool = True, **recipe: float) -> float:
        wanted = replace(Recipe(gap_weight=0, gain_weight=0, deletion_weight=0), **recipe)
        return float(Loss(prompts, wanted)(Says(order).train(mode), prompts))

    def disorder(order: list[int]) -> float:
        return cost(order, rank_weight=1) - cost(order, rank_weight=0)

    near, far = [1, 0, 2], [0, 2, 1]
    assert 0 < disorder([0, 1, 2]) < disorder(near) < disorder(far) < disorder([2, 1, 0])
    assert cost(far, rank_weight=7) - cost(far, rank_weight=0) == pytest.approx(7 * disorder(far), rel=1e-4)
    assert cost(far, False, rank_weight=7) == cost(far, False, rank_weight=0)
    blunt = [cost(order, rank_weight=1, sharpness=0) - cost(order, rank_weight=0) for order in (near, far)]
    assert blunt[0] == pytest.approx(blunt[1], rel=1e-4)


def test_a_pull_is_in_logits_and_what_its_error_costs_in_qualities() -> None:
    """By the slope of a quality at the mean of the models, here 0.2 * 0.8, in units of the gap's variance, 0.02."""
    level, gaps = torch.full((2, 1), 0.2), torch.tensor([[0.1], [-0.1]])
    ids = torch.zeros(2, 2).long()
    prompts = Examples(torch.zeros(2, 2, WIDTH), ids == 0, ids, level, level + gaps)
    shorter = Shorter(torch.zeros(1, 2, WIDTH), ids[:1] == 0, ids[:1], torch.tensor([1]))
    pulls = torch.tensor([[1.0, 0.5], [9.0, 9.0], [0.7, 0.0]])[..., None]

    class Says(torch.nn.Module):
        def forward(self, *_read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            edge, cloud = (torch.cat([each, each[:1]]) for each in (prompts.edge, prompts.cloud))
            return edge, cloud, pulls

    loss = Loss(prompts, replace(RECIPE, deletion_weight=2.0))(Says().eval(), prompts, shorter)
    assert float(loss) == pytest.approx(2 * ((1.5 - 0.7 - 0.5) * 0.16) ** 2 / 0.02, rel=1e-4)


def test_the_one_metric_of_an_ablation_is_the_mean_of_all() -> None:
    prompts = world(5, 1)
    measured = prompts.measuring(replace(SHAPE, metrics=1))
    for one, all_of_them in ((measured.edge, prompts.edge), (measured.cloud, prompts.cloud)):
        assert torch.equal(one, all_of_them.mean(1, keepdim=True))
    assert prompts.measuring(SHAPE) is prompts


def test_experts_learn_at_the_rate_of_the_layer_beside_them() -> None:
    learning, validating = world(64, 1), world(32, 2)
    recipe = replace(RECIPE, steps=4, learning_rate=1e-3, together_rate=1e-3)
    shape = knowing(replace(SHAPE, sentence=8), learning, WORDS)
    for kind in (SHAPE, shape):
        torch.manual_seed(0)
        before = Mixture(kind).shared
        assert not torch.equal(trained(learning, validating, recipe, kind).mixture.shared, before)


def test_the_layer_that_reads_tokens_together_has_a_rate_of_its_own() -> None:
    learning, validating = world(64, 1), world(32, 2)
    shape = knowing(replace(SHAPE, sentence=8), learning, WORDS)
    torch.manual_seed(0)
    begun = Mixture(shape).state_dict()
    made = trained(learning, validating, replace(RECIPE, steps=4, together_rate=1e-12), shape).mixture
    for name, weights in made.state_dict().items():
        if name.startswith("together."):
            torch.testing.assert_close(weights, begun[name], rtol=0, atol=1e-6)
    assert not torch.allclose(made.shared, begun["shared"], atol=1e-4)


def test_the_loss_of_training_is_a_mean_over_prompts_also_where_the_last_batch_is_small() -> None:
    """Of three prompts an eighth is one, which is read without a token, and not none; at first no token pulls."""
    learning = world(35, 1)
    still = replace(RECIPE, steps=2, learning_rate=1e-12, dropout=0.0, masked=0.0, rank_weight=0.0)
    plain, _ = train(learning, learning, SHAPE, replace(still, deletion_weight=0.0), 0)
    assert isinstance(plain, Epoch)
    assert plain.training_loss == pytest.approx(plain.validation_loss, rel=1e-4)
    deleting, _ = train(learning, learning, SHAPE, still, 0)
    assert isinstance(deleting, Epoch)
    assert deleting.training_loss == pytest.approx(plain.training_loss, rel=1e-4)


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    data, short = (world(64, 1), world(32, 2)), Recipe(steps=2)
    shape = knowing(replace(SHAPE, words=4, sentence=8), data[0], WORDS)
    runs = [trained(*data, short, shape, seed) for seed in (0, 1, 0)]
    first, second, again = (run.mixture.state_dict() for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head"], second["head"])


def test_it_keeps_the_epoch_that_was_best_on_validation() -> None:
    learning, validating = world(64, 1), world(64, 2)
    # Shuffled: only noise can be learnt, which costs on other prompts.
    noise = replace(learning, edge=learning.edge.flip(0), cloud=learning.cloud.flip(0))
    recipe = Recipe(steps=100, batch=16, learning_rate=2e-2, dropout=0.0, seeds=1)
    *epochs, run = train(noise, validating, SHAPE, recipe, 0)
    assert isinstance(run, Trained)
    assert len(epochs) == recipe.epochs(len(learning)) == 25
    losses = [epoch.validation_loss for epoch in epochs if isinstance(epoch, Epoch)]
    assert min(losses) < losses[-1]
    with torch.no_grad():
        kept = Loss(noise, recipe)(run.mixture, validating)
    assert float(kept) == pytest.approx(min(losses), rel=1e-5)


def test_what_is_hidden_in_training_is_hidden_in_every_epoch_and_in_no_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[tuple[bool, float, float]] = []
    forward = Mixture.forward

    def watched(self: Mixture, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert self.together is not None
        read.append((self.training, self.dropout.share, self.together.masked))
        return forward(self, *given)

    monkeypatch.setattr(Mixture, "forward", watched)
    learning, validating = world(64, 1), world(32, 2)
    recipe = replace(RECIPE, steps=4, dropout=0.3, masked=0.2)  # two an epoch
    trained(learning, validating, recipe, knowing(replace(SHAPE, sentence=8), learning, WORDS))
    assert [training for training, *_ in read] == [True, True, False] * 2
    assert {(dropped, masked) for _, dropped, masked in read} == {(0.3, 0.2)}


def test_a_metric_that_never_varies_keeps_none_of_the_others_from_being_learnt() -> None:
    learning, validating = world(64, 1), world(32, 2)
    for examples in (learning, validating):
        for side in (examples.edge, examples.cloud):
            side[:, 0] = 0.5
    run = trained(learning, validating, replace(RECIPE, steps=4))
    assert all(bool(torch.isfinite(weights).all()) for weights in run.mixture.parameters())


@pytest.mark.parametrize("steps", [1, 9, 10, 11])
def test_few_steps_are_steps_too(steps: int) -> None:
    run = trained(world(32, 1), world(8, 2), replace(RECIPE, steps=steps))
    assert all(bool(torch.isfinite(weights).all()) for weights in run.mixture.parameters())
