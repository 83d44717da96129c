"""What each page shows, read from the console at one moment, and which parts of it an event makes stale.

A page is a few fragments, each a macro of the same name in templates/fragments.html or ledgers.html that takes the
page's board. The
first paint holds all of them; later the live stream replaces those that an event touched. Fragments hold links but no
forms: what one types into or presses never moves, and one rendering serves viewers of every role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from ..protocol.budgets import OwnerBudget, RunBudget, owners
from ..protocol.registry import AliasView
from ..protocol.views import (
    AssignmentView,
    ClientView,
    EventView,
    InvitationView,
    RoundView,
    RunDetail,
    RunView,
    VersionView,
)
from . import figures
from .alerts import Alert, alerts
from .console import Console

LOG_LINES = 40
LOG_READ = 400  # events that are read for them
ROUND_ROWS = 12
PAGE_ROWS = 50
RUNNING_SHOWN = 6  # runs in progress that the overview draws, paused ones too; more are a link

# What an event may be about. A kind that is not among these touches everything.
KINDS = frozenset(("run", "phase", "client", "progress", "secure", "model", "privacy", "audit", "alias"))
ROUNDS = frozenset(("run", "phase", "client"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    now: datetime
    running: list[RunDetail]
    more_running: int
    paused: int
    recent: list[RunView]
    run_count: int
    clients: list[ClientView]
    newest: VersionView | None
    version_count: int
    run_names: dict[str, str]
    planned: dict[str, int]
    log: list[EventView]
    alerts: list[Alert]

    @property
    def active(self) -> list[ClientView]:
        return [c for c in self.clients if c.state == "active"]

    @property
    def online(self) -> int:
        return sum(c.online for c in self.active)

    @property
    def pending(self) -> int:
        return sum(c.state == "pending" for c in self.clients)


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    now: datetime
    runs: list[RunView]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    now: datetime
    detail: RunDetail
    log: list[EventView]
    log_scale: bool = False

    @property
    def run(self) -> RunView:
        return self.detail.run

    @property
    def secure(self) -> bool:
        return self.detail.run.recipe.secure.on

    @property
    def shown(self) -> RoundView | None:
        """The attempt in progress; between two, or after the last, the newest one. Of a simulation the newest done."""
        if self.run.simulation:  # nobody waits for virtual clients: who they are is known when their round is over
            return next((r for r in reversed(self.detail.rounds) if r.assignments), None)
        return self.detail.current or (self.detail.rounds[-1] if self.detail.rounds else None)

    @property
    def assignments(self) -> list[AssignmentView]:
        return figures.shown_clients(self.shown) if self.shown else []

    @property
    def metric_names(self) -> list[str]:
        return figures.main_metrics(m.name for m in self.detail.metrics)

    @property
    def values(self) -> dict[tuple[int, str], float]:
        return {(m.version, m.name): m.value for m in self.detail.metrics}

    @property
    def run_names(self) -> dict[str, str]:
        """Nothing: the log of one run does not name it in each line."""
        return {}

    @property
    def planned(self) -> dict[str, int]:
        return {self.run.id: self.run.rounds}


@dataclass(frozen=True, kw_only=True, slots=True)
class Clients:
    now: datetime
    clients: list[ClientView]
    invitations: list[InvitationView]

    @property
    def pending(self) -> list[ClientView]:
        return [c for c in self.clients if c.state == "pending"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    now: datetime
    client: ClientView


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    now: datetime
    versions: list[VersionView]
    total: int
    run: RunView | None
    aliases: list[AliasView]

    @property
    def metric_names(self) -> list[str]:
        return figures.main_metrics(name for v in self.versions for name in v.metrics)


@dataclass(frozen=True, kw_only=True, slots=True)
class Privacy:
    """Runs with differential privacy; of the others the page says only whose data they were trained on."""

    budgets: list[RunBudget]

    @property
    def bounded(self) -> list[RunBudget]:
        return [r for r in self.budgets if r.mode != "off"]

    @property
    def owners(self) -> list[OwnerBudget]:
        return owners(self.budgets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    entries: int


def overview(console: Console, _: str) -> Overview:
    runs = console.runs()
    going_on = [r for r in runs if not r.over]
    running = [console.run(r.id) for r in going_on[:RUNNING_SHOWN]]
    clients = console.clients()
    versions = console.versions()
    events = [e for e in console.recent_events(None, LOG_READ) if e.kind not in ("progress", "secure")]
    return Overview(
        now=console.now(),
        running=running,
        more_running=max(0, len(going_on) - RUNNING_SHOWN),
        paused=sum(r.state == "paused" for r in going_on),
        recent=[r for r in runs if r.over][:6],
        run_count=len(runs),
        clients=clients,
        newest=max(versions, key=lambda v: v.created_at, default=None),
        version_count=len(versions),
        run_names={r.id: r.name for r in runs},
        planned={r.id: r.rounds for r in runs},
        log=events[-LOG_LINES:],
        alerts=alerts(running, runs, clients, events),
    )


def _log(console: Console, run: str | None, *, hidden: tuple[str, ...]) -> list[EventView]:
    """The newest events without those of the hidden kinds, which come several to a second."""
    return [e for e in console.recent_events(run, LOG_READ) if e.kind not in hidden][-LOG_LINES:]


def runs(console: Console, _: str) -> Runs:
    return Runs(now=console.now(), runs=console.runs())


def run(console: Console, id: str, *, log_scale: bool = False) -> Run:
    log = _log(console, id, hidden=("progress",))
    return Run(now=console.now(), detail=console.run(id), log=log, log_scale=log_scale)


def clients(console: Console, _: str) -> Clients:
    return Clients(now=console.now(), clients=console.clients(), invitations=console.invitations())


def models(console: Console, run: str, page: int = 1) -> Models:
    """Versions of a run, or of all if `run` is empty, `PAGE_ROWS` on a page."""
    found = console.versions(run or None)
    first = (page - 1) * PAGE_ROWS
    one = console.run(run).run if run else None
    return Models(
        now=console.now(),
        versions=found[first : first + PAGE_ROWS],
        total=len(found),
        run=one,
        aliases=console.aliases(one.name if one else None),
    )


def privacy(console: Console, _: str) -> Privacy:
    return Privacy(budgets=console.budgets())


def audit(console: Console, _: str) -> Audit:
    return Audit(entries=console.audit(limit=1)[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """How a live page is read, and its fragments with the kinds of events that make each stale.

    macros: the template that they stand in. timed: those that grow stale by themselves, because a client that stays
    away makes no event.
    one_run: the page is about a single run, named in its address; events of other runs do not touch it.
    """

    read: Callable[[Console, str], Any]
    fragments: Mapping[str, frozenset[str]]
    timed: tuple[str, ...] = ()
    macros: str = "fragments.html"
    one_run: bool = False

    def stale(self, events: Iterable[EventView]) -> list[str]:
        """Names of the fragments that these events touch, in the page's order."""
        touched = {e.kind for e in events}
        if touched - KINDS:
            return list(self.fragments)
        return [name for name, kinds in self.fragments.items() if kinds & touched]


