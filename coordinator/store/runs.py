"""Runs and model versions: making, stopping, and reading them as views."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, and_, bindparam, func, insert, or_, select, update

from ...protocol.encoding import canonical_json, sha256_hex
from ...protocol.errors import Conflict, NotFound
from ...protocol.recipe import Recipe
from ...protocol.views import (
    AssignmentView,
    MetricPoint,
    Missing,
    Phase,
    PrivacyView,
    RoundView,
    RunDetail,
    RunView,
    SimulationView,
    SiteReport,
    VersionView,
)
from . import worlds
from .attempts import same_attempt
from .audit import note
from .database import Database, Transaction
from .tables import assignment, attempt, metric, round_, run, version
from .tables import update as arrived
from .times import utc


class Runs:
    def __init__(self, db: Database) -> None:
        self._db = db

    def start(self, run_id: str, recipe: Recipe, *, sha256: str, size: int, by: str, code: str = "") -> None:
        """Record a run with its version 0 and open its first round."""
        with self._db.write() as t:
            start_run(t, run_id, recipe, sha256=sha256, size=size, by=by, code=code)
            open_round(t, run_id, 1, "train")

    def stop(self, run_id: str, *, by: str) -> None:
        """End a running run; its open round is abandoned and its versions stay."""
        with self._db.write() as t:
            fits = (run.c.id == run_id, run.c.state == "running")
            if not t.execute(update(run).where(*fits).values(state="stopped", reason=f"stopped by {by}")).rowcount:
                state = t.scalar(select(run.c.state).where(run.c.id == run_id))
                raise NotFound(f"no run {run_id!r}") if state is None else Conflict(f"the run is {state}")
            close_run(t, run_id, f"the run was stopped by {by}")
            t.append("run", run_id, state="stopped", by=by)
            note(t, "run stopped", run_id, by=by)

    def pause(self, run_id: str, why: str, *, by: str = "") -> bool:
        """Let a running run stand still where it is; what clients have under way they may still deliver.

        by: empty where the coordinator pauses it itself, and lets it go on as soon as it can. False where it was
        paused before. Raises NotFound, and Conflict for a run that has ended.
        """
        with self._db.write() as t:
            _check_going_on(t, run_id)
            free = run.c.held_by.is_(None)
            fits = (run.c.id == run_id, or_(free, run.c.held_by == "") if by else free)
            if not t.execute(update(run).where(*fits).values(held_by=by, held_why=why)).rowcount:
                return False
            t.append("run", run_id, state="paused", by=by or "coordinator", reason=why)
            if by:
                note(t, "run paused", run_id, by=by)
            return True

    def resume(self, run_id: str, *, by: str = "") -> bool:
        """Let a paused run go on, its deadlines counted from now; False where it was not paused.

        by: empty for those that the coordinator paused itself. Raises as `pause` does.
        """
        with self._db.write() as t:
            _check_going_on(t, run_id)
            fits = (run.c.id == run_id, run.c.held_by.is_not(None) if by else run.c.held_by == "")
            if not t.execute(update(run).where(*fits).values(held_by=None, held_why="")).rowcount:
                return False
            open_ones = (attempt.c.run == run_id, attempt.c.closed_at.is_(None))
            t.execute(update(attempt).where(*open_ones).values(state_at=t.now))
            t.append("run", run_id, state="running", by=by or "coordinator")
            if by:
                note(t, "run resumed", run_id, by=by)
            return True

    def held(self) -> list[str]:
        """Runs that the coordinator has paused itself."""
        with self._db.read() as c:
            return list(c.scalars(select(run.c.id).where(run.c.state == "running", run.c.held_by == "")))

    def newest_bytes(self, run_id: str) -> int:
        """How large a run's newest version is."""
        query = select(version.c.bytes).where(version.c.run == run_id).order_by(version.c.n.desc()).limit(1)
        with self._db.read() as c:
            return c.scalar(query) or 0

    def recipe(self, run_id: str) -> Recipe:
        with self._db.read() as c:
            values = c.scalar(select(run.c.recipe).where(run.c.id == run_id))
        if values is None:
            raise NotFound(f"no run {run_id!r}")
        return Recipe.model_validate(values)

    def all(self) -> list[RunView]:
        """Every run, newest first."""
        return self._views()

    def detail(self, run_id: str) -> RunDetail:
        """A run with all of its rounds; raises NotFound."""
        views = self._views(run_id)
        if not views:
            raise NotFound(f"no run {run_id!r}")
        with self._db.read() as c:
            points = c.execute(select(metric).where(metric.c.run == run_id).order_by(metric.c.version)).mappings().all()
            rounds = _rounds(c, run_id)
            reports = () if views[0].recipe.secure.on else _reports(c, run_id)
        return RunDetail(
            run=views[0],
            current=rounds[-1] if rounds else None,
            rounds=rounds,
            metrics=tuple(
                MetricPoint(version=p["version"], name=p["name"], value=p["value"], count=p["count"]) for p in points
            ),
            reports=reports,
        )

    def round(self, run_id: str, n: int) -> RoundView:
        """The newest attempt of one round, with what each client did when; raises NotFound."""
        with self._db.read() as c:
            found = _rounds(c, run_id, n)
        if not found:
            raise NotFound(f"run {run_id!r} has no round {n}")
        return found[0]

    def versions(self, run_id: str | None = None) -> list[VersionView]:
        """Versions, newest first, of one run or of all; who is in them and who is missing for one run only."""
        query = select(version, run.c.name.label("run_name")).join(run, run.c.id == version.c.run)
        # A clock that was set back dates a version before its parent: each counts as no older than those before it.
        since = func.max(version.c.created_at).over(partition_by=version.c.run, order_by=version.c.n)
        query = query.order_by(since.desc(), version.c.run, version.c.n.desc())
        measured = select(metric)
        if run_id is not None:
            query, measured = query.where(version.c.run == run_id), measured.where(metric.c.run == run_id)
        with self._db.read() as c:
            rows = c.execute(query).mappings().all()
            metrics: dict[tuple[str, int], dict[str, float]] = {}
            for m in c.execute(measured).mappings():
                metrics.setdefault((m["run"], m["version"]), {})[m["name"]] = m["value"]
            missing: dict[int, list[Missing]] = {}
            for n, name, reason in c.execute(_NOT_COUNTED, {"run": run_id}) if run_id is not None else ():
                missing.setdefault(n, []).append(Missing(client=name, reason=reason))
        return [
            VersionView(
                run=r["run"],
                run_name=r["run_name"],
                n=r["n"],
                sha256=r["sha256"],
                bytes=r["bytes"],
                parent=r["parent"],
                contributors=len(r["contributors"]),
                who=tuple(sorted(r["contributors"])) if run_id is not None else (),
                missing=tuple(m for m in missing.get(r["n"], ()) if m.client not in r["contributors"]),
                created_at=utc(r["created_at"]),
                metrics=metrics.get((r["run"], r["n"]), {}),
            )
            for r in rows
        ]

    def has_version(self, sha256: str) -> bool:
        with self._db.read() as c:
            return c.scalar(select(version.c.n).where(version.c.sha256 == sha256).limit(1)) is not None

    def _views(self, run_id: str | None = None) -> list[RunView]:
        newest = select(version.c.run, func.max(version.c.n).label("n")).group_by(version.c.run).subquery()
        done = (
            select(attempt.c.run, func.count().label("n"))
            .join(round_, and_(round_.c.run == attempt.c.run, round_.c.n == attempt.c.round))
            .where(attempt.c.state == "committed", round_.c.kind == "train")
            .group_by(attempt.c.run)
            .subquery()
        )
        query = (
            select(run, newest.c.n.label("version"), done.c.n.label("done"))
            .join(newest, newest.c.run == run.c.id)
            .outerjoin(done, done.c.run == run.c.id)
            .order_by(run.c.created_at.desc())
        )
        last = select(metric.c.run, metric.c.name, func.max(metric.c.version).label("version"))
        last = last.group_by(metric.c.run, metric.c.name).subquery()
        same = and_(metric.c.run == last.c.run, metric.c.name == last.c.name, metric.c.version == last.c.version)
        latest = select(metric.c.run, metric.c.name, metric.c.value).join(last, same)
        if run_id is not None:
            query, latest = query.where(run.c.id == run_id), latest.where(metric.c.run == run_id)
        with self._db.read() as c:
            rows = c.execute(query).mappings().all()
            values: dict[str, dict[str, float]] = {}
            for owner, name, value in c.execute(latest):
                values.setdefault(owner, {})[name] = value
        return [_run(r, values.get(r["id"], {})) for r in rows]


