"""Bring a database to the schema of this release; each release's steps lie in `coordinator/migrations`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from ...protocol.errors import OperatorError

SCRIPTS = Path(__file__).parents[1] / "migrations"
MIGRATIONS_LOCK = 0x6D75726D7573


@cache
def revisions() -> tuple[str, frozenset[str]]:
    """The schema of this release, and all that it can upgrade from."""
    scripts = ScriptDirectory.from_config(_config())
    return scripts.get_current_head() or "", frozenset(script.revision for script in scripts.walk_revisions())


def current(engine: Engine) -> str:
    """The schema that a database has; empty for one without tables."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision() or ""


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    return config


def migrate(engine: Engine) -> None:
    """Upgrade to the newest schema; a database that is newer than this release raises OperatorError, unchanged."""
    newest, known = revisions()
    config = _config()
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":  # several processes may start at once; one of them upgrades
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATIONS_LOCK})
        found = MigrationContext.configure(connection).get_current_revision()
        if found == newest:
            return
        if found is not None and found not in known:
            raise OperatorError(
                f"the database has schema {found!r}, which this release does not know: it was written by a newer one"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
