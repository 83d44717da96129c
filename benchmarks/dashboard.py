"""What open dashboards cost the coordinator: `python -m benchmarks.dashboard`.

A coordinator in a process of its own moves a run on with ten agents; here are the agents, and the viewers: each signed
in, with the run's page loaded and its live stream open. Spans without and with viewers take turns, so that what grows
with the run is in both; a figure is the median of the turns. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from .process import Coordinator, allow_files
from .report import Figure, document, median, note, percentile, print_report
from .runs import METRICS, start_run, update_of
from .swarm import Agent, Connection, each, enrol, run

AGENTS = 10
MODEL_BYTES = 4096
ROUND_S = 4.5  # of training: with ten agents about six events a second
STEP_S = 1.0  # between an agent's signs of progress
READ_S = 0.25  # between an agent's reads, whose answers are timed
WARM_S = 6.0  # a round and a bit
OPEN_S = 60.0  # given to all viewers to be live
EVENT = b"\nevent: "
T = TypeVar("T")
SINCE = re.compile(rb'data-at="(\d+)"')


class Viewer(asyncio.Protocol):
    """One open dashboard: counts what its stream of server-sent events brings."""

    def __init__(self) -> None:
        self.live = asyncio.get_running_loop().create_future()
        self.updates = self.bytes = 0
        self.lost = ""
        self._held = b""  # of the piece before: a marker may be cut in two
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        held = self._held + data
        if not self.live.done() and b": murmur" in held:  # the first thing that is said
            self.live.set_result(None)
        if b"\nevent: signed-out" in held:
            self.lost = "signed out"
        self.updates += held.count(EVENT)
        self.bytes += len(data)
        self._held = held[1 - len(EVENT) :] if self.live.done() else held

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = self.lost or "the coordinator closed the stream"
        if not self.live.done():
            self.live.set_exception(ConnectionResetError(f"no stream, but {self._held[:300]!r}"))

    def close(self) -> None:
        self._transport.close()


@dataclass(kw_only=True, slots=True)
class Span:
    """What was measured over some seconds. Latencies in ms; updates are of each viewer."""

    seconds: float
    cpu: float  # of a core
    events: int
    reads: list[float]
    deliveries: list[float]
    updates: list[int] = field(default_factory=list)
    bytes: int = 0


@dataclass(slots=True)
class Bench:
    """The agents' side of a coordinator that is running, and the times that their requests took, in ms."""

    coordinator: Coordinator
    reads: list[float] = field(default_factory=list)
    deliveries: list[float] = field(default_factory=list)

    async def take_part(self, agent: Agent, train_s: float) -> None:
        """Deliver for every assignment; between, say each second how far one has come, and read the model often."""
        update = update_of(MODEL_BYTES, 0.0)
        while True:
            work = await agent.work()
            if work["kind"] != "train":
                raise RuntimeError(f"the run asks to {work['kind']}, which these agents do not")
            path, step = f"/v1/assignments/{work['id']}/progress?fence={work['fence']}", 0
            began = time.monotonic()
            while (trained := time.monotonic() - began) < train_s:
                await _timed(self.reads, agent.blob(work["model"]))
                if trained >= step * STEP_S:
                    step += 1
                    said = {"phase": "training", "step": step, "steps": 10, "bytes": 0}
                    await agent.bearer("POST", path, json.dumps(said).encode())
                await asyncio.sleep(READ_S)
            await _timed(self.deliveries, agent.deliver(work, *update, METRICS))

    async def span(self, seconds: float, viewers: list[Viewer]) -> Span:
        newest = "SELECT max(id) FROM event"
        self.reads, self.deliveries = [], []
        before = [(v.updates, v.bytes) for v in viewers]
        event = await asyncio.to_thread(self.coordinator.ask_database, newest)
        cpu, began = self.coordinator.cpu_s(), time.monotonic()
        await asyncio.sleep(seconds)
        late = time.monotonic() + OPEN_S  # a machine that is too busy for one of each is given as long
        while time.monotonic() < late and not (
            self.reads
            and self.deliveries
            and all(v.updates > updates for v, (updates, _) in zip(viewers, before, strict=True))
        ):
            await asyncio.sleep(0.1)
        took = time.monotonic() - began
        return Span(
            seconds=took,
            cpu=(self.coordinator.cpu_s() - cpu) / took,
            events=await asyncio.to_thread(self.coordinator.ask_database, newest) - event,
            reads=self.reads,
            deliveries=self.deliveries,
            updates=[v.updates - updates for v, (updates, _) in zip(viewers, before, strict=True)],
            bytes=sum(v.bytes - size for v, (_, size) in zip(viewers, before, strict=True)),
        )


