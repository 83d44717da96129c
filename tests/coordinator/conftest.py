from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from .. import postgres
from .harness import Agent, World

numbers = count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database: each test runs on both kinds."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'murmur.db'}"
        return
    if postgres.binaries() is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    with postgres.database(request.getfixturevalue("postgres_server"), f"test{next(numbers)}") as url:
        yield url


@pytest.fixture
def world(tmp_path: Path, database: str) -> Iterator[World]:
    world = World(tmp_path, database)
    yield world
    world.store.close()


@pytest.fixture
def agents(world: World) -> list[Agent]:
    return [world.agent(name) for name in ("a", "b", "c", "d")]
