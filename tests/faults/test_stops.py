"""Processes that stand still for a while (a suspended machine, a debugger, a disk that hangs) and go on."""

import os
import random
import signal
import time

import pytest

from murmur.coordinator.conductor import AWAY_S

from .door import Weather
from .federation import SITES, Coordinator, Federation, check_exact, finish, recipe, wait_until

PATIENCE_S = 2.0


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "masked"])
def test_nobody_is_dropped_for_the_time_that_the_coordinator_stood_still(
    lasting: Coordinator, federation: Federation, draw: random.Random, secure: bool
):
    one, rounds = lasting, 4
    federation.open_doors(one)
    finish(one, federation.start_run(one, recipe(1)))  # now the trainers have started
    run = federation.start_run(one, recipe(rounds, secure=secure, patience_s=PATIENCE_S))
    wait_until(lambda: one.run(run).round >= 1, 60, "a round")
    time.sleep(draw.uniform(0.0, 0.4))
    one.signal(signal.SIGSTOP)
    time.sleep(AWAY_S + PATIENCE_S)
    one.signal(signal.SIGCONT)
    finish(one, run)
    assert f"clients dropped run={run}" not in one.log
    assert {r.attempt for r in one.ask(lambda c: c.run(run)).rounds} == {1}
    check_exact(one, run, rounds, secure=secure)


@pytest.mark.slow
def test_a_killed_agent_that_is_started_again_takes_part_in_the_same_round(
    lasting: Coordinator, federation: Federation, draw: random.Random
):
    one, rounds, name = lasting, 5, SITES[1]
    federation.open_doors(one)
    run = federation.start_run(one, recipe(rounds))
    wait_until(lambda: one.run(run).round >= 1, 60, "a round")
    time.sleep(draw.uniform(0.0, 0.5))
    federation.agents[name].kill()
    federation.agents[name].wait()
    federation.start(name)
    finish(one, run)
    assert {r.attempt for r in one.ask(lambda c: c.run(run)).rounds} == {1}
    check_exact(one, run, rounds)


@pytest.mark.slow
def test_a_stopped_agent_keeps_its_place_until_it_is_killed_and_wakes_as_a_zombie_that_changes_nothing(
    lasting: Coordinator, federation: Federation
):
    """A second agent is refused while the first one only stands still: it could wake at any time. What a user sees is
    tested here: the round goes on without the client, and the woken agent gives up what it held and takes the next."""
    one, name = lasting, SITES[0]
    federation.open_doors(one)
    finish(one, federation.start_run(one, recipe(1)))
    wanted = recipe(8, patience_s=PATIENCE_S)
    cohort = wanted.cohort.model_copy(update={"min": 2})
    door = federation.doors[name]
    door.weather = Weather(bytes_s=20_000)  # it downloads for three seconds
    door.drop_all()
    run = federation.start_run(one, wanted.model_copy(update={"cohort": cohort}))
    first = federation.agents[name]
    wait_until(lambda: "working" in states(one, run, name), 60, "it has work")
    os.kill(first.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: f"clients dropped run={run}" in one.log, 60, "it is dropped")
        assert f"clients=['{name}']" in one.log
        second = federation.try_start(name)
        assert second.wait(60) == 1
        assert "another agent runs from" in federation.second_log(name)
    finally:
        door.weather = Weather()
        os.kill(first.pid, signal.SIGCONT)
    wait_until(lambda: "round went on without us" in federation.log(name), 60, "the woken agent gives up")
    finish(one, run)
    assert first.poll() is None and "Traceback" not in federation.log(name)
    again = federation.start_run(one, recipe(2))
    finish(one, again)
    check_exact(one, again, 2)


def states(one: Coordinator, run: str, name: str) -> list[str]:
    current = one.ask(lambda c: c.run(run)).current
    return [a.state for a in current.assignments if a.client == name] if current else []
