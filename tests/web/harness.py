"""The pages over a console, as an application and on a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from murmur.web import SecurityHeaders, pages, static_app

from .fakes import FakeConsole

OWN = {"sec-fetch-site": "same-origin"}


def application(console: FakeConsole, *, secure_cookies: bool = False) -> FastAPI:
    app = FastAPI()
    app.include_router(pages(console, secure_cookies=secure_cookies))
    app.mount("/static", static_app())
    app.add_middleware(SecurityHeaders)
    return app


@contextmanager
def serving(console: FakeConsole) -> Iterator[str]:
    """The pages on a real server; yields its address."""
    config = uvicorn.Config(application(console), port=0, ws="none", log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        console.stopping = True
        server.should_exit = True
        thread.join(60)
