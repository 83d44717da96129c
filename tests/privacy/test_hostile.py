"""No body, however malformed, makes either side fail in another way than by refusing it."""

import contextlib
import json
import random

import pytest

from murmur.protocol.encoding import b64
from murmur.protocol.errors import BadRequest, PrivacyRefusal

JUNK = [
    None, True, 0, -1, 1.5, 10**400, 1e308, "", "x", "\x00", "\ud800", "é", "0" * 64, "A" * 44, "=" * 44, [], [[]],
    {}, {"": ""}, {"c01": []}, {"c01": "x"}, ["c01", "c01"], [1], [["a", "b"]], b64(bytes(32)), b64(bytes(64)),
    b64(b"\xff" * 32), b64(bytes(80)),
]  # fmt: skip


def paths(value, here=()):
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*here, key))


def replaced(value, path, new, *, drop=False):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and drop:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(copy[path[0]], path[1:], new, drop=drop)
    return copy


def mutants(body, rng, count):
    """Bodies near a good one: values of other types and sizes, keys gone or added, text cut, doubled, flipped."""
    value = json.loads(body)
    places = list(paths(value))
    for _ in range(count):
        path = rng.choice(places)
        form = rng.randrange(8)
        if form < 4:
            yield json.dumps(replaced(value, path, rng.choice(JUNK)), sort_keys=True, separators=(",", ":"))
        elif form == 4 and path:
            yield json.dumps(replaced(value, path, None, drop=True), sort_keys=True, separators=(",", ":"))
        elif form == 5:
            yield json.dumps(value | {rng.choice(["x", "kind", "client", ""]): rng.choice(JUNK)})
        elif form == 6:
            at = rng.randrange(len(body))
            yield body[:at] + chr(rng.choice([0, 34, 92, 123, 0xD800, 0x1F600, rng.randrange(128)])) + body[at + 1 :]
        else:
            at = rng.randrange(len(body))
            yield rng.choice([body[:at], body + body[at:], body[at:], " " + body, body + "\n"])
    yield from (
        "",
        "[" * 6_000,
        "[" * 100_000,
        "{" * 100_000,
        "[]",
        "null",
        "1e999",
        "9" * 5000,
        "x" * (1 << 20),
        "\ud800",
    )
    yield from (None, 3, b"{}", [], {})


@pytest.fixture
def finished(fleet):
    """A round of four from which c03 dropped out after sharing."""
    round_ = fleet(4)
    for phase in (round_.advertise, round_.share, round_.open):
        phase(round_.context.cohort)
    for phase in (round_.upload, round_.agree, round_.reveal):
        phase(round_.without({"c03"}))
    return round_


def test_no_body_makes_the_coordinator_fail_in_another_way(finished, forge):
    """Mutants are refused as their sender's error; those that it signed again may be good, but never do more harm."""
    seed = 20_240
    print("seed", seed)
    rng, server = random.Random(seed), finished.server
    doors = (
        (server.check_advert, finished.adverts, ()),
        (server.check_shares, finished.shares, (finished.adverts,)),
        (server.check_agree, finished.agrees, (finished.told,)),
        (server.check_reveal, finished.reveals, (finished.adverts, finished.shares, finished.told)),
    )
    for check, messages, rest in doors:
        for body in mutants(messages["c01"], rng, 250):
            if body == messages["c01"]:
                continue
            with pytest.raises((BadRequest, PrivacyRefusal)):
                check("c01", body, *rest)
            signed = resigned(body, forge)
            if signed is not None:
                with contextlib.suppress(BadRequest, PrivacyRefusal):
                    check("c01", signed, *rest)


@pytest.mark.parametrize("nest", ["[]", "{}"])
def test_deeply_nested_bodies_are_refused(fleet, nest):
    round_ = fleet(12)
    good = round_.clients["c01"].advertise()
    opening = "[" if nest == "[]" else '{"":'
    for depth in (1, 100, *range(900, 1010), 2000):
        inner = opening * depth + nest + nest[1] * depth
        with pytest.raises(BadRequest):
            round_.server.check_advert("c01", good.replace('"c01"', inner))


def resigned(body, forge):
    """The body with a signature of c01 that fits; None when it is nothing that could be signed."""
    try:
        return forge(body, {}, by="c01")
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
        return None


def test_no_body_makes_a_client_fail_in_another_way(fleet, block):
    """The same for what a hostile coordinator sends. The inner steps are asked, as a refusal would end the session."""
    seed = 4_711
    print("seed", seed)
    rng = random.Random(seed)
    round_ = fleet(4)
    everyone, server, client = round_.context.cohort, round_.server, round_.clients["c01"]
    questions = (
        (client._share, lambda: server.roster(round_.adverts), (round_.share,)),
        (client._open, lambda: server.inbox("c01", round_.adverts, round_.shares), (round_.open, round_.upload)),
        (client._agree, lambda: server.survivors(round_.adverts, round_.shares, everyone), (round_.agree,)),
        (client._reveal, lambda: round_.signatures("c01"), (round_.reveal,)),
    )
    round_.advertise(everyone)
    for step, question, phases in questions:
        good, refused = question(), 0
        for body in mutants(good, rng, 250):
            try:
                step(body)
            except (BadRequest, PrivacyRefusal):
                refused += 1
        assert refused > 200
        for phase in phases:
            phase(everyone)
    assert block.decode(round_.unmask()[1]).clients == 4
