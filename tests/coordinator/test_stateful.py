"""Any sequence of what agents, an admin, the clock and restarts can do, against a small model of what has to be true.

Hypothesis draws the sequences and shrinks one that fails. The model is told only what agents are told.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import func, select

from murmur.coordinator.store import tables
from murmur.protocol.errors import BadUpdate, Conflict, NotFound, PeerError, TooLate, WrongOffset
from murmur.protocol.messages import Complete, Failure, Kind, Progress, StepKind, Total, UploadOffer
from murmur.protocol.tensors import Layout, read_layout

from ..fixtures.release import identity
from .harness import Agent, World, plain_file
from .schedules import weights_of

NAMES = ("a", "b", "c", "d")
CLIENTS = st.sampled_from(NAMES)
VALUES = st.integers(-8, 8).map(lambda n: n / 8)


@dataclass
class Model:
    """What must be true of the coordinator, from what it said. Nothing here knows of rows, states or deadlines."""

    acked: dict[str, str] = field(default_factory=dict[str, str])  # assignment -> digest that was acknowledged
    sent: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])  # by assignment
    fences: dict[str, int] = field(default_factory=dict[str, int])
    ended: dict[str, str] = field(default_factory=dict[str, str])
    chains: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def handed_out(self, assignment: str, fence: int) -> None:
        assert fence > self.fences.get(assignment, 0), "a fence was given twice"
        assert assignment not in self.acked, "work that was done is handed out again"
        self.fences[assignment] = fence

    def accepted(self, assignment: str, fence: int, digest: str, value: float, weight: float) -> None:
        first = self.acked.setdefault(assignment, digest)
        self.sent.setdefault(assignment, (value, weight))  # not by digest: two clients may send the same file
        assert first == digest, "a second update was accepted"
        assert fence == self.fences[assignment] or first == digest, "an older holder's update was accepted"

    def refused(self, assignment: str, digest: str) -> None:
        assert self.acked.get(assignment) != digest, "what was acknowledged is refused when it is repeated"

    def told_done(self, assignment: str) -> None:
        assert assignment in self.acked, "counted, but nothing was delivered"

    def holds(self, world: World) -> None:
        """Compare with the rows and the models."""
        with world.store.db.read() as c:
            rows = dict(c.execute(select(tables.update.c.assignment, tables.update.c.sha256)).all())
            opened = select(tables.attempt.c.run, func.count()).where(tables.attempt.c.closed_at.is_(None))
            still = dict(c.execute(opened.group_by(tables.attempt.c.run)).all())
            versions = c.execute(select(tables.version).order_by(tables.version.c.n)).mappings().all()
            states = dict(c.execute(select(tables.run.c.id, tables.run.c.state)).all())
        assert rows == self.acked, "the updates in the database are those that were acknowledged"
        for run, state in states.items():
            assert self.ended.get(run, state) == state, "a run that ended goes on"
            assert still.get(run, 0) == (state == "running"), "a run that goes on has one open attempt, others none"
            if state != "running":
                self.ended[run] = state
            self.chain_holds(world, run, [v for v in versions if v["run"] == run])

    def chain_holds(self, world: World, run: str, versions: list[Any]) -> None:
        known, chain = self.chains.get(run, []), [v["sha256"] for v in versions]
        assert chain[: len(known)] == known, "a version has changed"
        assert [v["parent"] for v in versions] == [None, *chain[:-1]] and [v["n"] for v in versions] == [
            *range(len(chain))
        ]
        for version in versions[len(known) or 1 :]:
            given: dict[str, str] = {}
            for assignment in self.acked:  # the last attempt with updates is the one that came through
                of_run, n, _, client = assignment.split(".")
                if (of_run, int(n)) == (run, version["n"]) and client in version["contributors"]:
                    given[client] = max(given.get(client, ""), assignment)
            assert sorted(given) == sorted(version["contributors"]) and len(given) >= 3
            parts = [self.sent[assignment] for _, assignment in sorted(given.items())]
            total = sum(float(np.float32(value)) * weight for value, weight in parts) / sum(w for _, w in parts)
            base, got = weights_of(world, version["parent"]), weights_of(world, version["sha256"])
            assert np.all(got == base + np.float32(total)), "a version is the mean of its updates"
        self.chains[run] = chain


@cache
def template() -> Path:
    """A data folder with four enrolled agents, made once."""
    folder = Path(tempfile.mkdtemp(prefix="murmur-stateful-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    world = World(folder)
    for name in NAMES:
        world.agent(name, identity(name))
    world.store.close()
    return folder


@pytest.fixture(scope="module", autouse=True)
def cleared() -> Any:
    yield
    shutil.rmtree(template())


class Coordinator(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=template().parent))
        shutil.copytree(template(), self.folder, dirs_exist_ok=True)
        self.world, self.model = World(self.folder), Model()
        self.agents = {name: Agent(self.world, name, identity(name)) for name in NAMES}
        self.data: dict[str, tuple[bytes, float, float]] = {}
        for agent in self.agents.values():
            agent.poll()
        self.start()

    @rule()
    @precondition(lambda self: len(self.world.store.runs.all()) < 2)
    def start(self) -> None:
        self.world.start(rounds=2, cohort={"min": 3, "patience_s": 10, "attempts": 3}, secure={"on": False})

    @rule(name=CLIENTS)
    def poll(self, name: str) -> None:
        """Ask for work, busy with what it has."""
        agent = self.agents[name]
        found = agent.poll(busy=agent.work is not None)
        if found is not None:
            self.data.pop(name, None)
            self.model.handed_out(found.id, found.fence)

    @rule(name=CLIENTS)
    def forget(self, name: str) -> None:
        """The agent's process ends and a new one begins."""
        self.agents[name].work = None
        self.data.pop(name, None)

    @rule(name=CLIENTS, value=VALUES, weight=st.integers(1, 9))
    def offer(self, name: str, value: float, weight: int) -> None:
        agent = self.agents[name]
        if agent.work is None:
            return
        layout = read_layout(self.world.blobs.path(agent.work.model)).update()
        evaluate = agent.work.kind == Kind.EVALUATE
        data = Layout(()).header() if evaluate else plain_file(layout, value)
        self.data[name] = (data, value, 0.0 if evaluate else float(weight))
        message = UploadOffer(fence=agent.work.fence, sha256=self.digest(name), size=len(self.data[name][0]))
        self.ask(lambda: self.world.conversation.offer_upload(name, agent.assignment.id, message), TooLate)

    @rule(name=CLIENTS, share=st.sampled_from((0.3, 1.0, 1.0)), astray=st.sampled_from((0, 0, 0, 0, 5)))
    def append(self, name: str, share: float, astray: int) -> None:
        agent, c = self.agents[name], self.world.conversation
        if name not in self.data or agent.work is None:
            return
        data, a = self.data[name][0], agent.work
        state = self.ask(lambda: c.upload_state(name, a.id, a.fence), TooLate)
        if state is not None and state.offset < state.size:
            piece = data[state.offset : state.offset + max(1, int(len(data) * share))]
            expected = (WrongOffset,) if astray else (TooLate,)
            self.ask(lambda: c.append(name, a.id, a.fence, state.offset + astray, piece), *expected)

    @rule(name=CLIENTS)
    def complete(self, name: str) -> None:
        agent = self.agents[name]
        if name not in self.data or agent.work is None:
            return
        a, digest, (_, value, weight) = agent.work, self.digest(name), self.data[name]
        message = Complete(fence=a.fence, sha256=digest, weight=weight, metrics={"loss": Total(sum=1.0, count=1.0)})
        try:
            self.world.conversation.complete(name, a.id, message)
            self.model.accepted(a.id, a.fence, digest, value, weight)
        except (TooLate, NotFound, Conflict, BadUpdate):  # of these BadUpdate: not all of it is there
            self.model.refused(a.id, digest)

    @rule(name=CLIENTS, value=VALUES, weight=st.integers(1, 9))
    def deliver(self, name: str, value: float, weight: int) -> None:
        """What an agent does when nothing goes wrong."""
        if self.agents[name].work is None:
            self.poll(name)
        self.offer(name, value, weight)
        self.append(name, 1.0, 0)
        self.complete(name)

    @rule(name=CLIENTS)
    def fail(self, name: str) -> None:
        if (a := self.agents[name].work) is not None:
            message = Failure(fence=a.fence, code="task_error", detail="it failed")
            self.ask(lambda: self.world.conversation.fail(name, a.id, message), TooLate)

    @rule(name=CLIENTS, step=st.integers(0, 9))
    def progress(self, name: str, step: int) -> None:
        if (a := self.agents[name].work) is not None:
            said = Progress(phase="training", step=step, steps=9)
            self.ask(lambda: self.world.conversation.progress(name, a.id, a.fence, said), TooLate)

    @rule(name=CLIENTS)
    def listen(self, name: str) -> None:
        if (a := self.agents[name].work) is not None:
            step = self.world.conversation.step(name, a.id, a.fence, "")
            if step is not None and step.kind == StepKind.DONE:
                self.model.told_done(a.id)
            if step is not None:
                self.forget(name)

    @rule(seconds=st.sampled_from((0.0, 1.0, 1.0, 11.0, 70.0)))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @invariant()
    def everything_holds(self) -> None:
        self.model.holds(self.world)

    def teardown(self) -> None:
        """Wherever it stands, agents that do their work bring every run to its end."""
        for _ in range(40):
            if all(run.state != "running" for run in self.world.store.runs.all()):
                break
            for name in NAMES:
                self.forget(name)
                self.deliver(name, 0.5, 1)
            self.world.tick(1.0)
        else:
            raise AssertionError("a run does not end")
        self.model.holds(self.world)
        self.world.store.close()
        shutil.rmtree(self.folder)

    def ask(self, call: Callable[[], Any], *refusals: type[PeerError]) -> Any:
        try:
            return call()
        except refusals:
            return None

    def digest(self, name: str) -> str:
        return hashlib.sha256(self.data[name][0]).hexdigest()


COMMON = {
    "phases": (Phase.explicit, Phase.generate),  # to make a failure shorter would take minutes of CI
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def test_any_sequence_of_requests_keeps_the_model():
    run_state_machine_as_test(
        Coordinator, settings=settings(max_examples=8, stateful_step_count=40, derandomize=True, **COMMON)
    )


@pytest.mark.slow
def test_any_long_sequence_of_requests_keeps_the_model():
    """Drawn anew each time; a failure prints the steps that lead to it and the blob that replays them."""
    run_state_machine_as_test(
        Coordinator, settings=settings(max_examples=500, stateful_step_count=50, print_blob=True, **COMMON)
    )
