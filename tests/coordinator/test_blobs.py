"""What the coordinator relies on, wherever blobs lie: each test runs on a folder and on a bucket."""

import copy
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from murmur.coordinator.blobs import Blobs, Swept, hash_file, open_blobs
from murmur.protocol.errors import BadUpdate, InternalError, NotFound, OperatorError, TooLarge, WrongOffset

from . import s3_server

HELLO = hashlib.sha256(b"hello").hexdigest()
WORLD = hashlib.sha256(b"world").hexdigest()
DAY_S = 86_400.0


@dataclass
class Place:
    location: str
    cache: Path
    age: Callable[[float], None]  # makes everything that is there older by so many seconds
    read_part: Callable[[str], bytes]

    def open(self) -> Blobs:
        return open_blobs(self.location, self.cache)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "folder":

        def older(seconds: float) -> None:
            for path in (tmp_path / "blobs").rglob("*"):
                os.utime(path, (path.stat().st_mtime - seconds,) * 2)

        parts = tmp_path / "blobs" / "parts"
        yield Place(str(tmp_path / "blobs"), tmp_path / "cache", older, lambda part: (parts / part).read_bytes())
        return
    with s3_server.serving() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)

        def older(seconds: float) -> None:
            for found in bucket.objects.values():
                found.at -= seconds

        def joined(part: str) -> bytes:
            return b"".join(o.data for key, o in sorted(bucket.objects.items()) if f"/parts/{part}/" in key)

        yield Place("s3://bucket/some/prefix", tmp_path / "cache", older, joined)


@pytest.fixture
def blobs(place: Place) -> Blobs:
    return place.open()


def upload(blobs: Blobs, data: bytes, part: str = "u") -> Path:
    blobs.append(part, 0, data, limit_bytes=len(data))
    return blobs.finish(part, hashlib.sha256(data).hexdigest())


def sweep(blobs: Blobs, named: Callable[[], set[str]] | set[str] = frozenset(), live: set[str] = frozenset()) -> Swept:
    return blobs.sweep(named, live, grace_s=DAY_S, now=time.time())


def test_an_upload_in_pieces_becomes_a_blob_under_its_hash(blobs: Blobs):
    assert blobs.append("u", 0, b"hel", limit_bytes=5) == 3
    assert blobs.append("u", 3, b"lo", limit_bytes=5) == 5
    assert blobs.part_size("u") == 5
    assert blobs.finish("u", HELLO).read_bytes() == b"hello"
    assert blobs.path(HELLO).read_bytes() == b"hello"
    assert blobs.held() == {HELLO} and blobs.has(HELLO)
    assert blobs.part_size("u") == 0


def test_an_upload_goes_on_in_another_process(place: Place):
    """Nothing that one process remembers is needed, and what it remembers never outlives what the other one wrote."""
    first, second = place.open(), place.open()
    first.append("u", 0, b"he", limit_bytes=5)
    assert second.part_size("u") == 2
    second.append("u", 2, b"ll", limit_bytes=5)
    first.append("u", 4, b"o", limit_bytes=5)
    assert first.finish("u", HELLO).read_bytes() == b"hello"
    assert second.path(HELLO).read_bytes() == b"hello"


def test_a_hash_that_is_remembered_is_of_what_is_there(place: Place):
    first, second = place.open(), place.open()
    first.append("u", 0, b"hello", limit_bytes=5)
    second.discard("u")
    second.append("u", 0, b"world", limit_bytes=5)
    with pytest.raises(BadUpdate):
        first.finish("u", HELLO)
    assert not first.held()


def test_large_pieces_keep_their_bytes(blobs: Blobs):
    data = os.urandom(20 << 20)  # several chunks of a put in S3, and hashed in threads in a folder
    for offset in range(0, len(data), 3 << 20):
        blobs.append("u", offset, data[offset : offset + (3 << 20)], limit_bytes=len(data))
    sha256 = hashlib.sha256(data).hexdigest()
    assert hash_file(blobs.finish("u", sha256)) == sha256


