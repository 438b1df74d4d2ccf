import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.starter.training import Run, made_ahead


def run_in(folder, steps, seconds=None):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return Run(folder, model, steps=steps, batch=8, learning_rate=0.1, seed=0, seconds=seconds)


def batch_of(step):
    return np.random.default_rng(step).standard_normal((8, 4), np.float32)


def loss_of(run):
    def loss(step, batch):
        assert (batch == batch_of(step)).all()
        inputs = torch.from_numpy(batch).to(run.device)
        return (run.model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()

    return loss


@pytest.mark.posix
def test_batches_are_made_ahead_by_other_processes_where_there_is_a_gpu(monkeypatch):
    def make(number):
        return os.getpid(), batch_of(number)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = list(made_ahead(make, range(3, 9)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ahead = list(made_ahead(make, range(3, 9)))
    assert {process for process, _ in here} == {os.getpid()}
    assert os.getpid() not in {process for process, _ in ahead}
    for (_, one), (_, other) in zip(here, ahead, strict=True):
        assert (one == other).all()


def test_a_run_cut_into_pieces_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    whole = run_in(tmp_path / "whole", steps=60)
    assert whole.train(batch_of, loss_of(whole))
    calls = 0
    while True:
        piece = run_in(tmp_path / "pieces", steps=60, seconds=0)
        calls += 1
        if piece.train(batch_of, loss_of(piece)):
            break
    assert calls == 60
    for name, value in whole.averaged_model().state_dict().items():
        torch.testing.assert_close(piece.averaged_model().state_dict()[name], value)


@pytest.mark.parametrize("changed", ["batch", "learning_rate", "seed", None])
def test_a_run_of_another_recipe_is_not_gone_on_with(tmp_path, changed):
    run = run_in(tmp_path, steps=60, seconds=0)
    run.train(batch_of, loss_of(run))
    recipe = {"steps": 60, **run.recipe}
    if changed is None:  # as runs were kept before they said their recipe
        kept = torch.load(run.checkpoint, weights_only=True)
        del kept["recipe"]
        torch.save(kept, run.checkpoint)
    else:
        recipe[changed] += 1
    with pytest.raises(ExportError, match="made by another recipe: remove"):
        Run(tmp_path, nn.Linear(4, 1), **recipe)


def test_a_run_learns(tmp_path):
    run = run_in(tmp_path, steps=300)
    before = loss_of(run)(0, batch_of(0)).item()
    run.train(batch_of, loss_of(run))
    run.averaged_model()
    assert loss_of(run)(0, batch_of(0)).item() < 0.2 * before


def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = run_in(tmp_path, steps=3)
    run.train(batch_of, loss_of(run))

    def torn(file, _content):
        with file.open("wb") as written:
            written.write(b"half of a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", torn)
    longer = run_in(tmp_path, steps=5)
    with pytest.raises(KeyboardInterrupt):
        longer.train(batch_of, loss_of(longer))
    assert run_in(tmp_path, steps=5).step == 3


@pytest.mark.posix
def test_a_full_disk_is_an_error_of_the_system_s(tmp_path):
    """A limit on the size of files stands for it; torch has an error of its own for that."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        run = run_in(tmp_path, steps=1)
        with pytest.raises(OSError, match="too large"):
            run.train(batch_of, loss_of(run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_record_tells_how_the_run_was_made(tmp_path):
    run = run_in(tmp_path, steps=50)
    run.train(batch_of, loss_of(run))
    record = run.record()
    assert record["steps"] == 50
    assert record["parameters"] == 5
    assert record["losses"][-1][0] == 50
