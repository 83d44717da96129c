"""Who waits for what inside this process: parked polls and pages wake when a commit concerns them.

A wake is a hint. Whoever wakes reads the database again, and reads it anyway after a while.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

EVERYBODY = ""  # the name under which pages wait
ALL = "*"  # instead of names: whoever waits


class Notice(NamedTuple):
    """Something that others may wait for has happened."""

    wake: tuple[str, ...] = ()
    newest_event: int = 0
    work: bool = False


class Hub:
    """Wakes coroutines of one event loop, and one worker thread, from any thread.

    `outside` hears of all of it too, where other processes work on the same database.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._parked: dict[str, set[_Parked]] = {}
        self._work = threading.Event()
        self.outside: Callable[[Notice], None] = lambda notice: None
        self.stopping = False
        self.newest_event = 0
        self.polls: dict[str, int] = {}  # client -> its newest poll: an older one has nobody behind it any more
        self._wakes = itertools.count(1)
        self._woken: dict[str, int] = {}  # name -> its newest wake
        self._all_woken = 0  # the newest wake of everybody

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the event loop whose coroutines wait here."""
        self._loop = loop

    @property
    def waiting(self) -> int:
        """How many names are waited for."""
        return len(self._parked)

    def woken(self, name: str) -> int:
        """The newest wake of this name: while it is the same number, nobody had anything to say to it."""
        return max(self._woken.get(name, 0), self._all_woken)

    def wake(self, names: Iterable[str]) -> None:
        """Wake whoever waits for one of these names; harmless after the loop is gone."""
        self.hear(notice := Notice(wake=tuple(names)))
        self.outside(notice)

    def committed(self, newest_event: int) -> None:
        """Events up to this one are in the log; wakes the pages."""
        self.hear(notice := Notice(newest_event=newest_event))
        self.outside(notice)

    def work(self) -> None:
        """Tell the conductor that something may have come true."""
        self.hear(notice := Notice(work=True))
        self.outside(notice)

    def hear(self, notice: Notice) -> None:
        """Act on a notice in this process."""
        names, number = notice.wake, next(self._wakes)
        if ALL in names:
            self._all_woken = number
        self._woken.update(dict.fromkeys(names, number))
        if notice.newest_event > self.newest_event:
            self.newest_event = notice.newest_event
            names = (*names, EVERYBODY)
        if notice.work:
            self._work.set()
        names = tuple(name for name in names if name == ALL or name in self._parked)  # who comes now, looks after this
        if names and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, names)

    def _wake(self, names: tuple[str, ...]) -> None:
        for name in tuple(self._parked) if ALL in names else names:
            for waiting in tuple(self._parked.get(name, ())):
                waiting.set()

    def parked(self, name: str) -> _Parked:
        return _Parked(self._parked, name)

    def wait_for_work(self, timeout_s: float) -> None:
        self._work.wait(timeout_s)
        self._work.clear()

    def stop(self) -> None:
        """Send everybody home: parked requests answer at once, so that the server can end."""
        self.stopping = True
        self.hear(Notice(wake=(ALL,), work=True))


class _Parked:
    """Somebody who waits under a name; what happens between two waits is not missed."""

    __slots__ = ("_all", "_future", "_name")

    def __init__(self, parked: dict[str, set[_Parked]], name: str) -> None:
        self._all, self._name = parked, name
        self._future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> _Parked:
        self._all.setdefault(self._name, set()).add(self)
        return self

    def __exit__(self, *_: object) -> None:
        waiting = self._all[self._name]
        waiting.discard(self)
        if not waiting:
            del self._all[self._name]

    def set(self) -> None:
        if not self._future.done():
            self._future.set_result(True)

    async def wait(self, timeout_s: float) -> bool:
        """Wait until woken; False when that takes longer. Ten thousand wait at a time: no task, no event of its own."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(0.0, timeout_s), _expire, self._future)
        try:
            return await self._future
        finally:
            timer.cancel()
            self._future = loop.create_future()


def _expire(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_result(False)
