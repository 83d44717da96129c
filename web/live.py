"""One stream of server-sent events per open page, which replaces the fragments that events made stale.

Viewers of the same page, run and language share a channel. It renders a fragment once per burst of events, however
many look on; a viewer keeps only which version of each fragment it has, so a slow one skips versions and holds nothing
up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from ..protocol.views import EventView
from .boards import PAGES
from .console import Console
from .language import ENGLISH

log = logging.getLogger(__name__)

COALESCE_S = 0.25  # events closer together than this are shown at once: an eye follows four changes a second
PING_S = 15.0  # proxies close connections that are silent for 30 to 60 s
RETRY_MS = 2000
MOST_EVENTS = 200  # after more than that, everything is taken as stale

Render = Callable[[str, str, list[str], str], dict[str, str]]
"""(page, run, names of fragments, language) -> HTML by name; may touch SQL, called in a worker thread."""


@dataclass(slots=True)
class Part:
    """A fragment as last drawn: the newest event known when its HTML last changed, and when it was last drawn."""

    version: int
    checked: int
    drawn_at: float
    html: str


@dataclass(slots=True)
class Channel:
    """The viewers of one page of one run (or of none), in one language."""

    page: str
    run: str
    language: str
    viewers: int = 0
    parts: dict[str, Part] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        before, self.changed = self.changed, asyncio.Event()
        before.set()


class Live:
    """Streams for all pages of one console. Belongs to one event loop; follows the console only while someone looks."""

    def __init__(self, console: Console, render: Render) -> None:
        self._console = console
        self._render = render
        self._channels: dict[tuple[str, str, str], Channel] = {}
        self._follower: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._at = 0  # the newest event that the channels know of

    async def stream(
        self, page: str, run: str, after: int, allowed: Callable[[], bool], language: str = ENGLISH
    ) -> AsyncIterator[bytes]:
        """Server-sent events for one viewer, who has seen the page as of event `after`.

        Each message is named as a fragment and carries its HTML; `id` is the version to come back with. `allowed` is
        asked with every ping whether the session still stands; if not, the message `signed-out` is the last. The stream
        ends when the console's changes end.
        """
        loop = asyncio.get_running_loop()
        async with self._join(page, run, language) as channel:
            yield format_sse_event(comment="murmur", retry=RETRY_MS)
            after = await self._catch_up(channel, after)
            sent = {name: part.html for name, part in channel.parts.items() if part.version <= after}
            ping_at = loop.time() + PING_S
            while self._follower is not None and not self._follower.done():
                changed = channel.changed  # taken before the parts are read, so that no change falls between
                fresh = {name: part for name, part in channel.parts.items() if sent.get(name) != part.html}
                for i, (name, part) in enumerate(fresh.items(), start=1):
                    sent[name] = part.html
                    after = max(after, part.version)
                    # the id only with the last, so that who is cut off in between gets all of them again
                    yield format_sse_event(event=name, data_str=part.html, id=str(after) if i == len(fresh) else None)
                with contextlib.suppress(TimeoutError):  # wait_for of 3.11 can swallow the end of a viewer's stream
                    async with asyncio.timeout(max(0.0, ping_at - loop.time())):
                        await changed.wait()
                if loop.time() >= ping_at:
                    ping_at = loop.time() + PING_S
                    if not await run_in_threadpool(allowed):
                        yield format_sse_event(event="signed-out", data_str="-")
                        return
                    yield format_sse_event(comment="ping")
                    await self._refresh_timed(channel)

    @contextlib.asynccontextmanager
    async def _join(self, page: str, run: str, language: str) -> AsyncGenerator[Channel, None]:
        key = (page, run, language)
        channel = self._channels.setdefault(key, Channel(*key))
        channel.viewers += 1
        try:
            async with self._starting:
                if self._follower is None or self._follower.done():
                    newest = await run_in_threadpool(self._newest)
                    self._follower = asyncio.create_task(self._follow(newest))
            yield channel
        finally:
            channel.viewers -= 1
            if not channel.viewers:
                self._channels.pop(key, None)
            if not self._channels and self._follower is not None:
                self._follower.cancel()
                self._follower = None

    def _newest(self) -> int:
        last = self._console.recent_events(None, 1)
        return last[-1].id if last else 0

    async def _catch_up(self, channel: Channel, after: int) -> int:
        """Render what changed since the viewer's page (all if `after` is not of this log); where the viewer stands."""
        only = channel.run if PAGES[channel.page].one_run else None
        missed = await run_in_threadpool(self._console.events, after, only, MOST_EVENTS)
        newest = await run_in_threadpool(self._newest)
        if after > newest:
            await self._refresh(channel, None, newest)
            return -1
        if len(missed) >= MOST_EVENTS:
            await self._refresh(channel, None, newest)
        elif missed:
            await self._refresh(channel, missed, missed[-1].id)
        return after

    async def _follow(self, after: int) -> None:
        self._at = after
        try:
            async for newest in self._console.changes(after):
                await asyncio.sleep(COALESCE_S)
                events = await run_in_threadpool(self._console.events, after, None, MOST_EVENTS)
                too_many = len(events) >= MOST_EVENTS
                if too_many:
                    after = max(newest, await run_in_threadpool(self._newest))
                elif events:
                    after = events[-1].id
                self._at = after
                for channel in list(self._channels.values()):
                    try:
                        await self._refresh(channel, None if too_many else events, after)
                    except Exception:  # one page that cannot be drawn must not stop the others
                        log.exception("fragments not rendered", extra={"page": channel.page, "run": channel.run})
        except Exception:  # the viewers' streams end with this one, and come back
            log.exception("the event log cannot be followed")
        finally:
            for channel in self._channels.values():
                channel.wake()

    async def _refresh(self, channel: Channel, events: Iterable[EventView] | None, newest: int) -> None:
        """Render what the events made stale (None: everything) unless that has been done for `newest` already."""
        page = PAGES[channel.page]
        if events is None:
            stale = list(page.fragments)
        else:
            stale = page.stale(e for e in events if not page.one_run or e.run == channel.run)
        async with channel.lock:
            await self._draw(channel, [n for n in stale if not self._knows(channel, n, newest)], newest)

    async def _refresh_timed(self, channel: Channel) -> None:
        """Render again what grows stale by itself, unless another viewer's ping just did."""
        async with channel.lock:
            since = asyncio.get_running_loop().time() - PING_S / 2
            names = [
                n for n in PAGES[channel.page].timed if n not in channel.parts or channel.parts[n].drawn_at < since
            ]
            await self._draw(channel, names, self._at)

    @staticmethod
    def _knows(channel: Channel, name: str, newest: int) -> bool:
        return name in channel.parts and channel.parts[name].checked >= newest

    async def _draw(self, channel: Channel, names: list[str], newest: int) -> None:
        if not names:
            return
        drawn = await run_in_threadpool(self._render, channel.page, channel.run, names, channel.language)
        now = asyncio.get_running_loop().time()
        for name, html in drawn.items():
            old = channel.parts.get(name)
            version = old.version if old and old.html == html else newest
            channel.parts[name] = Part(version, newest, now, html)
        channel.wake()
