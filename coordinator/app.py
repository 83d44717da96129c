"""The coordinator as an ASGI app: its parts joined, its threads started and stopped with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from ..web.pages import pages
from ..web.rendering import static_app
from ..web.security import SecurityHeaders
from . import admin_api, agents_api
from .blobs import Blobs
from .conductor import Conductor, start
from .conversation import Conversation
from .http import Parts, Protocol, install_errors
from .hub import Hub
from .people import People
from .service import Service
from .settings import Settings
from .store import Store
from .worker import Worker


def create_app(settings: Settings, *, ca_pem: str | None = None, clock: Callable[[], float] = time.time) -> FastAPI:
    """An app over the data folder of `settings`; opening it brings the database to this release's schema."""
    settings.data.mkdir(parents=True, exist_ok=True)
    hub = Hub()
    store = Store(settings.database_url, clock=clock)
    store.db.on_commit = hub.committed
    hub.newest_event = store.events.newest()
    blobs = Blobs(settings.data / "blobs")
    people = People(store, session_s=settings.session_s)
    service = Service(store, blobs, hub, people, invitation_s=settings.invitation_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        hub.attach(asyncio.get_running_loop())
        worker = Worker(settings.data / "blobs")
        worker.warm()
        store.rounds.resume()
        thread = start(Conductor(store, blobs, hub, worker, clock=clock))
        try:
            yield
        finally:
            hub.stop()
            await asyncio.to_thread(thread.join)
            await asyncio.to_thread(worker.close)
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
        ca_pem=ca_pem,
    )
    install_errors(app)
    app.add_middleware(Protocol)
    app.add_middleware(SecurityHeaders)
    app.include_router(agents_api.router)
    app.include_router(admin_api.router)
    app.include_router(pages(service, secure_cookies=not settings.insecure_http))
    app.mount("/static", static_app())

    @app.get("/healthz")
    def healthz() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        return {"status": "ok"}

    return app
