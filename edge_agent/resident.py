"""The models of one bundle, resident for as long as somebody needs them.

Whoever uses them does so in a `with` block. When nobody has for a while they are unloaded, which gives their memory
back; the next use loads each graph again when it comes to it. Models that others have succeeded are unloaded after
their last use.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Iterable

from edge_agent import memory
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.providers import Choice, Standing
from edge_agent.diffusion.sessions import Session
from edge_agent.log import events
from edge_agent.reader import Reader
from edge_agent.request import Limits

log = events(__name__)


class Resident:
    """Reader and generator of one bundle, and what they can serve. Belongs to the event loop's thread.

    `keep_alive_s` is how long they stay in memory after their last use; 0 keeps them for good.
    """

    def __init__(
        self,
        reader: Reader,
        generator: Generator,
        limits: Limits,
        choice: Choice | None = None,
        keep_alive_s: float = 0.0,
        open_better: Callable[[], Generator] | None = None,
    ) -> None:
        """`choice` is what they run on; left out, the CPU. `open_better` opens the generator on the choice's better
        providers, which may take minutes.
        """
        self.reader = reader
        self.generator = generator
        self.limits = limits
        self.open_better = open_better
        self._choice = choice or Choice()
        self._ready, self._failure = False, ""  # whether `take_up` was called, and with what `stay`
        self._made_at = time.monotonic()
        self.keep_alive_s = keep_alive_s
        self._uses = 0
        self._spare_due = False  # whether the spare graphs are to be unloaded after the last use
        self.succeeded = False  # whether others are used in their place
        self._timer: asyncio.TimerHandle | None = None
        self._going: asyncio.Future[None] | None = None  # the last unloading
        self._unloaded_at: float | None = None
        # Of them a request holds on to those that it still uses.
        self._predecessors: weakref.WeakSet[Resident] = weakref.WeakSet()

    @property
    def providers(self) -> tuple[Standing, ...]:
        """What the models run on and what was passed over."""
        opening_s = time.monotonic() - self._made_at
        return self._choice.standings(opening_s, ready=self._ready, failure=self._failure)

    @property
    def warming(self) -> str:
        """The provider that is being made ready, or was; empty where the first was the best."""
        return self._choice.better[0] if self._choice.better else ""

    def take_up(self, better: Generator) -> None:
        """Make images with `better` from now on. Those that have begun or wait end with the generator they have."""
        self.generator = better
        self.open_better = None  # it holds on to the generator before
        self._ready = self._spare_due = True
        if not self._uses:
            self.rest()

    def stay(self, failure: str) -> None:
        """Go on as it is: the better providers cannot be had, for the reason given."""
        self._failure = failure
        if not self._uses:  # trying them loaded what may have been unloaded meanwhile
            self.rest()

    @property
    def loaded(self) -> bool:
        """Whether every graph is in memory that an image of the default size takes. Those that a decision needs may be
        while the others are not.
        """
        return all(session.loaded_at is not None for session in self._sessions)

    @property
    def reads_at_once(self) -> bool:
        """Whether a prompt is read without loading a graph first, or waiting for one of another session."""
        going = self._going is not None and not self._going.done()
        return self.reader.loaded and not going and not self.reader.takes_turns

    @property
    def since(self) -> float:
        """Since when they are loaded, or are not, in seconds since 1970."""
        if self._unloaded_at is not None and not self.loaded:
            return self._unloaded_at
        return max(session.loaded_at or 0.0 for session in self._sessions)

    @property
    def fault(self) -> str:
        """Why one of the graphs cannot be loaded again, where that was tried."""
        sessions = (*self._sessions, *self.generator.spare_sessions)
        return next((session.fault for session in sessions if session.fault), "")

    @property
    def used(self) -> bool:
        """Whether a request uses them now."""
        return self._uses > 0

    @property
    def predecessors(self) -> list[str]:
        """The folders of bundles whose models these have succeeded, and that are still used."""
        return sorted(str(each.reader.bundle.folder) for each in self._predecessors if each.used)

    def __enter__(self) -> None:
        """They are used until the block is left, for the time of one request."""
        self._uses += 1
        self._stop_waiting()

    def __exit__(self, *raised: object) -> None:
        """This use is over."""
        self._uses -= 1
        if not self._uses:
            self.rest()

    def rest(self) -> None:
        """Nobody uses them now: from here the keep-alive time counts."""
        self._stop_waiting()
        loop = asyncio.get_running_loop()
        if self._spare_due:
            self._spare_due = False
            loop.run_in_executor(None, self._unload, self.generator.spare_sessions)
        if self.succeeded:
            self._leave()
        elif self.keep_alive_s:
            self._timer = loop.call_later(self.keep_alive_s, self._leave)

    def succeed(self, by: Resident) -> None:
        """Others are used from now on: go after the last use."""
        self.reader.save()
        self.succeeded = True
        by._predecessors = weakref.WeakSet((*self._predecessors, self))
        if not self._uses:
            self.rest()

    def _leave(self) -> None:
        self._going = asyncio.get_running_loop().run_in_executor(None, self._go)

    def _go(self) -> None:
        if not self._uses:  # one that has begun since comes here again when it ends
            self.unload()

    def unload(self) -> None:
        """Gives back the memory of every graph, in some milliseconds. A run in progress ends before its graph goes."""
        if any(session.loaded_at is not None for session in self._sessions):
            self._unloaded_at = time.time()
            self._unload((*self._sessions, *self.generator.spare_sessions))
            log.info("unloaded", bundle=self.reader.bundle.folder)

    def _unload(self, sessions: Iterable[Session]) -> None:
        for session in sessions:
            session.unload()
        memory.give_back()

    def close(self) -> None:
        """No timer is left behind."""
        self.reader.save()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def _sessions(self) -> tuple[Session, ...]:
        return (*self.reader.sessions, *self.generator.sessions)
