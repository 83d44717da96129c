"""From the event log to sinks: what an event means in numbers, and how far each sink has come."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from ...protocol.errors import MurmurError
from ...protocol.messages import OF_TRAINING
from ...protocol.views import OVER, EventView, RunDetail, RunView, VersionView

log = logging.getLogger(__name__)

LOOK_S, LONGEST_S = 1.0, 60.0  # between two looks at the log; after failures that follow each other
BATCH = 200  # events between two notes of how far a sink has come


class Source(Protocol):
    """The log and what belongs to it: a coordinator's `Service`, or a `murmur.Client`."""

    def events(self, after: int, run: str | None = None) -> list[EventView]: ...

    def run(self, id: str, /) -> RunDetail: ...

    def versions(self, run: str | None = None) -> list[VersionView]: ...


class Sink(Protocol):
    """Where runs are told on. Any method may raise: what it was told is told again later, so twice must do no harm.

    model: writes the version's safetensors file to a path.
    """

    def event(self, event: EventView) -> None: ...

    def began(self, run: RunView) -> None: ...

    def measured(self, run: RunView, version: int, at: datetime, values: Mapping[str, float]) -> None: ...

    def ended(self, run: RunView, version: VersionView, model: Callable[[Path], None]) -> None: ...

    def flush(self) -> None:
        """What was told is safe when this returns."""
        ...

    def close(self) -> None: ...


Pull = Callable[[str, Path], None]  # writes the blob of this SHA-256 to a file


def tell(sink: Sink, source: Source, pull: Pull, events: Sequence[EventView]) -> None:
    """Tell a sink these events with what they mean; raises what the sink raises."""
    known: dict[str, RunDetail] = {}
    for event in events:
        sink.event(event)
        if event.run is None:
            continue
        state = event.data.get("state")
        if event.kind == "run" and "name" in event.data:
            sink.began(_detail(source, event.run, known).run)
        elif event.kind == "phase" and state == "committed":
            detail = _detail(source, event.run, known, round=event.data["round"])
            for version, values in _numbers(detail, event.data["round"]).items():
                sink.measured(detail.run, version, event.at, values)
        elif event.kind == "model":
            detail = _detail(source, event.run, known)
            values = {n: float(event.data[n]) for n in ("contributors", "clipped", "rounding") if n in event.data}
            sink.measured(detail.run, event.data["version"], event.at, values)
        elif event.kind == "run" and state in OVER:
            detail, newest = source.run(event.run), source.versions(event.run)[0]
            sink.ended(detail.run, newest, lambda to, newest=newest: pull(newest.sha256, to))
    sink.flush()


def _detail(source: Source, run: str, known: dict[str, RunDetail], *, round: int = 0) -> RunDetail:
    """The run as it is, read again only for a round that the last look did not have."""
    if run not in known or not any(r.n >= round and r.state == "committed" for r in known[run].rounds):
        known[run] = source.run(run)
    return known[run]


def _numbers(detail: RunDetail, round: int) -> dict[int, dict[str, float]]:
    """What is known once a round is committed, by version: how good the one before was, how this one was trained."""
    found: dict[int, dict[str, float]] = {}
    for point in detail.metrics:
        if point.version == (round if point.name in OF_TRAINING else round - 1):
            found.setdefault(point.version, {})[point.name] = point.value
    r = next((r for r in detail.rounds if r.n == round), None)
    if r and r.kind == "train" and r.closed_at:
        mine = found.setdefault(round, {})
        mine["round_s"] = (r.closed_at - r.opened_at).total_seconds()
        mine["asked"] = float(len(r.assignments))
        if r.world:
            mine |= {"world_s": r.world.ends_s}
            mine |= {"world_down_bytes": float(r.world.down_bytes), "world_up_bytes": float(r.world.up_bytes)}
        if detail.run.privacy and detail.run.privacy.value is not None and detail.run.round == round:
            mine["epsilon"] = detail.run.privacy.value
    return found


@dataclass
class _Told:
    """One sink of a follower: how far it has come, and when it is tried again after failures."""

    name: str
    open: Callable[[], Sink]
    sink: Sink | None = None
    after: int = 0
    failures: int = 0
    due: float = field(default=0.0)


class Follower:
    """A thread that tells sinks on, each at its own pace; where each has come is kept in `folder`.

    A sink that fails is tried again from the event where it failed, ever more seldom, and said in the log once.
    """

    def __init__(self, source: Source, pull: Pull, folder: Path, sinks: Mapping[str, Callable[[], Sink]]) -> None:
        """sinks: by name, how each is opened."""
        self._source, self._pull, self._folder = source, pull, folder
        self._told = [_Told(name, opened, after=self._read(name)) for name, opened in sinks.items()]
        self._ended = threading.Event()
        self.leads: Callable[[], bool] = lambda: True  # of several coordinators, one tells
        self._thread = threading.Thread(target=self._run, name="sinks", daemon=True)

    def start(self) -> None:
        if self._told:
            self._thread.start()

    def close(self) -> None:
        """Tell what there is and stop; what a sink did not take is told at the next start."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.look()
        self.look()
        for told in self._told:
            if told.sink is not None:
                with suppress(Exception):
                    told.sink.close()

    def look(self, now: float | None = None) -> None:
        """Tell every sink that is due what it has not heard."""
        now = time.monotonic() if now is None else now
        for told in self._told if self.leads() else ():
            if told.due <= now:
                self._tell(told, now)

    def _tell(self, told: _Told, now: float) -> None:
        try:
            while events := self._source.events(told.after)[:BATCH]:
                told.sink = told.sink or told.open()
                tell(told.sink, self._source, self._pull, events)
                told.after = events[-1].id
                self._write(told)
        except Exception as error:  # of any sink, any server: a run goes on whatever becomes of its numbers
            told.failures += 1
            told.due = now + min(LONGEST_S, LOOK_S * 2**told.failures)
            if told.failures == 1:
                why = error.detail if isinstance(error, MurmurError) else f"{type(error).__name__}: {error}"
                log.warning("a sink takes nothing; it is tried again", extra={"sink": told.name, "why": why})
            return
        if told.failures:
            log.info("a sink takes events again", extra={"sink": told.name})
        told.failures = 0

    def _read(self, name: str) -> int:
        try:
            return int(json.loads((self._folder / f"{name}.json").read_text())["after"])
        except FileNotFoundError:
            return 0

    def _write(self, told: _Told) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{told.name}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"after": told.after}))
        os.replace(temporary, path)
