"""The addresses of admins and researchers, under `/v1/admin`, with an API token; the CLI and notebooks use them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from ..protocol.errors import BadUpdate
from ..protocol.messages import Digest
from ..protocol.recipe import Recipe
from ..protocol.sections import Name
from ..protocol.tensors import read_layout
from ..protocol.views import (
    ClientView,
    EventView,
    InvitationView,
    ManifestView,
    RunDetail,
    RunEstimate,
    RunView,
    VersionView,
)
from .http import Admin, BlobResponse, Starter, Steerer, WithParts, chunks_of, person

router = APIRouter(prefix="/v1/admin", dependencies=[Depends(person)])
Count = Annotated[int, Query(ge=0, lt=1 << 63)]
MAX_MODEL_BYTES = 64 << 30


class StartRun(BaseModel):
    model_config = ConfigDict(extra="forbid")
    recipe: Recipe
    model: Digest


class Invite(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Name


@router.put("/models")
async def put_model(request: Request, who: Starter, p: WithParts) -> dict[str, Any]:
    """Upload a model to start runs from: a canonical safetensors file as the body; answers its SHA-256."""
    _ = who
    with p.blobs.new() as path:
        size = 0
        with path.open("wb") as file:
            async for chunk in chunks_of(request):
                size += len(chunk)
                if size > MAX_MODEL_BYTES:
                    raise BadUpdate(f"a model has at most {MAX_MODEL_BYTES} bytes")
                await run_in_threadpool(file.write, chunk)
        await run_in_threadpool(read_layout, path)
        return {"sha256": await run_in_threadpool(p.blobs.adopt, path), "bytes": size}


@router.get("/models")
def versions(p: WithParts, run: str | None = None) -> list[VersionView]:
    return p.service.versions(run)


@router.get("/models/{sha256}")
def model(sha256: str, p: WithParts) -> BlobResponse:
    return BlobResponse(p.service.version_file(sha256), media_type="application/octet-stream")


@router.post("/runs", status_code=201)
def start_run(wanted: StartRun, who: Starter, p: WithParts, code: Digest | None = None) -> dict[str, str]:
    """Start a run; `code` is the SHA-256 of the task's file that made the model, for its lineage."""
    return {"id": p.service.start_run(wanted.recipe, wanted.model, by=who.name, code=code or "")}


@router.post("/runs/estimate")
def estimate_run(wanted: StartRun, p: WithParts) -> RunEstimate:
    """What such a run would come to: bytes of a client, clients needed, epsilon. Nothing is started."""
    return p.service.estimate(wanted.recipe, wanted.model)


@router.get("/runs")
def runs(p: WithParts) -> list[RunView]:
    return p.service.runs()


@router.get("/runs/{run}")
def run(run: str, p: WithParts) -> RunDetail:
    return p.service.run(run)


@router.post("/runs/{run}/stop")
def stop_run(run: str, who: Steerer, p: WithParts) -> RunDetail:
    p.service.stop_run(run, who.name)
    return p.service.run(run)


@router.post("/runs/{run}/pause")
def pause_run(run: str, who: Steerer, p: WithParts) -> RunDetail:
    p.service.pause_run(run, who.name)
    return p.service.run(run)


@router.post("/runs/{run}/resume")
def resume_run(run: str, who: Steerer, p: WithParts) -> RunDetail:
    p.service.resume_run(run, who.name)
    return p.service.run(run)


@router.get("/runs/{run}/manifests")
def manifests(run: str, p: WithParts) -> list[ManifestView]:
    """What is kept of each committed round, for whoever wants to check it."""
    return p.service.manifests(run)


@router.get("/runs/{run}/manifests/{round}")
def manifest(run: str, round: Annotated[int, Path(ge=0, lt=1 << 63)], p: WithParts) -> Response:
    """One manifest, byte for byte as the next one names it."""
    return Response(p.service.manifest(run, round), media_type="application/json")


@router.get("/clients")
def clients(p: WithParts) -> list[ClientView]:
    return p.service.clients()


@router.post("/clients/{client}/approve")
def approve(client: str, who: Admin, p: WithParts) -> dict[str, str]:
    p.service.approve(client, who.name)
    return {"client": client, "state": "active"}


@router.post("/clients/{client}/revoke")
def revoke(client: str, who: Admin, p: WithParts) -> dict[str, str]:
    p.service.revoke(client, who.name)
    return {"client": client, "state": "revoked"}


@router.post("/invitations", status_code=201)
def invite(wanted: Invite, who: Admin, p: WithParts) -> InvitationView:
    return p.service.invite(wanted.name, who.name)


@router.get("/events")
def events(p: WithParts, after: Count = 0, run: str | None = None, limit: Count = 200) -> list[EventView]:
    return p.service.events(after, run, min(limit, 1000))


@router.get("/events/stream")
async def stream(request: Request, p: WithParts, after: Count = 0, run: str | None = None) -> StreamingResponse:
    """The event log from `after` (or Last-Event-ID) on, as server-sent events, for as long as the caller listens."""
    resumed = request.headers.get("last-event-id", "")
    after = int(resumed) if resumed.isascii() and resumed.isdigit() and len(resumed) < 19 else after
    return StreamingResponse(
        _stream(p, after, run), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )


async def _stream(p: WithParts, after: int, run: str | None) -> AsyncIterator[str]:
    changes = p.service.changes(after)
    while True:
        while found := await run_in_threadpool(p.service.events, after, run):
            for event in found:
                yield f"id: {event.id}\ndata: {json.dumps(event.model_dump(mode='json'))}\n\n"
            after = found[-1].id
        try:
            async with asyncio.timeout(15):  # wait_for would lose a cancellation that comes with an event (Python 3.11)
                await anext(changes)
        except TimeoutError:
            changes = p.service.changes(after)
            yield ": ping\n\n"
        except StopAsyncIteration:
            return
