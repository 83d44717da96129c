"""The model registry as everybody sees it: names that point at versions, and where a version comes from.

A model is named by the recipe that its runs follow: all runs of one name make versions of one model. An alias of it,
such as `production`, points at one version of one of them.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, WithJsonSchema

from .views import MetricPoint, PrivacyView, RunView, VersionView, View

Action = Literal["promoted", "rolled_back", "removed"]

ALIAS = r"^[a-z][a-z0-9_.-]{0,63}$"
ALIAS_RULE = "an alias is up to 64 small letters, digits, dots, dashes and underscores, with a letter first"


def _alias(name: str) -> str:
    if not re.fullmatch(ALIAS, name):  # a letter first: NAME@37 is a version
        raise ValueError(ALIAS_RULE)
    return name


Alias = Annotated[str, AfterValidator(_alias), WithJsonSchema({"type": "string", "pattern": ALIAS})]


class VersionRef(View):
    """A version by its run and number."""

    run: str
    n: int

    def __str__(self) -> str:
        return f"{self.run}@{self.n}"


class AliasView(View):
    """One move of an alias: where it pointed from then on, and who moved it; of a removal, what it pointed at last.

    n: which move it was, from 1. before: what it pointed at before, to where a rollback leads; None: to nothing.
    A rollback takes a promotion back, so `before` of one is what stood before the promotion it returned to.
    """

    model: str
    alias: str
    n: int
    action: Action
    version: VersionRef
    sha256: str
    before: VersionRef | None
    at: datetime
    by: str


class LineageView(View):
    """Where a version comes from.

    aliases: the names that point at it. contributors: clients that are in it, through any round of its run.
    code: SHA-256 of the task's file that the run was started with, empty where it is not known; recipe: that of the
    run's recipe; manifest: that of its round's manifest, empty where there is none. origin: the version of another run
    that its run started from. metrics: measured by clients on this version. privacy: what the run had spent when this
    version was made; None where no epsilon is accounted here.
    """

    version: VersionView
    run: RunView
    aliases: tuple[str, ...] = ()
    contributors: int
    code: str = ""
    recipe: str
    manifest: str = ""
    origin: VersionRef | None = None
    metrics: tuple[MetricPoint, ...] = ()
    privacy: PrivacyView | None = None