def test_finishing_twice_is_the_same_as_once(blobs: Blobs):
    blobs.append("u", 0, b"hello", limit_bytes=5)
    assert blobs.finish("u", HELLO) == blobs.finish("u", HELLO)


def test_finishing_what_another_client_has_sent_needs_no_bytes(blobs: Blobs):
    upload(blobs, b"hello")
    blobs.append("v", 0, b"he", limit_bytes=5)
    assert blobs.finish("v", HELLO).read_bytes() == b"hello"
    assert blobs.part_size("v") == 0


def test_nothing_cannot_be_finished(blobs: Blobs):
    with pytest.raises(BadUpdate, match="nothing has been uploaded"):
        blobs.finish("u", HELLO)


@pytest.mark.parametrize("offset", [0, 2, 4])
def test_bytes_at_another_offset_are_refused_and_the_answer_says_where_to_go_on(blobs: Blobs, offset: int):
    blobs.append("u", 0, b"hel", limit_bytes=5)
    with pytest.raises(WrongOffset) as refused:
        blobs.append("u", offset, b"l", limit_bytes=5)
    assert refused.value.facts["offset"] == 3
    assert blobs.part_size("u") == 3


def test_an_upload_begins_at_its_first_byte(blobs: Blobs):
    with pytest.raises(WrongOffset) as refused:
        blobs.append("u", 3, b"lo", limit_bytes=5)
    assert refused.value.facts["offset"] == 0


def test_more_bytes_than_announced_are_refused_and_not_written(blobs: Blobs):
    with pytest.raises(TooLarge):
        blobs.append("u", 0, b"hello!", limit_bytes=5)
    assert blobs.part_size("u") == 0


def test_bytes_with_another_hash_never_become_a_blob(blobs: Blobs):
    blobs.append("u", 0, b"hullo", limit_bytes=5)
    with pytest.raises(BadUpdate, match="send them again"):
        blobs.finish("u", HELLO)
    assert not blobs.has(HELLO)
    assert blobs.part_size("u") == 0


RACER = """
import sys, time
from pathlib import Path
from murmur.coordinator.blobs import open_blobs
from murmur.protocol.errors import WrongOffset
location, cache, me, limit = sys.argv[1], Path(sys.argv[2]), sys.argv[3].encode(), int(sys.argv[4])
blobs, won, size = open_blobs(location, cache), 0, 0
blobs.failpoint = lambda name: time.sleep(0.002)  # between looking and writing
sys.stdin.readline()
while size < limit:
    try:
        size = blobs.append("u", size, me * 1000, limit_bytes=limit)
        won += 1
    except WrongOffset as error:
        size = error.facts["offset"]
print(won)
"""


def test_of_appends_at_one_offset_one_wins_whichever_process_it_is_in(place: Place):
    pieces = 40
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, place.location, str(place.cache), name, str(pieces * 1000)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abc"
    ]
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {name: int(racer.communicate(timeout=60)[0]) for name, racer in zip("abc", racers, strict=True)}
    print(won)
    blobs = place.open()
    assert sum(won.values()) == pieces and blobs.part_size("u") == pieces * 1000
    kept = {**won}
    whole = place.read_part("u")
    for start in range(0, len(whole), 1000):
        assert len(set(whole[start : start + 1000])) == 1, "a piece is torn"
        kept[chr(whole[start])] -= 1
    assert not any(kept.values())


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 63, "A" * 64, "", "g" * 64])
def test_only_a_hash_names_a_blob(blobs: Blobs, name: str):
    for ask in (blobs.path, blobs.has, blobs.keep, blobs.delete):
        with pytest.raises(NotFound):
            ask(name)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a b", "x" * 221])
def test_only_a_plain_name_names_an_upload(blobs: Blobs, name: str):
    with pytest.raises(InternalError):
        blobs.append(name, 0, b"hello", limit_bytes=5)


