"""A coordinator as admins and researchers use it from Python and from the command line."""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from murmur.notebook import Run, overview
from murmur.protocol.accounts import CredentialView, UserView
from murmur.protocol.audit import AuditView, LogReport
from murmur.protocol.budgets import RunBudget
from murmur.protocol.errors import OperatorError, Unavailable, from_problem
from murmur.protocol.recipe import Recipe
from murmur.protocol.registry import AliasView, LineageView
from murmur.protocol.roles import Role
from murmur.protocol.views import (
    OVER,
    ClientView,
    EventView,
    InvitationView,
    ManifestView,
    RunDetail,
    RunEstimate,
    RunView,
    VersionView,
)

V = TypeVar("V", bound=BaseModel)
READ_S = 60.0
TIMEOUT = httpx.Timeout(30, read=READ_S)
AGAIN_S = 1.0  # before a lost stream of events is taken up again


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Address and API token of a coordinator; `ca` is a PEM file to trust, empty for the system's own."""

    url: str
    token: str
    ca: str = ""


def find_access(data: Path | None = None) -> Access:
    """MURMUR_URL with MURMUR_TOKEN (and MURMUR_CA), or the coordinator whose data folder is on this machine.

    Raises OperatorError that says which of them to set.
    """
    url = os.environ.get("MURMUR_URL")
    if url and data is None:
        token = os.environ.get("MURMUR_TOKEN")
        if not token:
            raise OperatorError("MURMUR_URL is set, MURMUR_TOKEN is not: `murmur coordinator token` makes one")
        return Access(url=url, token=token, ca=os.environ.get("MURMUR_CA", ""))
    from murmur.coordinator.settings import Settings

    folder = data or Settings.read().data
    try:
        return Access(**json.loads((folder / "operator.json").read_text()))
    except FileNotFoundError:
        raise OperatorError(
            f"no coordinator's data in {folder}: give --data, or set MURMUR_URL and MURMUR_TOKEN for another machine's"
        ) from None
    except PermissionError:
        raise OperatorError(
            f"{folder}/operator.json is not yours to read: run this as the coordinator's user"
        ) from None


