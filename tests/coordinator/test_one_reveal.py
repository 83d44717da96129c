"""One update, one reveal: what a round's second attempt comes to when clients have opened its first one's sum.

The coordinator is the real one; the members are the agent's own half of masked rounds, with its memory on disk.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from murmur.clients.identity import Identity
from murmur.clients.job import Result
from murmur.clients.masked import MaskedPart
from murmur.clients.memory import Memory
from murmur.clients.settings import Policy
from murmur.privacy.verification import verify
from murmur.protocol.errors import BadUpdate, PrivacyRefusal
from murmur.protocol.messages import AnswerKind, Failure, StepKind
from murmur.protocol.tensors import read_layout, write_file

from .harness import Agent, Inline, World
from .test_conductor import MASKED


@pytest.fixture
def world(tmp_path: Path):
    world = World(tmp_path)
    yield world
    world.store.close()


class Member:
    """An agent with a memory. It answers each step as the agent does, and reports a refusal."""

    def __init__(self, agent: Agent, folder: Path) -> None:
        folder.mkdir()
        self.agent, self.folder = agent, folder
        self.memory = Memory(folder)
        self.refused = ""

    def start(self) -> None:
        agent, self.refused = self.agent, ""
        assert agent.poll() is not None, agent.name
        work, layout = agent.assignment, read_layout(agent.world.blobs.path(agent.assignment.model))
        assert work.secure is not None
        self.part = MaskedPart(
            work,
            work.secure,
            layout,
            me=agent.name,
            identity=Identity(agent.key),
            policy=Policy(),
            memory=self.memory,
        )
        agent.say(AnswerKind.ADVERT, self.part.advert())

    def go_on(self) -> None:
        """Take the coordinator's next word, if there is one."""
        if self.refused or (step := self.agent.step()) is None or step.kind in (StepKind.DONE, StepKind.GONE):
            return
        try:
            found = self.part.answer(step)
        except PrivacyRefusal as error:
            self.refused = error.reason
            told = Failure(fence=self.agent.assignment.fence, code=f"privacy_refusal:{error.reason}", detail="")
            self.agent.world.conversation.fail(self.agent.name, self.agent.assignment.id, told)
            return
        if found is not None:
            self.agent.say(*found)
        elif step.kind is StepKind.INBOX:
            layout, update, upload = read_layout(self.agent.world.blobs.path(self.agent.assignment.model)), *self._files
            write_file(update, {t.name: np.ones(t.shape, np.float32) for t in layout.tensors}, layout.update())
            self.part.write(upload, Result(update=update, examples=1, steps=1, metrics={}, seconds=0.1))
            self.agent.send(upload.read_bytes())

    @property
    def _files(self) -> tuple[Path, Path]:
        return self.folder / "update", self.folder / "upload"


class Failing(Inline):
    """Takes the sum, which has been opened by then, and fails the first one."""

    def submit(self, attempt, identities):
        if attempt.key.attempt > 1:
            return super().submit(attempt, identities)
        done: Future = Future()
        done.set_exception(BadUpdate("the first sum is of no use"))
        return done


def members(world: World, tmp_path: Path, names: str) -> list[Member]:
    world.conductor._summer = Failing(world.blobs)  # pyright: ignore[reportPrivateUsage]
    return [Member(world.agent(name), tmp_path / f"site-{name}") for name in names]


def attempt(world: World, group: list[Member]) -> None:
    """One attempt from its cohort to its last reveal, or as far as it comes; the next tick takes the sum."""
    world.tick()
    for member in group:
        member.start()
    for _ in range(4):  # roster, inbox, survivors, reveal
        world.tick()
        for member in group:
            member.go_on()


def test_the_same_clients_may_open_the_same_sum_again(world: World, tmp_path: Path):
    group = members(world, tmp_path, "abcd")
    run = world.start(**MASKED)
    attempt(world, group)
    attempt(world, group)
    world.tick()
    assert world.store.runs.detail(run).rounds[0].attempt == 2
    assert world.store.runs.versions(run)[0].who == ("a", "b", "c", "d")


def test_all_but_one_of_them_send_nothing_more(world: World, tmp_path: Path):
    """The sum of a, b, c and d less that of a, b and c would be d's update."""
    group = members(world, tmp_path, "abcd")
    run = world.start(**MASKED | {"cohort": {"min": 3, "patience_s": 10, "attempts": 2}})
    attempt(world, group)
    world.store.clients.decide("d", "revoked", by="admin")
    attempt(world, group[:3])
    world.tick()
    assert [m.refused for m in group] == ["summed_before"] * 3 + [""]
    view = world.store.runs.detail(run)
    assert view.run.state == "failed" and [v.n for v in world.store.runs.versions(run)] == [0]
    assert all(a.state == "failed" and a.reason.startswith("privacy_refusal:summed_before") for a in
               view.rounds[-1].assignments)  # fmt: skip
    assert world.store.manifests.of(run) == []


def test_an_attempt_goes_on_without_those_who_opened_the_one_before(world: World, tmp_path: Path):
    """Three of ten sit out; seven are as many shares as unmask ten (2 * 10 // 3 + 1)."""
    group = members(world, tmp_path, "abc")
    run = world.start(**MASKED)
    attempt(world, group)
    group += members(world, tmp_path, "defghij")
    attempt(world, group)
    world.tick()
    assert [m.refused for m in group] == ["summed_before"] * 3 + [""] * 7
    newest = world.store.runs.versions(run)[0]
    assert newest.who == tuple("defghij") and [m.client for m in newest.missing] == ["a", "b", "c"]
    assert verify({"1": world.store.manifests.text(run, 1)}).ok


def test_one_that_was_restarted_counts_as_dropped(world: World, tmp_path: Path):
    group = members(world, tmp_path, "abcd")
    run = world.start(**MASKED)
    world.tick()
    for member in group:
        member.start()
    first = group[0]
    first.memory = Memory(first.folder)
    assert first.agent.poll() is None  # it is handed nothing: the coordinator knows that its secrets are gone
    with pytest.raises(PrivacyRefusal) as refused:  # and were it handed the same once more, it would refuse
        MaskedPart(
            first.agent.assignment,
            first.agent.assignment.secure,
            read_layout(world.blobs.path(first.agent.assignment.model)),
            me="a",
            identity=Identity(first.agent.key),
            policy=Policy(),
            memory=first.memory,
        )
    assert refused.value.reason == "joined_before"
    world.conductor._summer = Inline(world.blobs)  # pyright: ignore[reportPrivateUsage]
    for _ in range(4):
        world.tick()
        for member in group[1:]:
            member.go_on()
    world.tick()
    assert world.store.runs.versions(run)[0].who == ("b", "c", "d")
