"""What only a bucket has: crashes between its requests, sweeps without locks, copies of its blobs on this machine."""

import hashlib
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from murmur.coordinator.blobs import cache as caching
from murmur.coordinator.blobs import s3
from murmur.coordinator.blobs.disk import Disk
from murmur.coordinator.blobs.s3 import S3Blobs
from murmur.protocol.errors import NotFound, OperatorError, StorageFull, Unavailable

from . import s3_server
from .lossy_disk import FullDisk
from .s3_server import Bucket

DATA = bytes(range(256)) * 40
HASH = hashlib.sha256(DATA).hexdigest()
KEY = f"p/sha256/{HASH[:2]}/{HASH}"
DAY_S = 86_400.0


class Killed(BaseException):
    pass


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with s3_server.serving() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        yield bucket


@pytest.fixture
def blobs(bucket: Bucket, tmp_path: Path) -> S3Blobs:
    return S3Blobs("s3://bucket/p", tmp_path / "cache")


def adopt(blobs: S3Blobs, data: bytes) -> str:
    with blobs.new() as path:
        path.write_bytes(data)
        return blobs.adopt(path)


def work(blobs: S3Blobs) -> None:
    if not blobs.has(HASH):
        while (offset := blobs.part_size("u")) < len(DATA):
            blobs.append("u", offset, DATA[offset : offset + 4000], limit_bytes=len(DATA))
    blobs.finish("u", HASH)


def test_a_process_that_dies_at_any_step_leaves_whole_blobs(bucket: Bucket, tmp_path: Path):
    step = 0
    while True:
        step, passed = step + 1, 0

        def reached(name: str, step: int = step) -> None:
            nonlocal passed
            passed += 1
            if passed == step:
                raise Killed(name)

        bucket.objects.clear()
        blobs = S3Blobs("s3://bucket/p", tmp_path / f"{step}")
        blobs.failpoint = reached
        try:
            work(blobs)
        except Killed:
            pass
        else:
            break
        assert KEY not in bucket.objects or bucket.objects[KEY].data == DATA
        work(S3Blobs("s3://bucket/p", tmp_path / f"{step}-other"))  # goes on on another machine
        assert bucket.objects[KEY].data == DATA and list(bucket.objects) == [KEY], "pieces are left behind"
    print(f"{step - 1} steps")
    assert step > 6


def test_a_blob_that_a_sweep_is_about_to_delete_is_not_relied_on(bucket: Bucket, blobs: S3Blobs, tmp_path: Path):
    adopt(blobs, DATA)
    bucket.objects[KEY].at -= 2 * DAY_S
    other = S3Blobs("s3://bucket/p", tmp_path / "other")
    waited: list[float] = []
    other.wait = waited.append

    def found_again(name: str) -> None:
        if name == "before delete":
            with pytest.raises(Unavailable, match="being swept just now"):
                adopt(other, DATA)

    blobs.failpoint = found_again
    assert blobs.sweep(set(), set(), grace_s=DAY_S, now=time.time()).blobs == 1
    assert waited and not bucket.objects
    assert adopt(other, DATA) == HASH and bucket.objects[KEY].data == DATA


def test_who_finds_a_sweep_at_its_blob_waits_for_its_end(bucket: Bucket, blobs: S3Blobs, tmp_path: Path):
    adopt(blobs, DATA)
    bucket.objects[KEY].at -= 2 * DAY_S
    other, at_delete, go_on = S3Blobs("s3://bucket/p", tmp_path / "other"), threading.Event(), threading.Event()

    def pause(name: str) -> None:
        if name == "before delete":
            at_delete.set()
            assert go_on.wait(60)

    blobs.failpoint = pause
    sweep = threading.Thread(target=lambda: blobs.sweep(set(), set(), grace_s=DAY_S, now=time.time()))
    sweep.start()
    assert at_delete.wait(60)

    def wait(seconds: float) -> None:
        go_on.set()
        sweep.join(60)

    other.wait = wait
    assert adopt(other, DATA) == HASH
    assert bucket.objects[KEY].data == DATA, "the sweep took what was relied on"


def test_what_a_dead_sweep_has_said_holds_nobody_up_and_is_cleared(bucket: Bucket, blobs: S3Blobs):
    adopt(blobs, DATA)
    bucket.objects[KEY].at -= 2 * DAY_S

    def die(name: str) -> None:
        if name == "before delete":
            bucket.refuse = 403  # it can clear nothing any more
            raise Killed(name)

    blobs.failpoint = die
    with pytest.raises((Killed, OperatorError)):
        blobs.sweep(set(), set(), grace_s=DAY_S, now=time.time())
    bucket.refuse, blobs.failpoint = 0, lambda name: None
    (word,) = (found for key, found in bucket.objects.items() if "sweeping" in key)
    word.at -= 1000  # older than a request that S3 would still take
    assert adopt(blobs, DATA) == HASH
    word.at -= DAY_S
    blobs.sweep({HASH}, set(), grace_s=DAY_S, now=time.time())
    assert list(bucket.objects) == [KEY]


