import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from murmur.coordinator.store import Store

from .. import postgres
from .harness import Agent, World

numbers = count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    with postgres.server() as url:
        yield url


@pytest.fixture(scope="session")
def postgres_template(postgres_server: str) -> Iterator[str]:
    """The name of a database that the migrations made, for others to be copied from."""
    name = f"migrated{os.getpid()}"
    with postgres.database(postgres_server, name) as url:
        Store(url, clock=lambda: 0.0).close()
        yield name


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without rows: each test runs on both kinds."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'murmur.db'}"
        return
    if postgres.binaries() is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    server, template = (request.getfixturevalue(f"postgres_{what}") for what in ("server", "template"))
    with postgres.database(server, f"test{os.getpid()}_{next(numbers)}", template) as url:
        yield url


@pytest.fixture
def world(tmp_path: Path, database: str) -> Iterator[World]:
    world = World(tmp_path, database)
    yield world
    world.store.close()


@pytest.fixture
def agents(world: World) -> list[Agent]:
    return [world.agent(name) for name in ("a", "b", "c", "d")]
