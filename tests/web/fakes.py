"""A console in memory, with the data of a made-up run over four hospitals."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from murmur.protocol.accounts import CredentialView, UserView
from murmur.protocol.audit import AuditView, LogReport, verify_log
from murmur.protocol.budgets import RunBudget
from murmur.protocol.encoding import fingerprint
from murmur.protocol.errors import Conflict, NotAuthenticated, NotFound, OperatorError
from murmur.protocol.recipe import Recipe
from murmur.protocol.registry import AliasView, LineageView, VersionRef
from murmur.protocol.roles import least
from murmur.protocol.sections import Cohort, Secure, Strategy, Train
from murmur.protocol.views import (
    AssignmentView,
    ClientView,
    EventView,
    InvitationView,
    ManifestView,
    MetricPoint,
    Missing,
    Phase,
    PrivacyView,
    RoundView,
    RunDetail,
    RunEstimate,
    RunView,
    Track,
    VersionView,
)
from murmur.web import Account
from murmur.web.card import model_card

START = datetime(2026, 3, 2, 9, 0, 0, tzinfo=UTC)
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
EXAMPLES = {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}
ROUND_S = 21
SILENT = "not heard for 60 s while collecting"
SAID_SILENT = "not heard for 60 s while training and sending"  # as it is shown


def recipe(name: str, rounds: int = 25, *, secure: bool = True) -> Recipe:
    return Recipe(
        name=name,
        task="heart-disease",
        rounds=rounds,
        seed=7,
        cohort=Cohort(min=3),
        strategy=Strategy(name="fedprox", mu=0.1),
        train=Train(epochs=2, batch_size=32, lr=0.05),
        secure=Secure(on=secure),
    )


def sha(run: str, n: int) -> str:
    return hashlib.sha256(f"{run}/{n}".encode()).hexdigest()


def accuracy(n: int) -> float:
    return 0.82 - 0.32 * math.exp(-n / 6) + 0.008 * math.sin(2.6 * n)


def loss(n: int) -> float:
    return 0.41 + 0.29 * math.exp(-n / 7) + 0.006 * math.cos(3.1 * n)


class FakeConsole:
    """Keeps what the coordinator would keep in SQL; `emit` is a committed event."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.time = START
        self.details: dict[str, RunDetail] = {}
        self.client_views: dict[str, ClientView] = {}
        self.invitation_views: list[InvitationView] = []
        self.version_views: list[VersionView] = []
        self.moves: list[AliasView] = []
        self.log: list[EventView] = []
        self.sessions: dict[str, Account] = {}
        self.people = {"ada": "admin", "rhea": "researcher", "vera": "viewer"}
        self.held: list[CredentialView] = []
        self.entries: list[AuditView] = []
        self.run_budgets: list[RunBudget] = []
        self.links: set[str] = set()
        self.started: list[tuple[Recipe, str, str]] = []
        self.reads = 0
        self.stopping = False

    # Console

    def now(self) -> datetime:
        return self.time

    def runs(self) -> list[RunView]:
        return sorted((d.run for d in self.details.values()), key=lambda r: r.created_at, reverse=True)

    def run(self, id: str) -> RunDetail:
        self.reads += 1
        if id not in self.details:
            raise NotFound(f"There is no run {id}.")
        return self.details[id]

    def round(self, run: str, n: int) -> RoundView:
        found = next((r for r in self.run(run).rounds if r.n == n), None)
        if found is None:
            raise NotFound(f"Run {run} has no round {n}.")
        return found

    def clients(self) -> list[ClientView]:
        return sorted(self.client_views.values(), key=lambda c: c.id)

    def invitations(self) -> list[InvitationView]:
        return self.invitation_views

    def versions(self, run: str | None = None) -> list[VersionView]:
        names: dict[VersionRef, tuple[str, ...]] = {}
        for a in self.aliases():
            names[a.version] = (*names.get(a.version, ()), a.alias)
        found = [
            v.model_copy(update={"aliases": names.get(VersionRef(run=v.run, n=v.n), ())})
            for v in self.version_views
            if run in (None, v.run)
        ]
        return sorted(found, key=lambda v: (v.created_at, v.n), reverse=True)

    def events(self, after: int, run: str | None = None, limit: int = 200) -> list[EventView]:
        return [e for e in self.log if e.id > after and run in (None, e.run)][:limit]

    def recent_events(self, run: str | None, limit: int) -> list[EventView]:
        return [e for e in self.log if run in (None, e.run)][-limit:]

    def aliases(self, model: str | None = None) -> list[AliasView]:
        newest = {(a.model, a.alias): a for a in self.moves if model in (None, a.model)}
        return [newest[key] for key in sorted(newest) if newest[key].action != "removed"]

    def alias_history(self, model: str) -> list[AliasView]:
        if not any(r.name == model for r in self.runs()):
            raise NotFound(f"No run is named {model}.")
        return [a for a in self.moves[::-1] if a.model == model]

    def promote(self, run: str, n: int, alias: str, by: str) -> None:
        self.lineage(run, n)
        now = next((a for a in self.aliases(run) if a.alias == alias), None)
        self._move(run, alias, now, VersionRef(run=run, n=n), now and now.version, "promoted", by)

    def rollback(self, model: str, alias: str, by: str, seen: int | None = None) -> None:
        now = next((a for a in self.aliases(model) if a.alias == alias), None)
        if now is None:
            raise NotFound(f"There is no alias {alias}.")
        if now.before is None or seen not in (None, now.n):
            raise Conflict(f"{alias} was moved meanwhile.")
        under = next(a for a in self.moves[::-1] if (a.model, a.alias, a.version) == (model, alias, now.before))
        self._move(model, alias, now, now.before, under.before, "rolled_back", by)

    def remove_alias(self, model: str, alias: str, by: str, seen: int | None = None) -> None:
        now = next((a for a in self.aliases(model) if a.alias == alias), None)
        if now is None:
            raise NotFound(f"There is no alias {alias}.")
        if seen not in (None, now.n):
            raise Conflict(f"{alias} was moved meanwhile.")
        self._move(model, alias, now, now.version, None, "removed", by)

    def lineage(self, run: str, n: int) -> LineageView:
        version = next((v for v in self.versions(run) if v.n == n), None)
        if version is None:
            raise NotFound(f"Run {run} has no version {n}.")
        detail = self.run(run)
        return LineageView(
            version=version,
            run=detail.run,
            aliases=version.aliases,
            contributors=len({who for v in self.versions(run) if v.n <= n for who in v.who}),
            code=sha(run, 1000),
            recipe=sha(run, 1001),
            manifest=next((m.sha256 for m in self.manifests(run) if m.round == n), ""),
            metrics=tuple(m for m in detail.metrics if m.version == n),
            privacy=detail.run.privacy,
        )

    def card(self, run: str, n: int) -> str:
        return model_card(self.lineage(run, n))

    def version_file(self, sha256: str) -> Path:
        if self.folder is None or not any(v.sha256 == sha256 for v in self.version_views):
            raise NotFound("There is no such version.")
        path = self.folder / sha256
        path.write_bytes(b"weights of " + sha256.encode())
        return path

    def manifests(self, run: str) -> list[ManifestView]:
        made = [r for r in self.run(run).rounds if r.state == "committed"]
        return [ManifestView(round=r.n, attempt=r.attempt, sha256=sha(run, r.n), at=r.closed_at) for r in made]

    def manifest(self, run: str, round: int) -> str:
        if not any(m.round == round for m in self.manifests(run)):
            raise NotFound(f"No round {round}.")
        return f'{{"round":{round}}}'

    def manifest_lines(self, run: str) -> Iterator[str]:
        return (self.manifest(run, m.round) + "\n" for m in self.manifests(run))

    def approve(self, client: str, by: str) -> None:
        self._client_becomes(client, "active")
        self.emit("client", client=client, state="active", by=by)

    def revoke(self, client: str, by: str) -> None:
        self._client_becomes(client, "revoked")
        self.emit("client", client=client, state="revoked", by=by)

    def invite(self, name: str, by: str) -> InvitationView:
        if name in self.client_views:
            raise Conflict(f"{name} is already enrolled.")
        made = InvitationView(name=name, expires_at=self.time + timedelta(days=7), used=False)
        self.invitation_views.insert(0, made)
        self.emit("audit", action="invited", client=name, by=by)
        return made.model_copy(update={"join": f"murmur://one-time-{name}@murmur.example:8440?ca={sha(name, 0)}"})

    def estimate(self, recipe: Recipe, sha256: str) -> RunEstimate:
        if not any(v.sha256 == sha256 for v in self.version_views):
            raise NotFound("There is no such model.")
        if recipe.dp.budget:
            raise OperatorError(f"dp.budget is {recipe.dp.budget:g}: 3 rounds would fit")
        online = sum(c.online for c in self.client_views.values())
        return RunEstimate(
            rounds=recipe.rounds,
            download_bytes=18_432,
            upload_bytes=18_600,
            needed=recipe.cohort.min,
            asked=recipe.cohort.asked,
            online=online,
        )

    def start_run(self, recipe: Recipe, sha256: str, *, by: str) -> str:
        self.started.append((recipe, sha256, by))
        id = f"{recipe.name}-{len(self.started)}"
        self.add_run(id, 0, rounds=recipe.rounds)
        return id

    def stop_run(self, id: str, by: str) -> None:
        self._run_becomes(id, state="stopped", reason="", paused_by=None, finished_at=self.time)
        self.emit("run", run=id, state="stopped", by=by)

    def pause_run(self, id: str, by: str) -> None:
        self.hold(id, f"paused by {by}", by)

    def resume_run(self, id: str, by: str) -> None:
        self._run_becomes(id, state="running", reason="", paused_by=None)
        self.emit("run", run=id, state="running", by=by or "coordinator")

    def users(self) -> list[UserView]:
        return [UserView(name=n, role=r, password=True, created_at=START) for n, r in sorted(self.people.items())]

    def add_user(self, name: str, role: str, by: str) -> str:
        if name in self.people:
            raise Conflict(f"There is a user named {name} already.")
        self.people[name] = role
        self.note("user added", name, by=by, role=role)
        return f"welcome-{name}"

    def set_role(self, name: str, role: str, by: str) -> None:
        self.people[name] = role
        self.note("user changed", name, by=by, role=role)

    def remove_user(self, name: str, by: str) -> None:
        del self.people[name]
        self.note("user removed", name, by=by)

    def set_password(self, name: str, password: str, before: str) -> None:
        if before != "right":
            raise NotAuthenticated("the password until now is another one")
        self.note("password changed", name, by=name)

    def credentials(self, account: str | None = None) -> list[CredentialView]:
        return [c for c in self.held if account in (None, c.account)]

    def holder_of(self, credential: str) -> str:
        found = next((c.account for c in self.held if c.id == credential), None)
        if found is None:
            raise NotFound("There is no such session or token.")
        return found

    def make_token(self, account: str, acting: str, *, label: str, days: float, role: str) -> CredentialView:
        made = self.grant("api", account, label, least(acting, role), days=days)
        return made.model_copy(update={"token": f"secret-{label}"})

    def withdraw(self, credential: str, by: str) -> None:
        self.holder_of(credential)
        self.held = [c for c in self.held if c.id != credential]
        self.note("session ended", credential, by=by)

    def audit(self, *, by: str = "", what: str = "", skip: int = 0, limit: int = 50):
        found = list(self.audit_entries(by=by, what=what))[::-1]
        return found[skip : skip + limit], len(found)

    def audit_entries(self, *, by: str = "", what: str = "", after: int = 0) -> Iterator[AuditView]:
        return (e for e in self.entries if by in ("", e.by) and (what in e.action or what in e.subject) and e.n > after)

    def check_audit(self) -> LogReport:
        return verify_log(self.entries)

    def budgets(self) -> list[RunBudget]:
        return self.run_budgets

    def login(self, user: str, password: str, address: str) -> str | None:
        return self.session(user) if (user, password) in (("ada", "right"), ("vera", "right")) else None

    def redeem(self, link_token: str, address: str) -> str | None:
        if link_token not in self.links:
            return None
        self.links.remove(link_token)
        return self.session("ada")

    def account(self, session_token: str) -> Account | None:
        return self.sessions.get(session_token)

    def logout(self, session_token: str) -> None:
        self.sessions.pop(session_token, None)

    async def changes(self, after: int) -> AsyncIterator[int]:
        while not self.stopping:
            newest = self.log[-1].id if self.log else 0
            if newest > after:
                after = newest
                yield newest
            await asyncio.sleep(0.01)

    # What tests do

    def session(self, user: str) -> str:
        token = f"token-of-{user}-{len(self.sessions)}"
        held = self.grant("session", user, "", self.people[user], days=0.5)
        self.sessions[token] = Account(name=user, role=self.people[user], session=held.id)
        return token

    def note(self, action: str, subject: str, *, by: str, **details: str) -> None:
        """Chain an entry to the audit log."""
        before = self.entries[-1].sha256 if self.entries else ""
        values: dict[str, Any] = {
            "n": len(self.entries) + 1,
            "at": self.time,
            "by": by,
            "action": action,
            "subject": subject,
        }
        entry = AuditView(**values, details=details, before=before, sha256="")
        self.entries.append(entry.model_copy(update={"sha256": entry.digest}))

    def grant(self, kind, account: str, name: str, role: str, *, days: float) -> CredentialView:
        made = CredentialView(
            id=f"{len(self.held):016x}",
            kind=kind,
            account=account,
            name=name,
            role=role,
            created_at=self.time,
            expires_at=self.time + timedelta(days=days),
        )
        self.held.append(made)
        return made

    def emit(self, kind: str, run: str | None = None, **data: Any) -> int:
        self.log.append(EventView(id=len(self.log) + 1, at=self.time, run=run, kind=kind, data=data))
        return len(self.log)

    def hold(self, id: str, why: str, by: str = "") -> None:
        """Pause a run; with `by` empty as the coordinator does when its disk is full."""
        self._run_becomes(id, state="paused", reason=why, paused_by=by)
        self.emit("run", run=id, state="paused", by=by or "coordinator", reason=why)

    def _move(self, model, alias, now, to, before, action, by) -> None:
        values = {"model": model, "alias": alias, "n": now.n + 1 if now else 1, "action": action, "version": to}
        self.moves.append(
            AliasView(**values, sha256=sha(to.run, to.n), before=before, at=self.time - timedelta(hours=1), by=by)
        )
        self.emit("alias", run=to.run, state=action, model=model, alias=alias, version=to.n, by=by)

    def _run_becomes(self, id: str, **values: Any) -> None:
        detail = self.run(id)
        if detail.run.over:
            raise Conflict(f"Run {id} is {detail.run.state} already.")
        self.details[id] = detail.model_copy(update={"run": detail.run.model_copy(update=values)})

    def _client_becomes(self, client: str, state: str) -> None:
        if client not in self.client_views:
            raise NotFound(f"There is no client {client}.")
        self.client_views[client] = self.client_views[client].model_copy(update={"state": state})

    def add_client(self, id: str, state: str = "active", *, online: bool = True, **info: Any) -> None:
        self.client_views[id] = ClientView.model_validate(
            {
                "id": id,
                "state": state,
                "fingerprint": fingerprint(id.encode()),
                "online": online,
                "seen_at": self.time - timedelta(seconds=3 if online else 5400),
                "created_at": self.time - timedelta(days=2),
                "info": {"version": "0.1.0", "tasks": ("heart-disease",), "gpus": (), "cpus": 16} | info,
                "track": Track(done=38, lost=2, upload_bytes_s=1_250_000.0) if state == "active" else None,
            }
        )

    def add_run(self, id: str, done: int, *, rounds: int = 25, secure: bool = True, state: str = "running") -> None:
        """A run with `done` rounds behind it, without an attempt in progress."""
        started = self.time - timedelta(seconds=ROUND_S * done + 14)
        rows: list[RoundView] = []
        points: list[MetricPoint] = []
        for n in range(1, done + 1):
            opened = started + timedelta(seconds=ROUND_S * (n - 1))
            lost = ("va",) if n in (9, 17) else ()
            rows.append(
                RoundView(
                    n=n,
                    kind="train",
                    attempt=2 if n == 9 else 1,
                    state="committed",
                    opened_at=opened,
                    closed_at=opened + timedelta(seconds=ROUND_S - 2 + math.sin(n)),
                    version=n,
                    threshold=3,
                    assignments=tuple(
                        self.assignment(c, "dropped", reason=SILENT) if c in lost else self.assignment(c, "counted")
                        for c in HOSPITALS
                    ),
                )
            )
            count = float(sum(EXAMPLES[c] for c in HOSPITALS if c not in lost))
            points.append(MetricPoint(version=n, name="loss", value=loss(n), count=count))
            points.append(MetricPoint(version=n, name="accuracy", value=accuracy(n), count=count))
        for n in range(done + 1):
            self.version_views.append(
                VersionView(
                    run=id,
                    run_name=id,
                    n=n,
                    sha256=sha(id, n),
                    bytes=18_432,
                    parent=sha(id, n - 1) if n else None,
                    contributors=0 if n == 0 else 3 if n in (9, 17) else 4,
                    who=() if n == 0 else HOSPITALS[:3] if n in (9, 17) else HOSPITALS,
                    missing=(Missing(client="va", reason=SILENT),) if n in (9, 17) else (),
                    created_at=started + timedelta(seconds=ROUND_S * n),
                    metrics={"loss": loss(n), "accuracy": accuracy(n)} if n else {},
                )
            )
        run = RunView.model_validate(
            {
                "id": id,
                "name": id,
                "state": state,
                "recipe": recipe(id, rounds, secure=secure),
                "round": done,
                "rounds": rounds,
                "version": done,
                "created_at": started,
                "finished_at": None if state == "running" else self.time,
                "created_by": "ada",
                "latest": {"loss": loss(done), "accuracy": accuracy(done)} if done else {},
            }
        )
        current = rows[-1] if rows else None
        self.details[id] = RunDetail(run=run, current=current, rounds=tuple(rows), metrics=tuple(points))

    def assignment(self, client: str, state: str, **values: Any) -> AssignmentView:
        sent = 73_912 if state in ("uploaded", "counted") else 0
        given: dict[str, Any] = {"client": client, "state": state, "bytes": sent}
        given |= {"started_at": self.time - timedelta(seconds=12), "updated_at": self.time - timedelta(seconds=2)}
        if "phases" not in values:
            given["phases"] = self.phases(state)
        return AssignmentView.model_validate(given | values)

    def phases(self, state: str) -> tuple[Phase, ...]:
        """What a client of this state did in the 12 s since it was asked."""
        done = [("waiting", 12), ("downloading", 11), ("training", 9), ("uploading", 4), ("sent", 2)]
        kept = {"offered": 0, "working": 3, "dropped": 3, "failed": 3}.get(state, 5)
        return tuple(Phase(name=name, at=self.time - timedelta(seconds=ago)) for name, ago in done[:kept])

    def open_round(
        self,
        id: str,
        state: str,
        *assignments: AssignmentView,
        kind: str = "train",
        attempt: int = 1,
        reason: str = "",
    ) -> None:
        detail = self.details[id]
        current = RoundView.model_validate(
            {
                "n": detail.run.round + 1,
                "kind": kind,
                "attempt": attempt,
                "state": state,
                "reason": reason,
                "opened_at": self.time - timedelta(seconds=12),
                "closed_at": None,
                "threshold": 3,
                "assignments": assignments,
            }
        )
        rounds = (*(r for r in detail.rounds if r.n != current.n), current)
        self.details[id] = detail.model_copy(update={"current": current, "rounds": rounds})

    def commit_round(self, id: str) -> None:
        """The open round becomes a version, as the coordinator would say it."""
        before = self.details[id]
        self.version_views = [v for v in self.version_views if v.run != id]
        self.add_run(id, before.run.round + 1, rounds=before.run.rounds, secure=before.run.recipe.secure.on)
        n = before.run.round + 1
        self.emit("phase", run=id, round=n, attempt=1, state="committed")
        self.emit("model", run=id, version=n, contributors=4)


