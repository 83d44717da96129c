"""Every table of the coordinator. Times are seconds since 1970 in UTC; tokens are stored as SHA-256 only.

A row is the truth: what a process knows beside these rows and the blobs they name, it can lose at any instant.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _one_of(column: str, *values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


client = Table(
    "client",
    metadata,
    Column("id", String(64), primary_key=True, comment="the name it enrolled under"),
    Column("public_key", LargeBinary(32), nullable=False, unique=True, comment="Ed25519 identity"),
    Column("state", String(16), nullable=False),
    Column("info", JSON, nullable=False, comment="what the agent says of itself"),
    Column("created_at", Float, nullable=False),
    Column("seen_at", Float, comment="last authenticated request, to within a few seconds"),
    Column("expected_at", Float, comment="until then its silence is no news"),
    Column("decided_by", String(64), comment="who approved or revoked it"),
    Column("instance", String(32), comment="the process of the agent that was last handed work"),
    Column("polled", BigInteger, nullable=False, default=0, server_default="0", comment="which of its polls that was"),
    _one_of("state", "pending", "active", "revoked"),
)

invitation = Table(
    "invitation",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("name", String(64), nullable=False, comment="the client that may enrol with it"),
    Column("created_by", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("used_at", Float, comment="set in the transaction that enrols"),
)

bearer = Table(
    "bearer",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("client", ForeignKey("client.id"), nullable=False),
    Column("expires_at", Float, nullable=False, index=True),
)

nonce = Table(
    "nonce",
    metadata,
    Column("client", String(64), primary_key=True),
    Column("nonce", String(64), primary_key=True, comment="of a signed request; seen once, kept until it is too old"),
    Column("expires_at", Float, nullable=False, index=True),
)

account = Table(
    "account",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("password", String(256), comment="Argon2id PHC string; null: no login by password"),
    Column("created_at", Float, nullable=False),
    _one_of("role", "admin", "researcher", "viewer"),
)

credential = Table(
    "credential",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("kind", String(16), nullable=False, comment="session: cookie; link: one-time login; api: bearer token"),
    Column("account", ForeignKey("account.name"), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False, index=True),
    Column("name", String(64), nullable=False, default="", server_default="", comment="what an API token is for"),
    Column("role", String(16), comment="of an API token that may less than its account; null: as much"),
    Column("used_at", Float, comment="to within a minute"),
    _one_of("kind", "session", "link", "api"),
    _one_of("role", "admin", "researcher", "viewer"),
)

audit = Table(
    "audit",
    metadata,
    Column("n", BigInteger, primary_key=True, autoincrement=False, comment="from 1, without a gap"),
    Column("at", Float, nullable=False),
    Column("by", String(64), nullable=False, comment="the account, or the client; operator: on this machine"),
    Column("action", String(64), nullable=False),
    Column("subject", String(200), nullable=False, comment="what it was done to"),
    Column("details", JSON, nullable=False),
    Column("before", String(64), nullable=False, comment="sha256 of entry n - 1; empty in the first"),
    Column("sha256", String(64), nullable=False, comment="protocol.audit.AuditView.digest"),
)

run = Table(
    "run",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, default="", comment="why it failed or was stopped"),
    Column("recipe", JSON, nullable=False, comment="protocol.recipe.Recipe, every default written out"),
    Column("created_at", Float, nullable=False),
    Column("created_by", String(64), nullable=False),
    Column("finished_at", Float),
    Column("held_by", String(64), comment="who paused it; empty: the coordinator, which goes on when it can"),
    Column("held_why", Text, nullable=False, default="", server_default="", comment="and what would let it go on"),
    Column("epsilon", JSON(none_as_null=True), comment="what its privacy events come to, as shown: views.PrivacyView"),
    Column(
        "code", String(64), nullable=False, default="", server_default="", comment="SHA-256 of the starter's task file"
    ),
    Column(
        "simulation",
        JSON(none_as_null=True),
        comment="of a simulated run, what is simulated and how; null: the clients are real",
    ),
    Column(
        "fence",
        Integer,
        nullable=False,
        default=0,
        server_default="0",
        comment="how often a simulated run was begun or gone on with; only the last to do so may write",
    ),
    _one_of("state", "running", "finished", "failed", "stopped"),
)

version = Table(
    "version",
    metadata,
    Column("run", ForeignKey("run.id"), primary_key=True),
    Column("n", Integer, primary_key=True, comment="0 is what the run started from; n came out of round n"),
    Column("sha256", String(64), nullable=False, index=True, comment="blob with the model"),
    Column("bytes", BigInteger, nullable=False),
    Column("parent", String(64), comment="sha256 of the version it was made from"),
    Column("optimizer", String(64), comment="blob with the server optimizer's state after this round"),
    Column("contributors", JSON, nullable=False, comment="ids of the clients whose update is in it"),
    Column(
        "weight",
        BigInteger,
        nullable=False,
        default=0,
        server_default="0",
        comment="of a masked round's updates together; 0 of a plain one",
    ),
    Column("created_at", Float, nullable=False),
)

alias = Table(
    "alias",
    metadata,
    Column("model", String(64), primary_key=True, comment="the name of the runs whose versions it names"),
    Column("alias", String(64), primary_key=True),
    Column("n", Integer, primary_key=True, comment="its moves, from 1; the newest says where it points"),
    Column("action", String(16), nullable=False),
    Column("run", String(32), nullable=False),
    Column("version", Integer, nullable=False),
    Column("before", Integer, nullable=False, comment="the move that a rollback returns to; 0: none"),
    Column("at", Float, nullable=False),
    Column("by", String(64), nullable=False),
    ForeignKeyConstraint(["run", "version"], ["version.run", "version.n"]),
    _one_of("action", "promoted", "rolled_back", "removed"),
)

metric = Table(
    "metric",
    metadata,
    Column("run", String(32), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("value", Float, nullable=False, comment="sum / count over all clients that reported"),
    Column("count", Float, nullable=False, comment="examples behind it"),
    ForeignKeyConstraint(["run", "version"], ["version.run", "version.n"]),
)

round_ = Table(
    "round",
    metadata,
    Column("run", ForeignKey("run.id"), primary_key=True),
    Column("n", Integer, primary_key=True, comment="from 1"),
    Column("kind", String(16), nullable=False),
    Column("attempt", Integer, nullable=False, comment="the attempt that is under way or that ended the round"),
    Column("opened_at", Float, nullable=False),
    Column("closed_at", Float),
    Column("clip_norm", Float, comment="L2 bound of its updates, where it is adaptive"),
    Column(
        "simulation",
        JSON(none_as_null=True),
        comment="of a simulated round, what the next ones need and no other column has",
    ),
    _one_of("kind", "train", "evaluate"),
)

attempt = Table(
    "attempt",
    metadata,
    Column("run", String(32), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("n", Integer, primary_key=True, comment="from 1"),
    Column("state", String(16), nullable=False, comment="rounds.State"),
    Column("reason", Text, nullable=False, default="", comment="why it failed"),
    Column("threshold", Integer, nullable=False, default=0, comment="shares that unmask; 0 in a plain round"),
    Column(
        "total_weight",
        BigInteger,
        nullable=False,
        default=0,
        server_default="0",
        comment="what the weights of a masked attempt may add up to; 0: no bound but max_weight for each",
    ),
    Column("opened_at", Float, nullable=False),
    Column("state_at", Float, nullable=False, comment="when it came into its state"),
    Column("closed_at", Float),
    ForeignKeyConstraint(["run", "round"], ["round.run", "round.n"]),
    _one_of(
        "state",
        "selecting",
        "keys",
        "shares",
        "collecting",
        "agreeing",
        "revealing",
        "aggregating",
        "committed",
        "failed",
    ),
    Index("ix_attempt_open", "closed_at"),
)

assignment = Table(
    "assignment",
    metadata,
    Column("id", String(200), primary_key=True, comment="run.round.attempt.client"),
    Column("run", String(32), nullable=False),
    Column("round", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("client", ForeignKey("client.id"), nullable=False, index=True),
    Column("state", String(16), nullable=False),
    Column("fence", Integer, nullable=False, default=0, comment="times handed out; only the last holder may write"),
    Column("phase", String(16), nullable=False, default="", comment="what the agent says it is doing"),
    Column("step", BigInteger, nullable=False, default=0),
    Column("steps", BigInteger, nullable=False, default=0),
    Column("bytes", BigInteger, nullable=False, default=0),
    Column("reason", Text, nullable=False, default="", comment="why it failed or was dropped"),
    Column("offered_at", Float, nullable=False),
    Column("progress_at", Float, nullable=False, comment="last sign that it came further"),
    Column("heard_at", Float, nullable=False, default=0.0, server_default="0", comment="last sign of life of any kind"),
    Column("gap_s", Float, nullable=False, default=0.0, server_default="0", comment="longest time without progress"),
    Column("lost_at", Float, comment="when we stopped waiting for it"),
    Column("phases", JSON, nullable=False, default=list, server_default="[]", comment="[phase, since when], in order"),
    Column(
        "group_n",
        Integer,
        nullable=False,
        default=0,
        server_default="0",
        comment="which of the run's groups, from 1; 0: it has none",
    ),
    UniqueConstraint("run", "round", "attempt", "client"),
    ForeignKeyConstraint(["run", "round", "attempt"], ["attempt.run", "attempt.round", "attempt.n"]),
    _one_of("state", "offered", "working", "uploaded", "counted", "failed", "dropped"),
)

answer = Table(
    "answer",
    metadata,
    Column("assignment", ForeignKey("assignment.id"), primary_key=True),
    Column("kind", String(16), primary_key=True, comment="messages.AnswerKind"),
    Column("body", Text, nullable=False, comment="as it was signed; the first one counts"),
    Column("at", Float, nullable=False),
)

manifest = Table(
    "manifest",
    metadata,
    Column("run", String(32), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("body", Text, nullable=False, comment="canonical JSON: privacy.manifest.Manifest"),
    Column("sha256", String(64), nullable=False, comment="of the body"),
    Column("at", Float, nullable=False),
    ForeignKeyConstraint(["run", "round", "attempt"], ["attempt.run", "attempt.round", "attempt.n"]),
)

privacy_event = Table(
    "privacy_event",
    metadata,
    Column("run", String(32), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("event", JSON, nullable=False, comment="what was spent: privacy.dp's event, as JSON"),
    Column("at", Float, nullable=False),
    ForeignKeyConstraint(["run", "round", "attempt"], ["attempt.run", "attempt.round", "attempt.n"]),
)

upload = Table(
    "upload",
    metadata,
    Column("assignment", ForeignKey("assignment.id"), primary_key=True),
    Column("fence", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size", BigInteger, nullable=False, comment="bytes; how many are here is the size of the part file"),
)

update = Table(
    "update",
    metadata,
    Column("assignment", ForeignKey("assignment.id"), primary_key=True, comment="the row is the exactly-once guard"),
    Column("sha256", String(64), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("weight", Float, comment="null in a masked round: it lies inside the masks"),
    Column("metrics", JSON, comment="null in a masked round"),
    Column("received_at", Float, nullable=False),
    Column("data", LargeBinary, comment="a small update itself, until it is summed; null: it is the blob of its hash"),
)

event = Table(
    "event",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("run", String(32), index=True),
    Column("kind", String(32), nullable=False),
    Column("data", JSON, nullable=False),
    sqlite_autoincrement=True,
)

lease = Table(
    "lease",
    metadata,
    Column("name", String(16), primary_key=True, comment="what its holder alone may do; rounds: move them on"),
    Column("holder", String(64), nullable=False),
    Column("fence", BigInteger, nullable=False, comment="grows with each new holder; checked in every write it makes"),
    Column("until", Float, nullable=False),
)
