"""Bring a database to the schema of this release; each release's steps lie in `coordinator/migrations`."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from ...protocol.errors import OperatorError

SCRIPTS = Path(__file__).parents[1] / "migrations"
MIGRATIONS_LOCK = 0x6D75726D7573


def migrate(engine: Engine) -> None:
    """Upgrade to the newest schema; a database that is newer than this release raises OperatorError, unchanged."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":  # several processes may start at once; one of them upgrades
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATIONS_LOCK})
        current = MigrationContext.configure(connection).get_current_revision()
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if current is not None and current not in known:
            raise OperatorError(
                f"the database has schema {current!r}, which this release does not know: it was written by a newer one"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
