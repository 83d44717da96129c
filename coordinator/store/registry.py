"""The model registry: what aliases point at, each move of theirs, and what only rows know of a version's origin."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, RowMapping, Select, and_, func, insert, select
from sqlalchemy.exc import IntegrityError

from ...protocol.encoding import canonical_json, sha256_hex
from ...protocol.errors import Conflict, NotFound
from ...protocol.registry import Action, AliasView, VersionRef
from .audit import note
from .database import Database, Transaction
from .tables import alias, event, manifest, run, version
from .times import utc

_under = alias.alias("under")
_moves = (
    select(alias, version.c.sha256, _under.c.run.label("under_run"), _under.c.version.label("under_version"))
    .join(version, and_(version.c.run == alias.c.run, version.c.n == alias.c.version))
    .outerjoin(
        _under,
        and_(_under.c.model == alias.c.model, _under.c.alias == alias.c.alias, _under.c.n == alias.c.before),
    )
)


class Origin(NamedTuple):
    """Digests of a run's recipe and code and of a version's manifest, and the version the run started from."""

    recipe: str
    code: str
    manifest: str
    version: VersionRef | None


class Registry:
    def __init__(self, db: Database) -> None:
        self._db = db

    def aliases(self, model: str | None = None) -> list[AliasView]:
        """Where each alias points now, by model and alias; removed ones point nowhere."""
        last = select(alias.c.model, alias.c.alias, func.max(alias.c.n).label("n"))
        last = last.group_by(alias.c.model, alias.c.alias).subquery()
        same = and_(last.c.model == alias.c.model, last.c.alias == alias.c.alias, last.c.n == alias.c.n)
        query = _moves.join(last, same).where(alias.c.action != "removed").order_by(alias.c.model, alias.c.alias)
        return self._views(query if model is None else query.where(alias.c.model == model))

    def history(self, model: str) -> list[AliasView]:
        """Every move of a model's aliases, the newest first; raises NotFound for a model that no run is named for."""
        found = self._views(_moves.where(alias.c.model == model).order_by(alias.c.at.desc(), alias.c.n.desc()))
        if not found:
            with self._db.read() as c:
                if c.scalar(select(run.c.id).where(run.c.name == model).limit(1)) is None:
                    raise NotFound(f"no run is named {model!r}, so there is no such model")
        return found

    def promote(self, run_id: str, n: int, name: str, *, by: str) -> None:
        """Let an alias of the run's model point at a version; nothing where it does already. Raises NotFound."""
        query = select(run.c.name).join(version, version.c.run == run.c.id)
        with self._db.write() as t:
            model = t.scalar(query.where(version.c.run == run_id, version.c.n == n))
            if model is None:
                raise NotFound(f"there is no version {n} of a run {run_id!r}")
            now = _newest(t, model, name)
            stands = now is not None and now["action"] != "removed"
            if not (now and stands and (now["run"], now["version"]) == (run_id, n)):
                to = VersionRef(run=run_id, n=n)
                _move(t, model, name, now, to, before=now["n"] if now and stands else 0, action="promoted", by=by)

    def rollback(self, model: str, name: str, *, by: str, seen: int | None = None) -> None:
        """Let an alias point at what it pointed at before its last promotion that stands.

        seen: the move that the caller has seen as the newest one. Raises NotFound, and Conflict where there is nothing
        to go back to or somebody has moved it since.
        """
        with self._db.write() as t:
            now = _standing(t, model, name, seen)
            if not now["before"]:
                raise Conflict(f"{name} pointed at nothing before {now['run']}@{now['version']}: promote a version")
            under = t.execute(select(alias).where(*_of(model, name), alias.c.n == now["before"])).mappings().one()
            to = VersionRef(run=under["run"], n=under["version"])
            _move(t, model, name, now, to, before=under["before"], action="rolled_back", by=by)

    def remove(self, model: str, name: str, *, by: str, seen: int | None = None) -> None:
        """Let an alias name nothing any more; its history stays, and a promotion begins anew. Raises as `rollback`."""
        with self._db.write() as t:
            now = _standing(t, model, name, seen)
            last = VersionRef(run=now["run"], n=now["version"])
            _move(t, model, name, now, last, before=0, action="removed", by=by)

    def spent(self, run_id: str, n: int) -> dict[str, Any] | None:
        """The epsilon as it was told when version n was made, as fields of a PrivacyView."""
        query = select(event.c.data).where(event.c.run == run_id, event.c.kind == "privacy")
        with self._db.read() as c:
            told = [data for data in c.scalars(query.order_by(event.c.id)) if data.get("round", n + 1) <= n]
        known = ("value", "delta", "unit", "accountant")
        return {key: told[-1][key] for key in known} | {"spent": len(told)} if told else None

    def origin(self, run_id: str, n: int) -> Origin:
        """What a version was made by; raises NotFound for an unknown run."""
        first = select(version.c.sha256).where(version.c.run == run_id, version.c.n == 0).scalar_subquery()
        trained = (version.c.sha256 == first, version.c.run != run_id, version.c.n > 0)
        made = select(manifest.c.sha256).where(manifest.c.run == run_id, manifest.c.round == n)
        with self._db.read() as c:
            row = c.execute(select(run.c.recipe, run.c.code).where(run.c.id == run_id)).first()
            if row is None:
                raise NotFound(f"no run {run_id!r}")
            source = c.execute(
                select(version.c.run, version.c.n).where(*trained).order_by(version.c.created_at).limit(1)
            ).first()
            return Origin(
                recipe=sha256_hex(canonical_json(row.recipe)),
                code=row.code,
                manifest=c.scalar(made) or "",
                version=VersionRef(run=source.run, n=source.n) if source else None,
            )

    def _views(self, query: Select[Any]) -> list[AliasView]:
        with self._db.read() as c:
            return [_view(row) for row in c.execute(query).mappings()]


