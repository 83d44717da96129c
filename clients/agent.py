"""The agent: asks its coordinator for work, does it, and lives through whatever happens to either.

    python -m murmur.clients.agent --dir DIR

A small process without torch. It calls out and is never called; SIGTERM and SIGINT end it within seconds, with the
processes that train. What was under way is reported as failed, so that nobody waits for it. An agent that is killed
says nothing: started anew, it is handed its assignments again and goes on inside its plain rounds (see `kept`).
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from ..protocol.errors import (
    MurmurError,
    NotApproved,
    NotAuthenticated,
    OperatorError,
    PrivacyRefusal,
    ProtocolMismatch,
    TooLate,
    Unavailable,
)
from ..protocol.messages import Assignment, Poll
from . import logs
from .conversation import Conversation
from .enrolment import agent_info, enrol
from .identity import load_identity
from .link import Link
from .nodes import Nodes
from .settings import Settings, TaskEntry, load_settings, with_tasks
from .shared import Site, Trains
from .site_page import SitePage
from .switch import refusal
from .trainer import Trainer

__all__ = ["Agent", "enrol", "main"]

log = logging.getLogger(__name__)

APPROVAL_S = 5.0  # between two questions whether an admin has approved the key
REFUSED_S = 60.0  # after an answer that only a person can change
SHORTEST_S = 0.05  # between two polls, whatever the coordinator says
LONGEST_S = 3600.0
SWITCH_S = 0.5  # between two looks at the site's stop switch
FAREWELL_S = 3.0  # to tell the coordinator what is left undone


class Keeps(Trains, Protocol):
    """A trainer as the agent keeps it, from its start to its end."""

    def warm(self) -> None: ...

    def close(self) -> None: ...


MakeTrainer = Callable[[str, TaskEntry], Keeps]


class Agent:
    """One client's agent: `run` it in one thread, `stop` it from another."""

    def __init__(
        self, settings: Settings, *, link: Link | None = None, make_trainer: MakeTrainer | None = None
    ) -> None:
        """link, make_trainer: for tests and for agents inside another process.

        Raises OperatorError when the directory is not one of an enrolled client, or another agent runs from it.
        """
        self.settings = settings
        identity = load_identity(settings.key_file)
        self._lock = _lock(settings.directory / "agent.lock")
        self._site = Site(settings, identity)
        self._link = link or Link(
            settings.coordinator,
            name=settings.name,
            identity=identity,
            ca=settings.ca_file if settings.ca_file.exists() else None,
            proxy=settings.proxy,
        )
        self._link.before_sending = self._site.before_sending
        make = make_trainer or self._make_trainer
        self._trainers: Mapping[str, Keeps] = {name: make(name, entry) for name, entry in settings.tasks.items()}
        self._info = agent_info(settings)
        port = settings.site.port
        self.page = SitePage(self._site, port) if port != "off" else None
        self._conversations: dict[str, tuple[Conversation, threading.Thread]] = {}
        self._changing = threading.Lock()  # held where a conversation begins or leaves, and where the agent stops
        self._stopped = threading.Event()
        self._waiting_for_approval = False

    def run(self) -> None:
        """Take part until stopped; raises ProtocolMismatch when only another release can go on."""
        facts = {"client": self.settings.name, "url": self.settings.coordinator}
        log.info("agent started", extra={**facts, "tasks": sorted(self._trainers)})
        try:
            for trainer in self._trainers.values():
                trainer.warm()
            if self.page is not None:
                self.page.start()
                log.info("site page", extra={"url": self.page.url, "link": "murmur client site prints it"})
            threading.Thread(target=self._watch_switch, name="switch", daemon=True).start()
            while not self._stopped.is_set():
                self._stopped.wait(self._ask())
        finally:
            self._close()
            log.info("agent stopped", extra=facts)

    def stop(self) -> None:
        """End `run`, from any other thread; the coordinator is told of what is left undone, if it can be reached."""
        with self._changing:
            self._stopped.set()
            talks = list(self._conversations.values())
        for conversation, _ in talks:
            conversation.cancel(Unavailable("the agent is stopping"))
        for _, thread in talks:
            thread.join(FAREWELL_S)
        self._link.abort()

    def _watch_switch(self) -> None:
        """End what is under way soon after somebody at the site has stopped it, and say so in the log."""
        was = False
        while not self._stopped.wait(SWITCH_S):
            stopped = self._site.switch.stopped() is not None
            if stopped != was:
                log.warning("stopped by the site" if stopped else "resumed by the site")
            was = stopped
            for conversation, _ in list(self._conversations.values()) if stopped else ():
                conversation.cancel(refusal())

    def _ask(self) -> float:
        """One poll and what follows from it; returns the seconds until the next. A stopped site asks for nothing."""
        if self._site.switch.stopped():
            return SWITCH_S
        busy = {key: conversation.sign for key, (conversation, _) in list(self._conversations.items())}
        try:
            work = self._link.poll(Poll(info=self._info, busy=busy))
        except NotApproved:
            if not self._waiting_for_approval:
                self._waiting_for_approval = True
                fingerprint = self._site.identity.fingerprint
                log.warning("waiting for an admin to approve this client", extra={"fingerprint": fingerprint})
            return APPROVAL_S
        except ProtocolMismatch:
            raise
        except PrivacyRefusal:
            return SWITCH_S  # stopped just now
        except Unavailable:
            return SHORTEST_S  # the link was aborted; else it would not have come back with this
        except NotAuthenticated as error:
            log.error("the coordinator does not accept this client", extra={"why": error.detail})
            return REFUSED_S
        except MurmurError as error:
            log.error("the coordinator refused a poll", extra={"code": error.code, "why": error.detail})
            return REFUSED_S
        if self._waiting_for_approval:
            self._waiting_for_approval = False
            log.info("this client was approved")
        for key in work.void:
            if (void := self._conversations.get(key)) is not None:
                void[0].cancel(TooLate("the coordinator called it off"))
        if work.assignment is not None:
            self._begin(work.assignment)
        return min(LONGEST_S, max(SHORTEST_S, work.next_poll_s))

    def _begin(self, assignment: Assignment) -> None:
        earlier = self._conversations.get(assignment.id)
        if earlier is not None and earlier[0].assignment.fence >= assignment.fence:
            return
        trainer = self._trainers.get(assignment.task)
        # Before the earlier one ends, so that it leaves to this one what it has on disk.
        conversation = Conversation(assignment, site=self._site, link=self._link, trainer=trainer)
        if earlier is not None:
            before, thread = earlier
            before.cancel(TooLate("it was handed out again"))
            thread.join(FAREWELL_S)

        def talk() -> None:
            try:
                conversation.run()
            finally:
                with self._changing:
                    if self._conversations.get(assignment.id, (None,))[0] is conversation:
                        del self._conversations[assignment.id]

        thread = threading.Thread(target=talk, name=f"conversation {assignment.id}", daemon=True)
        with self._changing:
            if not self._stopped.is_set():
                self._conversations[assignment.id] = (conversation, thread)
                thread.start()

    def _make_trainer(self, name: str, entry: TaskEntry) -> Trainer:
        workdir = self.settings.workdir / "trainers" / name
        workdir.mkdir(parents=True, exist_ok=True)
        start = f"murmur client ranks --dir {self.settings.directory} --task {name}"
        nodes = Nodes(workdir, self.settings.nodes, start) if self.settings.nodes > 1 else None
        return Trainer(entry.reference, entry.options, processes=self.settings.ranks, workdir=workdir, nodes=nodes)

    def _close(self) -> None:
        self._stopped.set()
        for trainer in self._trainers.values():
            trainer.close()
        for _, thread in list(self._conversations.values()):
            thread.join(FAREWELL_S)
        self._link.close()
        if self.page is not None:
            self.page.close()
        self._site.record.close()
        os.close(self._lock)