class Client:
    """Everything that a coordinator's admin API does; errors are the ones of `murmur.protocol.errors`."""

    def __init__(self, access: Access | None = None, *, answer_s: float | None = None) -> None:
        """access: `find_access()` by default. answer_s: how long to wait for any answer, instead of half a minute."""
        access = access or find_access()
        verify: Any = ssl.create_default_context(cafile=access.ca) if access.ca else True
        headers = {"Authorization": f"Bearer {access.token}"}
        self.url = access.url
        self._http = httpx.Client(base_url=access.url, headers=headers, verify=verify, timeout=answer_s or TIMEOUT)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repr_html_(self) -> str:
        return overview(self.url, self.runs())

    def runs(self) -> list[RunView]:
        return self._many(RunView, "/runs")

    def run(self, run: str) -> Run:
        return Run.model_validate(self._json("GET", f"/runs/{run}"))

    def estimate(self, recipe: Recipe, model: Path) -> RunEstimate:
        """What a run would come to: bytes of a client, clients needed, epsilon. Nothing is started.

        model: the canonical safetensors file that it would start from, which is uploaded.
        """
        with model.open("rb") as file:
            sha256 = self._json("PUT", "/models", content=file)["sha256"]
        wanted = {"recipe": recipe.model_dump(mode="json"), "model": sha256}
        return RunEstimate.model_validate(self._json("POST", "/runs/estimate", json=wanted))

    def start_run(self, recipe: Recipe, model: Path, *, code: str = "") -> str:
        """Upload the model that the run starts from, a canonical safetensors file, and start; returns the run's id.

        code: SHA-256 of the task's file that made the model, which its versions' lineage will name.
        """
        with model.open("rb") as file:
            sha256 = self._json("PUT", "/models", content=file)["sha256"]
        wanted = {"recipe": recipe.model_dump(mode="json"), "model": sha256}
        return self._json("POST", "/runs", json=wanted, params={"code": code} if code else {})["id"]

    def stop_run(self, run: str) -> RunDetail:
        return RunDetail.model_validate(self._json("POST", f"/runs/{run}/stop"))

    def pause_run(self, run: str) -> RunDetail:
        """Begin nothing new in a run until it is resumed; what clients have under way they may still deliver."""
        return RunDetail.model_validate(self._json("POST", f"/runs/{run}/pause"))

    def resume_run(self, run: str) -> RunDetail:
        return RunDetail.model_validate(self._json("POST", f"/runs/{run}/resume"))

    def manifests(self, run: str) -> list[ManifestView]:
        """The manifests of a run's committed rounds, oldest first."""
        return self._many(ManifestView, f"/runs/{run}/manifests")

    def manifest(self, run: str, round: int) -> str:
        """One manifest, byte for byte as the next one names it."""
        return self._answer("GET", f"/runs/{run}/manifests/{round}").text

    def clients(self) -> list[ClientView]:
        return self._many(ClientView, "/clients")

    def invite(self, name: str) -> InvitationView:
        return InvitationView.model_validate(self._json("POST", "/invitations", json={"name": name}))

    def users(self) -> list[UserView]:
        return self._many(UserView, "/users")

    def add_user(self, name: str, role: Role) -> str:
        """Add an account; returns the address where it signs in once, within three days."""
        made = self._json("POST", "/users", json={"name": name, "role": role})
        return f"{self.url}/login?link={made['link']}"

    def set_role(self, name: str, role: Role) -> None:
        self._json("PUT", f"/users/{name}/role", json={"role": role})

    def remove_user(self, name: str) -> None:
        self._answer("DELETE", f"/users/{name}")

    def credentials(self) -> list[CredentialView]:
        """Sessions and API tokens that hold: one's own, and to an admin everybody's."""
        return self._many(CredentialView, "/credentials")

    def make_token(self, name: str, *, role: Role = "viewer", days: float = 90) -> CredentialView:
        """A new API token of one's own, with `token` in it; name: what it is for."""
        wanted = {"name": name, "role": role, "days": days}
        return CredentialView.model_validate(self._json("POST", "/tokens", json=wanted))

    def withdraw(self, credential: str) -> None:
        """Take a token back or end a session, by its `CredentialView.id`."""
        self._answer("DELETE", f"/credentials/{credential}")

    def audit(self, *, by: str = "", what: str = "", limit: int = 50) -> list[AuditView]:
        """Who did what, the newest first. what: part of an action or of what it was done to."""
        return self._many(AuditView, "/audit", params={"by": by, "what": what, "limit": limit})

    def audit_log(self) -> str:
        """The whole audit log as JSON Lines, for `protocol.audit.verify_log`."""
        return self._answer("GET", "/audit/log").text

    def check_audit(self) -> LogReport:
        """Whether every entry of the coordinator's log is unchanged and follows from the one before."""
        return LogReport.model_validate(self._json("GET", "/audit/check"))

    def budgets(self) -> list[RunBudget]:
        """What each run has spent of its clients' privacy, and what it will come to."""
        return self._many(RunBudget, "/privacy")

    def approve(self, client: str) -> None:
        self._json("POST", f"/clients/{client}/approve")

    def revoke(self, client: str) -> None:
        self._json("POST", f"/clients/{client}/revoke")

    def versions(self, run: str | None = None) -> list[VersionView]:
        """Versions, newest first; who is in them and who is missing is told for one run only."""
        return self._many(VersionView, "/models", params={"run": run} if run else {})

    def aliases(self, model: str | None = None) -> list[AliasView]:
        """Where each alias points; a model is named as its runs are."""
        return self._many(AliasView, "/aliases", params={"model": model} if model else {})

    def alias_history(self, model: str) -> list[AliasView]:
        """Every move of a model's aliases, the newest first."""
        return self._many(AliasView, f"/aliases/{model}")

    def promote(self, run: str, n: int, alias: str) -> AliasView:
        """Let an alias of the run's model point at version `n` of the run."""
        return AliasView.model_validate(self._json("POST", f"/runs/{run}/versions/{n}/promote", json={"alias": alias}))

    def rollback(self, model: str, alias: str, *, seen: int | None = None) -> AliasView:
        """Let an alias point at what it pointed at before.

        seen: `AliasView.n` of what you looked at; raises Conflict where it was moved since.
        """
        wanted = {} if seen is None else {"seen": seen}
        return AliasView.model_validate(self._json("POST", f"/aliases/{model}/{alias}/rollback", json=wanted))

    def remove_alias(self, model: str, alias: str, *, seen: int | None = None) -> None:
        """Let an alias name nothing any more; its history stays. seen: as for `rollback`."""
        self._answer("DELETE", f"/aliases/{model}/{alias}", params={} if seen is None else {"seen": seen})

    def lineage(self, run: str, n: int) -> LineageView:
        """Where a version comes from: parent, contributors, digests of recipe and code, epsilon."""
        return LineageView.model_validate(self._json("GET", f"/runs/{run}/versions/{n}/lineage"))

    def card(self, run: str, n: int, *, license: str = "") -> str:
        """The card of a version, in Markdown with a YAML head."""
        params = {"license": license} if license else {}
        return self._answer("GET", f"/runs/{run}/versions/{n}/card", params=params).text

    def pull(self, sha256: str, path: Path) -> None:
        """Write a version to a file; the bytes are checked against their hash before the file has its name."""
        import hashlib

        temporary, digest = path.with_name(f".{path.name}.part"), hashlib.sha256()
        with self._http.stream("GET", f"/v1/admin/models/{sha256}") as response, temporary.open("wb") as file:
            self._check(response)
            for chunk in response.iter_raw(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            temporary.unlink()
            raise Unavailable("the download was damaged on its way; try again")
        temporary.replace(path)

    def events(self, after: int = 0, run: str | None = None) -> list[EventView]:
        params = {"after": after} | ({"run": run} if run else {})
        return self._many(EventView, "/events", params=params)

    def history(self, run: str) -> Iterator[EventView]:
        """The run's events up to now, oldest first."""
        after = 0
        while found := self.events(after, run):
            yield from found
            after = found[-1].id

    def watch(self, run: str, after: int = 0, *, timeout_s: float | None = None) -> Iterator[EventView]:
        """The run's events as they happen, until the run has ended; a lost connection is taken up again.

        A paused run has not ended: its events go on when it does. Raises TimeoutError when it has not ended after
        `timeout_s` seconds.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                for event in self._stream(run, after, until):
                    if event is not None:
                        after = event.id
                        yield event
                        if event.kind == "run" and event.data.get("state") in OVER:
                            return
                    if until is not None and time.monotonic() >= until:
                        break
            except (httpx.TransportError, Unavailable):
                pass
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(f"the run has not ended after {timeout_s:g} s; it goes on")
            time.sleep(AGAIN_S)

    def _stream(self, run: str, after: int, until: float | None = None) -> Iterator[EventView | None]:
        """Events, and None for each sign of life between them; ends at `until` at the latest."""
        read = READ_S if until is None else max(0.01, min(READ_S, until - time.monotonic()))
        asked, timeout = {"run": run, "after": after}, httpx.Timeout(30, read=read)
        with self._http.stream("GET", "/v1/admin/events/stream", params=asked, timeout=timeout) as response:
            self._check(response)
            for line in response.iter_lines():
                yield EventView.model_validate_json(line[6:]) if line.startswith("data: ") else None

    def _many(self, kind: type[V], path: str, **options: Any) -> list[V]:
        return [kind.model_validate(row) for row in self._json("GET", path, **options)]

    def _json(self, method: str, path: str, **options: Any) -> Any:
        return self._answer(method, path, **options).json()

    def _answer(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, f"/v1/admin{path}", **options)
        except httpx.TransportError as error:
            raise Unavailable(f"the coordinator at {self.url} cannot be reached: {error}") from None
        self._check(response)
        return response

    @staticmethod
    def _check(response: httpx.Response) -> None:
        if response.is_success:
            return
        response.read()
        try:
            document = response.json()
        except ValueError:
            document = {"status": response.status_code, "detail": response.text[:200]}
        raise from_problem(document)