def _of(model: str, name: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return alias.c.model == model, alias.c.alias == name


def _newest(t: Transaction, model: str, name: str) -> RowMapping | None:
    return t.execute(select(alias).where(*_of(model, name)).order_by(alias.c.n.desc()).limit(1)).mappings().first()


def _standing(t: Transaction, model: str, name: str, seen: int | None) -> RowMapping:
    """The newest move of an alias that stands; raises NotFound, and Conflict where it is not the one that was seen."""
    now = _newest(t, model, name)
    if now is None or now["action"] == "removed":
        raise NotFound(f"{model!r} has no alias {name!r}" + (f": {now['by']} removed it" if now else ""))
    if seen is not None and seen != now["n"]:
        raise Conflict(f"{name} was moved meanwhile, by {now['by']} to {now['run']}@{now['version']}: look again")
    return now


def _move(
    t: Transaction,
    model: str,
    name: str,
    now: RowMapping | None,
    to: VersionRef,
    *,
    before: int,
    action: Action,
    by: str,
) -> None:
    key = {"model": model, "alias": name, "n": now["n"] + 1 if now else 1}
    try:
        t.execute(insert(alias).values(**key, run=to.run, version=to.n, before=before, action=action, at=t.now, by=by))
    except IntegrityError:  # two at once on PostgreSQL; SQLite has one writer
        raise Conflict(f"somebody else moved {name} at this moment: look again") from None
    t.append("alias", to.run, state=action, model=model, alias=name, version=to.n, by=by)
    note(t, f"alias {action.replace('_', ' ')}", f"{model}: {name}", by=by, version=f"{to.run}@{to.n}")


def _view(r: RowMapping) -> AliasView:
    return AliasView(
        model=r["model"],
        alias=r["alias"],
        n=r["n"],
        action=r["action"],
        version=VersionRef(run=r["run"], n=r["version"]),
        sha256=r["sha256"],
        before=VersionRef(run=r["under_run"], n=r["under_version"]) if r["before"] else None,
        at=utc(r["at"]),
        by=r["by"],
    )
