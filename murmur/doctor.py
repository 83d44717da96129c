"""`murmur doctor`: what is right and what is not on this machine, and what to do about it."""

from __future__ import annotations

import email.utils
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from murmur.clients.finding import Finding, green, red, yellow
from murmur.output import FAILED, out, print_json

if TYPE_CHECKING:
    from murmur.coordinator.settings import Settings

CLOCK_S = 30.0
EXPIRES_DAYS = 14


def doctor(
    data: Annotated[Path | None, typer.Option("--data", help="data folder of a coordinator on this machine")] = None,
    directory: Annotated[Path | None, typer.Option("--dir", help="folder of a client on this machine")] = None,
    json_: Annotated[bool, typer.Option("--json", help="one line of JSON")] = False,
) -> None:
    """Explain this machine: torch and GPUs, memory, disk, and the coordinator and the client that are set up here."""
    from murmur.checking import show_finding
    from murmur.clients.check import Report

    report = Report((lambda finding: None) if json_ else show_finding)
    for finding in examine(data, directory):
        report.add(finding)
    if json_:
        print_json(report.to_json())
    else:
        bad, doubts = (sum(f.level == level for f in report.findings) for level in ("red", "yellow"))
        said = f"[bold red]{bad} to correct[/]" if bad else "[bold green]nothing is broken[/]"
        out.print(said + (f", {doubts} to look at" if doubts else ""))
    if not report.ok:
        raise typer.Exit(FAILED)


def examine(data: Path | None, directory: Path | None) -> Iterator[Finding]:
    """Every finding in its order; what needs a coordinator or a client is left out where there is none."""
    from murmur.clients.settings import FILE
    from murmur.coordinator.settings import Settings
    from murmur.machine import machine

    yield from machine()
    settings = Settings.read(data=data)
    if (settings.data / "operator.json").exists() or settings.database:
        yield from coordinator(settings)
    elif data is not None:
        yield red("coordinator", f"there is no coordinator's data in {data}", "start one: murmur coordinator serve")
    elif "MURMUR_URL" in os.environ:
        yield from answers(os.environ["MURMUR_URL"], os.environ.get("MURMUR_CA", ""))
    place = directory or Path("murmur-client")
    if (place / FILE).exists():
        yield from client(place)
    elif directory is not None:
        yield red("client", f"there is no {directory / FILE}", "enrol it: murmur client enroll")


def client(directory: Path) -> Iterator[Finding]:
    """A client's settings, its disk, and its way to the coordinator."""
    from murmur.clients.check import Report
    from murmur.clients.reach import reach
    from murmur.clients.settings import load_settings
    from murmur.machine import disk
    from murmur.protocol.errors import MurmurError

    try:
        settings = load_settings(directory)
    except MurmurError as error:
        yield red("client", error.detail, "correct client.toml")
        return
    yield green("client", f"{settings.name}, tasks {', '.join(sorted(settings.tasks)) or 'none'}")
    yield disk(directory, "client's disk")
    way = Report()
    reach(settings, way)
    yield from way.findings


def coordinator(settings: Settings) -> Iterator[Finding]:
    """A coordinator's database, disk and certificate, and whether it answers."""
    from murmur.machine import disk, network_disk

    yield from _told(lambda: database(settings.database_url))
    if settings.data.exists():
        yield disk(settings.data, "coordinator's disk")
        if not settings.database and (kind := network_disk(settings.data)):
            yield red("database", f"SQLite lies on a network file system ({kind}), where its locks do not hold",
                      "move the data folder to a local disk, or use PostgreSQL with --database")  # fmt: skip
    chain = settings.tls_cert or settings.data / "tls" / "server.pem"
    if chain.exists():
        yield certificate(chain, own=settings.tls_cert is None)
    try:
        access = json.loads((settings.data / "operator.json").read_text())
    except (OSError, ValueError):
        return
    yield from answers(access["url"], access.get("ca", ""))


def _told(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # of any driver: what is wrong with a database is what is to be told
        said = (str(error) or type(error).__name__).splitlines()[0]
        yield red("database", f"cannot be read: {said}", "see whether it runs, and whether the URL is right")


def database(url: str) -> Iterator[Finding]:
    """Whether the schema is this release's, and SQLite keeps a write-ahead log; nothing is changed."""
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        with closing(sqlite3.connect(f"{Path(parsed.database or '').absolute().as_uri()}?mode=ro", uri=True)) as opened:
            current = opened.execute("SELECT version_num FROM alembic_version").fetchone()[0]
            mode = opened.execute("PRAGMA journal_mode").fetchone()[0]
        if mode != "wal":
            yield yellow("database", f"SQLite keeps a {mode} journal", "start the coordinator once: it sets WAL")
    else:
        engine = create_engine(parsed.set(drivername="postgresql+psycopg"))
        with engine.connect() as connection:
            current = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one()
        engine.dispose()
    yield schema(current)


def schema(current: str) -> Finding:
    from murmur.coordinator.store.migrate import revisions

    head, known = revisions()
    if current == head:
        return green("database", f"at this release's schema ({head})")
    if current in known:
        return yellow("database", f"at schema {current}, this release has {head}",
                      "start the coordinator: it upgrades the database; `murmur coordinator backup` first")  # fmt: skip
    return red("database", f"at schema {current}, which this release does not know", "install the newer release again")


def certificate(chain: Path, *, own: bool) -> Finding:
    """How long the server's certificate is good. own: made by the coordinator's CA, which renews it."""
    from cryptography import x509

    found = x509.load_pem_x509_certificate(chain.read_bytes())
    left_s = found.not_valid_after_utc.timestamp() - time.time()
    said = f"the certificate {chain.name} is good until {found.not_valid_after_utc:%F}"
    if left_s > EXPIRES_DAYS * 86_400:
        return green("TLS", said)
    todo = "start the coordinator again: it renews its own" if own else "renew it, and start the coordinator again"
    return red("TLS", said, todo) if left_s < 0 else yellow("TLS", said, todo)


def answers(url: str, ca: str) -> Iterator[Finding]:
    """Whether a coordinator answers and can do its work, and how far its clock is from this one's."""
    import ssl

    import httpx

    try:
        verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=ca) if ca else True
        response = httpx.get(f"{url}/healthz/ready", verify=verify, timeout=5)
        body = response.json()
    except (httpx.HTTPError, OSError, ValueError) as error:
        yield red("coordinator", f"{url} does not answer: {error or type(error).__name__}",
                  "see whether `murmur coordinator serve` runs, and the port is open")  # fmt: skip
        return
    if body.get("troubles"):
        yield red("coordinator", f"{url} answers, but: " + "; ".join(body["troubles"]), "see its log")
    else:
        yield green("coordinator", f"{url} answers and is ready")
    try:
        ahead_s = time.time() - email.utils.parsedate_to_datetime(response.headers.get("date", "")).timestamp()
    except ValueError:
        return
    if abs(ahead_s) > CLOCK_S:
        yield yellow("clock", f"{abs(ahead_s):.0f} s from the coordinator's; at 300 s no signature is accepted",
                     "let NTP set this machine's clock")  # fmt: skip
