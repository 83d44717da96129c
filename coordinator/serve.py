"""Run a coordinator: TLS, the first account, the address for invitations, and a graceful end."""

from __future__ import annotations

import datetime as dt
import fcntl
import gc
import json
import logging
import os
import resource
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

import uvicorn

from ..protocol.errors import OperatorError
from ..protocol.joining import SYSTEM
from . import tls
from .app import create_app
from .http import Parts
from .settings import Settings

log = logging.getLogger(__name__)

ADMIN = "admin"
FILES = 1_024
TOKEN_S = 10 * 365 * 86_400.0
GRACE_S = 5  # parked polls answer at once when told to stop; this bounds a stuck upload


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a coordinator that has started is found. `login` works once, for a quarter of an hour."""

    url: str
    login: str
    token_file: str


def serve(settings: Settings, *, started: Callable[[Address], None]) -> None:
    """Serve until SIGTERM or SIGINT; `started` hears the address once the port is open.

    The data folder gets `operator.json` (mode 0600): address and API token, with which the CLI on this machine acts.
    Raises OperatorError when the port is taken or the settings are unsafe.
    """
    settings = settings.checked()
    with _alone(settings):
        _serve(settings, started)


def _serve(settings: Settings, started: Callable[[Address], None]) -> None:
    _allow_files()
    bound = _bind(settings)
    port = bound.getsockname()[1]
    name = settings.public_host or settings.host
    certificates = None
    if not settings.insecure_http and settings.tls_cert is None:
        hosts = tuple(dict.fromkeys((name, settings.host, "localhost", "127.0.0.1", socket.gethostname())))
        certificates = tls.ensure(settings.data / "tls", hosts, now=dt.datetime.now(dt.UTC))
    chain, key = (certificates.chain, certificates.key) if certificates else (settings.tls_cert, settings.tls_key)
    app = create_app(settings, ca_pem=certificates.ca.read_text() if certificates else None)
    parts: Parts = app.state.parts
    own = None if settings.insecure_http else SYSTEM
    parts.service.address = (name, port, certificates.fingerprint if certificates else own)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_keep_alive=75,  # longer than agents pause between polls, so that TLS is not shaken out anew each time
        timeout_graceful_shutdown=GRACE_S,
        ssl_certfile=chain,
        ssl_keyfile=key,
        server_header=False,
        proxy_headers=False,  # nothing here goes by who seems to call
    )
    url = f"{'http' if settings.insecure_http else 'https'}://{_netloc(name, port)}"
    ca = str(certificates.ca) if certificates else ""
    server = _Server(config, parts, lambda: started(_introduce(parts, settings, url, ca)))
    gc.collect()
    gc.freeze()  # what is there by now stays; looking through it, and through thousands of waiting requests, costs more
    gc.set_threshold(50_000, 20, 100)
    server.run(sockets=[bound])


@contextmanager
def _alone(settings: Settings) -> Generator[None]:
    """Hold the data folder: SQLite has one coordinator, and so has a folder's operator.json.

    Raises OperatorError where another one runs.
    """
    settings.data.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(settings.data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise OperatorError(
            f"another coordinator runs from {settings.data}. Several of them need PostgreSQL (--database), a folder or "
            "bucket of models in common (--blobs), and a data folder each"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def _allow_files() -> None:
    """Let this process hold as many connections as the system allows; each waiting client has one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < FILES:
        log.warning("few connections are allowed: raise the limit of open files", extra={"limit": hard})


def _introduce(parts: Parts, settings: Settings, url: str, ca: str) -> Address:
    if parts.store.accounts.role(ADMIN) is None:
        parts.people.add(ADMIN, "admin", None)
    path = settings.data / "operator.json"
    token = parts.people.api_token(ADMIN, lifetime_s=TOKEN_S, label="operator.json").token
    if path.exists():
        old = json.loads(path.read_text()).get("token", "")
        parts.people.end(old)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"url": url, "token": token, "ca": ca}, file)
    return Address(url=url, login=f"{url}/login?link={parts.people.link(ADMIN)}", token_file=str(path))


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with suppress(OSError, AttributeError):  # accepted connections inherit it; on a lossy line it is forty times CUBIC
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        where = f"{settings.host}:{settings.port}"
        raise OperatorError(f"cannot listen on {where}: {error.strerror}; choose another --port") from None
    return bound


def _netloc(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, parts: Parts, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._parts, self._started = parts, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End well at the first signal, with exit code 0, and at once at the second."""
        self._parts.hub.stop()  # uvicorn waits for open requests before it ends the app, and polls are open for long
        self.should_exit, self.force_exit = True, self.should_exit
