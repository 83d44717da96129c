"""Signs of life on their way into the database: whatever comes while a write is under way shares the next one.

Ten thousand clients say every few seconds how far they are. One transaction each would be ten thousand syncs; here
they are as many as the disk can do, and each client is still answered only after its own sign is on disk.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from ..protocol.errors import InternalError, MurmurError
from .store.signs import Seen, Sign, Signs

log = logging.getLogger(__name__)

MOST = 1_000  # signs in one transaction
SOON_S = 0.5  # how long a sign may wait that nobody waits for


_Done = asyncio.Future[list[MurmurError | None]]


class _Heard:
    """What one request brings, and whom to tell when it is written."""

    __slots__ = ("done", "seen", "signs")

    def __init__(self, seen: Sequence[Seen], signs: Sequence[Sign], done: _Done | None):
        self.seen, self.signs, self.done = seen, signs, done


class Heartbeats:
    """One thread that writes; `note` from coroutines of one event loop."""

    def __init__(self, signs: Signs) -> None:
        self._signs = signs
        self._queue: queue.SimpleQueue[_Heard | None] = queue.SimpleQueue()
        self._soon: deque[Seen] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    async def note(self, seen: Sequence[Seen], signs: Sequence[Sign]) -> list[MurmurError | None]:
        """Write them; returns for each of `signs` why it was refused, or None, once that is on disk."""
        done = asyncio.get_running_loop().create_future()
        self._queue.put(_Heard(seen, signs, done))
        return await done

    def tell(self, seen: Seen) -> None:
        """Write it soon; nobody waits for it, so that many share a transaction."""
        self._soon.append(seen)

    def close(self) -> None:
        """Write what has come so far and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            if batch := self._gather():
                self._write(batch)

    def _gather(self) -> list[_Heard]:
        """What has come while the last batch was written; else what comes next, or was told meanwhile."""
        batch: list[_Heard] = []
        with suppress(queue.Empty):
            while len(batch) < MOST:
                heard = self._queue.get(not batch, SOON_S)
                if heard is None:
                    self._closed = True
                    break
                batch.append(heard)
        told = [self._soon.popleft() for _ in range(len(self._soon))]
        return [*batch, _Heard(told, [], None)] if told else batch

    def _write(self, batch: list[_Heard]) -> None:
        error: MurmurError | None = None
        refused: list[MurmurError | None] = []
        try:
            refused = self._signs.note([s for h in batch for s in h.seen], [s for h in batch for s in h.signs])
        except MurmurError as failed:
            error = failed
        except Exception:
            log.exception("signs of life could not be written")
            error = InternalError("signs of life could not be written")
        loop = next((h.done.get_loop() for h in batch if h.done is not None), None)
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(_tell, batch, refused, error)


def _tell(batch: list[_Heard], refused: list[MurmurError | None], error: MurmurError | None) -> None:
    first = 0
    for heard in batch:
        after = first + len(heard.signs)
        if heard.done is not None and not heard.done.done():  # else the caller has gone
            if error is not None:
                heard.done.set_exception(error)
            else:
                heard.done.set_result(refused[first:after])
        first = after
