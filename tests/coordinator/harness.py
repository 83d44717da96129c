"""A coordinator without HTTP, processes or time, and agents that speak its library: every round in these tests is real.

The clock stands still until a test moves it; sums are taken when the conductor ticks; agents do what a test lets them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from murmur.coordinator.blobs import Blobs, FolderBlobs
from murmur.coordinator.conductor import Conductor
from murmur.coordinator.conversation import Conversation
from murmur.coordinator.hub import Hub
from murmur.coordinator.people import hash_token
from murmur.coordinator.store import Store
from murmur.coordinator.store.attempts import Attempt, Outcome
from murmur.coordinator.summing import aggregate
from murmur.privacy.auxiliary import Block
from murmur.privacy.client import ClientSession, Policy
from murmur.privacy.context import Context
from murmur.privacy.dp.accounting import Event
from murmur.privacy.dp.plan import view_of
from murmur.privacy.terms import block_of, context_of
from murmur.protocol.messages import (
    TOTAL_WEIGHT,
    AgentInfo,
    AnswerKind,
    Assignment,
    Complete,
    Kind,
    Poll,
    Progress,
    Step,
    StepKind,
    Total,
    UploadOffer,
)
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.tensors import Layout, TensorSpec, map_file, masked_layout, read_layout, write_file
from murmur.protocol.views import PrivacyView

# For what costs seconds and asks of the database only what other tests ask of both.
SLOW_ON_POSTGRES = pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)], indirect=True
)
INFO = AgentInfo(version="test")
MODEL = Layout((TensorSpec("b", "F32", (2,)), TensorSpec("w", "F32", (2, 3))))


class Inline:
    """Takes the sum when it is asked for."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs

    def submit(self, attempt: Attempt, identities: Mapping[str, bytes]) -> Future[Outcome]:
        done: Future[Outcome] = Future()
        try:
            done.set_result(aggregate(attempt, identities, self.blobs))
        except Exception as error:
            done.set_exception(error)
        return done

    def account(self, recipe: Recipe, spent: Sequence[Event]) -> Future[PrivacyView]:
        done: Future[PrivacyView] = Future()
        done.set_result(view_of(recipe, spent, "pld"))
        return done


class World:
    """One coordinator. `now` is its clock."""

    def __init__(self, folder: Path, url: str = "") -> None:
        self.now = 1_000_000.0
        self.folder = folder
        self.url = url or f"sqlite:///{folder / 'murmur.db'}"
        self.open()

    def open(self) -> None:
        """Start the coordinator from its rows and blobs, as after a restart."""
        self.store = Store(self.url, clock=lambda: self.now)
        self.rebuild()

    def rebuild(self) -> None:
        """Make everything anew that a coordinator keeps in memory; its rows and blobs stay."""
        self.hub = Hub()
        self.blobs = FolderBlobs(self.folder / "blobs")
        self.conversation = Conversation(self.store, self.blobs, self.hub)
        self.conductor = Conductor(self.store, self.blobs, self.hub, Inline(self.blobs), clock=lambda: self.now)

    def restart(self) -> None:
        self.store.lease.give_back()  # else the new process waits until it runs out
        self.store.close()
        self.open()
        self.store.rounds.resume()

    def agent(self, name: str, key: Ed25519PrivateKey | None = None) -> Agent:
        """An enrolled, approved and online agent; with a new key unless one is given."""
        key = key or Ed25519PrivateKey.generate()
        token = f"{name}-token-of-many-letters"
        self.store.clients.invite(name, hash_token(token), by="admin", lifetime_s=60)
        self.store.clients.enrol(name, hash_token(token), key.public_key().public_bytes_raw(), {})
        self.store.clients.decide(name, "active", by="admin")
        agent = Agent(world=self, name=name, key=key)
        agent.poll()
        return agent

    def start(self, **recipe: Any) -> str:
        """Start a run from a model of zeros; three clients are enough."""
        settings = {"name": "t", "task": "t", "rounds": 1, "cohort": {"min": 3, "patience_s": 10}} | recipe
        with self.blobs.new() as path:
            write_file(path, {t.name: np.zeros(t.shape, np.float32) for t in MODEL.tensors}, MODEL)
            size, sha256 = path.stat().st_size, self.blobs.adopt(path)
        run = f"run{len(self.store.runs.all())}"
        self.store.runs.start(run, parse_recipe(settings), sha256=sha256, size=size, by="admin")
        return run

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        for _ in range(3):  # a sum is submitted in one tick and published in the next
            self.conductor.tick()

    def model(self, run: str) -> dict[str, np.ndarray[Any, Any]]:
        """The newest version's tensors."""
        path = self.blobs.path(self.store.runs.versions(run)[0].sha256)
        return map_file(path, read_layout(path))

    def state(self, run: str) -> str:
        current = self.store.runs.detail(run).current
        return current.state if current else ""


