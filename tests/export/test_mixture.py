from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from export.errors import ExportError
from export.mixture import Ensemble, Mixture, Shape

SHAPE = Shape(width=16, metrics=3, kept=4, rank=2, hidden=8)


def made_up(shape: Shape, seed: int = 0) -> Mixture:
    torch.manual_seed(seed)
    mixture = Mixture(shape).eval()
    mixture.start_from(
        torch.randn(50, shape.width),
        torch.arange(shape.met),
        torch.rand(20, shape.metrics),
        torch.rand(20, shape.metrics),
    )
    return mixture


def prompt(tokens: int, own: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(own)
    return torch.randn(1, tokens, SHAPE.width), (torch.arange(tokens) < own)[None], torch.arange(tokens)[None]


def gap(edge: torch.Tensor, cloud: torch.Tensor) -> torch.Tensor:
    return torch.logit(cloud) - torch.logit(edge)


def test_the_gap_is_its_bias_and_what_every_token_pulls() -> None:
    mixture = made_up(SHAPE)
    edge, cloud, pull = mixture(*prompt(10, 7))
    torch.testing.assert_close(gap(edge, cloud), mixture.bias[:, 1] + pull.sum(1), atol=1e-5, rtol=0)


def test_without_a_token_the_gap_is_smaller_by_just_its_pull() -> None:
    mixture = made_up(SHAPE)
    states, mask, ids = prompt(10, 4)  # as many as an expert keeps: no other token moves up
    edge, cloud, pull = mixture(states, mask, ids)
    without = mask.clone()
    without[0, 2] = False
    torch.testing.assert_close(
        gap(edge, cloud) - pull[:, 2], gap(*mixture(states, without, ids)[:2]), atol=1e-5, rtol=0
    )
    assert pull[:, 2].abs().min() > 1e-4


def test_an_expert_keeps_at_most_k_tokens_and_without_selection_all() -> None:
    states, mask, ids = prompt(10, 9)
    assert ((made_up(SHAPE)(states, mask, ids)[2] != 0).sum(1) == SHAPE.kept).all()
    every = Shape(16, 3, kept=4, rank=2, hidden=8, selection=False)
    assert ((made_up(every)(states, mask, ids)[2] != 0).sum(1) == 9).all()


def test_padding_changes_nothing() -> None:
    mixture = made_up(SHAPE)
    states, mask, ids = prompt(10, 6)
    longer = (
        torch.cat([states, torch.randn(1, 5, SHAPE.width)], 1),
        torch.cat([mask, torch.zeros(1, 5).bool()], 1),
        torch.cat([ids, torch.arange(5)[None]], 1),
    )
    for short, long in zip(mixture(states, mask, ids)[:2], mixture(*longer)[:2], strict=True):
        torch.testing.assert_close(short, long, atol=1e-6, rtol=0)


def test_a_prompt_is_read_alike_alone_and_among_others() -> None:
    mixture = made_up(replace(SHAPE, words=4, sentence=8, vocabulary=10, met=10))
    assert mixture.together is not None
    torch.nn.init.normal_(mixture.together.out.weight)
    one, other = prompt(10, 6), prompt(10, 3)
    both = mixture(*(torch.cat(pair) for pair in zip(other, one, strict=True)))
    for alone, among in zip(mixture(*one), both, strict=True):
        torch.testing.assert_close(alone[0], among[1], atol=1e-6, rtol=0)


def test_a_word_speaks_for_itself_and_one_that_was_never_met_by_its_state_alone() -> None:
    shape = replace(SHAPE, words=4, vocabulary=10, met=5)
    mixture = made_up(shape)
    assert mixture.words is not None
    states, mask, ids = prompt(10, 8)
    mute = mixture(states, mask, ids)  # embeddings begin as zeros
    with torch.no_grad():
        mixture.words[1:] = 1.0
    spoken = mixture(states, mask, ids)
    changed = (spoken[2] != mute[2]).any(dim=-1)[0]
    assert changed[:5].any() and not changed[8:].any()
    never_met = torch.full_like(ids, 9)
    torch.testing.assert_close(mixture(states, mask, never_met)[0], mute[0])


def test_what_tokens_say_together_depends_on_their_company_and_still_adds_up() -> None:
    shape = replace(SHAPE, sentence=8, vocabulary=10, met=10)
    mixture = made_up(shape)
    assert mixture.together is not None
    torch.nn.init.normal_(mixture.together.out.weight)
    states, mask, ids = prompt(10, 6)
    edge, cloud, pull = mixture(states, mask, ids)
    torch.testing.assert_close(gap(edge, cloud), mixture.bias[:, 1] + pull.sum(1), atol=1e-5, rtol=0)
    other = ids.clone()
    other[0, 5] = 0
    alone = made_up(replace(SHAPE, vocabulary=10, met=10))
    for read, moves in ((mixture, True), (alone, False)):
        before, after = (read(states, mask, words)[2][0, 0] for words in (ids, other))
        assert torch.equal(before, after) != moves  # the first word's pull, when the last is another
    padded = mask.clone()
    padded[0, 6:] = False
    ids[0, 6:] = 3
    torch.testing.assert_close(mixture(states, padded, ids)[0], edge)


def test_a_prompt_without_tokens_gets_the_mean_qualities() -> None:
    torch.manual_seed(0)
    mixture = Mixture(SHAPE).eval()
    low, high = torch.rand(20, 3), torch.rand(20, 3)
    mixture.start_from(torch.randn(50, 16), torch.zeros(0).long(), low, high)
    edge, cloud, pull = mixture(*prompt(10, 0))
    torch.testing.assert_close(torch.cat([edge, cloud]), torch.stack([low.mean(0), high.mean(0)]))
    assert not pull.any()


def test_two_gates_can_say_what_their_difference_says_alone() -> None:
    dual, single = made_up(SHAPE), made_up(Shape(16, 3, 4, 2, 8, dual_gate=False))
    state = dual.state_dict()
    state["positive"] = state["positive"] - state.pop("negative")
    single.load_state_dict(state)
    for ours, theirs in zip(dual(*prompt(10, 7)), single(*prompt(10, 7)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_an_expert_costs_l_times_d_and_h_and_not_d_times_h() -> None:
    d, m, rank, hidden = 192, 10, 8, 32
    count = sum(p.numel() for p in Mixture(Shape(d, m, rank=rank, hidden=hidden)).parameters())
    assert count == m * (d + 2 * d * rank + rank * hidden + 2 * hidden + 2)


@pytest.mark.parametrize("sentence", [0, 8])
def test_an_ensemble_s_gap_and_pull_are_the_means_of_its_members(sentence: int) -> None:
    members = [made_up(replace(SHAPE, sentence=sentence, vocabulary=10, met=10), seed) for seed in range(3)]
    for member in members:
        member.inputs = members[0].inputs  # they learn from the same prompts
        if member.together is not None:
            torch.nn.init.normal_(member.together.out.weight)
    alone = [member(*prompt(10, 7)) for member in members]
    edge, cloud, pull = Ensemble(members)(*prompt(10, 7))
    mean = torch.stack([gap(low, high) for low, high, _ in alone]).mean(0)
    torch.testing.assert_close(gap(edge, cloud), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(pull, torch.stack([pulls for _, _, pulls in alone]).mean(0))


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    ensemble = Ensemble([made_up(SHAPE, seed) for seed in range(2)])
    ensemble.save(tmp_path / "w.safetensors", {"seed": 3})
    read, record = Ensemble.load(tmp_path / "w.safetensors")
    assert record == {"seed": 3}
    assert read.shape == SHAPE
    for ours, theirs in zip(ensemble(*prompt(10, 7)), read(*prompt(10, 7)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.posix
def test_a_full_disk_is_an_error_of_the_system_s(tmp_path: Path) -> None:
    """A limit on the size of files stands for it; safetensors has an error of its own for that."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            Ensemble([made_up(SHAPE)]).save(tmp_path / "w.safetensors", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("record", [None, "[", "[]"])
def test_a_predictor_without_a_record_of_its_making_is_refused(tmp_path: Path, record: str | None) -> None:
    file = tmp_path / "w.safetensors"
    Ensemble([made_up(SHAPE)]).save(file, {})
    with safe_open(file, framework="pt") as opened:
        facts = {name: fact for name, fact in opened.metadata().items() if name != "record"}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, facts | ({} if record is None else {"record": record}))
    with pytest.raises(ExportError, match="not a trained predictor"):
        Ensemble.load(file)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    torch.save(made_up(SHAPE).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ExportError, match="not a trained predictor"):
        Ensemble.load(tmp_path / "w.safetensors")
