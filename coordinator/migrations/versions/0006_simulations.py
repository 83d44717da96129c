"""simulated runs, which another process than the coordinator carries out"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    about = "of a simulated run, what is simulated and how; null: the clients are real"
    op.add_column("run", sa.Column("simulation", sa.JSON(none_as_null=True), comment=about))
    times = "how often a simulated run was begun or gone on with; only the last to do so may write"
    op.add_column("run", sa.Column("fence", sa.Integer(), nullable=False, server_default="0", comment=times))
    kept = "of a simulated round, what the next ones need and no other column has"
    op.add_column("round", sa.Column("simulation", sa.JSON(none_as_null=True), comment=kept))
