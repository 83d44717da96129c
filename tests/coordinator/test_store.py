"""What the store promises on either database: the schema is the migrations', and no concurrent write is lost."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select, text, update

from murmur.coordinator.store import Store, tables
from murmur.coordinator.store.database import Database
from murmur.coordinator.store.migrate import migrate
from murmur.protocol.errors import Conflict, NotAuthenticated, OperatorError, Replayed
from murmur.protocol.messages import AnswerKind

from .harness import Agent, World


def at_once(count: int, work: Callable[[], object]) -> list[object]:
    """What `count` threads get that do the same at the same time; an exception counts as what it is."""
    found: list[object] = []
    gate = threading.Barrier(count)

    def run() -> None:
        gate.wait()
        try:
            found.append(work())
        except Exception as error:
            found.append(type(error))

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_the_migrations_make_exactly_the_tables(world: World):
    with world.store.db.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []


def test_opening_a_store_twice_changes_nothing(world: World):
    again = Store(world.url, clock=lambda: world.now)
    again.close()


def test_a_database_of_a_newer_release_is_refused_and_left_alone(world: World):
    with world.store.db.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(OperatorError, match="newer"):
        migrate(world.store.db.engine)


def test_other_databases_are_refused_by_name():
    with pytest.raises(OperatorError, match="mysql"):
        Database("mysql://localhost/x", clock=lambda: 0.0)


def test_no_read_then_write_is_lost_on_sqlite(tmp_path: Path):
    world = World(tmp_path)
    run = world.start(secure={"on": False})

    def count() -> None:
        for _ in range(25):
            with world.store.db.write() as t:
                before = t.scalar(select(tables.run.c.reason).where(tables.run.c.id == run))
                t.execute(update(tables.run).values(reason=str(int(before or 0) + 1)))

    assert at_once(8, count) == [None] * 8
    assert world.store.runs.detail(run).run.reason == "200"
    world.store.close()


def test_the_same_answer_from_many_connections_is_accepted_once(world: World, agents: list[Agent]):
    world.start()
    world.tick()
    agents[0].poll()
    a = agents[0].assignment
    found = at_once(8, lambda: world.store.assignments.answer(a.id, a.fence, AnswerKind.ADVERT, "{}"))
    assert sorted(map(str, found)) == ["False"] * 7 + ["True"]


def test_different_updates_from_many_connections_leave_one(world: World, agents: list[Agent]):
    world.start(secure={"on": False})
    world.tick()
    agents[0].poll()
    a = agents[0].assignment
    digests = iter(f"{n:064x}" for n in range(8))

    def accept() -> bool:
        return world.store.assignments.accept_update(
            a.id, a.fence, sha256=next(digests), size=1, weight=1.0, metrics={}
        )

    found = at_once(8, accept)
    assert found.count(True) == 1 and found.count(Conflict) == 7


def test_a_nonce_is_taken_once_by_many_connections(world: World):
    found = at_once(8, lambda: world.store.clients.use_nonce("a", "n", lifetime_s=60))
    assert found.count(None) == 1 and found.count(Replayed) == 7


def test_an_invitation_admits_one_of_many_that_race_for_it(world: World):
    world.store.clients.invite("a", "hash", by="admin", lifetime_s=60)
    keys = iter(bytes([n]) * 32 for n in range(8))
    found = at_once(8, lambda: world.store.clients.enrol("a", "hash", next(keys), {}))
    assert found.count(None) == 1
    assert set(found) <= {None, NotAuthenticated, Conflict}
    assert len(world.store.clients.all()) == 1


def test_events_are_read_in_the_order_of_their_commits(world: World):
    """A reader that goes on from the last id it saw never misses one, however the writers interleave."""
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set() or world.store.events.since(seen[-1] if seen else 0):
            seen.extend(e.id for e in world.store.events.since(seen[-1] if seen else 0))

    reader = threading.Thread(target=read)
    reader.start()

    def write() -> None:
        for _ in range(20):
            with world.store.db.write() as t:
                t.append("log")

    at_once(4, write)
    done.set()
    reader.join()
    assert len([e for e in world.store.events.since(0) if e.kind == "log"]) == 80
    assert seen == [e.id for e in world.store.events.since(0)]
