"""when each phase of a client's part in a round began"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    since = "[phase, since when], in order"
    op.add_column("assignment", sa.Column("phases", sa.JSON(), nullable=False, server_default="[]", comment=since))
