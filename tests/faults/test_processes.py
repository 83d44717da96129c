"""Several coordinator processes on one PostgreSQL: one moves the rounds on, and when it dies another one does."""

import signal
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from murmur.coordinator.store.leases import LEASE_S

from .. import postgres
from ..waiting import slowness
from .federation import Coordinator, Federation, check_exact, finish, recipe, wait_until

numbers = count()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    if postgres.binaries() is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    with postgres.server() as url:
        yield url


@pytest.fixture
def several(
    server: str, coordinator: Callable[..., Coordinator], federation: Federation, tmp_path: Path
) -> Iterator[Callable[[int], list[Coordinator]]]:
    """Starts so many coordinators on one new database and one folder of blobs."""
    with postgres.database(server, f"faults{next(numbers)}") as url:
        made: list[Coordinator] = []

        def start(n: int) -> list[Coordinator]:
            made.extend(coordinator(f"process-{i}", database=url, blobs=tmp_path / "blobs") for i in range(n))
            return [one.start() for one in made]

        yield start
        federation.rest()
        for one in made:
            if one.running:
                one.kill()


def leader(processes: list[Coordinator], within_s: float = 60.0) -> Coordinator:
    def leading() -> list[Coordinator]:
        return [one for one in processes if one.leads]

    (found,) = wait_until(leading, within_s, "a process that leads")
    return found


@pytest.mark.slow
def test_a_dead_leader_is_followed_by_another_process_and_a_woken_one_writes_nothing(
    several: Callable[[int], list[Coordinator]], federation: Federation
):
    processes, rounds = several(3), 8
    federation.open_doors(*processes)
    first = leader(processes)
    run = federation.start_run(first, recipe(rounds))
    wait_until(lambda: first.run(run).round >= 2, 60, "two rounds")

    others = [one for one in processes if one is not first]
    first.kill()
    killed_at = time.monotonic()
    federation.open_doors(*others)
    second = leader(others, LEASE_S + 60)
    print(f"took over from a killed leader after {time.monotonic() - killed_at:.1f} s")
    reached = second.run(run).round
    wait_until(lambda: second.run(run).round > reached, 60, "a round by the second leader")

    (third,) = (one for one in others if one is not second)
    federation.open_doors(third)
    second.signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    wait_until(lambda: third.leads, LEASE_S + 60, "the third process leads")
    print(f"took over from a stopped leader after {time.monotonic() - stopped_at:.1f} s")
    reached = third.run(run).round
    for door in federation.doors.values():
        door.drop_all()  # those that the stopped process holds would wait for a minute
    wait_until(lambda: third.run(run).round > reached, 60, "a round by the third leader")
    second.signal(signal.SIGCONT)
    wait_until(lambda: "another process moves the rounds on now" in second.log, 60, "the woken leader gives up")
    finish(third, run)
    assert not second.leads and third.leads
    check_exact(third, run, rounds)
    said = [line for one in processes for line in one.log.splitlines() if "round committed" in line]
    assert len(said) == rounds + 1, said  # one of them is the evaluation of the last version


@pytest.mark.slow
def test_agents_at_another_process_than_the_leader_wait_for_no_timer(
    several: Callable[[int], list[Coordinator]], federation: Federation
):
    processes = several(2)
    first = leader(processes)
    (other,) = (one for one in processes if one is not first)
    federation.open_doors(other)
    rounds = 5
    run = federation.start_run(other, recipe(rounds))
    wait_until(lambda: other.run(run).round >= 1, 60, "the first round, whose trainers may still be starting")
    began, reached = time.monotonic(), other.run(run).round
    finish(other, run)
    took_s = (time.monotonic() - began) / (rounds - reached)
    print(f"{took_s:.2f} s per round")
    assert took_s < 1.9 * slowness()  # a poll that nobody wakes waits 20 s
    assert first.leads and "round committed" not in other.log
    check_exact(other, run, rounds)


@pytest.mark.slow
def test_a_process_that_is_told_to_end_hands_the_rounds_over_at_once(
    several: Callable[[int], list[Coordinator]], federation: Federation
):
    processes = several(2)
    first = leader(processes)
    (other,) = (one for one in processes if one is not first)
    federation.open_doors(*processes)
    run = federation.start_run(other, recipe(4))
    wait_until(lambda: other.run(run).round >= 1, 60, "a round")
    federation.open_doors(other)
    assert first.end() == 0
    ended_at = time.monotonic()
    wait_until(lambda: other.leads, 2.0, "the other process leads, without waiting for the lease to run out")
    print(f"took over from a leader that ended after {time.monotonic() - ended_at:.1f} s")
    finish(other, run)
    check_exact(other, run, 4)