def test_a_model_is_fetched_once_for_a_whole_cohort(bucket: Bucket, blobs: S3Blobs, tmp_path: Path):
    adopt(blobs, DATA)
    other = S3Blobs("s3://bucket/p", tmp_path / "other")
    bucket.requests.clear()
    threads = [threading.Thread(target=other.path, args=(HASH,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.path(HASH).read_bytes() == DATA
    assert bucket.requests == [f"HEAD {KEY}", f"GET {KEY}"]


def test_other_bytes_under_a_blobs_name_are_not_taken(bucket: Bucket, blobs: S3Blobs, tmp_path: Path):
    adopt(blobs, DATA)
    bucket.objects[KEY].data = DATA[:-1]
    other = S3Blobs("s3://bucket/p", tmp_path / "other")
    with pytest.raises(Unavailable, match="hash to"):
        other.path(HASH)
    assert not list((tmp_path / "other").iterdir())


def test_the_cache_keeps_its_limit_but_what_was_just_handed_out_stays(bucket: Bucket, tmp_path: Path):
    blobs = S3Blobs("s3://bucket/p", tmp_path / "cache", cache_bytes=25)
    names = [adopt(blobs, bytes([n]) * 10) for n in range(4)]
    assert len(list((tmp_path / "cache").iterdir())) == 4, "all are in use"
    for age, name in enumerate(reversed(names)):
        at = time.time() - caching.IN_USE_S - 60 * (age + 1)
        os.utime(tmp_path / "cache" / name, (at, at))
    blobs.path(names[0])  # the oldest is used again
    adopt(blobs, b"x" * 10)
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {names[0], hashlib.sha256(b"x" * 10).hexdigest()}
    for n, name in enumerate(names):
        assert blobs.path(name).read_bytes() == bytes([n]) * 10


def test_the_cache_makes_room_on_a_disk_that_is_smaller_than_its_limit(bucket: Bucket, tmp_path: Path):
    class Small(Disk):
        def space(self, folder: Path) -> tuple[int, int]:
            return 1000 - sum(path.stat().st_size for path in folder.iterdir()), 1000

    blobs = S3Blobs("s3://bucket/p", tmp_path / "cache", disk=Small())
    names = [adopt(blobs, bytes([n]) * 400) for n in range(2)]
    for name in names:
        os.utime(tmp_path / "cache" / name, (0, 0))
    blobs.append("u", 0, b"x" * 500, limit_bytes=500)
    blobs.finish("u", sha256 := hashlib.sha256(b"x" * 500).hexdigest())
    assert sha256 in (left := [path.name for path in (tmp_path / "cache").iterdir()]) and len(left) == 2
    assert all(blobs.has(name) for name in names)


def test_a_blob_that_was_deleted_elsewhere_leaves_the_cache(bucket: Bucket, blobs: S3Blobs, tmp_path: Path):
    """An update is nobody's to keep: neither in the bucket nor on any machine."""
    adopt(blobs, DATA)
    S3Blobs("s3://bucket/p", tmp_path / "other").delete(HASH)
    os.utime(tmp_path / "cache" / HASH, (0, 0))
    blobs.sweep(set(), set(), grace_s=DAY_S, now=time.time())
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(NotFound):
        blobs.path(HASH)


def test_a_full_disk_under_the_cache_loses_nothing(bucket: Bucket, tmp_path: Path):
    hit: set[str] = set()
    for at in range(1, 20):
        bucket.objects.clear()
        disk = FullDisk()
        blobs = S3Blobs("s3://bucket/p", tmp_path / f"{at}", disk=disk)
        assert blobs.room() == math.inf
        blobs.require(1 << 60)
        blobs.append("u", 0, DATA, limit_bytes=len(DATA))
        disk.calls, disk.at = 0, at
        try:
            blobs.finish("u", HASH)
        except StorageFull:
            hit.add(disk.hit)
        disk.at, calls = 0, disk.calls
        blobs.finish("u", HASH)
        assert blobs.path(HASH).read_bytes() == DATA == bucket.objects[KEY].data
        if calls < at:
            break
    assert hit >= {"sync", "rename"}


def test_a_store_that_refuses_and_one_that_is_down_are_told_apart(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(s3.RETRIES, "max_retries", 0)
    blobs = S3Blobs("s3://bucket/p", tmp_path)
    bucket.refuse = 403
    with pytest.raises(OperatorError, match="check the AWS_"):
        blobs.has(HASH)
    bucket.refuse = 503
    with pytest.raises(Unavailable, match="does not answer as it should"):
        blobs.append("u", 0, b"x", limit_bytes=1)
