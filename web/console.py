"""What the pages ask of the coordinator: views to show, a few actions, accounts, and a sign that something changed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from ..protocol.recipe import Recipe
from ..protocol.registry import AliasView, LineageView
from ..protocol.roles import Right, Role, may
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
from .administration import Administration


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Who is signed in, with what role, in which session (its `CredentialView.id`)."""

    name: str
    role: Role
    session: str = ""

    def may(self, right: str, owner: str | None = None) -> bool:
        """Whether a button is shown; what it does is checked again when it is pressed."""
        return may(self.name, self.role, Right[right], owner)


class Console(Administration, Protocol):
    """The coordinator as its pages see it.

    All methods but `changes` are synchronous and may touch SQL and disk: the pages call them from worker threads,
    several at once. Every time is an aware datetime in UTC. An action raises a MurmurError (NotFound, Conflict, ...)
    whose `detail` is shown to the admin; it has then changed nothing.
    """

    def now(self) -> datetime:
        """The coordinator's time; pages count "2 min ago" and running durations from it."""
        ...

    def runs(self) -> list[RunView]:
        """Every run, newest first."""
        ...

    def run(self, id: str) -> RunDetail:
        """One run with its rounds (oldest first), the attempt in progress and the metrics by version.

        Raises NotFound.
        """
        ...

    def round(self, run: str, n: int) -> RoundView:
        """The newest attempt of a round, with what each of its clients did when. Raises NotFound."""
        ...

    def clients(self) -> list[ClientView]:
        """Every client that ever enrolled, whatever its state, by id."""
        ...

    def invitations(self) -> list[InvitationView]:
        """Invitations that can still be used or were used, newest first; `join` is empty in all of them."""
        ...

    def versions(self, run: str | None = None) -> list[VersionView]:
        """Versions of one run, with who is in each and who is missing; or of all, without. The newest is the first.

        An unknown run gives an empty list.
        """
        ...

    def events(self, after: int, run: str | None = None, limit: int = 200) -> list[EventView]:
        """Events with an id above `after`, oldest first, at most `limit`; of one run if it is named, else of all."""
        ...

    def recent_events(self, run: str | None, limit: int) -> list[EventView]:
        """The last `limit` events of a run, or of all; the newest is the last."""
        ...

    def version_file(self, sha256: str) -> Path:
        """The safetensors file of a version. Raises NotFound for a hash that is no version's."""
        ...

    def aliases(self, model: str | None = None) -> list[AliasView]:
        """Where each alias points, of one model or of all."""
        ...

    def alias_history(self, model: str) -> list[AliasView]:
        """Every move of a model's aliases, the newest first. Raises NotFound for a name that no run has."""
        ...

    def lineage(self, run: str, n: int) -> LineageView:
        """Where a version comes from. Raises NotFound."""
        ...

    def card(self, run: str, n: int) -> str:
        """The card of a version, in Markdown. Raises NotFound."""
        ...

    def promote(self, run: str, n: int, alias: str, by: str) -> None:
        """Let an alias of the run's model point at a version; nothing where it does. Raises NotFound."""
        ...

    def rollback(self, model: str, alias: str, by: str, seen: int | None = None) -> None:
        """Let an alias point at what it pointed at before. seen: the move that was the newest one when `by` decided.

        Raises NotFound, and Conflict where there is nothing to go back to or the alias was moved meanwhile.
        """
        ...

    def remove_alias(self, model: str, alias: str, by: str, seen: int | None = None) -> None:
        """Let an alias name nothing any more. Raises as `rollback`."""
        ...

    def manifests(self, run: str) -> list[ManifestView]:
        """The manifests of a run's committed rounds, oldest first. Raises NotFound."""
        ...

    def manifest(self, run: str, round: int) -> str:
        """One of them, as it is hashed. Raises NotFound."""
        ...

    def manifest_lines(self, run: str) -> Iterator[str]:
        """All of a run's, one a line: JSON Lines. Raises NotFound."""
        ...

    def approve(self, client: str, by: str) -> None:
        """Let a pending client take part. `by` is the account's name, for the log."""
        ...

    def revoke(self, client: str, by: str) -> None:
        """Refuse a client's key from now on; a pending client is thereby rejected."""
        ...

    def invite(self, name: str, by: str) -> InvitationView:
        """A new one-time invitation. This answer alone carries `join`, the line that the organization runs."""
        ...

    def estimate(self, recipe: Recipe, sha256: str) -> RunEstimate:
        """What a run from the model of this hash would come to. Raises as `start_run` does."""
        ...

    def start_run(self, recipe: Recipe, sha256: str, *, by: str) -> str:
        """Start a run from a model that lies here; its id.

        Raises NotFound for a model that does not, OperatorError for one that cannot be trained as the recipe says.
        """
        ...

    def stop_run(self, id: str, by: str) -> None:
        """Stop a running or paused run after what is committed; the versions stay. Raises NotFound, Conflict."""
        ...

    def pause_run(self, id: str, by: str) -> None:
        """Begin nothing new in a run until it is resumed; nothing where it is paused already. Raises as `stop_run`."""
        ...

    def resume_run(self, id: str, by: str) -> None:
        """Let a paused run go on; nothing where it is not paused. Raises as `stop_run`."""
        ...

    def login(self, user: str, password: str, address: str) -> str | None:
        """A new session's token or None, equally slow for unknown users. Raises Unavailable after many failures.

        address: where it was asked from, for the audit log's entry about those that failed.
        """
        ...

    def redeem(self, link_token: str, address: str) -> str | None:
        """A new session's token for a one-time login link, which is thereby used up; None if it is not valid."""
        ...

    def account(self, session_token: str) -> Account | None:
        """Whose session this is; None if it is unknown, ended or expired."""
        ...

    def logout(self, session_token: str) -> None:
        """End a session; an unknown token is no error."""
        ...

    def changes(self, after: int) -> AsyncIterator[int]:
        """Yield the newest event id each time events above the last yielded one (first: above `after`) are committed.

        Never blocks the event loop, and may skip ids. It ends when the coordinator stops, which ends every open stream.
        """
        ...