def _lock(path: Path) -> int:
    """Hold a file as long as this process lives: two agents of one client would take the work from each other."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise OperatorError(f"another agent runs from {path.parent}: a client has one") from None
    return descriptor


def main(argv: Sequence[str] | None = None, *, tasks: Mapping[str, TaskEntry] | None = None) -> int:
    """Run a directory's agent until SIGTERM or SIGINT; returns the exit code. Raises OperatorError before it runs.

    tasks: beside those of its client.toml, for as long as it runs; a file is looked for from the current folder on.
    """
    parser = argparse.ArgumentParser(prog="murmur.clients.agent", description="Run the agent of an enrolled client.")
    parser.add_argument("--dir", type=Path, required=True, help="the client's directory, made by enrolment")
    parser.add_argument("--verbose", action="store_true", help="log more")
    options = parser.parse_args(argv)
    logs.to_stderr(logging.DEBUG if options.verbose else logging.INFO)
    agent = Agent(with_tasks(load_settings(options.dir), tasks or {}))
    ended, failures = threading.Event(), list[MurmurError]()

    def run() -> None:
        try:
            agent.run()
        except MurmurError as error:
            failures.append(error)
        finally:
            ended.set()

    def on_signal(number: int, _: FrameType | None) -> None:
        log.info("stopping", extra={"signal": signal.Signals(number).name})
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    thread = threading.Thread(target=run, name="agent")
    thread.start()
    if agent.page is not None and sys.stderr.isatty():  # a person reads this, and no log keeps it
        sys.stderr.write(f"this site's own page (the link logs in once): {agent.page.link()}\n")
    ended.wait()
    agent.stop()
    thread.join()
    for failure in failures:
        log.error("the agent cannot go on", extra={"code": failure.code, "why": failure.detail})
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MurmurError as problem:
        sys.exit(f"error: {problem.detail}")
