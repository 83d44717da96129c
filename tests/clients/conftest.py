from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from murmur.clients.conversation import Conversation
from murmur.clients.identity import Identity
from murmur.clients.job import Cancelled, Job, Progress, Result
from murmur.clients.link import Link
from murmur.clients.settings import Settings, parse_settings
from murmur.clients.shared import Site
from murmur.protocol.tensors import DTYPES, read_layout, write_file

from .coordinator_double import CoordinatorDouble

NAMES = ("alpha", "beta", "delta", "gamma")


class FakeTrainer:
    """Writes real update files: numbers that depend on the client alone. `hold` keeps a job from ending."""

    def __init__(self, *, error: Exception | None = None, change: Callable[[dict], None] = lambda arrays: None) -> None:
        self.error, self.change = error, change
        self.hold = threading.Event()
        self.hold.set()
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.closed = self.warmed = self.keeps = False
        self.jobs: list[Job] = []
        self.most_at_once = self._now = 0

    def run(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
        self.cancelled.clear()
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            self.jobs.append(job)
            self.started.set()
            step = 0
            while not self.hold.wait(0.01):
                step += 1
                on_progress(Progress(step=step, steps=1000, loss=1.0, examples_per_s=1.0))
                if self.cancelled.is_set():
                    raise Cancelled("called off")
            if self.error is not None:
                raise self.error
            return self._result(job)
        finally:
            self._now -= 1

    def _result(self, job: Job) -> Result:
        metrics = {"loss": (2.5, 10.0), "accuracy": (7.0, 10.0), "secret": (1.0, 1.0)}
        if job.kind == "inspect":
            return Result(update=None, examples=examples_of(job.client), steps=0, metrics={}, seconds=0.1)
        if job.kind == "evaluate":
            return Result(update=None, examples=10, steps=0, metrics=metrics, seconds=0.1)
        arrays = update_of(job.client, job.model)
        self.change(arrays)
        write_file(job.update, arrays, read_layout(job.model).update())
        metrics["train_loss"] = (3.0, 20.0)
        if self.keeps:
            job.own_after.write_text(f"{job.own.read_text() if job.own else ''}{job.round}")
        return Result(update=job.update, examples=examples_of(job.client), steps=5, metrics=metrics, seconds=0.1)

    def cancel(self) -> None:
        self.cancelled.set()

    def warm(self) -> None:
        self.warmed = True

    def close(self) -> None:
        self.closed = True
        self.cancelled.set()


def examples_of(client: str) -> int:
    return 100 * (NAMES.index(client) + 1)


def update_of(client: str, model: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(zlib.crc32(client.encode()))
    found = {}
    for t in read_layout(model).update().tensors:
        values = rng.normal(0, 0.1, t.shape) if t.dtype.startswith("F") else rng.integers(0, 9, t.shape)
        found[t.name] = np.asarray(values, DTYPES[t.dtype])
    return found


@pytest.fixture(scope="session")
def identities() -> dict[str, Identity]:
    return {name: Identity(Ed25519PrivateKey.generate()) for name in NAMES}


class Party:
    """Clients in one process, each with its site, talking to a double."""

    def __init__(self, folder: Path, identities: dict[str, Identity]) -> None:
        self.folder, self.identities = folder, identities
        self.sites: dict[str, Site] = {}
        self.trainers = {name: FakeTrainer() for name in NAMES}
        self.policies: dict[str, dict] = {}

    def settings(self, name: str) -> Settings:
        values = {
            "name": name,
            "coordinator": "http://127.0.0.1:1",
            "policy": self.policies.get(name, {}),
            "tasks": {"digits": {"reference": "digits:Digits"}},
        }
        return parse_settings(values, self.folder / name)

    def site(self, name: str) -> Site:
        if name not in self.sites:
            self.sites[name] = Site(self.settings(name), self.identities[name])
        return self.sites[name]

    def conversation(self, coordinator: CoordinatorDouble, name: str, link: Link | None = None) -> Conversation:
        return Conversation(
            coordinator.assignments[name],
            site=self.site(name),
            link=link or coordinator.link(name),
            trainer=self.trainers[name],
        )

    def start(self, coordinator: CoordinatorDouble, *names: str) -> dict[str, threading.Thread]:
        """Begin these clients' conversations (all, when none is named), each in its thread."""
        threads = {}
        for name in names or coordinator.assignments:
            threads[name] = threading.Thread(target=self.conversation(coordinator, name).run, daemon=True)
            threads[name].start()
        return threads

    def talk(self, coordinator: CoordinatorDouble, *names: str) -> None:
        """Let them all come to their end."""
        for name, thread in self.start(coordinator, *names).items():
            thread.join(60)
            assert not thread.is_alive(), f"{name} still talks"


@contextmanager
def patiently(act: Callable[[], None]) -> Iterator[None]:
    """Do it again and again beside the block: one time may come before what it is meant for has begun."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(0.2):
            act()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture
def party(tmp_path: Path, identities: dict[str, Identity]) -> Party:
    return Party(tmp_path / "sites", identities)
