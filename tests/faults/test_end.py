"""SIGTERM with many polls open, and a copy that is taken under load and goes on elsewhere."""

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from murmur.coordinator.people import hash_token
from murmur.coordinator.store import Store

from .federation import SITES, Coordinator, Federation, check_exact, finish, recipe, wait_until

POLLS = 300
TOKEN = "a-token-of-many-letters"


def park(one: Coordinator, count: int) -> list[socket.socket]:
    """Polls of so many more clients, on a socket each."""
    store = Store(one.url, clock=time.time)
    for n in range(count):
        name, token = f"idle-{n}", hash_token(f"{TOKEN}-{n}")
        store.clients.invite(name, token, by="admin", lifetime_s=600)
        store.clients.enrol(name, token, n.to_bytes(32, "big"), {})
        store.clients.decide(name, "active", by="admin")
        store.clients.issue_token(name, token, lifetime_s=600)
    store.close()
    body = b'{"info": {"version": "1"}}'
    parked: list[socket.socket] = []
    for n in range(count):
        connection = socket.create_connection(("127.0.0.1", one.port))
        head = (
            f"POST /v1/poll HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}-{n}\r\nMurmur-Protocol: 1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        parked.append(connection)
    return parked


def leave(one: Coordinator, count: int) -> None:
    """They take no part in the run that follows."""
    store = Store(one.url, clock=time.time)
    for n in range(count):
        store.clients.decide(f"idle-{n}", "revoked", by="admin")
    store.close()


@pytest.mark.slow
def test_sigterm_answers_three_hundred_parked_polls_and_agents_come_back_without_an_error(
    coordinator: Callable[..., Coordinator], federation: Federation
):
    one = coordinator().start()
    federation.open_doors(one)
    federation.wait_online(one)
    said = {name: len(federation.log(name)) for name in SITES}
    parked = park(one, POLLS)
    wait_until(lambda: online(one) == POLLS + len(SITES), 60, "all of them wait")
    time.sleep(0.5)
    began = time.monotonic()
    assert one.end() == 0
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began <= 5
    statuses: list[int] = []
    for connection in parked:
        connection.settimeout(5)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        statuses.append(answer.status)
        answer.close()
        connection.close()
    assert statuses == [200] * POLLS
    leave(one, POLLS)
    one.start()
    back = time.monotonic()
    run = federation.start_run(one, recipe(2))
    wait_until(lambda: taken(one, run) == set(SITES), 60, "the agents are back")
    print(f"agents back after {time.monotonic() - back:.1f} s")
    finish(one, run)
    check_exact(one, run, 2)
    for name in SITES:
        assert " ERROR " not in federation.log(name)[said[name] :]


def online(one: Coordinator) -> int:
    return sum(view.online for view in one.ask(lambda c: c.clients()))


def taken(one: Coordinator, run: str) -> set[str]:
    rounds = one.ask(lambda c: c.run(run)).rounds
    return {a.client for r in rounds for a in r.assignments if a.state != "offered"}


@pytest.mark.slow
def test_a_copy_taken_under_load_ends_in_the_same_model(
    coordinator: Callable[..., Coordinator], federation: Federation, tmp_path: Path
):
    one, rounds = coordinator().start(), 10
    federation.open_doors(one)
    run = federation.start_run(one, recipe(rounds))
    wait_until(lambda: one.run(run).round >= 2, 60, "two rounds")
    murmur("coordinator", "backup", str(tmp_path / "copy"), "--data", str(one.data))
    finish(one, run)
    check_exact(one, run, rounds)
    assert one.end() == 0
    murmur("coordinator", "restore", str(tmp_path / "copy"), "--data", str(tmp_path / "restored"))
    other = coordinator("restored", known=True)
    other.start()
    reached = other.run(run).round
    print(f"the copy was taken in round {reached + 1}")
    assert reached < rounds
    federation.open_doors(other)
    finish(other, run)
    check_exact(other, run, rounds)


def murmur(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "murmur", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
