"""manifests, privacy events and what they come to, and groups of clients"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    attempt = ("run", "round", "attempt")
    for table, columns in {
        "manifest": (
            sa.Column("body", sa.Text(), nullable=False, comment="canonical JSON: privacy.manifest.Manifest"),
            sa.Column("sha256", sa.String(length=64), nullable=False, comment="of the body"),
        ),
        "privacy_event": (
            sa.Column("event", sa.JSON(), nullable=False, comment="what was spent: privacy.dp's event, as JSON"),
        ),
    }.items():
        op.create_table(
            table,
            sa.Column("run", sa.String(length=32), nullable=False),
            sa.Column("round", sa.Integer(), nullable=False),
            sa.Column("attempt", sa.Integer(), nullable=False),
            *columns,
            sa.Column("at", sa.Float(), nullable=False),
            sa.PrimaryKeyConstraint(*attempt, name=op.f(f"pk_{table}")),
            sa.ForeignKeyConstraint(
                attempt,
                ["attempt.run", "attempt.round", "attempt.n"],
                name=op.f(f"fk_{table}_run_round_attempt_attempt"),
            ),
        )
    for table, column, why in (
        ("version", "weight", "of a masked round's updates together; 0 of a plain one"),
        (
            "attempt",
            "total_weight",
            "what the weights of a masked attempt may add up to; 0: no bound but max_weight for each",
        ),
    ):
        op.add_column(table, sa.Column(column, sa.BigInteger(), nullable=False, server_default="0", comment=why))
    comes_to = "what its privacy events come to, as shown: views.PrivacyView"
    op.add_column("run", sa.Column("epsilon", sa.JSON(none_as_null=True), comment=comes_to))
    bound = "L2 bound of its updates, where it is adaptive"
    op.add_column("round", sa.Column("clip_norm", sa.Float(), comment=bound))
    which = "which of the run's groups, from 1; 0: it has none"
    op.add_column("assignment", sa.Column("group_n", sa.Integer(), nullable=False, server_default="0", comment=which))
