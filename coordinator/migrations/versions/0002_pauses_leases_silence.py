"""pauses, leases, and silence told from slowness"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column(
        "client", sa.Column("expected_at", sa.Float(), nullable=True, comment="until then its silence is no news")
    )
    which = "the process of the agent that was last handed work"
    op.add_column("client", sa.Column("instance", sa.String(length=32), nullable=True, comment=which))
    nth = "which of its polls that was"
    op.add_column("client", sa.Column("polled", sa.BigInteger(), nullable=False, server_default="0", comment=nth))
    who = "who paused it; empty: the coordinator, which goes on when it can"
    op.add_column("run", sa.Column("held_by", sa.String(length=64), nullable=True, comment=who))
    why = "and what would let it go on"
    op.add_column("run", sa.Column("held_why", sa.Text(), nullable=False, server_default="", comment=why))
    for name, comment in {
        "heard_at": "last sign of life of any kind",
        "gap_s": "longest time without progress",
    }.items():
        op.add_column("assignment", sa.Column(name, sa.Float(), nullable=False, server_default="0", comment=comment))
    op.execute("UPDATE client SET expected_at = seen_at + 60")
    op.execute("UPDATE assignment SET heard_at = progress_at")
    inline = "a small update itself, until it is summed; null: it is the blob of its hash"
    op.add_column("update", sa.Column("data", sa.LargeBinary(), nullable=True, comment=inline))
    op.create_table(
        "lease",
        sa.Column(
            "name",
            sa.String(length=16),
            nullable=False,
            comment="what its holder alone may do; rounds: move them on",
        ),
        sa.Column("holder", sa.String(length=64), nullable=False),
        sa.Column(
            "fence",
            sa.BigInteger(),
            nullable=False,
            comment="grows with each new holder; checked in every write it makes",
        ),
        sa.Column("until", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_lease")),
    )
