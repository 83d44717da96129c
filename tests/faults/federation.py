"""Real coordinators and real agents, with a door between each agent and its coordinator, for tests that hurt them.

The agents are started once and kept: a test makes its own coordinators, on which the agents are enrolled already, and
opens the doors to them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import torch
from safetensors.numpy import load_file
from sqlalchemy import create_engine, text

from murmur import simulate
from murmur.client import Client, find_access
from murmur.clients.engine.state import initial_model
from murmur.clients.identity import create_identity, load_identity
from murmur.clients.settings import Policy, Settings, TaskEntry, write_settings
from murmur.coordinator.people import hash_token
from murmur.coordinator.store import Store
from murmur.processes import Children
from murmur.protocol.errors import Unavailable
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.views import RunView

from ..waiting import slowness, wait_until
from .door import Door, Weather

HERE = Path(__file__).parent
REFERENCE = f"{HERE / 'task.py'}:Line"
SITES = ("site-0", "site-1", "site-2")
T = TypeVar("T")


def recipe(rounds: int, *, secure: bool = False, patience_s: float = 300.0) -> Recipe:
    """Nobody may be missing in a round: the model depends on who is in the sum, and would differ for a good reason."""
    values = {"name": "line", "task": "line", "rounds": rounds, "metrics": [], "secure": {"on": secure}}
    cohort = {"min": len(SITES), "patience_s": patience_s}
    return parse_recipe({**values, "cohort": cohort, "train": {"lr": 1e-4, "batch_size": 8}})


@cache
def undisturbed(rounds: int, secure: bool) -> dict[str, np.ndarray[Any, Any]]:
    """The model that a run ends in when nothing happens to it: the simulator's."""
    torch.set_num_threads(1)  # as the trainers have it: the order of sums inside an operator depends on it
    federation, wanted = f"{HERE / 'task.py'}:federation", recipe(rounds, secure=secure)
    history = simulate(federation, wanted, secure=secure, backend="sequential")  # an agent's own bits
    return {name: tensor.numpy().copy() for name, tensor in history.state_dict().items()}


class Launcher:
    """Starts coordinators; see launcher.py."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "launcher.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._changed = threading.Condition()
        self._started: list[int] = []
        self.codes: dict[int, int] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, arguments: list[str], log: Path) -> int:
        """The pid of `murmur ARGUMENTS`."""
        assert self._process.stdin is not None
        wanted = {"arguments": arguments, "log": str(log)}
        with self._changed:
            self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
            self._process.stdin.flush()
            assert self._changed.wait_for(lambda: self._started, 120)
            return self._started.pop()

    def wait(self, pid: int, within_s: float) -> int:
        """Its exit code; negative where a signal ended it."""
        with self._changed:
            assert self._changed.wait_for(lambda: pid in self.codes, within_s), f"still runs after {within_s:g} s"
            return self.codes[pid]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._reader.join()
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            with self._changed:
                if "code" in said:
                    self.codes[said["pid"]] = said["code"]
                else:
                    self._started.append(said["pid"])
                self._changed.notify_all()


class Coordinator:
    """One coordinator process on a data folder, started and ended as often as a test likes."""

    def __init__(
        self, launcher: Launcher, data: Path, *, port: int, database: str = "", blobs: Path | None = None
    ) -> None:
        self._launcher, self.data, self.port = launcher, data, port
        self.url = database or f"sqlite:///{data / 'murmur.db'}"
        self._options = ["--database", database] if database else []
        self._options += ["--blobs", str(blobs)] if blobs else []
        self.log_file = data.parent / f"{data.name}.log"
        self.pid = 0
        data.mkdir(exist_ok=True)

    def start(self) -> Coordinator:
        """Start it and wait until it answers."""
        (self.data / "operator.json").unlink(missing_ok=True)
        where = ["--data", str(self.data), "--port", str(self.port), "--insecure-http", *self._options]
        self.pid = self._launcher.start(["coordinator", "serve", *where], self.log_file)
        wait_until(self._up, 60, f"start: {self.log[-3000:]}")
        return self

    def _up(self) -> bool:
        assert self.running, self.log[-3000:]
        return (self.data / "operator.json").exists() and (self.data / "operator.json").read_bytes().endswith(b"}")

    @property
    def running(self) -> bool:
        return bool(self.pid) and self.pid not in self._launcher.codes

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, within_s: float = 60.0) -> int:
        return self._launcher.wait(self.pid, within_s)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def end(self) -> int:
        """SIGTERM; returns the exit code."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        return self.wait()

    def ask(self, question: Callable[[Client], T]) -> T:
        """Ask as the CLI does, again while it cannot answer."""
        began = time.monotonic()
        while True:
            try:
                with Client(find_access(self.data)) as client:
                    return question(client)
            except Unavailable:
                assert time.monotonic() - began < 60 * slowness(), self.log[-3000:]
                time.sleep(0.05)

    def ready(self) -> tuple[int, dict[str, Any]]:
        """(status, answer) of /healthz/ready."""
        answer = httpx.get(f"http://127.0.0.1:{self.port}/healthz/ready", timeout=20)
        return answer.status_code, answer.json()

    @property
    def leads(self) -> bool:
        return self.ready()[1]["leads"]

    def run(self, id: str) -> RunView:
        return self.ask(lambda c: c.run(id).run)


