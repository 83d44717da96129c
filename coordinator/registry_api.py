"""The model registry's addresses under `/v1/admin`: aliases, their history, where a version comes from, its card."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from ..protocol.registry import Alias, AliasView, LineageView
from .http import Admin, WithParts, person

router = APIRouter(prefix="/v1/admin", dependencies=[Depends(person)])
Number = Annotated[int, Path(ge=0, lt=1 << 31)]


class Promote(BaseModel):
    model_config = ConfigDict(extra="forbid")
    alias: Alias


class Rollback(BaseModel):
    """`seen`: the move that was the newest when the caller looked; another one in between is then a conflict."""

    model_config = ConfigDict(extra="forbid")
    seen: int | None = Field(default=None, ge=0, lt=1 << 31)


@router.get("/aliases")
def aliases(p: WithParts, model: str | None = None) -> list[AliasView]:
    """Where each alias points."""
    return p.service.aliases(model)


@router.get("/aliases/{model}")
def history(model: str, p: WithParts) -> list[AliasView]:
    """Every move of a model's aliases, the newest first."""
    return p.service.alias_history(model)


@router.post("/aliases/{model}/{alias}/rollback")
def rollback(model: str, alias: str, wanted: Rollback, who: Admin, p: WithParts) -> AliasView:
    """Let an alias point at what it pointed at before."""
    p.service.rollback(model, alias, who.name, wanted.seen)
    return next(a for a in p.service.aliases(model) if a.alias == alias)


@router.delete("/aliases/{model}/{alias}", status_code=204)
def remove(
    model: str, alias: str, who: Admin, p: WithParts, seen: Annotated[int | None, Query(ge=0, lt=1 << 31)] = None
) -> None:
    """Let an alias name nothing any more. seen: as for a rollback."""
    p.service.remove_alias(model, alias, who.name, seen)


@router.post("/runs/{run}/versions/{n}/promote")
def promote(run: str, n: Number, wanted: Promote, who: Admin, p: WithParts) -> AliasView:
    """Let an alias of the run's model point at a version."""
    p.service.promote(run, n, wanted.alias, who.name)
    model = p.service.run(run).run.name
    return next(a for a in p.service.aliases(model) if a.alias == wanted.alias)


@router.get("/runs/{run}/versions/{n}/lineage")
def lineage(run: str, n: Number, p: WithParts) -> LineageView:
    """Where a version comes from."""
    return p.service.lineage(run, n)


@router.get("/runs/{run}/versions/{n}/card")
def card(run: str, n: Number, p: WithParts, license: Annotated[str, Query(max_length=64)] = "") -> Response:
    """The card of a version, in Markdown."""
    return Response(p.service.card(run, n, license), media_type="text/markdown; charset=utf-8")
