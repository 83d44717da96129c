"""the audit log, researchers, and what is known of sessions and API tokens"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

ROLES = "role IN ('admin', 'researcher', 'viewer')"


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("n", sa.BigInteger(), nullable=False, autoincrement=False, comment="from 1, without a gap"),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column(
            "by", sa.String(length=64), nullable=False, comment="the account, or the client; operator: on this machine"
        ),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False, comment="what it was done to"),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("before", sa.String(length=64), nullable=False, comment="sha256 of entry n - 1; empty in the first"),
        sa.Column("sha256", sa.String(length=64), nullable=False, comment="protocol.audit.AuditView.digest"),
        sa.PrimaryKeyConstraint("n", name=op.f("pk_audit")),
    )
    what_for = "what an API token is for"
    op.add_column("credential", sa.Column("name", sa.String(64), nullable=False, server_default="", comment=what_for))
    less = "of an API token that may less than its account; null: as much"
    op.add_column("credential", sa.Column("role", sa.String(length=16), comment=less))
    op.add_column("credential", sa.Column("used_at", sa.Float(), comment="to within a minute"))
    if op.get_bind().dialect.name == "postgresql":
        op.drop_constraint(op.f("ck_account_role"), "account", type_="check")
        op.create_check_constraint(op.f("ck_account_role"), "account", ROLES)
        op.create_check_constraint(op.f("ck_credential_role"), "credential", ROLES)
    else:
        _rebuild()


def _rebuild() -> None:
    """SQLite changes a CHECK by a new table only. What names an account is rebuilt with it, so that no key dangles."""
    op.create_table(
        "account_new",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("password", sa.String(length=256)),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_account")),
        sa.CheckConstraint(ROLES, name=op.f("ck_account_role")),
    )
    op.create_table(
        "credential_new",
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("account", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False, server_default=""),
        sa.Column("role", sa.String(length=16)),
        sa.Column("used_at", sa.Float()),
        sa.PrimaryKeyConstraint("token_hash", name=op.f("pk_credential")),
        sa.ForeignKeyConstraint(["account"], ["account_new.name"], name=op.f("fk_credential_account_account")),
        sa.CheckConstraint("kind IN ('session', 'link', 'api')", name=op.f("ck_credential_kind")),
        sa.CheckConstraint(ROLES, name=op.f("ck_credential_role")),
    )
    op.execute("INSERT INTO account_new SELECT name, role, password, created_at FROM account")
    columns = "token_hash, kind, account, created_at, expires_at, name, role, used_at"
    op.execute(f"INSERT INTO credential_new SELECT {columns} FROM credential")
    op.drop_table("credential")
    op.drop_table("account")
    op.rename_table("account_new", "account")
    op.rename_table("credential_new", "credential")
    op.create_index(op.f("ix_credential_expires_at"), "credential", ["expires_at"])