_CONTRIBUTORS = select(version.c.n, version.c.contributors).where(version.c.run == bindparam("run"))
_NOT_COUNTED = (  # asked for a round of this run that was committed; version n came out of round n
    select(assignment.c.round, assignment.c.client, assignment.c.reason)
    .join(attempt, same_attempt())
    .where(assignment.c.run == bindparam("run"), assignment.c.state != "counted", attempt.c.state == "committed")
    .order_by(assignment.c.round, assignment.c.client)
)


_NEWEST = select(func.max(attempt.c.round)).where(attempt.c.run == bindparam("run"), attempt.c.state == "committed")
_REPORTED = (
    select(assignment.c.client, assignment.c.round, arrived.c.weight, arrived.c.metrics)
    .join(arrived, arrived.c.assignment == assignment.c.id)
    .where(assignment.c.run == bindparam("run"), assignment.c.round == _NEWEST.scalar_subquery())
    .where(assignment.c.state == "counted", arrived.c.weight.is_not(None))
    .order_by(assignment.c.client)
)


def _check_going_on(t: Transaction, run_id: str) -> None:
    """Raise unless the run has not ended and a coordinator carries it out."""
    row = t.execute(select(run.c.state, run.c.simulation).where(run.c.id == run_id)).first()
    if row is None:
        raise NotFound(f"no run {run_id!r}")
    if row.state != "running":
        raise Conflict(f"the run is {row.state}")
    if row.simulation is not None:
        raise Conflict(
            f"{run_id} is a simulation: Ctrl-C holds it, `murmur simulate --resume {run_id}` goes on with it"
        )


