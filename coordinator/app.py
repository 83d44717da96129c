"""The coordinator as an ASGI app: its parts joined, its threads started and stopped with it."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, Response

from ..protocol.errors import Unavailable
from ..web.pages import pages
from ..web.rendering import static_app
from ..web.security import SecurityHeaders
from . import accounts_api, admin_api, agents_api, registry_api
from .blobs import open_blobs
from .bus import Bus
from .clocks import steady
from .conductor import Conductor, start
from .conversation import Conversation
from .heartbeats import Heartbeats
from .http import Front, Parts, install_errors, person
from .hub import Hub
from .people import People
from .service import Service
from .settings import Settings
from .simulated import FOLDER
from .sinks import Follower, open_sink
from .store import Store
from .worker import Worker

STILL_S = 15.0  # a tick that takes longer than this is not one


def create_app(
    settings: Settings, *, ca_pem: str | None = None, wall_clock: Callable[[], float] = time.time
) -> FastAPI:
    """An app over the data folder of `settings`; opening it brings the database to this release's schema."""
    settings.data.mkdir(parents=True, exist_ok=True)
    hub = Hub()
    store = Store(settings.database_url, clock=wall_clock)
    clock = store.db.clock = steady(store.db.now() if store.db.shared else wall_clock())
    store.db.on_commit = hub.committed
    hub.newest_event = store.events.newest()
    blobs = open_blobs(settings.blobs_location, settings.data / "cache")
    people = People(store, session_s=settings.session_s)
    worker = Worker(blobs)
    conductor = Conductor(store, blobs, hub, worker, clock=clock, simulations=settings.data / FOLDER)
    heartbeats = Heartbeats(store.signs)
    service = Service(store, blobs, hub, people, invitation_s=settings.invitation_s)
    follower = _follower(service, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        hub.attach(asyncio.get_running_loop())
        bus = Bus(store.db, hub, me=store.lease.holder) if store.db.shared else None
        worker.warm()
        thread = start(conductor)
        follower.leads = lambda: conductor.leads
        follower.start()
        written = asyncio.create_task(service.failed_sign_ins.keep_writing())
        try:
            yield
        finally:
            hub.stop()
            written.cancel()
            await asyncio.to_thread(service.failed_sign_ins.write)
            await asyncio.to_thread(follower.close)
            await asyncio.to_thread(thread.join)
            await asyncio.to_thread(worker.close)
            await asyncio.to_thread(heartbeats.close)
            if bus is not None:
                await asyncio.to_thread(bus.close)
            store.close()

    app = FastAPI(title="Murmur coordinator", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.parts = Parts(
        settings=settings,
        store=store,
        blobs=blobs,
        hub=hub,
        people=people,
        conversation=Conversation(store, blobs, hub),
        service=service,
        conductor=conductor,
        heartbeats=heartbeats,
        ca_pem=ca_pem,
        wall_clock=wall_clock,
    )
    install_errors(app)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(Front, find=agents_api.often, parts=app.state.parts)
    app.include_router(agents_api.router)
    app.include_router(admin_api.router)
    app.include_router(registry_api.router)
    app.include_router(accounts_api.router)
    app.include_router(pages(service, secure_cookies=not settings.insecure_http))
    app.mount("/static", static_app())

    @app.get("/healthz")
    def healthz() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/metrics", dependencies=[Depends(person)])
    def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        """The state in numbers, for Prometheus, with an API token as the bearer."""
        from .prometheus import exposition

        return Response(exposition(app.state.parts), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/healthz/ready")
    def ready() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        """Whether it can do its work: 503 with what is wrong otherwise."""
        wrong = list(troubles(app.state.parts))
        values = {"status": "not ready" if wrong else "ready", "troubles": wrong, "leads": conductor.leads}
        return JSONResponse(values, 503 if wrong else 200)

    return app


def troubles(p: Parts) -> Iterator[str]:
    """What keeps a coordinator from its work, in words."""
    silent_s = time.monotonic() - p.conductor.ticked_at
    if silent_s > STILL_S:
        yield f"rounds have stood still for {silent_s:.0f} s"
    try:
        p.store.db.now()
        p.store.runs.held()
        p.blobs.require(0)
    except Unavailable as error:
        yield error.detail


def _follower(service: Service, settings: Settings) -> Follower:
    """What tells this coordinator's events on; with no sinks it does nothing."""

    def pull(sha256: str, to: Path) -> None:
        shutil.copyfile(service.version_file(sha256), to)

    sinks = {f"{n}-{given.kind}": partial(open_sink, given) for n, given in enumerate(settings.sinks)}
    return Follower(service, pull, settings.data / "sinks", sinks)
