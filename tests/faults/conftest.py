import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .federation import SITES, Coordinator, Federation, Launcher


@pytest.fixture
def draw() -> random.Random:
    """Randomness by a seed that is printed; MURMUR_SEED repeats a test that failed."""
    seed = int(os.environ.get("MURMUR_SEED") or random.randrange(1 << 32))
    print(f"MURMUR_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """The three agents, started once."""
    federation = Federation(tmp_path_factory.mktemp("sites"))
    federation.rest()
    federation.start(*SITES)
    yield federation
    federation.close()


@pytest.fixture
def federation(agents: Federation, request: pytest.FixtureRequest) -> Iterator[Federation]:
    """The agents, sent home after the test; their logs are shown when it fails."""
    agents.rest()
    yield agents
    agents.rest()
    for name in SITES:
        print(f"== {name}\n{agents.log(name)[-2500:]}")


@pytest.fixture(scope="module")
def lasting(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory, agents: Federation) -> Iterator[Coordinator]:
    """One coordinator for a module whose tests leave it alive."""
    one = Coordinator(launcher, tmp_path_factory.mktemp("lasting") / "coordinator", port=free_port())
    agents.know(one.url)
    yield one.start()
    assert one.end() == 0
    print(f"== coordinator\n{one.log[-4000:]}")


@pytest.fixture
def coordinator(launcher: Launcher, tmp_path: Path, federation: Federation) -> Iterator[Callable[..., Coordinator]]:
    """Makes coordinators that know the agents; each is ended with the test."""
    made: list[Coordinator] = []

    def make(name: str = "coordinator", *, known: bool = False, **options: object) -> Coordinator:
        new = Coordinator(launcher, tmp_path / name, port=free_port(), **options)
        if not known and not any(other.url == new.url for other in made):
            federation.know(new.url)
        made.append(new)
        return new

    yield make
    for one in made:
        if one.running:
            one.kill()
        print(f"== {one.data.name}\n{one.log[-4000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
