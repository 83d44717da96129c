"""A consistent copy of a coordinator while it runs: database, blobs and the CA that its agents trust.

Blobs never change, so they are copied first, then a snapshot of the database, then what the snapshot names besides. A
blob that was made and deleted in between is noticed, and the copy is taken again.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from ..protocol.errors import NotFound, OperatorError
from .blobs import Blobs, FolderBlobs, open_blobs
from .settings import Settings
from .store import Store

TRIES = 5
DATABASE = "murmur.db"


def backup(settings: Settings, to: Path) -> int:
    """Copy a coordinator's data, running or not, to a new folder; returns how many blobs it holds.

    The folder holds the CA's key and every model: it is made for its owner alone. Raises OperatorError for a folder
    that exists, for data that is not there, and for PostgreSQL, which has better tools of its own.
    """
    source = settings.data / DATABASE
    if settings.database:
        raise OperatorError(
            "the database is not in the data folder: copy it with its own tools (pg_dump), then the blobs folder"
        )
    if not source.exists():
        raise OperatorError(f"no coordinator's data in {settings.data}")
    try:
        to.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise OperatorError(f"{to} exists already: a backup is a new folder") from None
    if (settings.data / "tls").exists():
        shutil.copytree(settings.data / "tls", to / "tls")
    blobs = open_blobs(settings.blobs_location, settings.data / "cache")
    copied = FolderBlobs(to / "blobs")
    for _ in range(TRIES):
        _copy(blobs, copied, blobs.held())
        named = _snapshot(source, to / DATABASE)
        _copy(blobs, copied, named)
        if all(copied.has(sha256) for sha256 in named):
            for sha256 in copied.held() - named:
                copied.delete(sha256)
            return len(named)
    raise OperatorError(
        f"the data changed faster than it could be copied, {TRIES} times: try again in a quieter moment"
    )


def restore(source: Path, settings: Settings) -> None:
    """Make a data folder from a backup; a coordinator that is started on it goes on where the backup was taken.

    Raises OperatorError for a folder that is not empty, and for a backup that is not one.
    """
    if not (source / DATABASE).exists():
        raise OperatorError(f"{source} is no backup: it has no {DATABASE}")
    if settings.data.exists() and any(settings.data.iterdir()):
        raise OperatorError(f"{settings.data} is not empty: restore to a new folder")
    shutil.copytree(source, settings.data, dirs_exist_ok=True)


def _snapshot(source: Path, to: Path) -> set[str]:
    """Copy the database as of one moment; returns the blobs that it names."""
    to.unlink(missing_ok=True)
    with closing(sqlite3.connect(source, timeout=30)) as connection:
        connection.execute("VACUUM INTO ?", (str(to),))
    store = Store(f"sqlite:///{to}", clock=time.time)
    try:
        return store.rounds.named_blobs()
    finally:
        store.close()
        for rest in ("-wal", "-shm"):
            to.with_name(to.name + rest).unlink(missing_ok=True)


def _copy(blobs: Blobs, to: Blobs, wanted: set[str]) -> None:
    """Copy the wanted blobs that are there; one that is deleted under our hands is left out."""
    for sha256 in sorted(wanted):
        if to.has(sha256) or not blobs.has(sha256):
            continue
        with to.new() as path:
            try:
                shutil.copyfile(blobs.path(sha256), path)
            except (FileNotFoundError, NotFound):
                continue
            to.adopt(path)
