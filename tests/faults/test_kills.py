"""kill -9 of the coordinator, again and again within a run: it ends in the model of an undisturbed one."""

import random
import time
from collections.abc import Callable

import pytest

from .federation import Coordinator, Federation, check_exact, finish, recipe


def killed(
    coordinator: Coordinator,
    federation: Federation,
    draw: random.Random,
    *,
    kills: int,
    rounds: int,
    secure: bool,
    longest_s: float,
) -> None:
    coordinator.start()
    federation.open_doors(coordinator)
    run = federation.start_run(coordinator, recipe(rounds, secure=secure))
    for _ in range(kills):
        time.sleep(draw.uniform(0.0, longest_s))
        coordinator.kill()
        coordinator.start()
    view = coordinator.run(run)
    print(f"{kills} kills, then round {view.round} of {rounds}, {view.state}")
    finish(coordinator, run)
    check_exact(coordinator, run, rounds, secure=secure)


@pytest.mark.parametrize(
    ("secure", "kills", "rounds"),
    [pytest.param(False, 4, 3, marks=pytest.mark.slow), (True, 2, 2)],
    ids=["plain", "masked"],
)
def test_a_coordinator_killed_at_random_instants_ends_in_the_same_model(
    coordinator: Callable[..., Coordinator], federation: Federation, draw: random.Random, secure, kills, rounds
):
    killed(coordinator(), federation, draw, kills=kills, rounds=rounds, secure=secure, longest_s=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "masked"])
def test_two_hundred_kills_end_in_the_same_model(
    coordinator: Callable[..., Coordinator], federation: Federation, draw: random.Random, secure
):
    killed(coordinator(), federation, draw, kills=200, rounds=60, secure=secure, longest_s=2.0)
