"""The coordinator dies at any instant, requests and replies get lost, agents restart and have twins: nothing may break.

    python -m tests.coordinator.schedules --seed 7 --crash 0.3 --secure --power --trace

One thread, a clock that the schedule moves, and every random choice, keys included, from one seed: this command replays
a failure exactly. The oracle stands outside the coordinator: what its agents were told is accepted, and what they had
sent. Training differs each time it is repeated, as on a GPU; otherwise most double counting would be invisible.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select

from murmur.coordinator.store import tables
from murmur.privacy.client import ClientSession, Policy
from murmur.protocol.errors import PrivacyRefusal, TooLate, WrongOffset
from murmur.protocol.messages import AnswerKind, Assignment, Complete, Kind, StepKind, Total, UploadOffer
from murmur.protocol.tensors import Layout, map_file, masked_layout, read_layout

from .disk import Disk
from .harness import Agent, World, plain_file

ROUNDS, CLIENTS, STEPS = 3, 4, 6_000
PATIENCE_S = 60.0


class Crash(BaseException):
    """The process is gone; no code of ours may catch it."""


@dataclass
class Chaos:
    """What goes wrong, how often it did, and in `trace` what happened in which order."""

    draw: random.Random
    crash: float
    lose: float = 0.05
    crashes: int = 0
    lost: int = 0
    twins: int = 0
    trace: list[str] = field(default_factory=list[str])

    def failpoint(self, name: str) -> None:
        if self.draw.random() < self.crash:
            self.die(name)

    def die(self, name: str) -> None:
        self.crashes += 1
        self.trace.append(f"crash {name}")
        raise Crash

    def train(self, assignment: Assignment, client: str) -> tuple[float, float]:
        """What training comes to: (a delta, a weight)."""
        _ = (assignment, client)
        return self.draw.uniform(-1, 1), float(self.draw.randint(1, 9))


@dataclass
class Truth:
    """What the agents know: which updates were acknowledged, and what lies behind every digest that was sent."""

    acked: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    sent: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])


@dataclass
class Player:
    """An agent that takes one step whenever it is its turn, and repeats what it got no answer to."""

    agent: Agent
    chaos: Chaos
    truth: Truth
    data: bytes = b""
    value: tuple[float, float] = (0.0, 0.0)
    done: bool = False  # the update is acknowledged
    superseded: bool = False  # a newer process of this client runs; this one ends when it has nothing left to do
    ended: bool = False

    def forget(self) -> None:
        """The process was restarted: memory is gone."""
        self.chaos.trace.append(f"{self.agent.name} forgets")
        self.ended = self.superseded
        self.agent.work, self.agent.session, self.agent.seen = None, None, None
        self.data, self.done = b"", False

    def turn(self) -> None:
        held = self.agent.work and f"{self.agent.work.id} fence {self.agent.work.fence}, after {self.agent.seen}"
        self.chaos.trace.append(f"{self.agent.name} {held or 'asks for work'}")
        try:
            if self.agent.work is None:
                self.data, self.done = b"", False
                self.reply(lambda: self.agent.poll(), lost=self.forget)
            elif self.agent.assignment.secure:
                self.masked()
            else:
                self.plain()
        except WrongOffset as error:
            self.chaos.trace.append(error.detail)  # the next turn asks where the upload goes on
        except (TooLate, PrivacyRefusal) as error:
            self.chaos.trace.append(error.detail)
            self.forget()

    def reply(self, call: Callable[[], Any], *, lost: Callable[[], None] = lambda: None) -> Any:
        """Call the coordinator; perhaps the answer never comes, and perhaps the request is delivered twice."""
        found = call()
        if self.chaos.draw.random() < self.chaos.lose:
            self.chaos.lost += 1
            lost()
            raise WrongOffset("the connection broke")
        return found

    def plain(self) -> None:
        if self.done:
            return self.finish()
        if not self.data:
            self.train()
        self.deliver(weight=self.value[1])

    def train(self) -> None:
        layout = read_layout(self.agent.world.blobs.path(self.agent.assignment.model))
        self.value = self.chaos.train(self.agent.assignment, self.agent.name)
        if self.agent.assignment.kind == Kind.EVALUATE:
            self.data = Layout(()).header()
        else:
            self.data = plain_file(layout.update(), self.value[0])

    def deliver(self, weight: float | None) -> None:
        """One request of an upload: announce, a piece, or complete."""
        c, a = self.agent.world.conversation, self.agent.assignment
        digest = hashlib.sha256(self.data).hexdigest()
        self.truth.sent[digest] = self.value
        offer = UploadOffer(fence=a.fence, sha256=digest, size=len(self.data))
        state = self.reply(lambda: c.offer_upload(self.agent.name, a.id, offer))
        if state.offset < state.size:
            piece = self.data[state.offset : state.offset + max(1, len(self.data) // 2)]
            self.reply(lambda: c.append(self.agent.name, a.id, a.fence, state.offset, piece))
            return
        evaluate = a.kind == Kind.EVALUATE
        metrics = {"loss": Total(sum=1.0, count=1.0)}
        plain = {"weight": 0.0 if evaluate else weight, "metrics": metrics} if weight is not None else {}
        message = Complete.model_validate({"fence": a.fence, "sha256": digest, **plain})
        self.reply(lambda: c.complete(self.agent.name, a.id, message))
        self.truth.acked.add((a.id, digest))
        self.done = True

    def finish(self) -> None:
        step = self.reply(self.agent.step)
        if step is not None and step.kind in (StepKind.DONE, StepKind.GONE):
            self.forget()

    def masked(self) -> None:
        agent = self.agent
        if agent.session is None:
            context, random = agent.context(), self.chaos.draw.randbytes
            agent.session = ClientSession(context, agent.name, agent.key, policy=Policy(), known={}, random=random)
            self.advert = agent.session.advertise()
            self.pending: tuple[AnswerKind, str] | None = (AnswerKind.ADVERT, self.advert)
        if self.pending is not None:
            kind, body = self.pending
            self.reply(lambda: agent.say(kind, body))
            self.pending = None
        if self.data and not self.done:
            return self.deliver(weight=None)
        step = agent.step()
        if step is None:
            return
        if step.kind in (StepKind.DONE, StepKind.GONE):
            return self.forget()
        if step.kind == StepKind.ROSTER:
            self.pending = (AnswerKind.SHARES, agent.session.share(step.body))
        elif step.kind == StepKind.INBOX:
            agent.session.open(step.body)
            self.mask()
        elif step.kind == StepKind.SURVIVORS:
            self.pending = (AnswerKind.AGREE, agent.session.agree(step.body))
        else:
            self.pending = (AnswerKind.REVEAL, agent.session.reveal(step.body))

    def mask(self) -> None:
        agent = self.agent
        assert agent.session is not None
        evaluate = agent.assignment.kind == Kind.EVALUATE
        self.value = self.chaos.train(self.agent.assignment, self.agent.name)
        weight = 0 if evaluate else int(self.value[1])
        context, layout = agent.context(), read_layout(agent.world.blobs.path(agent.assignment.model))
        aux = agent.block(layout).encode(
            weight=weight, clipped=0, metrics={"loss": (1.0, 1.0)}, integers=np.zeros(0, np.int64)
        )
        values = [np.full(context.dim, self.value[0], np.float32)] if context.dim else []
        body = b"".join(bytes(c) for c in agent.session.mask(values, weight=weight, aux=aux))
        self.data = masked_layout(context.dim, context.aux).header() + body


@dataclass
class Stage:
    """A run about to start: its coordinator, its agents, and what went wrong so far."""

    world: World
    chaos: Chaos
    truth: Truth
    players: list[Player]
    run: str
    secure: bool
    disk: Disk | None = None

    def arm(self) -> None:
        self.world.store.db.failpoint = self.world.blobs.failpoint = self.chaos.failpoint

    def disarm(self) -> None:
        self.world.store.db.failpoint = self.world.blobs.failpoint = lambda name: None

    def recover(self) -> None:
        """Only rows and blobs survive, of these what was synced if the power failed; the rest is made anew."""
        if self.disk is not None:
            self.disk.lose_power(self.chaos.draw)
        self.world.rebuild()
        if self.disk is not None:
            self.everything_named_is_whole()
        self.arm()

    def everything_named_is_whole(self) -> None:
        for sha256 in self.world.store.rounds.named_blobs():
            found = hashlib.sha256(self.world.blobs.path(sha256).read_bytes()).hexdigest()
            assert found == sha256, "a blob that the rows name was lost with the power"

    def finished(self) -> bool:
        return self.world.store.runs.detail(self.run).run.state != "running"


@contextmanager
def stage(
    folder: Path, chaos: Chaos, *, secure: bool, clients: int, rounds: int = ROUNDS, power: bool = False
) -> Iterator[Stage]:
    """A world with its agents online and a run started; `check` it at the end."""
    world, truth = World(folder), Truth()
    keys = {f"c{n}": Ed25519PrivateKey.from_private_bytes(chaos.draw.randbytes(32)) for n in range(clients)}
    players = [Player(world.agent(name, key), chaos, truth) for name, key in keys.items()]
    run = world.start(
        rounds=rounds,
        cohort={"min": 3, "patience_s": PATIENCE_S, "attempts": 20},
        secure={"on": secure, "clip_value": 1.0},
        strategy={"max_weight": 9},
    )
    disk = Disk(folder / "blobs") if power else None
    with disk or nullcontext():
        yield Stage(world, chaos, truth, players, run, secure, disk)
    world.store.close()


def run_schedule(seed: int, folder: Path, *, secure: bool, crash: float, power: bool = False) -> Chaos:
    """One whole run under chaos; asserts every invariant and returns what happened."""
    draw = random.Random(seed)
    with stage(folder, Chaos(draw, crash), secure=secure, clients=CLIENTS, power=power) as s:
        s.arm()
        for step in range(STEPS):
            s.world.now += draw.choice((0.01, 0.1, 0.5))
            try:
                disturb_and_go_on(s)
            except Crash:
                s.recover()
            if step % 50 == 0 and s.finished():
                break
        s.disarm()
        s.chaos.trace += [
            f"{e.at.timestamp():.2f} {e.kind} {e.data}" for e in s.world.store.events.since(0, None, 10**6)
        ]
        check(s.world, s.run, s.truth, secure=secure)
    return s.chaos


def disturb_and_go_on(s: Stage) -> None:
    """Perhaps a tick of the conductor, perhaps a restart or a twin of an agent, and one turn of it."""
    draw = s.chaos.draw
    if draw.random() < 0.4:
        s.world.conductor.tick()
    player = draw.choice([p for p in s.players if not p.ended])
    roll = draw.random()
    if roll < 0.003:
        player.forget()
    elif roll < 0.02 and player.agent.work is not None and not s.secure:
        s.chaos.twins += 1  # the agent is stopped, a new one starts, and later the old one goes on
        s.chaos.trace.append(f"{player.agent.name} gets a twin")
        agent = Agent(s.world, player.agent.name, player.agent.key)
        twin = Player(agent, s.chaos, s.truth, superseded=True)
        twin.agent.work, twin.data, twin.value = player.agent.work, player.data, player.value
        s.players.append(twin)
        player.forget()
    player.turn()


def check(world: World, run: str, truth: Truth, *, secure: bool) -> None:
    detail = world.store.runs.detail(run)
    assert detail.run.state == "finished", (detail.run.state, detail.run.reason, detail.current)
    with world.store.db.read() as c:
        counted = {(a, s) for a, s in c.execute(select(tables.update.c.assignment, tables.update.c.sha256))}
        versions = c.execute(select(tables.version).order_by(tables.version.c.n)).mappings().all()
    assert truth.acked <= counted, "an acknowledged update is not in the database"
    assert [v["n"] for v in versions] == list(range(ROUNDS + 1)), "versions are contiguous"
    assert [v["parent"] for v in versions] == [None, *(v["sha256"] for v in versions[:-1])], "the chain is whole"
    for before, after in itertools.pairwise(versions):
        committed = next(r for r in detail.rounds if r.n == after["n"])
        prefix = f"{run}.{after['n']}.{committed.attempt}."
        included = {a.removeprefix(prefix): s for a, s in counted if a.startswith(prefix)}
        assert sorted(after["contributors"]) == sorted(included), "every accepted update counts, and only those"
        total = weights = 0.0
        for client in sorted(included):
            value, weight = truth.sent[included[client]]
            total, weights = total + float(np.float32(value)) * weight, weights + weight
        base, model = weights_of(world, before["sha256"]), weights_of(world, after["sha256"])
        if secure:
            np.testing.assert_allclose(model, base + total / weights, atol=2e-6)
        else:
            assert np.all(model == base + np.float32(total / weights)), "the version is not the mean of its updates"


def weights_of(world: World, sha256: str) -> np.ndarray[Any, Any]:
    path = world.blobs.path(sha256)
    return map_file(path, read_layout(path))["w"]


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory, where this system has one: a commit costs microseconds there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.coordinator.schedules", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="so many seeds from --seed on")
    parser.add_argument("--crash", type=float, default=0.3, help="chance at each failpoint")
    parser.add_argument("--secure", action="store_true", help="masked rounds")
    parser.add_argument("--power", action="store_true", help="a crash loses what was not synced")
    parser.add_argument("--trace", action="store_true", help="print every step")
    options = parser.parse_args()
    for seed in range(options.seed, options.seed + options.count):
        began = time.monotonic()
        with memory_folder() as folder:
            kind = {"secure": options.secure, "crash": options.crash, "power": options.power}
            print(f"seed {seed}, {kind}", flush=True)
            chaos = run_schedule(seed, folder, **kind)
        if options.trace:
            print("\n".join(chaos.trace))
        took_s = time.monotonic() - began
        print(f"  {chaos.crashes} crashes, {chaos.lost} lost replies, {chaos.twins} twins in {took_s:.1f} s")


if __name__ == "__main__":
    main()