async def _timed(taken_ms: list[float], asked: Awaitable[T]) -> T:
    began = time.monotonic()
    answer = await asked
    taken_ms.append((time.monotonic() - began) * 1000)
    return answer


def measure(folder: Path, *, viewers: int, seconds: float, turns: int) -> list[Figure]:
    """Cost, memory, updates and the agents' latencies, over so many turns of a span without and one with viewers."""
    allow_files(viewers)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        coordinator = Coordinator(Path(own))
        agents = enrol(coordinator.data, AGENTS)
        with coordinator:
            return run(_measure(coordinator, agents, viewers, seconds, turns))


async def _measure(
    coordinator: Coordinator, agents: list[Agent], count: int, seconds: float, turns: int
) -> list[Figure]:
    await asyncio.sleep(2)  # the summing process imports torch
    bench = Bench(coordinator)
    await each(agents, lambda agent: agent.connect(coordinator.port))
    tasks = [
        asyncio.ensure_future(bench.take_part(agent, ROUND_S * i / AGENTS)) for i, agent in enumerate(agents, start=1)
    ]
    name = await asyncio.to_thread(start_run, coordinator, MODEL_BYTES, clients=AGENTS, rounds=10_000)
    cookie = await asyncio.to_thread(_sign_in, coordinator)
    await asyncio.sleep(WARM_S)
    without, with_, opened = list[Span](), list[Span](), list[float]()
    grown = 0.0
    for turn in range(turns):
        without.append(await bench.span(seconds, []))
        memory, began = coordinator.memory()["anonymous"], time.monotonic()
        viewers = await asyncio.wait_for(
            asyncio.gather(*(_open(coordinator.port, name, cookie) for _ in range(count))), OPEN_S
        )
        opened.append(time.monotonic() - began)
        await asyncio.sleep(1)
        with_.append(await bench.span(seconds, viewers))
        grown = grown if turn else coordinator.memory()["anonymous"] - memory
        lost = [v.lost for v in viewers if v.lost]
        for viewer in viewers:
            viewer.close()
        if lost:
            raise RuntimeError(f"{len(lost)} of {count} streams ended, the first one with: {lost[0]}")
        said = f"{without[-1].cpu:.1%} of a core without, {with_[-1].cpu:.1%} with {count} viewers"
        note(f"turn {turn + 1}: {said}, live after {opened[-1]:.1f} s")
        await asyncio.sleep(1)
    broken = [task for task in tasks if task.done()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for agent in agents:
        agent.close()
    if broken:
        raise RuntimeError("an agent failed") from broken[0].exception()
    return _figures(without, with_, opened, grown, f"{count} viewers, {turns} turns of 2 x {seconds:g} s")


async def _open(port: int, name: str, cookie: str) -> Viewer:
    """Load the run's page as a browser does, and open its stream where the page stands; returns once that is live."""
    loop = asyncio.get_running_loop()

    def head(path: str) -> bytes:
        return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nCookie: {cookie}\r\n\r\n".encode()

    _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    status, page = await connection.ask(head(f"/runs/{name}"))
    connection.close()
    since = SINCE.search(page)
    if status != 200 or since is None:
        raise RuntimeError(f"the run's page is answered {status}: {page[:300].decode(errors='replace')}")
    transport, viewer = await loop.create_connection(Viewer, "127.0.0.1", port)
    transport.write(head(f"/live?page=run&run={name}&after={since[1].decode()}"))
    await viewer.live
    return viewer


def _sign_in(coordinator: Coordinator) -> str:
    """The session of a new viewer, as the Cookie header that carries it."""
    with coordinator.admin() as admin:
        link = admin.add_user("viewer", "viewer")
    answer = httpx.get(link).raise_for_status()
    return "; ".join(f"{key}={value}" for key, value in answer.cookies.items())


def _figures(without: list[Span], with_: list[Span], opened: list[float], grown: float, said: str) -> list[Figure]:
    turns = list(zip(without, with_, strict=True))

    def ratio(of: Callable[[Span], float]) -> float:
        return median([of(b) / of(a) for a, b in turns])

    def times(spans: list[Span], share: float, kind: str) -> float:
        return median([percentile(getattr(s, kind), share) for s in spans])

    cost = median([b.cpu - a.cpu for a, b in turns])
    figures = [
        Figure(name="dashboards_cpu", value=cost * 100, unit="% of a core", below=10, note=said),
        Figure(name="read_p50_ratio", value=ratio(lambda s: percentile(s.reads, 0.5)), unit="x without", below=1.5),
        Figure(name="read_p95_ratio", value=ratio(lambda s: percentile(s.reads, 0.95)), unit="x without", below=1.5),
        Figure(name="all_live", value=median(opened), unit="s", note="from the first page asked to the last stream"),
        Figure(name="memory_growth", value=grown, unit="MB", note="anonymous, over the first turn"),
        Figure(name="updates", value=median([median(s.updates) / s.seconds for s in with_]), unit="/s a viewer"),
        Figure(name="updates_least", value=min(min(s.updates) / s.seconds for s in with_), unit="/s a viewer"),
        Figure(
            name="sent",
            value=median([s.bytes / len(s.updates) / s.seconds / 1000 for s in with_]),
            unit="KB/s a viewer",
        ),
    ]
    for spans, name in ((without, "without"), (with_, "with")):
        figures += [
            Figure(name=f"cpu_{name}", value=median([s.cpu for s in spans]) * 100, unit="% of a core"),
            Figure(name=f"events_{name}", value=median([s.events / s.seconds for s in spans]), unit="/s"),
            Figure(name=f"read_p50_{name}", value=times(spans, 0.5, "reads"), unit="ms"),
            Figure(name=f"read_p95_{name}", value=times(spans, 0.95, "reads"), unit="ms"),
            Figure(name=f"delivery_p50_{name}", value=times(spans, 0.5, "deliveries"), unit="ms"),
            Figure(name=f"delivery_p95_{name}", value=times(spans, 0.95, "deliveries"), unit="ms"),
        ]
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="one object on one line")
    form.add_argument("--markdown", dest="form", action="store_const", const="markdown", help="the page's table")
    parser.add_argument("--quick", action="store_true", help="small: it shows that it runs, not how fast")
    parser.add_argument("--viewers", type=int, default=100, help="dashboards that are open [%(default)s]")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="on the file system to measure [%(default)s]")
    options = parser.parse_args(arguments)
    if options.viewers < 1:
        parser.error(f"--viewers {options.viewers}: at least one dashboard is needed to measure its cost")
    folder, quick = Path(options.dir), options.quick
    viewers, seconds, turns = (min(5, options.viewers), 5.0, 1) if quick else (options.viewers, 20.0, 3)
    figures = measure(folder, viewers=viewers, seconds=seconds, turns=turns)
    print_report(document(figures, folder=folder, quick=quick), options.form)


if __name__ == "__main__":
    main()
