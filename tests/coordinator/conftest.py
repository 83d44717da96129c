from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import Agent, World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.store.close()


@pytest.fixture
def agents(world: World) -> list[Agent]:
    return [world.agent(name) for name in ("a", "b", "c", "d")]
