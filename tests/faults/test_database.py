"""The database is away for a while: locked by another process, or restarted. What was acknowledged stays, and the
run ends in the same model."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, text

from murmur.client import find_access

from .. import postgres
from .federation import Coordinator, Federation, check_exact, finish, recipe, wait_until


class Visitor:
    """Asks the coordinator for something that the database must answer, all the time; remembers each status."""

    def __init__(self, one: Coordinator) -> None:
        self.statuses: list[int] = []
        self.acknowledged: list[str] = []  # names that were invited
        self._token = find_access(one.data).token
        self._url = f"http://127.0.0.1:{one.port}/v1/admin"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Visitor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        names = 0
        with httpx.Client(headers={"Authorization": f"Bearer {self._token}"}, timeout=60) as http:
            while not self._ended.wait(0.05):
                names += 1
                self.statuses.append(http.get(f"{self._url}/runs").status_code)
                wanted = {"name": f"visitor-{names}"}
                self.statuses.append(http.post(f"{self._url}/invitations", json=wanted).status_code)
                if self.statuses[-1] == 201:
                    self.acknowledged.append(wanted["name"])


def only_good(visitor: Visitor) -> None:
    counted = {status: visitor.statuses.count(status) for status in set(visitor.statuses)}
    print(f"statuses {counted}")
    assert counted.keys() <= {200, 201, 503}, counted


def invited(url: str) -> set[str]:
    engine = create_engine(url)
    with engine.connect() as c:
        names = set(c.scalars(text("SELECT name FROM invitation")))
    engine.dispose()
    return names


@pytest.mark.slow
@pytest.mark.parametrize("locked_s", [3.0, 30.0])
def test_a_locked_sqlite_is_waited_for(
    coordinator: Callable[..., Coordinator], federation: Federation, locked_s: float
):
    one, rounds = coordinator().start(), 6
    federation.open_doors(one)
    run = federation.start_run(one, recipe(rounds, patience_s=min(2.0, locked_s / 3)))  # far less than it is locked
    wait_until(lambda: one.run(run).round >= 1, 60, "a round")
    with Visitor(one) as visitor:
        other = sqlite3.connect(one.data / "murmur.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        reached = one.run(run).round
        time.sleep(locked_s)
        assert one.run(run).round <= reached + 1
        other.rollback()
        other.close()
        wait_until(lambda: one.run(run).round > reached, 60, "a round after the lock")
    only_good(visitor)
    assert set(visitor.acknowledged) <= invited(one.url)
    finish(one, run)
    check_exact(one, run, rounds)
    assert one.ask(lambda c: any(view.reason for view in c.run(run).rounds)) is False
    assert "Traceback" not in one.log


@pytest.fixture
def restarting() -> Iterator[postgres.Server]:
    if postgres.binaries() is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    with postgres.own_server() as server:
        yield server


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_restarted_postgresql_is_waited_for(
    restarting: postgres.Server,
    coordinator: Callable[..., Coordinator],
    federation: Federation,
    tmp_path: Path,
    times: int,
):
    with postgres.database(restarting.url, "faults") as url:
        one = coordinator(database=url).start()
        other = coordinator("other", database=url, blobs=one.data / "blobs").start()
        rounds = 6 * times
        federation.open_doors(one, other)
        run = federation.start_run(one, recipe(rounds))
        with Visitor(one) as visitor:
            for _ in range(times):
                reached = one.run(run).round
                wait_until(lambda reached=reached: one.run(run).round > reached, 60, "a round")
                restarting.restart()
            reached = one.run(run).round
            wait_until(lambda: one.run(run).round > reached, 60, "a round after the restart")
        only_good(visitor)
        finish(one, run)
        check_exact(one, run, rounds)
        assert set(visitor.acknowledged) <= invited(url)
        assert "Traceback" not in one.log + other.log
        federation.rest()
        assert one.end() == other.end() == 0