def start_run(t: Transaction, run_id: str, recipe: Recipe, *, sha256: str, size: int, by: str, code: str = "") -> None:
    """Record a run with its version 0."""
    values = {"id": run_id, "name": recipe.name, "state": "running", "recipe": recipe.model_dump(mode="json")}
    t.execute(insert(run).values(**values, created_at=t.now, created_by=by, code=code))
    first = {"run": run_id, "n": 0, "sha256": sha256, "bytes": size, "contributors": [], "created_at": t.now}
    t.execute(insert(version).values(**first))
    t.append("run", run_id, state="running", by=by, name=recipe.name)
    terms = sha256_hex(canonical_json(values["recipe"]))
    note(t, "run started", run_id, by=by, recipe=terms, model=sha256)


def open_round(t: Transaction, run_id: str, n: int, kind: str, *, clip_norm: float | None = None) -> None:
    """Open round `n` with its first attempt, in the transaction that closes the one before."""
    t.execute(insert(round_).values(run=run_id, n=n, kind=kind, attempt=1, opened_at=t.now, clip_norm=clip_norm))
    open_attempt(t, run_id, n, 1)


def open_attempt(t: Transaction, run_id: str, round_n: int, n: int) -> None:
    values = {"run": run_id, "round": round_n, "n": n, "state": "selecting", "opened_at": t.now, "state_at": t.now}
    t.execute(insert(attempt).values(**values))
    fits = (round_.c.run == run_id, round_.c.n == round_n)
    t.execute(update(round_).where(*fits).values(attempt=n))
    t.append("phase", run_id, round=round_n, attempt=n, state="selecting")


def end_run(t: Transaction, run_id: str, state: Literal["finished", "failed"], reason: str = "", *, by: str) -> None:
    """End a run that nobody stopped. by: what carried it out, for the audit log."""
    t.execute(update(run).where(run.c.id == run_id).values(state=state, reason=reason))
    close_run(t, run_id, reason)
    why = {"reason": reason} if reason else {}
    t.append("run", run_id, state=state, **why)
    note(t, f"run {state}", run_id, by=by, **why)


def close_run(t: Transaction, run_id: str, reason: str) -> None:
    """Note when the run ended, and abandon what is still open of it."""
    t.execute(update(run).where(run.c.id == run_id).values(finished_at=t.now))
    open_ones = (attempt.c.run == run_id, attempt.c.closed_at.is_(None))
    t.execute(update(attempt).where(*open_ones).values(state="failed", reason=reason, closed_at=t.now, state_at=t.now))
    fits = (round_.c.run == run_id, round_.c.closed_at.is_(None))
    t.execute(update(round_).where(*fits).values(closed_at=t.now))