def demo(folder: Path | None = None) -> FakeConsole:
    """Four hospitals in round 18 of 25 with one lost, a finished and a failed run, and one organization at the door."""
    console = FakeConsole(folder)
    for name in HOSPITALS:
        console.add_client(name, online=name != "va", gpus=("NVIDIA L4",) if name != "va" else ())
    console.add_client("st-mary", "pending", online=False)
    console.add_client("old-clinic", "revoked", online=False)
    console.time = START - timedelta(hours=5)
    console.add_run("heart-pilot", 12, rounds=12, secure=False, state="finished")
    console.time = START - timedelta(hours=26)
    console.add_run("heart-first-try", 3, state="failed")
    failed = console.details["heart-first-try"]
    reason = "Round 4 failed 3 times: 2 clients left, 3 needed to unmask"
    console.details["heart-first-try"] = failed.model_copy(
        update={"run": failed.run.model_copy(update={"reason": reason})}
    )
    console.time = START
    console.add_run("heart-disease", 17)
    console.open_round(
        "heart-disease",
        "collecting",
        console.assignment("cleveland", "uploaded"),
        console.assignment("hungarian", "working", phase="training", step=14, steps=20),
        console.assignment("switzerland", "uploaded"),
        console.assignment("va", "dropped", reason="no progress for 60 s"),
    )
    console.invitation_views = [
        InvitationView(name="st-mary", expires_at=START + timedelta(days=5), used=True),
        InvitationView(name="north-bay", expires_at=START + timedelta(days=6), used=False),
        InvitationView(name="old-clinic", expires_at=START - timedelta(days=1), used=False),
    ]
    for alias, n in (("production", 12), ("production", 16), ("staging", 17)):
        console.promote("heart-disease", n, alias, "ada")
    console.log.clear()
    write_log(console)
    write_audit(console)
    return console


