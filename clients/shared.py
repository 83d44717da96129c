"""What the conversations of one agent have in common: its folders, its record, whose turn it is to train."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import httpx

from ..protocol.messages import Progress as Sign
from .identity import Identity
from .job import Job, Progress, Result
from .kept import Shelf
from .ledger import FILE as LEDGER
from .ledger import Ledger
from .memory import Memory
from .models import Models
from .outgoing import describe
from .own import Own
from .record import FILE as RECORD
from .record import Record
from .settings import Settings
from .switch import Switch, refusal

LONG_S = 3600.0  # a training of which a hundredth may take longer than a client without progress is waited for


class Trains(Protocol):
    """What a conversation asks of a trainer; `clients.trainer.Trainer` is one."""

    def run(self, job: Job, on_progress: Callable[[Progress], None]) -> Result: ...

    def cancel(self) -> None: ...


class Site:
    """What the conversations of one agent have in common.

    turn: one job trains at a time; front: how far the one that has its turn is, which is what the others wait for.
    """

    def __init__(self, settings: Settings, identity: Identity) -> None:
        settings.workdir.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self.identity = identity
        self.memory = Memory(settings.workdir)
        self.models = Models(settings.workdir / "models")
        self.shelf = Shelf(settings.workdir, resume=settings.policy.resume)
        self.own = Own(settings.workdir / "own")
        self.ledger = Ledger(settings.directory / LEDGER)
        self.record = Record(settings.directory / RECORD)
        self.switch = Switch(settings.directory)
        self.turn = threading.Lock()
        self.front = Sign(phase="waiting")

    def before_sending(self, request: httpx.Request) -> None:
        """Note what is about to leave. At a site that was stopped nothing leaves but the word that it was."""
        if self.switch.stopped() and describe(request).kind not in {"failure", "token"}:
            raise refusal()
        self.record.leaves(request)


def coarse(step: int, steps: int, took_s: float) -> tuple[int, int]:
    """The step in hundredths of the job, or in thousandths of a long one.

    How many steps a job has says how many examples the site has, which a masked round hides. A job that does not know
    how many it has counts something else: see `clients.flower`.
    """
    if not steps:
        return step, 0
    parts = 100 if not step or took_s * steps / step < LONG_S else 1000
    return parts * step // max(steps, 1), parts
