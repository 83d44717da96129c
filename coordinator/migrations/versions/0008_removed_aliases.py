"""an alias may be removed"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

ACTIONS = "action IN ('promoted', 'rolled_back', 'removed')"


def upgrade() -> None:
    with op.batch_alter_table(
        "alias"
    ) as alias:  # SQLite changes a CHECK by a new table only; nothing points at this one
        if op.get_bind().dialect.name == "postgresql":
            alias.drop_constraint(op.f("ck_alias_action"), type_="check")
        alias.create_check_constraint(op.f("ck_alias_action"), sa.text(ACTIONS))