def write_audit(console: FakeConsole) -> None:
    """Who did what before, and what the runs have spent."""
    for minutes, action, subject, by, details in (
        (600, "user added", "rhea", "ada", {"role": "researcher"}),
        (500, "client invited", "st-mary", "ada", {}),
        (400, "client enrolled", "st-mary", "st-mary", {"fingerprint": fingerprint(b"st-mary")}),
        (300, "run started", "heart-pilot", "rhea", {"recipe": sha("recipe", 0), "model": sha("heart-pilot", 0)}),
        (30, "alias promoted", "heart-disease: production", "ada", {"version": "heart-disease@16"}),
    ):
        console.time = START - timedelta(minutes=minutes)
        console.note(action, subject, by=by, **details)
    console.time = START
    console.grant("api", "ada", "nightly export", "viewer", days=90)
    shown = PrivacyView(value=3.2, delta=1e-5, unit="client", accountant="rdp", budget=8, spent=17, assumptions=("a",))
    known: dict[str, Any] = {"done": 17, "planned": 25, "rounds": dict.fromkeys(HOSPITALS, 17)}
    console.run_budgets = [
        RunBudget(
            run="heart-disease",
            name="heart-disease",
            state="running",
            mode="distributed",
            delta=1e-5,
            budget=8,
            spent=shown,
            forecast=4.1,
            **known,
        ),
        RunBudget(run="heart-local", name="heart-local", state="finished", mode="local", delta=1e-5, budget=0, **known),
        RunBudget(run="heart-pilot", name="heart-pilot", state="finished", mode="off", delta=1e-5, budget=0, **known),
    ]