class Federation:
    """Three agents, each behind a door of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children = Children(folder / "logs")
        self.doors = {name: Door() for name in SITES}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: dict[str, list[Path]] = {name: [] for name in SITES}
        for n, name in enumerate(SITES):
            home = folder / name
            home.mkdir(parents=True)
            entry = TaskEntry(reference=REFERENCE, options={"client": n})
            settings = Settings(
                name=name,
                coordinator=f"http://127.0.0.1:{self.doors[name].port}",
                workdir=home / "work",
                processes=1,
                policy=Policy(require_secure=False),
                tasks={"line": entry},
                directory=home,
            )
            create_identity(settings.key_file)
            write_settings(settings)

    def start(self, *names: str) -> None:
        """Start the agents of these sites."""
        for name in names:
            label = f"{name}.{len(self._logs[name])}"
            one = {"OMP_NUM_THREADS": "1"}
            home = str(self.folder / name)
            self.agents[name] = self.children.start(label, "murmur.clients.agent", "--dir", home, environment=one)
            self._logs[name].append(self.folder / "logs" / f"{label}.log")

    def try_start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a second agent of this site beside the first."""
        return self.children.start(f"{name}.second", "murmur.clients.agent", "--dir", str(self.folder / name))

    def second_log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.second.log").read_text()

    def log(self, name: str) -> str:
        """What the newest agent of this site has said."""
        return self._logs[name][-1].read_text()

    def know(self, url: str) -> None:
        """Enrol and approve the agents in a database."""
        store = Store(url, clock=time.time)
        for name in SITES:
            key = load_identity(self.folder / name / "identity.pem").public_key
            token = hash_token(f"invitation-of-{name}")
            store.clients.invite(name, token, by="admin", lifetime_s=60)
            store.clients.enrol(name, token, key, {})
            store.clients.decide(name, "active", by="admin")
        store.close()

    def open_doors(self, *coordinators: Coordinator) -> None:
        """Let the agents go to these coordinators, in turn."""
        for n, door in enumerate(self.doors.values()):
            door.target = ("127.0.0.1", coordinators[n % len(coordinators)].port)
            door.hold(False)

    def rest(self) -> None:
        """Let the agents wait, in a good mood, for the next test's coordinator."""
        for door in self.doors.values():
            door.weather = Weather()
            door.hold(True)
            door.target = None
            door.drop_all()

    def start_run(self, coordinator: Coordinator, wanted: Recipe, *, online: bool = True) -> str:
        """Start a run as soon as all agents are online, or before."""
        first = coordinator.data.parent / "first.safetensors"
        if not first.exists():
            from .task import Line

            initial_model(Line(), wanted.seed, first)
        if online:
            self.wait_online(coordinator)
        return coordinator.ask(lambda c: c.start_run(wanted, first))

    def wait_online(self, coordinator: Coordinator) -> None:
        wait_until(lambda: coordinator.ask(self._online), 60, "all agents online")

    @staticmethod
    def _online(client: Client) -> bool:
        found = {
            view.id: view.online and "line" in view.info.get("tasks", ())
            for view in client.clients()
            if view.id in SITES
        }
        return len(found) == len(SITES) and all(found.values())

    def close(self) -> None:
        self.rest()
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.send_signal(signal.SIGCONT)
        self.children.__exit__()
        for door in self.doors.values():
            door.close()


def finish(coordinator: Coordinator, run: str, within_s: float = 60.0) -> RunView:
    """Wait for the end of a run; it must be a good one, and no round of it may take longer (see `waiting.py`)."""
    reached, since = -1, 0.0
    while (view := coordinator.run(run)).state != "finished":
        assert view.state in ("running", "paused"), f"{view.state}: {view.reason}"
        if view.round > reached:
            reached, since = view.round, time.monotonic()
        waited = time.monotonic() - since
        assert waited < within_s * slowness(), (
            f"still in round {reached} after {waited:.0f} s: {coordinator.log[-3000:]}"
        )
        time.sleep(0.02)
    return view


def check_exact(coordinator: Coordinator, run: str, rounds: int, *, secure: bool = False) -> None:
    """The run has the undisturbed model, each round's version is there once, and each counts each agent once."""
    rows = facts(coordinator.url, run)
    assert [n for n, _, _ in rows["versions"]] == list(range(rounds + 1))
    for (_, sha256, _), (n, _, parent) in zip(rows["versions"], rows["versions"][1:], strict=False):
        assert parent == sha256, f"version {n} was not made from the one before"
    assert rows["contributors"] == [[]] + [sorted(SITES)] * rounds
    assert rows["counted"] == [(n, name) for n in range(1, rounds + 1) for name in SITES]
    newest = coordinator.ask(lambda c: c.versions(run)[0])
    path = coordinator.data.parent / f"{run}.safetensors"
    coordinator.ask(lambda c: c.pull(newest.sha256, path))
    expected = undisturbed(rounds, secure)
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def facts(url: str, run: str) -> dict[str, Any]:
    """What the rows say of a run, read with plain SQL."""
    engine = create_engine(url)
    try:
        with engine.connect() as c:
            values = {"run": run}
            versions = c.execute(
                text("SELECT n, sha256, parent, contributors FROM version WHERE run = :run ORDER BY n"), values
            ).all()
            counted = c.execute(
                text(
                    "SELECT a.round, a.client FROM assignment a JOIN round r ON r.run = a.run AND r.n = a.round "
                    "WHERE a.run = :run AND a.state = 'counted' AND r.kind = 'train' ORDER BY a.round, a.client"
                ),
                values,
            ).all()
    finally:
        engine.dispose()
    contributors = [json.loads(v[3]) if isinstance(v[3], str) else v[3] for v in versions]
    return {
        "versions": [tuple(v[:3]) for v in versions],
        "contributors": [sorted(names) for names in contributors],
        "counted": [tuple(row) for row in counted],
    }


__all__ = [
    "SITES",
    "Coordinator",
    "Federation",
    "Launcher",
    "check_exact",
    "facts",
    "finish",
    "recipe",
    "undisturbed",
    "wait_until",
]
