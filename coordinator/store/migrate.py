"""Bring a database to the schema of this release; each release's steps lie in `coordinator/migrations`."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

from ...protocol.errors import OperatorError

SCRIPTS = Path(__file__).parents[1] / "migrations"


def migrate(engine: Engine) -> None:
    """Upgrade to the newest schema; a database that is newer than this release raises OperatorError, unchanged."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    with engine.begin() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if current is not None and current not in known:
            raise OperatorError(
                f"the database has schema {current!r}, which this release does not know: it was written by a newer one"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
