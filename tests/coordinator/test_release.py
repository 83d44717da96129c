"""The previous release's data folder, taken in the middle of two runs: this release goes on from it to the right model.

The models are known numbers, from the updates that `fixtures/make_release.py` and these tests send:

    plain   round 1  (1 + 2 + 3 + 4) / 4                                = 2.5
            round 2  2.5 + (1 * 1 + 1 * 3 + 4 * 0.5 + 2 * 0.25) / 8     = 3.3125
            round 3  3.3125 + (1 + 2 + 3 + 2) / 4                       = 5.3125
    masked  round 1  (1 * 0.5 + 2 * -0.25 + 1 * 0.25) / 4               = 0.0625
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, MetaData, Table, create_engine, insert, inspect, select, text

from murmur.coordinator.store.migrate import SCRIPTS
from murmur.privacy.verification import verify
from murmur.protocol.messages import StepKind
from murmur.protocol.tensors import masked_layout

from ..fixtures.release import FOLDER, Member, recall, restore
from .harness import MODEL, World, masked_round, plain_file

DAY_S = 86_400.0


@pytest.fixture
def postgres_template() -> str:
    """Nothing: here the migrations are what is tested."""
    return "template1"


@pytest.fixture
def released(tmp_path: Path, database: str) -> tuple[str, dict[str, Any]]:
    """(the URL of a database with the old release's rows, what its agents knew); blobs lie in `tmp_path`."""
    known = restore(tmp_path)
    if database.startswith("postgresql"):
        copy_rows(tmp_path / "murmur.db", database)
    return database, known


def copy_rows(old: Path, url: str) -> None:
    """Bring a PostgreSQL database to the first schema and put a SQLite file's rows into it."""
    target, source = create_engine(url), create_engine(f"sqlite:///{old}")
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    with target.begin() as c, source.connect() as rows:
        config.attributes["connection"] = c
        command.upgrade(config, "0001")
        there, here = MetaData(), MetaData()
        there.reflect(c)
        here.reflect(rows)
        for table in there.sorted_tables:
            if table.name == "alembic_version":
                continue
            values = [dict(row) for row in rows.execute(select(here.tables[table.name])).mappings()]
            if values:
                c.execute(insert(table), values)
        c.execute(text("SELECT setval(pg_get_serial_sequence('event', 'id'), (SELECT max(id) FROM event))"))
    target.dispose()
    source.dispose()


@pytest.fixture
def upgraded(released: tuple[str, dict[str, Any]], tmp_path: Path) -> Iterator[tuple[World, dict[str, Any]]]:
    """This release's coordinator, started on the old folder a day later."""
    url, known = released
    world = World(tmp_path, url)
    world.now = known["now"] + DAY_S
    world.store.rounds.resume()
    yield world, known
    world.store.close()


def revision(url: str) -> str:
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as c:
        found = c.scalar(text("SELECT version_num FROM alembic_version"))
    engine.dispose()
    return str(found)


def test_the_fixture_has_the_schema_of_its_release(released: tuple[str, dict[str, Any]]):
    url, known = released
    assert revision(url) == "0001"
    engine = create_engine(url)
    assert "run" in inspect(engine).get_table_names() and known["plain"]["run"] == "run0"
    engine.dispose()


def everybody(world: World, known: dict[str, Any]) -> dict[str, Member]:
    return {name: recall(world, name, agent, agent.get("said", {})) for name, agent in known["agents"].items()}


def model(world: World, run: str, n: int) -> np.ndarray[Any, Any]:
    versions = world.store.runs.versions(run)
    assert versions[0].n == n
    found = world.model(run)
    return np.concatenate([found["b"].reshape(-1), found["w"].reshape(-1)])


def test_a_plain_run_of_the_previous_release_ends_in_the_right_model(upgraded: tuple[World, dict[str, Any]]):
    world, known = upgraded
    run, agents = known["plain"]["run"], everybody(world, known["plain"])
    b, c, d = agents["b"], agents["c"], agents["d"]
    np.testing.assert_array_equal(model(world, run, 1), 2.5)
    data = plain_file(MODEL.update(), 3.0)
    state = world.conversation.upload_state("b", b.assignment.id, b.assignment.fence)
    assert (state.offset, state.size) == (len(data) // 2, len(data)), "the upload goes on where it stood"
    b.upload_plain(3.0, 1.0)
    c.upload_plain(0.5, 4.0)
    assert d.poll() is not None
    d.upload_plain(0.25, 2.0)
    agents["a"].work = None
    together(world, list(agents.values()))
    np.testing.assert_array_equal(model(world, run, 2), 3.3125)
    for agent, value in zip(agents.values(), (1.0, 2.0, 3.0, 2.0), strict=True):
        assert agent.poll() is not None
        agent.upload_plain(value, 1.0)
    together(world, list(agents.values()))
    np.testing.assert_array_equal(model(world, run, 3), 5.3125)
    for agent in agents.values():
        assert agent.poll() is not None, "the run ends with an evaluation"
        agent.upload_plain(0.0, 1.0)
    world.tick()
    detail = world.store.runs.detail(run)
    assert detail.run.state == "finished"
    assert [r.state for r in detail.rounds] == ["committed"] * 4
    assert sorted(p.client for p in detail.rounds[1].assignments if p.state == "counted") == ["a", "b", "c", "d"]
    texts = {str(m.round): world.store.manifests.text(run, m.round) for m in world.store.manifests.of(run)}
    report = verify(texts)  # the old release wrote none: the chain begins with the round that the upgrade found open
    assert report.ok and (report.chains[0].first, report.chains[0].last) == (2, 4)
    assert "starts_late" in {note.code for note in report.notes}


def test_a_masked_run_of_the_previous_release_ends_in_the_right_model(upgraded: tuple[World, dict[str, Any]]):
    world, known = upgraded
    run, agents = known["masked"]["run"], everybody(world, known["masked"])
    said = known["masked"]["agents"]["k"]["said"]
    mask_again(world, agents["k"], said["inbox"], 0.5, 1)
    agents["l"].upload_masked(-0.25, 2)
    agents["m"].upload_masked(0.25, 1)
    for stage in ("agree", "reveal"):
        world.tick()
        for agent in agents.values():
            getattr(agent, stage)()
    together(world, list(agents.values()))
    np.testing.assert_allclose(model(world, run, 1), 0.0625, atol=2e-6)
    masked_round(world, list(agents.values()), [0.0] * 3, [0] * 3)
    assert world.store.runs.detail(run).run.state == "finished"


def mask_again(world: World, agent: Member, inbox: str, value: float, weight: int) -> None:
    """Bring a session behind its upload, which lies at the coordinator: this release's masks are that one's."""
    assert agent.session is not None and agent.assignment.secure is not None
    agent.session.open(inbox)
    context = agent.context()
    layout = masked_layout(context.dim, context.aux)
    block = agent.block(MODEL)
    aux = block.encode(weight=weight, clipped=0, metrics={"loss": (2.0 * weight, weight)}, integers=np.zeros(0, int))
    pieces = agent.session.mask([np.full(context.dim, value, np.float32)], weight=weight, aux=aux)
    data = layout.header() + b"".join(bytes(piece) for piece in pieces)
    assert world.blobs.has(hashlib.sha256(data).hexdigest()), "the masks are not those of the previous release"
    agent.seen = StepKind.INBOX


def together(world: World, agents: list[Member]) -> None:
    """Everybody is online when the next round chooses its cohort, and nobody of another run."""
    world.now += 100.0
    for agent in agents:
        agent.poll(busy=agent.work is not None)
    world.tick()


def test_every_row_of_the_previous_release_is_still_there(upgraded: tuple[World, dict[str, Any]], tmp_path: Path):
    """An upgrade adds columns and tables; what a row said, it says still."""
    world, _ = upgraded
    old = create_engine("sqlite://")
    raw = old.raw_connection()
    assert isinstance(raw.driver_connection, sqlite3.Connection)
    raw.driver_connection.executescript((FOLDER / "murmur.sql").read_text())
    before, after = MetaData(), MetaData()
    with old.connect() as a, world.store.db.engine.connect() as b:
        before.reflect(a)
        after.reflect(b)
        for name, table in before.tables.items():
            if name in ("alembic_version", "sqlite_sequence"):
                continue
            # Coming back counts every deadline anew, in `attempt.state_at`; nothing else has changed.
            columns = [column.name for column in table.columns if (name, column.name) != ("attempt", "state_at")]
            assert rows(a, table, columns) == rows(b, after.tables[name], columns), name
    raw.close()
    old.dispose()


def rows(connection: Connection, table: Table, columns: list[str]) -> list[Any]:
    query = select(*(table.c[name] for name in columns)).order_by(*(table.c[key.name] for key in table.primary_key))
    return list(connection.execute(query))
