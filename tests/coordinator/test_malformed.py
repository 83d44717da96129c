"""Ten thousand malformed uploads: what is accepted is the derived header and finite numbers, and nothing ends in a 500.

Most go through the check alone, some through every step of an upload, some over HTTP. The oracle reads no header: a
file is right when its bytes are those that the layout calls for.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import delete, update

from murmur.coordinator.conversation import MAX_NORM
from murmur.coordinator.store import Store, tables
from murmur.protocol.errors import BadUpdate, PeerError, TooLarge, WrongOffset
from murmur.protocol.messages import Complete, Total, UploadOffer

from .harness import MODEL, Agent, World, plain_file
from .schedules import memory_folder
from .test_agents_api import Caller, callers, http, parts  # fixtures and the raw caller of the same app

LAYOUT = MODEL.update()
HEADER = LAYOUT.header()
GOOD = plain_file(LAYOUT, 0.5)
CHECKED, UPLOADED, POSTED = 9_600, 300, 100
SLACK_BYTES = 48 << 20
_ = (callers, http, parts)


def right(data: bytes) -> bool:
    """Whether an update of these bytes must be counted."""
    if len(data) != len(GOOD) or not data.startswith(HEADER):
        return False
    values = np.frombuffer(data[len(HEADER) :], "<f4").astype(np.float64)
    return bool(np.isfinite(values).all()) and float(np.sqrt((values**2).sum())) <= MAX_NORM


def flipped(draw: random.Random, data: bytes, first: int = 0) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(first, len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def with_header(text: bytes, *, fit: bool = True) -> bytes:
    """A file with another header text, as long as the right one where that is possible."""
    text = text.ljust(len(HEADER) - 8 if fit else -(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + GOOD[len(HEADER) :]


def with_value(draw: random.Random, value: float) -> bytes:
    at = len(HEADER) + 4 * draw.randrange((len(GOOD) - len(HEADER)) // 4)
    return GOOD[:at] + np.float32(value).tobytes() + GOOD[at + 4 :]


@cache
def a_million_tensors() -> bytes:
    entries = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(1_000_000))
    return with_header(b"{" + entries + b"}", fit=False)


def other_header(draw: random.Random) -> bytes:
    """A header that says nearly what the right one says."""
    text = HEADER[8:].rstrip()
    found = json.loads(text)
    swaps = [
        (b'"b"', b'"c"'), (b'"b"', b'"w"'), (b'"b"', b'"../b"'), (b'"w"', b'"/etc/passwd"'), (b'"w"', b'"w\\u0000"'),
        (b"F32", b"I32"), (b"F32", b"f32"), (b"F32", b"BF16"), (b"[2,3]", b"[3,2]"), (b"[2,3]", b"[6]"),
        (b"[2,3]", b"[-2,-3]"), (b"[2,3]", b"[2,3.0]"), (b"[2,3]", b"[2,3,1]"), (b"[0,8]", b"[0,7]"),
        (b"[0,8]", b"[8,0]"), (b"[0,8]", b"[0,99999999999999999999]"), (b"[8,32]", b"[0,24]"), (b":", b": "),
        (b"{", b'{"__metadata__":{"a":"b"},'), (b"{", b'{"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'),
    ]  # fmt: skip
    kind = draw.randrange(4)
    if kind == 0:
        old, new = draw.choice(swaps)
        return with_header(text.replace(old, new, 1), fit=draw.random() < 0.8)
    if kind == 1:
        names = list(found)
        draw.shuffle(names)
        return with_header(json.dumps({n: found[n] for n in names}, indent=draw.choice((None, 1))).encode(), fit=False)
    if kind == 2:
        return with_header(
            draw.choice((b"[" * 5000, b"null", b"{}", b'{"b":1}', b'"', b"\xff\xfe{}", b"1e999", b"{" * 60))
        )
    return with_header(text + draw.choice((b"\n", b"\t", b"\x00", b"}", b"  ")))


def mutant(draw: random.Random) -> bytes:
    ways: list[Callable[[], bytes]] = [
        lambda: flipped(draw, GOOD),
        lambda: flipped(draw, GOOD[: len(HEADER)]) + GOOD[len(HEADER) :],
        lambda: GOOD[: draw.randrange(len(GOOD))],
        lambda: GOOD + draw.randbytes(draw.choice((1, 8, 4096))),
        lambda: other_header(draw),
        lambda: with_value(draw, draw.choice((np.nan, np.inf, -np.inf, 3e38, -2e12))),
        lambda: draw.randbytes(draw.choice((0, 1, 7, 8, 9, len(GOOD)))),
        lambda: draw.randbytes(8) + GOOD[8:],
        lambda: draw.choice((0, 1, 1 << 24, 1 << 63, (1 << 64) - 1)).to_bytes(8, "little") + GOOD[8:],
    ]
    return draw.choice(ways)()


def same_size(draw: random.Random) -> bytes:
    """A mutant that gets past the announcement of its size."""
    while len(data := mutant(draw)) != len(GOOD):
        pass
    return data


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def holder() -> Iterator[Agent]:
    """An agent with an assignment in a plain round that is collecting."""
    with memory_folder() as folder:
        world = World(folder)
        agents = [world.agent(name) for name in "abc"]
        world.start(secure={"on": False})
        world.tick()
        agents[0].poll()
        yield agents[0]
        world.store.close()


def begin_again(store: Store, assignment: str) -> None:
    """Forget how an upload ended: one assignment serves for all."""
    with store.db.write() as t:
        t.execute(delete(tables.update).where(tables.update.c.assignment == assignment))
        t.execute(delete(tables.upload).where(tables.upload.c.assignment == assignment))
        fits = tables.assignment.c.id == assignment
        t.execute(update(tables.assignment).where(fits).values(state="working", reason="", phase="waiting"))


def test_the_check_takes_right_files_only(holder: Agent):
    draw, taken, world = random.Random(14), 0, holder.world
    attempt, _ = world.store.assignments.mine(holder.assignment.id, holder.name)
    message = Complete(fence=1, sha256="0" * 64, weight=1.0, metrics={"loss": Total(sum=1.0, count=1.0)})
    path = world.folder / "upload"
    before = 0
    for n in range(CHECKED):
        data = a_million_tensors() if n in (10, 20) else mutant(draw)
        path.write_bytes(data)
        try:
            world.conversation._check_update(attempt, path, message)
            accepted = True
        except BadUpdate:
            accepted = False
        assert accepted == right(data), (n, data[:300])
        taken += accepted
        before = before or (resident_bytes() if n == 100 else 0)
    assert taken < CHECKED // 5, "the mutants are too tame"
    assert resident_bytes() - before < SLACK_BYTES
    print(f"{taken} of {CHECKED} still right")


def test_uploads_that_are_wrong_in_any_step_leave_nothing_behind(holder: Agent):
    draw, talk, a = random.Random(15), holder.world.conversation, holder.assignment
    counts = {"refused": 0, "accepted": 0}
    before = resident_bytes()
    for n in range(UPLOADED):
        data = mutant(draw) if draw.random() < 0.3 else same_size(draw)
        said = hashlib.sha256(draw.randbytes(8) if draw.random() < 0.2 else data).hexdigest()
        try:
            if data:
                talk.offer_upload(holder.name, a.id, UploadOffer(fence=a.fence, sha256=said, size=len(data)))
                wrong = draw.choice((-1, 1, len(data), 1 << 40)) if draw.random() < 0.2 else 0
                try:
                    talk.append(holder.name, a.id, a.fence, wrong, data)
                except WrongOffset as error:
                    assert wrong and error.facts["offset"] == 0
                    talk.append(holder.name, a.id, a.fence, 0, data)
                with pytest.raises(TooLarge):
                    talk.append(holder.name, a.id, a.fence, len(data), b"x")
            complete = Complete(fence=a.fence, sha256=said, weight=1.0, metrics={"loss": Total(sum=1.0, count=1.0)})
            talk.complete(holder.name, a.id, complete)
            counts["accepted"] += 1
            assert right(data) and said == hashlib.sha256(data).hexdigest(), (n, data[:300])
        except PeerError:
            counts["refused"] += 1
            assert not (right(data) and said == hashlib.sha256(data).hexdigest()), (n, data[:300])
        assert list((holder.world.folder / "blobs" / "parts").iterdir()) == [], n
        begin_again(holder.world.store, a.id)
    print(counts)
    assert counts["refused"] > UPLOADED // 2 and counts["accepted"]
    assert resident_bytes() - before < SLACK_BYTES


def test_over_http_each_is_a_clean_refusal(http: TestClient, callers: list[Caller]):
    from .test_agents_api import upload

    draw, caller, refused = random.Random(16), callers[0], 0
    store: Store = http.app.state.parts.store  # pyright: ignore
    assignment = caller.poll()
    for n in range(POSTED):
        data = mutant(draw) if n % 3 else same_size(draw)
        answer: httpx.Response = upload(caller, assignment, data)
        assert (answer.status_code == 200) == right(data), (n, answer.text, data[:300])
        if answer.status_code != 200:
            refused += 1
            assert answer.status_code in (413, 422) and answer.json()["code"] in (
                "too_large",
                "bad_update",
                "bad_request",
            )
        begin_again(store, assignment.id)
    assert refused > POSTED // 2
    assert list((http.app.state.parts.settings.data / "blobs" / "parts").iterdir()) == []  # pyright: ignore
