"""A real PostgreSQL for tests: MURMUR_TEST_POSTGRES_URL, or the system's binaries run as a user that is not root."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, text

OPTIONS = "-c fsync=off -c full_page_writes=off -c listen_addresses= -c max_connections=300"


def binaries() -> Path | None:
    """The folder of the newest installed server, or None."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), key=lambda p: float(p.split("/")[4]))
    return Path(found[-1]).parent if found else None


@dataclass(frozen=True)
class Server:
    """A server of our own: the URL of its database `postgres`, and how to end it as a crash does and start it again."""

    url: str
    restart: Callable[[], None]


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server's database `postgres`, where this user may create databases."""
    if url := os.environ.get("MURMUR_TEST_POSTGRES_URL"):
        yield url
        return
    with own_server("-c synchronous_commit=off") as own:
        yield own.url


@contextmanager
def own_server(options: str = "") -> Iterator[Server]:
    """A server that keeps what it acknowledged when its processes die, but not when the machine does."""
    programs = binaries()
    assert programs is not None
    folder = Path(tempfile.mkdtemp(prefix="murmur-pg-", dir="/tmp"))  # sockets have short paths
    user = _user()
    if user:
        shutil.chown(folder, user)
    data = folder / "data"

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, user=user, cwd=folder, env={"LC_ALL": "C", "PATH": ""})

    run("initdb", "-D", str(data), "-A", "trust", "-U", "murmur", "-E", "UTF8", "--no-sync")
    started = ("-D", str(data), "-w", "-l", str(folder / "log"), "-o", f"{OPTIONS} {options} -k {folder}")
    run("pg_ctl", *started, "start")
    try:
        url = f"postgresql+psycopg://murmur@/postgres?host={folder}"
        yield Server(url, restart=lambda: run("pg_ctl", *started, "-m", "immediate", "restart"))
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def database(url: str, name: str, template: str = "template1") -> Iterator[str]:
    """A new database on the server, empty or a copy of `template`, dropped at the end."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)  # a test may restart the server
    with engine.connect() as c:
        c.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    try:
        yield url.replace("/postgres?", f"/{name}?")
    finally:
        with engine.connect() as c:
            c.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        engine.dispose()


def _user() -> str | None:
    """PostgreSQL refuses root: the user that its package made, or nobody."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"