def write_log(console: FakeConsole) -> None:
    """The events that would have led to the demo's state."""
    run = "heart-disease"
    began = 14 + ROUND_S * 17
    said: list[tuple[int, str, str | None, dict[str, Any]]] = [
        (700, "client", None, {"client": "st-mary", "state": "pending"}),
        (began, "run", run, {"state": "running", "name": run, "by": "ada"}),
    ]
    for n in range(14, 19):
        opened = 14 + ROUND_S * (18 - n)
        here = {"round": n, "attempt": 1}
        cohort = list(HOSPITALS)
        said.append((opened, "phase", run, {**here, "state": "selecting"}))
        said.append((opened - 1, "phase", run, {**here, "state": "keys", "cohort": cohort}))
        said.append((opened - 4, "phase", run, {**here, "state": "collecting"}))
        for i, client in enumerate(HOSPITALS):
            said.append((opened - 2, "secure", run, {**here, "said": "shares", "client": client}))
            if n < 17 or (n == 17 and client != "va") or client in ("cleveland", "switzerland"):
                said.append((opened - 8 - i, "client", run, {**here, "client": client, "state": "uploaded"}))
        if n < 18:
            said.append((opened - 16, "phase", run, {**here, "state": "revealing"}))
            said.append((opened - 18, "phase", run, {**here, "state": "committed"}))
            said.append((opened - 18, "model", run, {"version": n, "contributors": 3 if n == 17 else 4}))
    lost = {"round": 18, "attempt": 1, "client": "va", "state": "dropped", "reason": "no progress for 60 s"}
    said.append((2, "client", run, lost))
    for before, kind, of, data in sorted(said, key=lambda s: -s[0]):
        console.time = START - timedelta(seconds=before)
        console.emit(kind, of, **data)
    console.time = START