def _run(r: RowMapping, latest: dict[str, float]) -> RunView:
    recipe = Recipe.model_validate(r["recipe"])
    paused = r["held_by"] is not None and r["state"] == "running"
    return RunView(
        id=r["id"],
        name=r["name"],
        state="paused" if paused else r["state"],
        reason=r["reason"] or (r["held_why"] if paused else ""),
        paused_by=r["held_by"] if paused else None,
        simulation=SimulationView(**r["simulation"]) if r["simulation"] else None,
        recipe=recipe,
        round=r["done"] or 0,
        rounds=recipe.rounds,
        version=r["version"],
        created_at=utc(r["created_at"]),
        finished_at=utc(r["finished_at"]),
        created_by=r["created_by"],
        latest=latest,
        privacy=PrivacyView(**r["epsilon"]) if r["epsilon"] else None,
    )


def _rounds(c: Connection, run_id: str, n: int | None = None) -> tuple[RoundView, ...]:
    """The newest attempt of each round, oldest first, or of one; with what each client did when in the last of them."""
    newest = and_(attempt.c.run == round_.c.run, attempt.c.round == round_.c.n, attempt.c.n == round_.c.attempt)
    opened = select(attempt, round_.c.kind, round_.c.simulation["world"].label("world")).join(round_, newest)
    opened = opened.where(round_.c.run == run_id).order_by(round_.c.n)
    mine = select(assignment).where(assignment.c.run == run_id).order_by(assignment.c.client)
    if n is not None:
        opened, mine = opened.where(round_.c.n == n), mine.where(assignment.c.round == n)
    attempts = c.execute(opened).mappings().all()
    parts: dict[tuple[int, int], list[RowMapping]] = {}
    for row in c.execute(mine).mappings():
        parts.setdefault((row["round"], row["attempt"]), []).append(row)
    made = {n: who for n, who in c.execute(_CONTRIBUTORS, {"run": run_id})}
    return tuple(
        _round(a, parts.get((a["round"], a["n"]), []), made.get(a["round"], ()), timed=a is attempts[-1])
        for a in attempts
    )


def _reports(c: Connection, run_id: str) -> tuple[SiteReport, ...]:
    """What the clients of the newest committed round said of themselves; it measured the version before it."""
    found = c.execute(_REPORTED, {"run": run_id}).all()
    newest = max((row.round for row in found), default=0)
    return tuple(
        SiteReport(
            client=row.client,
            version=newest - 1,
            weight=row.weight,
            metrics={n: m["sum"] / m["count"] for n, m in (row.metrics or {}).items() if m["count"]},
        )
        for row in found
    )


def _round(a: RowMapping, parts: Sequence[RowMapping], contributors: Sequence[str], *, timed: bool) -> RoundView:
    """A round's view. One that failed after its update was in the sum is in the version, and so it is counted.

    timed: with what each client did when.
    """
    state: Any = a["state"]
    opened_at = utc(a["opened_at"])
    included = frozenset(contributors)
    return RoundView(
        n=a["round"],
        kind=a["kind"],
        attempt=a["n"],
        state=state,
        reason=a["reason"],
        opened_at=opened_at,
        closed_at=utc(a["closed_at"]),
        version=a["round"] if state == "committed" and a["kind"] == "train" else None,
        threshold=a["threshold"],
        assignments=tuple(
            AssignmentView(
                client=p["client"],
                state="counted" if p["client"] in included else p["state"],
                phase=p["phase"],
                step=p["step"],
                steps=p["steps"],
                bytes=p["bytes"],
                reason=p["reason"],
                started_at=utc(p["offered_at"]),
                updated_at=utc(p["progress_at"]),
                group=p["group_n"],
                phases=tuple(Phase(name=name, at=utc(at)) for name, at in p["phases"]) if timed else (),
                heard_at=utc(p["heard_at"]) if timed else None,
                lost_at=utc(p["lost_at"]) if timed else None,
            )
            for p in parts
        )
        or (worlds.parts(a["world"], opened_at) if a["world"] else tuple(map(_virtual, contributors))),
        world=worlds.lived(a["world"]) if a["world"] else None,
    )


@lru_cache(maxsize=100_000)
def _virtual(client: str) -> AssignmentView:
    """A client's part in a simulated round, of which there is no row: it is over, and the same in every round."""
    return AssignmentView(client=client, state="counted")
