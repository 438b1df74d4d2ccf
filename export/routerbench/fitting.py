"""How routers are fitted: tuned on validation, with several seeds, in processes of a pool that all end at once."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from export.bootstrap import Floats
from export.errors import ExportError
from export.evaluate import routed
from export.outcomes import Outcomes
from export.routerbench.router import Prompts, Router, Scorer
from export.routerbench.routers import ByGain, Ranked
from export.states import of_prompts, of_shorter_prompts

SEEDS = 3
TIMED = 200  # decisions a router's time is measured on
OTHER_SPLITS = ("combinations", "wording", "free-form")


@dataclass(frozen=True)
class Data:
    """The splits of one matrix, as routers see them."""

    train: Prompts
    validation: Prompts
    others: Mapping[str, Prompts]
    """Of test, and of those of OTHER_SPLITS that the matrix has."""

    @classmethod
    def of(cls, outcomes: Outcomes, bundle: Bundle, scenes: NDArray[np.int64], cache: Path) -> Data:
        """``scenes`` [N] numbers what each prompt says. Token states are kept in the folder ``cache``."""
        there = (split for split in OTHER_SPLITS if (outcomes.splits == split).sum() > 1)
        found = Prompts.of(outcomes, bundle, scenes, cache, ("train", "validation", "test", *there))
        return cls(found.pop("train"), found.pop("validation"), found)


def keep_states(train: Outcomes, bundle: Bundle, cache: Path) -> None:
    """Put into the folder ``cache`` the token states that `Data.of` takes longest to make."""
    of_prompts(cache, bundle, train.prompts)
    of_shorter_prompts(cache, bundle, train.prompts)


@dataclass(frozen=True)
class Fitted:
    """What came of one router."""

    name: str
    setting: Mapping[str, float]
    validation: float
    """Mean gain over random on the validation prompts, over all rates."""
    scores: Mapping[str, Sequence[Floats]]
    """Split -> one array [N] a seed."""
    decision_ms: Floats
    """[TIMED], of one prompt whose token states are there."""


def worth(scores: Floats, gain: Floats) -> float:
    """Mean over rates of what these scores win on prompts of known gain, less what random ones would."""
    rates = np.arange(0.1, 0.95, 0.1)
    return float(np.mean([routed(scores, rate) @ gain / len(gain) - rate * gain.mean() for rate in rates]))


def fit(router: Router, data: Data, again: ByGain | None = None, seeds: int = SEEDS) -> list[Fitted]:
    """Tune on validation, fit with as many ``seeds``, score the rest, which has no outcomes there. With ``again`` the
    same networks a second time, as that router ranks what they predict.
    """
    torch.set_num_threads(1)
    unseen = {split: prompts.unseen for split, prompts in data.others.items()}
    validation = data.validation.unseen

    def learnt(seed: int, setting: Mapping[str, float]) -> Scorer:
        with blamed_on(router.name):
            return router.fit(data.train, data.validation, seed, **setting)

    def measured(name: str, setting: Mapping[str, float], raw: Sequence[Scorer]) -> Fitted:
        scorers = [checked(name, score) for score in raw]
        worths = worth(scorers[0](validation), data.validation.gain)
        scores = {split: [score(prompts) for score in scorers] for split, prompts in unseen.items()}
        return Fitted(name, dict(setting), worths, scores, _time(scorers[0], unseen["test"]))

    tried = [learnt(0, setting) for setting in router.settings]
    worths = [worth(checked(router.name, score)(validation), data.validation.gain) for score in tried]
    best = int(np.argmax(worths))
    setting = router.settings[best]
    scorers = [tried[best], *(learnt(seed, setting) for seed in range(1, seeds))]
    made = [measured(router.name, setting, scorers)]
    if again is not None:
        made.append(measured(again.name, setting, [again.again(cast("Ranked", score)) for score in scorers]))
    return made


def leave_interrupts() -> None:
    """In a process of a pool: Ctrl-C is for the one that has begun it, which ends this one at once, see `ending`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a process that was forked has its parent's handler


@contextmanager
def ending(pool: ProcessPoolExecutor) -> Iterator[None]:
    """End all processes at once after an error or Ctrl-C: what they do takes minutes, and nobody waits for it."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()  # which no process can miss, however early it comes
        raise


@contextmanager
def blamed_on(router: str) -> Iterator[None]:
    """A router of one's own fails in its own way: whichever, it becomes an ExportError that says where."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = next((frame for frame in reversed(frames) if "site-packages" not in frame.filename), frames[-1])
        raise ExportError(
            f"router {router!r} failed: {type(error).__name__}: {error} ({at.filename}, line {at.lineno})"
        ) from error


def checked(name: str, score: Scorer) -> Scorer:
    """The same; ExportError where it fails, or does not score each prompt with a finite number."""

    def scored(prompts: Prompts) -> Floats:
        with blamed_on(name):
            scores = np.asarray(score(prompts), np.float64)
        if scores.shape != (len(prompts),) or not np.isfinite(scores).all():
            raise ExportError(
                f"router {name!r} scored {len(prompts)} prompts with an array {list(scores.shape)}, "
                f"{int(np.isfinite(scores).sum())} of it finite: it must give one finite number a prompt"
            )
        return scores

    return scored


def _time(score: Scorer, prompts: Prompts) -> Floats:
    times = []
    for index in range(TIMED):
        row = index % len(prompts)
        one = replace(
            prompts,
            texts=prompts.texts[row : row + 1],
            objects=prompts.objects[row : row + 1],
            examples=prompts.examples.rows(torch.tensor([row])),
            scenes=prompts.scenes[row : row + 1],
        )
        started = time.perf_counter()
        score(one)
        times.append(1000 * (time.perf_counter() - started))
    return np.array(times)
