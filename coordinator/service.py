"""What admins, researchers and pages ask of the coordinator: one object for the JSON API, the pages and the CLI."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path

from ..aggregation.local import first_version, without_controls
from ..privacy.dp.plan import check_run
from ..protocol.errors import NotFound, OperatorError
from ..protocol.joining import format_join
from ..protocol.recipe import Recipe
from ..protocol.registry import AliasView, LineageView
from ..protocol.tensors import FLOATS, Layout, read_layout
from ..protocol.views import (
    ClientView,
    EventView,
    InvitationView,
    ManifestView,
    RoundView,
    RunDetail,
    RunEstimate,
    RunView,
    VersionView,
)
from ..web.card import model_card
from ..web.console import Account
from . import registry
from .administration import Administration
from .blobs import Blobs
from .estimates import estimate
from .hub import EVERYBODY, Hub, Notice
from .people import People, credential_id, hash_token, new_token
from .sign_ins import FailedSignIns
from .store import Store
from .store.times import utc
from .worker import check_flower_apart

LOOK_S = 1.0  # how late the pages show what another process has written


class Service(Administration):
    """Reads give views; actions say by whom. It is the `web.console.Console` of this coordinator."""

    def __init__(self, store: Store, blobs: Blobs, hub: Hub, people: People, *, invitation_s: float) -> None:
        self._store, self._blobs, self._hub, self._people = store, blobs, hub, people
        self._invitation_s = invitation_s
        self.failed_sign_ins = FailedSignIns(store)
        self.address: tuple[str, int, str | None] = (
            "127.0.0.1",
            0,
            None,
        )  # host, port, CA fingerprint

    def now(self) -> datetime:
        return utc(self._store.db.clock())

    def runs(self) -> list[RunView]:
        return self._store.runs.all()

    def run(self, id: str) -> RunDetail:
        return self._store.runs.detail(id)

    def round(self, run: str, n: int) -> RoundView:
        return self._store.runs.round(run, n)

    def clients(self) -> list[ClientView]:
        tracks = self._store.records.all()
        return [v.model_copy(update={"track": tracks.get(v.id)}) for v in self._store.clients.all()]

    def invitations(self) -> list[InvitationView]:
        return self._store.clients.invitations()

    def versions(self, run: str | None = None) -> list[VersionView]:
        return registry.named(self._store, self._store.runs.versions(run))

    def events(self, after: int, run: str | None = None, limit: int = 200) -> list[EventView]:
        return self._store.events.since(after, run, limit)

    def recent_events(self, run: str | None, limit: int) -> list[EventView]:
        return self._store.events.recent(run, limit)

    def version_file(self, sha256: str) -> Path:
        if not self._store.runs.has_version(sha256):
            raise NotFound("no version has this hash")
        try:
            return self._blobs.path(sha256)
        except NotFound:
            raise NotFound("this version's file was not kept: a simulation keeps its first and its newest") from None

    def aliases(self, model: str | None = None) -> list[AliasView]:
        return self._store.registry.aliases(model)

    def alias_history(self, model: str) -> list[AliasView]:
        return self._store.registry.history(model)

    def promote(self, run: str, n: int, alias: str, by: str) -> None:
        self._store.registry.promote(run, n, alias, by=by)

    def rollback(self, model: str, alias: str, by: str, seen: int | None = None) -> None:
        self._store.registry.rollback(model, alias, by=by, seen=seen)

    def remove_alias(self, model: str, alias: str, by: str, seen: int | None = None) -> None:
        self._store.registry.remove(model, alias, by=by, seen=seen)

    def lineage(self, run: str, n: int) -> LineageView:
        return registry.lineage(self._store, run, n)

    def card(self, run: str, n: int, licence: str = "") -> str:
        return model_card(self.lineage(run, n), licence=licence)

    def manifests(self, run: str) -> list[ManifestView]:
        return self._store.manifests.of(run)

    def manifest(self, run: str, round: int) -> str:
        return self._store.manifests.text(run, round)

    def manifest_lines(self, run: str) -> Iterator[str]:
        self._store.runs.recipe(run)  # raises NotFound before the first line
        return (text + "\n" for text in self._store.manifests.texts(run))

    def approve(self, client: str, by: str) -> None:
        self._store.clients.decide(client, "active", by=by)

    def revoke(self, client: str, by: str) -> None:
        self._store.clients.decide(client, "revoked", by=by)

    def invite(self, name: str, by: str) -> InvitationView:
        host, port, ca = self.address
        token = new_token()
        view = self._store.clients.invite(name, hash_token(token), by=by, lifetime_s=self._invitation_s)
        return view.model_copy(update={"join": format_join(token=token, host=host, port=port, ca=ca)})

    def estimate(self, recipe: Recipe, sha256: str) -> RunEstimate:
        """What a run from this model will come to. Raises as `start_run` does, and starts nothing."""
        return estimate(recipe, without_controls(self._check(recipe, sha256)[1]), self._store.clients.eligible())

    def _check(self, recipe: Recipe, sha256: str) -> tuple[Path, Layout]:
        path = self._blobs.keep(sha256)
        layout = read_layout(path)
        if not any(t.dtype in FLOATS for t in layout.tensors):
            raise OperatorError("the model has no floating-point tensor: there is nothing to train")
        check_run(recipe, without_controls(layout))
        if recipe.strategy.flower:
            check_flower_apart(recipe)
        return path, layout

    def start_run(self, recipe: Recipe, sha256: str, *, by: str, code: str = "") -> str:
        """Start a run from a model that was uploaded before; returns the run's id.

        code: SHA-256 of the task's file that made the model, for its lineage; empty where nobody knows.

        Raises NotFound when it was not uploaded, OperatorError for a model that cannot be averaged, and for a recipe
        whose differential privacy cannot be kept (with this model, in this ring, or within its budget) or whose Flower
        strategy cannot be used.
        """
        path, layout = self._check(recipe, sha256)
        with self._blobs.new() as first:
            if first_version(path, layout, recipe.strategy, first):
                sha256 = self._blobs.adopt(first)
                path = self._blobs.path(sha256)
        run_id = f"{recipe.name[:20]}-{secrets.token_hex(4)}"
        self._store.runs.start(run_id, recipe, sha256=sha256, size=path.stat().st_size, by=by, code=code)
        self._hub.work()
        return run_id

    def stop_run(self, id: str, by: str) -> None:
        self._store.runs.stop(id, by=by)
        self._hub.work()

    def pause_run(self, id: str, by: str) -> None:
        self._store.runs.pause(id, f"paused by {by}", by=by)
        self._hub.work()

    def resume_run(self, id: str, by: str) -> None:
        self._store.runs.resume(id, by=by)
        self._hub.work()

    def login(self, user: str, password: str, address: str) -> str | None:
        self.failed_sign_ins.check(user, address)
        session = self._people.login(user, password)
        if session is None:
            self.failed_sign_ins.add(address, user)
        return session

    def redeem(self, link_token: str, address: str) -> str | None:
        session = self._people.redeem(link_token)
        if session is None:
            self.failed_sign_ins.add(address)
        return session

    def account(self, session_token: str) -> Account | None:
        person = self._people.holder("session", session_token)
        return Account(name=person.name, role=person.role, session=credential_id(session_token)) if person else None

    def logout(self, session_token: str) -> None:
        self._people.end(session_token)

    async def changes(self, after: int) -> AsyncIterator[int]:
        newest = after
        with self._hub.parked(EVERYBODY) as woken:
            while not self._hub.stopping:
                latest = self._hub.newest_event
                if latest > newest:
                    newest = latest
                    yield newest
                else:  # a simulation in another process writes to the same log and wakes nobody here
                    await woken.wait(LOOK_S)
                    self._hub.hear(Notice(newest_event=await asyncio.to_thread(self._store.events.newest)))
