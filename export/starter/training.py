"""A training run that can be stopped at any time and goes on where it was.

Every stage of the starter (autoencoder, denoisers, judge) is a ``Run``: it owns the optimiser, the learning-rate
schedule, the averaged weights, checkpoints, progress and the record that ends up in the model card. On a GPU the
batches are made ahead, by processes beside it: painting scenes would keep it waiting.
"""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from export.errors import ExportError

Made = TypeVar("Made")

UNFINISHED = 75  # exit code of a stage that ran out of its --seconds; calling it again goes on (EX_TEMPFAIL)

RECORD = "record.json"  # beside a checkpoint, once the run came to its end
WARM_UP = 100  # steps of linearly rising learning rate
CHECKPOINT_EVERY = 120.0  # seconds
AVERAGE_DECAY = 0.999  # of the averaged (EMA) weights once enough steps have been made
REPORT_EVERY = 50  # steps; reading the loss makes a GPU wait, so it is not read at every one
AHEAD = 4  # batches that each process beside a run keeps ready


class _ByNumber(Dataset[Made], Generic[Made]):
    """What ``make`` makes of a number."""

    def __init__(self, make: Callable[[int], Made]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Made:
        return self.make(number)


def made_ahead(make: Callable[[int], Made], numbers: Sequence[int]) -> Iterable[Made]:
    """``make`` of each number in turn: on the CPU when it is asked for, on a GPU ahead, by processes beside this one.

    What is made must depend on its number alone, and hold arrays, not tensors: those of a process that ends are gone.
    """
    if not torch.cuda.is_available() or sys.platform == "win32":  # which forks no processes
        return map(make, numbers)
    return DataLoader(
        _ByNumber(make),
        batch_size=None,
        sampler=numbers,
        num_workers=max(1, (os.cpu_count() or 1) - 2),
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        multiprocessing_context="fork",
    )


def _as_it_is(made: Made) -> Made:
    return made


class Run:
    """Optimises ``model`` for ``steps`` steps; checkpoints to ``folder`` and resumes from there.

    Raises ExportError where ``folder`` holds a run of another batch, learning rate or seed.

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
        self.seconds = seconds
        # What a run that goes on must have in common with the one that was interrupted.
        self.recipe = {"batch": batch, "learning_rate": learning_rate, "seed": seed}
        self.checkpoint = folder / "checkpoint.pt"
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
            fused=self.device.type == "cuda",
        )
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._resume()

    @property
    def done(self) -> bool:
        """Whether every step has been made."""
        return self.step >= self.steps

    def train(
        self, make_batch: Callable[[int], Made], loss_of_batch: Callable[[int, Made], torch.Tensor]
    ) -> bool:
        """Run steps until done or out of time; True when done.

        ``make_batch(step)`` makes what a step learns from, on the CPU, and ``loss_of_batch(step, batch)`` learns from
        it. Both must depend on the step and the seed alone, so that a resumed run sees what an unbroken one would have
        seen.
        """
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU: ten bits of mantissa are plenty
        try:
            return self._train(make_batch, loss_of_batch)
        finally:
            torch.set_float32_matmul_precision(precision)

    def _train(
        self, make_batch: Callable[[int], Made], loss_of_batch: Callable[[int, Made], torch.Tensor]
    ) -> bool:
        started = saved = time.monotonic()
        spent_before = self.trained_seconds
        smooth: torch.Tensor | None = None
        self.model.train()
        first, remaining = self.step, range(self.step, self.steps)
        for step, batch in zip(remaining, made_ahead(make_batch, remaining), strict=True):
            for group in self.optimiser.param_groups:
                group["lr"] = self.recipe["learning_rate"] * self._schedule(step)
            loss = loss_of_batch(step, batch)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self._update_average()
            self.step = step + 1

            now = time.monotonic()
            self.trained_seconds = spent_before + now - started
            smooth = loss.detach() if smooth is None else 0.98 * smooth + 0.02 * loss.detach()
            if self.step % REPORT_EVERY == 0 or self.done:
                self.losses.append((self.step, smooth.item()))
                left = (now - started) / (self.step - first) * (self.steps - self.step)
                print(
                    f"{self.folder.name}: step {self.step}/{self.steps}  loss {smooth.item():.4f}  "
                    f"{left / 60:.0f} min left",
                    flush=True,
                )
            if now - saved > CHECKPOINT_EVERY:
                self._save()
                saved = now
            if self.seconds is not None and now - started >= self.seconds:
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
            **self.recipe,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": round(self.trained_seconds),
            "hardware": hardware(),
            "torch": torch.__version__,
            "final_loss": round(self.losses[-1][1], 5) if self.losses else None,
            "losses": [
                (step, round(loss, 5)) for step, loss in self.losses[:: max(1, len(self.losses) // 40)]
            ],
        }

    def _schedule(self, step: int) -> float:
        """Rise over WARM_UP steps, then fall along half a cosine to zero."""
        rise = min(1.0, (step + 1) / WARM_UP)
        return rise * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.steps)).item())

    def _update_average(self) -> None:
        decay = min(AVERAGE_DECAY, (1 + self.step) / (10 + self.step))
        state = self.model.state_dict()
        learnt = [key for key, value in state.items() if value.dtype.is_floating_point]
        with torch.no_grad():
            torch._foreach_lerp_(
                [self.average[key] for key in learnt], [state[key] for key in learnt], 1 - decay
            )
            for key in state.keys() - learnt:
                self.average[key].copy_(state[key])

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.trained_seconds,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "recipe": self.recipe,
        }
        partial = self.checkpoint.with_suffix(".partial")
        partial.write_bytes(pickled(state))
        os.replace(partial, self.checkpoint)  # a kill leaves the old one or the new one, never half of one

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state.get("recipe") != self.recipe:  # of one from before recipes were kept nothing is known
            raise ExportError(
                f"{self.checkpoint} was made by another recipe: remove {self.folder}, or name another --work"
            )
        self.step = state["step"]
        self.trained_seconds = state["seconds"]
        self.losses = [tuple(entry) for entry in state["losses"]]
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])


def pickled(state: Any) -> memoryview:
    """As `torch.save` writes it, to be written by Python: of a full disk torch makes a RuntimeError of many lines."""
    made = io.BytesIO()
    torch.save(state, made)
    return made.getbuffer()


def hardware() -> str:
    """What the run was made on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def needed(work: Path, name: str, stage: str | None = None) -> Path:
    """The folder of the finished run ``name`` under ``work``, whose ``model`` another stage builds on.

    Raises ExportError that names the stage to run first; it is called as the run unless ``stage`` says otherwise.
    """
    folder = work / name
    if not (folder / RECORD).exists():
        raise ExportError(
            f"the model {name!r} is not finished: run `edge-export starter {stage or name} --work {work}`"
        )
    return folder


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Keep a run's record beside its checkpoint, for the model card."""
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
