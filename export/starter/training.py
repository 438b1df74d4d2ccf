"""A training run that can be stopped at any time and goes on where it was.

Every stage of the starter (autoencoder, denoisers, judge) is a ``Run``: it owns the optimiser, the learning-rate
schedule, the averaged weights, checkpoints, progress and the record that ends up in the model card.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

UNFINISHED = 75  # exit code of a stage that ran out of its --seconds; calling it again goes on (EX_TEMPFAIL)

WARM_UP = 100  # steps of linearly rising learning rate
CHECKPOINT_EVERY = 120.0  # seconds
AVERAGE_DECAY = 0.999  # of the averaged (EMA) weights once enough steps have been made


class Run:
    """Optimises ``model`` for ``steps`` steps; checkpoints to ``folder`` and resumes from there.

    ``seconds`` bounds one call, so that a long run can be made in pieces; the schedule is by steps and stays the
    same however the run is cut.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        *,
        steps: int,
        batch: int,
        learning_rate: float,
        seed: int,
        seconds: float | None = None,
    ) -> None:
        self.folder = folder
        self.model = model
        self.steps = steps
        self.batch = batch
        self.learning_rate = learning_rate
        self.seed = seed
        self.seconds = seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.step = 0
        self.trained_seconds = 0.0
        self.losses: list[tuple[int, float]] = []
        model.to(self.device)
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.optimiser = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        """Where the run is kept."""
        return self.folder / "checkpoint.pt"

    @property
    def done(self) -> bool:
        """Whether every step has been made."""
        return self.step >= self.steps

    def train(self, loss_of_batch: Callable[[int], torch.Tensor]) -> bool:
        """Run steps until done or out of time; True when done. ``loss_of_batch(step)`` must depend on the step and
        the seed alone, so that a resumed run sees the batches an unbroken one would have seen.
        """
        started = saved = time.monotonic()
        spent_before = self.trained_seconds
        smooth: float | None = None
        self.model.train()
        for step in self._remaining():
            for group in self.optimiser.param_groups:
                group["lr"] = self.learning_rate * self._schedule(step)
            loss = loss_of_batch(step)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self._update_average()
            self.step = step + 1

            now = time.monotonic()
            self.trained_seconds = spent_before + now - started
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            if self.step % 50 == 0 or self.done:
                self.losses.append((self.step, smooth))
                left = (now - started) / (self.step - self._first) * (self.steps - self.step)
                print(
                    f"{self.folder.name}: step {self.step}/{self.steps}  loss {smooth:.4f}  {left / 60:.0f} min left",
                    flush=True,
                )
            if now - saved > CHECKPOINT_EVERY:
                self._save()
                saved = now
            if self.seconds is not None and now - started > self.seconds:
                break
        self._save()
        return self.done

    def averaged_model(self) -> nn.Module:
        """The model with the averaged weights loaded, in evaluation mode."""
        self.model.load_state_dict(self.average)
        return self.model.eval()

    def record(self) -> dict[str, Any]:
        """What the model card tells of this run."""
        return {
            "steps": self.step,
            "batch": self.batch,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": round(self.trained_seconds),
            "hardware": hardware(),
            "torch": torch.__version__,
            "final_loss": round(self.losses[-1][1], 5) if self.losses else None,
            "losses": [
                (step, round(loss, 5)) for step, loss in self.losses[:: max(1, len(self.losses) // 40)]
            ],
        }

    def _remaining(self) -> Iterator[int]:
        self._first = self.step
        yield from range(self.step, self.steps)

    def _schedule(self, step: int) -> float:
        """Rise over WARM_UP steps, then fall along half a cosine to zero."""
        rise = min(1.0, (step + 1) / WARM_UP)
        return rise * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.steps)).item())

    def _update_average(self) -> None:
        decay = min(AVERAGE_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self.model.state_dict().items():
                if value.dtype.is_floating_point:
                    self.average[key].lerp_(value, 1 - decay)
                else:
                    self.average[key].copy_(value)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.trained_seconds,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(
            partial, self.checkpoint
        )  # a kill leaves the old checkpoint or the new one, never half of one

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.step = state["step"]
        self.trained_seconds = state["seconds"]
        self.losses = [tuple(entry) for entry in state["losses"]]
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])


def hardware() -> str:
    """What the run was made on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Keep a run's record beside its checkpoint, for the model card."""
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
