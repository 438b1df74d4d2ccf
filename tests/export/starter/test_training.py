import pytest
import torch
from torch import nn

from export.starter.training import Run


def run_in(folder, steps, seconds=None):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return Run(folder, model, steps=steps, batch=8, learning_rate=0.1, seed=0, seconds=seconds)


def loss_of(run):
    def loss(step):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (run.model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()

    return loss


def test_a_run_cut_into_pieces_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    whole = run_in(tmp_path / "whole", steps=60)
    assert whole.train(loss_of(whole))
    calls = 0
    while True:
        piece = run_in(tmp_path / "pieces", steps=60, seconds=0)
        calls += 1
        if piece.train(loss_of(piece)):
            break
    assert calls == 60
    for name, value in whole.averaged_model().state_dict().items():
        torch.testing.assert_close(piece.averaged_model().state_dict()[name], value)


def test_a_run_learns(tmp_path):
    run = run_in(tmp_path, steps=300)
    before = loss_of(run)(0).item()
    run.train(loss_of(run))
    run.averaged_model()
    assert loss_of(run)(0).item() < 0.2 * before


def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = run_in(tmp_path, steps=3)
    run.train(loss_of(run))

    def torn(state, file):
        file.write_bytes(b"half of a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    longer = run_in(tmp_path, steps=5)
    with pytest.raises(KeyboardInterrupt):
        longer.train(loss_of(longer))
    assert run_in(tmp_path, steps=5).step == 3


def test_the_record_tells_how_the_run_was_made(tmp_path):
    run = run_in(tmp_path, steps=50)
    run.train(loss_of(run))
    record = run.record()
    assert record["steps"] == 50
    assert record["parameters"] == 5
    assert record["losses"][-1][0] == 50
