"""The one place where the pages and the JSON API ask whether somebody may do what a route does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..protocol.roles import Right, Role, require
from .console import Console


def authorize(console: Console, name: str, role: Role, right: Right, about: Mapping[str, Any]) -> None:
    """Raise NotAllowed where an account may not do what a route needs; NotFound where it acts on nothing.

    about: the route's path parameters: a run is `run` or `id` in them, a session or token `credential`.
    """

    def owner() -> str | None:
        if "credential" in about:
            return console.holder_of(about["credential"])
        if right is Right.STEER:
            return console.run(about.get("run") or about["id"]).run.created_by
        return None

    require(name, role, right, owner)
