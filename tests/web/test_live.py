"""The live streams: what is sent to whom and when, straight from the generator, and once over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager

import httpx
import pytest
from starlette.testclient import TestClient

from murmur.web import live
from murmur.web.boards import PAGES
from murmur.web.live import Live
from murmur.web.rendering import Renderer

from .fakes import FakeConsole
from .harness import OWN, serving

RUN = "heart-disease"
PARTS = set(PAGES["run"].fragments) - {"run_privacy"}  # what a round that is committed may change


class Viewer:
    """Reads one stream; `heard` is every message as (event, data, id)."""

    def __init__(
        self,
        streams: Live,
        page: str = "run",
        run: str = RUN,
        after: int = 0,
        allowed: Callable[[], bool] = lambda: True,
    ) -> None:
        self.heard: list[tuple[str, str, str]] = []
        self.comments: list[str] = []
        self.stream = streams.stream(page, run, after, allowed)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self.stream:
            fields: dict[str, list[str]] = {}
            for row in message.decode().splitlines():
                name, _, value = row.partition(": ")
                fields.setdefault(name, []).append(value)
            if "event" in fields:
                self.heard.append((fields["event"][0], "\n".join(fields["data"]), fields.get("id", [""])[0]))
            else:
                self.comments += fields.get("", [])

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.heard]

    async def hears(self, count: int, within_s: float = 60.0) -> None:
        end = time.monotonic() + within_s
        while len(self.heard) < count and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert len(self.heard) >= count, f"heard only {self.names}"

    async def leave(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        await self.stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]


class Counter:
    """A renderer that notes what it was asked to draw."""

    def __init__(self, console: FakeConsole) -> None:
        self.drawn: list[tuple[str, str, str]] = []
        self._renderer = Renderer(console)

    def __call__(self, page: str, run: str, names: list[str], language: str) -> dict[str, str]:
        self.drawn += [(page, run, name) for name in names]
        return self._renderer.fragments(page, run, names, language)


@pytest.fixture
def counter(console: FakeConsole) -> Counter:
    return Counter(console)


@pytest.fixture
def streams(console: FakeConsole, counter: Counter) -> Live:
    return Live(console, counter)


@contextlib.asynccontextmanager
async def watching(streams: Live, count: int = 1, **given: object) -> AsyncIterator[list[Viewer]]:
    viewers = [Viewer(streams, **given) for _ in range(count)]  # pyright: ignore[reportArgumentType]
    await asyncio.sleep(0.15)
    try:
        yield viewers
    finally:
        for viewer in viewers:
            await viewer.leave()


def test_a_viewer_who_is_up_to_date_hears_only_what_changes(
    console: FakeConsole, streams: Live, counter: Counter
) -> None:
    async def story() -> None:
        async with watching(streams, after=console.log[-1].id) as (viewer,):
            assert viewer.heard == [] and counter.drawn == []
            console.commit_round(RUN)
            newest = console.log[-1].id
            await viewer.hears(len(PARTS))
            assert set(viewer.names) == PARTS
            assert "Version 18" in dict((n, d) for n, d, _ in viewer.heard)["run_rounds"]
            assert [id for _, _, id in viewer.heard] == [""] * (len(PARTS) - 1) + [str(newest)]

    asyncio.run(story())


def test_progress_of_a_client_redraws_the_cohort_alone(console: FakeConsole, streams: Live) -> None:
    async def story() -> None:
        async with watching(streams, after=console.log[-1].id) as (viewer,):
            working = console.assignment("hungarian", "working", phase="training", step=15, steps=20)
            console.open_round(RUN, "collecting", working)
            console.emit("progress", run=RUN, client="hungarian", round=18, step=15, steps=20)
            await viewer.hears(1)
            await asyncio.sleep(0.4)
            assert viewer.names == ["run_cohort"]
            assert "Training, 15 of 20" in viewer.heard[0][1]

    asyncio.run(story())


def test_a_hundred_viewers_share_one_rendering(console: FakeConsole, streams: Live, counter: Counter) -> None:
    async def story() -> None:
        async with watching(streams, count=100, after=console.log[-1].id) as viewers:
            console.commit_round(RUN)
            for viewer in viewers:
                await viewer.hears(len(PARTS))
            assert sorted(counter.drawn) == sorted(("run", RUN, name) for name in PARTS)

    asyncio.run(story())


def test_a_burst_of_events_is_drawn_at_most_every_quarter_second(
    console: FakeConsole, streams: Live, counter: Counter
) -> None:
    async def story() -> None:
        async with watching(streams, after=console.log[-1].id):
            began = time.monotonic()
            for step in range(100):
                working = console.assignment("hungarian", "working", phase="training", step=step, steps=100)
                console.open_round(RUN, "collecting", working)
                console.emit("progress", run=RUN, client="hungarian", round=18, step=step, steps=100)
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.4)
            most = (time.monotonic() - began) / live.COALESCE_S + 1
            assert 2 <= len(counter.drawn) <= most

    asyncio.run(story())


def test_an_event_of_another_run_disturbs_nobody(console: FakeConsole, streams: Live, counter: Counter) -> None:
    async def story() -> None:
        async with watching(streams, after=console.log[-1].id) as (viewer,):
            console.emit("phase", run="heart-pilot", round=1, attempt=1, state="committed")
            await asyncio.sleep(0.5)
            assert viewer.heard == [] and counter.drawn == []

    asyncio.run(story())


def test_an_event_of_an_unknown_kind_redraws_everything(console: FakeConsole, streams: Live, counter: Counter) -> None:
    async def story() -> None:
        async with watching(streams, after=console.log[-1].id):
            console.emit("weather", run=RUN, to="rain")
            async with asyncio.timeout(60):
                while {name for _, _, name in counter.drawn} != set(PAGES["run"].fragments):
                    await asyncio.sleep(0.01)

    asyncio.run(story())


def test_a_fragment_that_stayed_the_same_is_not_sent_again(console: FakeConsole, streams: Live) -> None:
    async def story() -> None:
        async with watching(streams, after=console.log[-1].id) as (viewer,):
            console.emit("progress", run=RUN, client="va", round=18)
            await viewer.hears(1)
            console.emit("progress", run=RUN, client="va", round=18)
            await asyncio.sleep(0.6)
            assert viewer.names == ["run_cohort"]

    asyncio.run(story())


def test_who_comes_back_gets_what_was_missed(console: FakeConsole, streams: Live) -> None:
    async def story() -> None:
        before = console.log[-1].id
        console.emit("progress", run=RUN, client="va", round=18)
        async with watching(streams, after=before) as (viewer,):
            await viewer.hears(1)
            assert viewer.names == ["run_cohort"]
            assert viewer.heard[0][2] == str(before + 1)

    asyncio.run(story())


@pytest.mark.parametrize("gap", [live.MOST_EVENTS + 50, None], ids=["a long gap", "another database"])
def test_who_missed_too_much_gets_everything(console: FakeConsole, streams: Live, gap: int | None) -> None:
    async def story() -> None:
        after = console.log[-1].id if gap else 10**9
        for _ in range(gap or 0):
            console.emit("progress", run=RUN, client="va", round=18)
        async with watching(streams, after=after) as (viewer,):
            await viewer.hears(len(PARTS))
            assert set(viewer.names) == set(PAGES["run"].fragments)

    asyncio.run(story())


def test_a_second_viewer_does_not_get_what_its_page_shows_already(console: FakeConsole, streams: Live) -> None:
    async def story() -> None:
        async with watching(streams, after=console.log[-1].id) as (first,):
            console.commit_round(RUN)
            await first.hears(len(PARTS))
            async with watching(streams, after=console.log[-1].id) as (second,):
                assert second.heard == []
            console.emit("progress", run=RUN, client="va", round=18)
            await asyncio.sleep(0.4)

    asyncio.run(story())


def test_all_who_come_back_at_once_share_one_rendering(console: FakeConsole, streams: Live, counter: Counter) -> None:
    async def story() -> None:
        before = console.log[-1].id
        console.emit("progress", run=RUN, client="va", round=18)
        async with watching(streams, count=20, after=before) as viewers:
            for viewer in viewers:
                await viewer.hears(1)
            assert counter.drawn == [("run", RUN, "run_cohort")]

    asyncio.run(story())


def test_an_event_that_changed_nothing_is_not_sent_to_who_comes_back(console: FakeConsole, streams: Live) -> None:
    async def story() -> None:
        async with watching(streams, after=console.log[-1].id) as (first,):
            shown = console.emit("progress", run=RUN, client="va", round=18)
            await first.hears(1)
            console.emit("progress", run=RUN, client="va", round=18)
            await asyncio.sleep(0.5)
            async with watching(streams, after=shown) as (second,):
                assert second.heard == []

    asyncio.run(story())


def test_a_session_that_ended_is_told_so_at_the_next_ping(
    console: FakeConsole, streams: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PING_S", 0.2)
    still = [True]

    async def story() -> None:
        async with watching(streams, after=console.log[-1].id, allowed=lambda: still[0]) as (viewer,):
            async with asyncio.timeout(60):
                while "ping" not in viewer.comments:
                    await asyncio.sleep(0.01)
            assert viewer.heard == []
            still[0] = False
            await viewer.hears(1)
            assert viewer.names == ["signed-out"]
            await asyncio.wait_for(viewer.task, 60)

    asyncio.run(story())


def test_the_session_is_asked_for_although_events_never_pause(
    console: FakeConsole, streams: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PING_S", 0.3)
    monkeypatch.setattr(live, "COALESCE_S", 0.01)

    async def story() -> None:
        async with watching(streams, after=console.log[-1].id, allowed=lambda: False) as (viewer,):
            for step in range(100):
                working = console.assignment("va", "working", phase="training", step=step, steps=100)
                console.open_round(RUN, "collecting", working)
                console.emit("progress", run=RUN, client="va", round=18, step=step)
                await asyncio.sleep(0.01)
            assert "signed-out" in viewer.names

    asyncio.run(story())


def test_a_client_that_stays_away_is_shown_offline_without_an_event(
    console: FakeConsole, streams: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PING_S", 0.2)

    async def story() -> None:
        async with watching(streams, page="clients", run="", after=console.log[-1].id) as (viewer,):
            await viewer.hears(1)
            console.client_views["cleveland"] = console.client_views["cleveland"].model_copy(update={"online": False})
            await viewer.hears(2)
            assert viewer.names == ["clients_table", "clients_table"]
            assert viewer.heard[1][1].count("Offline") == viewer.heard[0][1].count("Offline") + 1

    asyncio.run(story())


def test_streams_end_when_the_coordinator_stops(console: FakeConsole, streams: Live) -> None:
    async def story() -> None:
        async with watching(streams, after=console.log[-1].id) as (viewer,):
            console.stopping = True
            await asyncio.wait_for(viewer.task, 60)

    asyncio.run(story())


def test_nothing_is_followed_while_nobody_looks(console: FakeConsole, streams: Live, counter: Counter) -> None:
    async def story() -> None:
        async with watching(streams, after=console.log[-1].id):
            pass
        console.commit_round(RUN)
        await asyncio.sleep(0.4)
        assert counter.drawn == []
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(story())


def test_a_page_that_cannot_be_drawn_does_not_stop_the_others(
    console: FakeConsole, streams: Live, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        console.add_run("doomed", 1)
        after = console.log[-1].id
        async with watching(streams, run="doomed", after=after), watching(streams, after=after) as (viewer,):
            del console.details["doomed"]
            console.emit("phase", run="doomed", round=1, attempt=1, state="failed")
            console.commit_round(RUN)
            await viewer.hears(len(PARTS))
        assert "fragments not rendered" in caplog.text

    asyncio.run(story())


def listen(console: FakeConsole, address: str, after: int, **headers: str) -> AbstractContextManager[httpx.Response]:
    cookies = {"murmur": console.session("ada")}
    url = f"{address}/live?page=run&run={RUN}&after={after}"
    return httpx.stream("GET", url, cookies=cookies, headers=headers, timeout=60)


def test_over_a_socket_the_stream_is_not_buffered(console: FakeConsole) -> None:
    with serving(console) as address, listen(console, address, console.log[-1].id) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["cache-control"] == "no-store"
        rows = answer.iter_lines()
        assert next(rows) == ": murmur"
        time.sleep(0.3)
        console.commit_round(RUN)
        next(row for row in rows if row.startswith("event: run_charts"))  # while the answer goes on


def test_last_event_id_comes_before_the_address(console: FakeConsole) -> None:
    before = console.log[-1].id
    console.emit("progress", run=RUN, client="va", round=18)
    with serving(console) as address, listen(console, address, before + 1, **{"last-event-id": str(before)}) as answer:
        assert next(row for row in answer.iter_lines() if row.startswith("event")) == "event: run_cohort"


@pytest.mark.parametrize(
    ("query", "status"),
    [("page=none", 404), ("page=run&run=none", 404), ("page=run", 404), ("page=models&run=none", 404), ("", 422)],
)
def test_only_known_pages_are_live(admin: TestClient, query: str, status: int) -> None:
    assert admin.get(f"/live?{query}").status_code == status


def test_a_stranger_is_told_in_the_stream_that_it_is_signed_out(stranger: TestClient) -> None:
    answer = stranger.get("/live?page=overview", headers=OWN)
    assert answer.status_code == 200 and answer.text == "event: signed-out\ndata: -\n\n"


def test_a_viewer_who_leaves_as_something_changes_is_gone(console: FakeConsole, streams: Live) -> None:
    async def story(turns: int) -> None:
        async with watching(streams, after=console.log[-1].id) as (viewer,):
            (channel,) = streams._channels.values()
            channel.wake()
            for _ in range(turns):
                await asyncio.sleep(0)
            viewer.task.cancel()
            done, _ = await asyncio.wait({viewer.task}, timeout=60)
            assert done, f"still there when told to leave {turns} turns of the loop after a change"

    for turns in range(5):
        asyncio.run(story(turns))