@dataclass
class Agent:
    """An organization's side, made of the same state machine that the real agent uses."""

    world: World
    name: str
    key: Ed25519PrivateKey
    work: Assignment | None = None
    session: ClientSession | None = None
    seen: StepKind | None = None
    knows: tuple[str, ...] = (TOTAL_WEIGHT,)
    log: list[StepKind] = field(default_factory=list[StepKind])

    @property
    def assignment(self) -> Assignment:
        assert self.work is not None
        return self.work

    def poll(self, *, busy: bool = False) -> Assignment | None:
        doing = {self.assignment.id: Progress(phase="training")} if busy else {}
        if self.world.conversation.idle(self.name):
            assert not self.world.store.assignments.held(self.name)
        asked = Poll(info=INFO, busy=doing)
        found = self.world.conversation.poll(self.name, asked, knows=self.knows)
        if found.assignment is not None:
            self.work, self.session, self.seen = found.assignment, None, None
        return found.assignment

    def step(self) -> Step | None:
        after = self.seen or ""
        found = self.world.conversation.step(self.name, self.assignment.id, self.assignment.fence, after)
        if found is not None:
            self.seen = found.kind
            self.log.append(found.kind)
        return found

    def say(self, kind: AnswerKind, body: str) -> None:
        self.world.conversation.answer(self.name, self.assignment.id, self.assignment.fence, kind, body)

    def advert(self) -> None:
        self.session = ClientSession(self.context(), self.name, self.key, policy=Policy(), known={})
        self.say(AnswerKind.ADVERT, self.session.advertise())

    def share(self) -> None:
        step = self.step()
        assert self.session and step and step.kind == StepKind.ROSTER
        self.say(AnswerKind.SHARES, self.session.share(step.body))

    def agree(self) -> None:
        step = self.step()
        assert self.session and step and step.kind == StepKind.SURVIVORS
        self.say(AnswerKind.AGREE, self.session.agree(step.body))

    def reveal(self) -> None:
        step = self.step()
        assert self.session and step and step.kind == StepKind.REVEAL
        self.say(AnswerKind.REVEAL, self.session.reveal(step.body))

    def context(self) -> Context:
        assert self.assignment.secure is not None
        layout = read_layout(self.world.blobs.path(self.assignment.model))
        return context_of(self.assignment, layout, self.assignment.secure)

    def block(self, layout: Layout) -> Block:
        assert self.assignment.secure is not None
        return block_of(self.assignment, layout, self.assignment.secure)

    def upload_masked(self, value: float, weight: int) -> Complete:
        """Mask a delta of `value` everywhere and send it."""
        step = self.step()
        assert self.session and step and step.kind == StepKind.INBOX
        self.session.open(step.body)
        context, layout = self.context(), read_layout(self.world.blobs.path(self.assignment.model))
        aux = self.block(layout).encode(
            weight=weight, clipped=0, metrics={"loss": (2.0 * weight, weight)}, integers=np.zeros(0, np.int64)
        )
        values = [np.full(context.dim, value, np.float32)] if context.dim else []
        body = b"".join(bytes(c) for c in self.session.mask(values, weight=weight, aux=aux))
        return self.send(masked_layout(context.dim, context.aux, context.ring_bits).header() + body)

    def upload_plain(self, value: float, weight: float, **changes: Any) -> Complete:
        metrics = {"loss": Total(sum=2.0 * weight, count=weight)}
        if self.assignment.kind == Kind.EVALUATE:
            return self.send(Layout(()).header(), weight=0.0, metrics=metrics)
        layout = read_layout(self.world.blobs.path(self.assignment.model)).update()
        return self.send(plain_file(layout, value), **({"weight": weight, "metrics": metrics} | changes))

    def upload_inline(self, value: float, weight: float) -> None:
        """Deliver a plain update inside the message that says that it is complete."""
        data = plain_file(read_layout(self.world.blobs.path(self.assignment.model)).update(), value)
        message = Complete(
            fence=self.assignment.fence,
            sha256=hashlib.sha256(data).hexdigest(),
            weight=weight,
            metrics={},
            data=base64.b64encode(data).decode(),
        )
        self.world.conversation.complete(self.name, self.assignment.id, message)

    def send(self, data: bytes, **message: Any) -> Complete:
        """Upload a whole file and say that it is complete."""
        c, a = self.world.conversation, self.assignment
        digest = hashlib.sha256(data).hexdigest()
        state = c.offer_upload(self.name, a.id, UploadOffer(fence=a.fence, sha256=digest, size=len(data)))
        if state.offset < len(data):
            c.append(self.name, a.id, a.fence, state.offset, data[state.offset :])
        complete = Complete(fence=a.fence, sha256=digest, **message)
        c.complete(self.name, a.id, complete)
        return complete


def plain_file(layout: Layout, value: float) -> bytes:
    return layout.header() + b"".join(np.full(t.numel, value, "<f4").tobytes() for t in layout.tensors)


def masked_up_to(world: World, agents: list[Agent], *stages: str) -> None:
    """Hand a masked round out to all agents and take them through its first stages."""
    world.tick()
    for agent in agents:
        assert agent.poll() is not None, agent.name
    for stage in stages:
        for agent in agents:
            getattr(agent, stage)()
        world.tick()


def masked_round(world: World, agents: list[Agent], values: list[float], weights: list[int]) -> None:
    """Take all agents through one masked round in lockstep."""
    masked_up_to(world, agents, "advert", "share")
    for agent, value, weight in zip(agents, values, weights, strict=True):
        agent.upload_masked(value, weight)
    for stage in ("agree", "reveal"):
        world.tick()
        for agent in agents:
            getattr(agent, stage)()
    world.tick()


def plain_round(world: World, agents: list[Agent], values: list[float], weights: list[float]) -> None:
    world.tick()
    for agent, value, weight in zip(agents, values, weights, strict=True):
        assert agent.poll() is not None, agent.name
        agent.upload_plain(value, weight)
    world.tick()
