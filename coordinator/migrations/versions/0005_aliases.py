"""aliases of model versions, and the code that a run was started with"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    what = "SHA-256 of the starter's task file"
    op.add_column("run", sa.Column("code", sa.String(length=64), nullable=False, server_default="", comment=what))
    op.create_table(
        "alias",
        sa.Column(
            "model", sa.String(length=64), nullable=False, comment="the name of the runs whose versions it names"
        ),
        sa.Column("alias", sa.String(length=64), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False, comment="its moves, from 1; the newest says where it points"),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("run", sa.String(length=32), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("before", sa.Integer(), nullable=False, comment="the move that a rollback returns to; 0: none"),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("by", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("model", "alias", "n", name=op.f("pk_alias")),
        sa.ForeignKeyConstraint(
            ["run", "version"], ["version.run", "version.n"], name=op.f("fk_alias_run_version_version")
        ),
        sa.CheckConstraint("action IN ('promoted', 'rolled_back')", name=op.f("ck_alias_action")),
    )
