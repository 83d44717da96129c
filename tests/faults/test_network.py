"""A network that cuts, resets, crawls and repeats itself changes no bit of the model."""

import random
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from murmur.clients.link import PIECE_BYTES

from .door import Weather
from .federation import Coordinator, Federation, check_exact, finish, recipe, wait_until

CONNECTION_BYTES = 100_000  # a model of 66 kB and its update of as much: a cut falls into each


def cuts(draw: random.Random) -> Weather:
    return Weather(cut=lambda: draw.randrange(CONNECTION_BYTES) if draw.random() < 0.5 else None)


def resets(draw: random.Random) -> Weather:
    return Weather(reset=lambda: draw.random() < 0.3, cut=lambda: draw.randrange(20_000, 4 * CONNECTION_BYTES))


def crawls(draw: random.Random) -> Weather:
    return Weather(bytes_s=30_000)


def lags(draw: random.Random) -> Weather:
    return Weather(delay_s=0.2)


def repeats(draw: random.Random) -> Weather:
    """Everything but polls: a poll that is sent again after its answer looks like a restart."""
    return Weather(again=lambda request: True)


@pytest.mark.parametrize(
    ("weather", "rounds", "secure"),
    [
        (cuts, 4, False),
        pytest.param(repeats, 4, False, marks=pytest.mark.slow),
        pytest.param(cuts, 20, True, marks=pytest.mark.slow),
        pytest.param(resets, 20, True, marks=pytest.mark.slow),
        pytest.param(crawls, 1, False, marks=pytest.mark.slow),
        pytest.param(crawls, 3, True, marks=pytest.mark.slow),
        pytest.param(lags, 5, True, marks=pytest.mark.slow),
        pytest.param(repeats, 20, False, marks=pytest.mark.slow),
    ],
)
def test_a_bad_network_changes_nothing_in_the_model(
    lasting: Coordinator,
    federation: Federation,
    draw: random.Random,
    weather: Callable[[random.Random], Weather],
    rounds: int,
    secure: bool,
):
    one = lasting
    federation.open_doors(one)
    run = federation.start_run(one, recipe(rounds, secure=secure))
    before = {
        name: (door.seen.cuts, door.seen.repeated, len(door.seen.pieces)) for name, door in federation.doors.items()
    }
    for door in federation.doors.values():
        door.weather = weather(draw)
        door.drop_all()  # so that it holds for the connections that are open, too
    began = time.monotonic()
    finish(one, run)
    for name, door in federation.doors.items():
        was_cut, repeated, pieces = before[name]
        print(f"{name}: {door.seen.cuts - was_cut} cuts, {door.seen.repeated - repeated} requests sent again")
        again = resent(door.seen.pieces[pieces:])
        print(f"  sent again of uploads: {again} bytes")
        assert all(count <= PIECE_BYTES for count in again)
        assert sum(again) <= (door.seen.cuts - was_cut) * CONNECTION_BYTES
        if weather is repeats:
            assert door.seen.repeated > repeated
    print(f"{weather.__name__}: {(time.monotonic() - began) / rounds:.2f} s per round")
    check_exact(one, run, rounds, secure=secure)
    assert "Traceback" not in one.log


def resent(pieces: list[tuple[str, int, int]]) -> list[int]:
    """For each piece of an upload that follows another one, how many bytes had come before already."""
    return [
        max(0, before + came - offset) for (path, before, came), (after, offset, _) in pairwise(pieces) if path == after
    ]


@pytest.mark.parametrize(
    "loudly",
    [
        pytest.param(True, id="reset", marks=pytest.mark.slow),
        pytest.param(False, id="forgotten by a firewall", marks=pytest.mark.slow),
    ],
)
def test_a_poll_whose_connection_was_lost_takes_no_work_from_the_next_one(
    lasting: Coordinator, federation: Federation, loudly: bool
):
    """In a masked round, work that is handed out twice is an agent that was restarted, and its round is lost."""
    one, rounds = lasting, 2
    federation.open_doors(one)
    wanted = recipe(rounds, secure=True)
    federation.wait_online(one)
    time.sleep(0.5)
    for door in federation.doors.values():
        door.drop_all() if loudly else door.forget_all()
    time.sleep(1.0)  # by now they have polled again
    run = federation.start_run(one, wanted)
    finish(one, run)
    assert [r.attempt for r in one.ask(lambda c: c.run(run)).rounds] == [1] * (rounds + 1)
    check_exact(one, run, rounds, secure=True)


def test_an_upload_that_is_cut_goes_on_where_it_was_cut(
    lasting: Coordinator, federation: Federation, draw: random.Random
):
    """Cut at 40,000 bytes of 66 kB, on a link that is slow enough for the coordinator to have them."""
    one = lasting
    federation.open_doors(one)
    run = federation.start_run(one, recipe(3))
    wait_until(lambda: one.run(run).round >= 1, 60, "a round")
    doors = federation.doors.values()
    before = [len(door.seen.pieces) for door in doors]
    for door in doors:
        door.weather = Weather(cut=lambda: 40_000, bytes_s=200_000)
        door.drop_all()
    finish(one, run)
    for door, start in zip(doors, before, strict=True):
        pieces = door.seen.pieces[start:]
        again = resent(pieces)
        print(pieces, again)
        assert len(again) >= 1
        assert any(offset for _, offset, _ in pieces), "no upload went on in its middle"
        assert all(count <= 16_384 for count in again)  # what the door held when it cut
    check_exact(one, run, 3)