def test_a_new_file_that_is_not_adopted_is_deleted(blobs: Blobs):
    with blobs.new() as path:
        path.write_bytes(b"hello")
    assert not path.exists()
    for _ in range(2):  # the second time the blob is there already
        with blobs.new() as path:
            path.write_bytes(b"hello")
            assert blobs.adopt(path) == HELLO
        assert not path.exists()
    assert blobs.path(HELLO).read_bytes() == b"hello"


def test_a_deleted_blob_is_gone(blobs: Blobs):
    upload(blobs, b"hello")
    blobs.delete(HELLO)
    blobs.delete(HELLO)
    assert not blobs.has(HELLO) and not blobs.held()
    for ask in (blobs.path, blobs.keep):
        with pytest.raises(NotFound):
            ask(HELLO)


def test_another_process_opens_the_same_blobs(blobs: Blobs, place: Place):
    upload(blobs, b"hello")
    assert open_blobs(blobs.location, place.cache).has(HELLO)
    assert copy.copy(blobs).path(HELLO).read_bytes() == b"hello"  # as an argument of a process pool is made anew


def test_a_sweep_deletes_what_is_old_and_not_named(blobs: Blobs, place: Place):
    upload(blobs, b"hello")
    upload(blobs, b"world!")
    kept = hashlib.sha256(b"world!").hexdigest()
    blobs.append("dead", 0, b"hel", limit_bytes=5)
    blobs.append("live", 0, b"wo", limit_bytes=5)
    assert sweep(blobs) == Swept()  # all is young
    place.age(DAY_S + 60)
    blobs.append("young", 0, b"wo", limit_bytes=5)
    assert sweep(blobs, {kept}, {"live"}) == Swept(blobs=1, bytes=5, parts=1)
    assert blobs.held() == {kept}
    assert [blobs.part_size(part) for part in ("dead", "live", "young")] == [0, 2, 2]
    assert sweep(blobs, {kept}, {"live"}) == Swept()


def test_a_sweep_asks_for_the_names_after_it_has_listed(blobs: Blobs, place: Place):
    """A blob that is made and named while a sweep looks around is not taken for one that nobody names."""
    upload(blobs, b"hello")
    place.age(2 * DAY_S)
    named: set[str] = set()

    def names() -> set[str]:
        upload(blobs, b"world")
        place.age(2 * DAY_S)
        return named

    assert sweep(blobs, names).blobs == 1
    assert blobs.held() == {WORLD}


@pytest.mark.parametrize("way", ["finish", "adopt", "keep"])
def test_a_blob_that_is_found_again_while_it_is_being_swept_stays(place: Place, way: str):
    blobs, other = place.open(), place.open()
    upload(blobs, b"hello")
    place.age(2 * DAY_S)

    def found_again(name: str) -> None:
        if name != "before sweep":
            return
        if way == "finish":
            other.finish("v", HELLO)
        elif way == "adopt":
            with other.new() as path:
                path.write_bytes(b"hello")
                other.adopt(path)
        else:
            other.keep(HELLO)

    blobs.failpoint = found_again
    assert sweep(blobs).blobs == 0
    assert other.path(HELLO).read_bytes() == b"hello" and blobs.has(HELLO)


def test_a_new_file_of_a_dead_process_is_swept(blobs: Blobs):
    with blobs.new() as path:
        path.write_bytes(b"hello")
        sweep(blobs)
        assert path.exists()
        os.utime(path, (0, 0))
        sweep(blobs)
        assert not path.exists()


def test_a_location_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(OperatorError, match="not in gs://"):
        open_blobs("gs://bucket", tmp_path)


def test_s3_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "murmur.coordinator.blobs.s3", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(OperatorError, match=r"pip install 'murmur\[s3\]'"):
        open_blobs("s3://bucket", tmp_path)