LOG = KINDS - {"progress"}
OF_RUN = {
    "run_head": frozenset(("run", "phase")),
    "run_now": ROUNDS,
    "run_charts": frozenset(("model", "phase", "run")),
    "run_cohort": ROUNDS | {"progress"},
    "run_sum": ROUNDS | {"secure"},
    "run_privacy": frozenset(("run", "privacy")),
    "run_rounds": ROUNDS | {"model"},
    "run_people": frozenset(("model", "run")),
    "run_fairness": frozenset(("model", "run")),
    "log": LOG,
}
PAGES: Mapping[str, Page] = {
    "overview": Page(
        read=overview,
        timed=("overview_figures", "overview_clients", "overview_alerts"),
        fragments={
            "overview_figures": frozenset(("run", "client", "model")),
            "overview_alerts": frozenset(("run", "phase", "client", "model", "privacy")),
            "overview_runs": frozenset(("run", "phase", "model")),
            "overview_clients": frozenset(("client",)),
            "overview_model": frozenset(("model", "phase")),
            "log": LOG - {"secure"},
        },
    ),
    "runs": Page(read=runs, fragments={"runs_table": frozenset(("run", "phase", "model"))}),
    "run": Page(read=run, one_run=True, fragments=OF_RUN),
    "run-log": Page(read=partial(run, log_scale=True), one_run=True, fragments=OF_RUN),
    "clients": Page(
        read=clients,
        timed=("clients_table",),
        fragments={
            "clients_notice": frozenset(("client",)),
            "clients_table": frozenset(("client",)),
            "invitations": frozenset(("client", "audit")),
        },
    ),
    "models": Page(
        read=models,
        fragments={
            "aliases_table": frozenset(("alias",)),
            "models_table": frozenset(("model", "run", "phase", "alias")),
        },
    ),
    "privacy": Page(
        read=privacy,
        macros="ledgers.html",
        fragments=dict.fromkeys(("privacy_runs", "privacy_owners"), frozenset(("run", "privacy", "model"))),
    ),
    "audit": Page(
        read=audit,
        macros="ledgers.html",
        timed=("audit_notice",),  # who signs in is in the log and makes no event
        fragments={"audit_notice": frozenset(("audit", "run", "client", "alias"))},
    ),
}
