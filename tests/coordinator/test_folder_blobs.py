"""Power cuts and full disks: a blob is whole under its name or is not there, and an upload goes on where it was."""

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from murmur.coordinator.blobs import FolderBlobs, digests, hash_file
from murmur.coordinator.blobs.disk import RESERVE_BYTES, Disk, in_words
from murmur.protocol.errors import BadUpdate, StorageFull

from .lossy_disk import FullDisk, LossyDisk, PowerCut, Survives, WatchedDisk

DATA = bytes(range(256)) * 40
HASH = hashlib.sha256(DATA).hexdigest()
PIECE = 4000
MODEL = b"model" * 100
MODEL_HASH = hashlib.sha256(MODEL).hexdigest()


def work(blobs: FolderBlobs, promised: set[str]) -> None:
    """What a coordinator does, from wherever an earlier call of this was broken off."""
    if not blobs.has(HASH):
        while (offset := blobs.part_size("u")) < len(DATA):
            blobs.append("u", offset, DATA[offset : offset + PIECE], limit_bytes=len(DATA))
    try:
        blobs.finish("u", HASH)
    except BadUpdate:  # the bytes were lost: the client sends them again
        blobs.discard("u")
        return work(blobs, promised)
    promised.add(HASH)
    with blobs.new() as path:
        path.write_bytes(MODEL)
        blobs.adopt(path)
    promised.add(MODEL_HASH)
    assert blobs.finish("u", HASH)  # a repeated request


def check(blobs: FolderBlobs, promised: set[str]) -> None:
    for sha256 in promised:
        assert blobs.has(sha256), "a blob that was promised is lost"
    for sha256 in blobs.held():
        assert hash_file(blobs.path(sha256)) == sha256, "what has a blob's name is something else"


@pytest.mark.parametrize("survives", Survives)
def test_a_power_cut_at_any_step_leaves_whole_blobs(tmp_path: Path, survives: Survives):
    step = 0
    while True:
        step += 1
        root, disk, passed = tmp_path / f"{step}", LossyDisk(), 0

        def reached(name: str, step: int = step) -> None:
            nonlocal passed
            passed += 1
            if passed >= step:
                raise PowerCut(name)

        promised: set[str] = set()
        blobs = FolderBlobs(root, disk)
        blobs.failpoint = disk.before = reached
        try:
            work(blobs, promised)
        except PowerCut as cut:
            where = str(cut)
        else:
            break
        left = FolderBlobs(disk.cut(root, tmp_path / f"{step}-left", survives), WatchedDisk())
        disk.close()
        check(left, promised)
        work(left, promised)
        check(left, {HASH, MODEL_HASH})
        shutil.rmtree(root)
        assert where
    disk.close()
    print(f"{step - 1} steps")
    assert step > 30


def test_a_repeated_finish_promises_what_the_first_one_could_not(tmp_path: Path):
    """The first process dies between rename and sync of the folder; the power fails after the second has answered."""
    disk = LossyDisk()
    first = FolderBlobs(tmp_path / "blobs", disk)
    first.append("u", 0, DATA, limit_bytes=len(DATA))

    def killed(name: str) -> None:
        if name == "after rename":
            raise PowerCut(name)

    first.failpoint = killed
    with pytest.raises(PowerCut):
        first.finish("u", HASH)
    FolderBlobs(tmp_path / "blobs", disk).finish("u", HASH)
    check(FolderBlobs(disk.cut(tmp_path / "blobs", tmp_path / "left", Survives.SYNCED)), {HASH})
    disk.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
def test_a_full_disk_at_any_call_loses_nothing(tmp_path: Path, code: int):
    """Each call fails once: the caller hears of it, what was stored stays, and the same call succeeds later."""
    hit: set[str] = set()
    for at in range(1, 1000):
        root, disk = tmp_path / f"{at}", FullDisk(code)
        blobs = FolderBlobs(root, disk)
        disk.calls, disk.at = 0, at
        promised: set[str] = set()
        try:
            work(blobs, promised)
        except StorageFull as full:
            assert full.facts["free_bytes"] > 0 and str(full).count("full") == 1
            check(blobs, promised)
            size = blobs.part_size("u")
            assert size % PIECE == 0 or size == len(DATA), "half of a piece was left behind"
            work(blobs, promised)
        check(blobs, {HASH, MODEL_HASH})
        shutil.rmtree(root)
        if not disk.hit and disk.calls < at:
            break
        hit.add(disk.hit)
    print(f"{at - 1} calls: {sorted(hit)}")
    assert hit >= {"write", "sync", "rename", "mkdir", "open", "sync_folder"}


def test_after_a_failed_append_the_upload_goes_on_where_it_was(tmp_path: Path):
    blobs = FolderBlobs(tmp_path / "blobs", disk := FullDisk())
    blobs.append("u", 0, b"hel", limit_bytes=5)
    disk.calls, disk.at = 0, 2  # the first call opens the file, the second writes
    with pytest.raises(StorageFull):
        blobs.append("u", 3, b"lo", limit_bytes=5)
    assert blobs.part_size("u") == 3
    assert disk.hit == "write"
    assert blobs.append("u", 3, b"lo", limit_bytes=5) == 5
    assert blobs.finish("u", hashlib.sha256(b"hello").hexdigest()).read_bytes() == b"hello"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


class NoReserve(Disk):
    def require(self, folder: Path, size: int) -> None:
        pass


@pytest.mark.parametrize("disk", [Disk(), NoReserve()], ids=["reserve", "full"])
def test_on_a_disk_of_4_mb_an_upload_waits_for_room(small: Path, disk: Disk):
    data = os.urandom(3 << 20)
    sha256 = hashlib.sha256(data).hexdigest()
    blobs, ballast, size = FolderBlobs(small / "blobs", disk), small / "ballast", 0
    ballast.write_bytes(b"x" * (2 << 20))
    with pytest.raises(StorageFull) as full:
        while True:
            size = blobs.append("u", size, data[size : size + (300 << 10)], limit_bytes=len(data))
    print(full.value.detail)
    assert full.value.facts["needed_bytes"] >= 300 << 10 > full.value.facts["free_bytes"] - (4 << 20) // 20
    assert blobs.part_size("u") == size > 1 << 20
    if type(disk) is Disk:
        (small / "row").write_bytes(b"x" * (150 << 10))  # the database beside them can still write
        (small / "row").unlink()
    with pytest.raises(StorageFull), blobs.new() as path:
        path.write_bytes(data)
    ballast.unlink()
    while size < len(data):
        size = blobs.append("u", size, data[size : size + (300 << 10)], limit_bytes=len(data))
    assert hash_file(blobs.finish("u", sha256)) == sha256


class Sized(Disk):
    def __init__(self, free: int, total: int) -> None:
        self.found = free, total

    def space(self, folder: Path) -> tuple[int, int]:
        return self.found


@pytest.mark.parametrize(
    ("total", "reserve"), [(1 << 40, RESERVE_BYTES), (20 * RESERVE_BYTES, RESERVE_BYTES), (4 << 20, (4 << 20) // 20)]
)
def test_a_reserve_is_left_for_the_database(tmp_path: Path, total: int, reserve: int):
    FolderBlobs(tmp_path, Sized(reserve + 1000, total)).require(1000)
    blobs = FolderBlobs(tmp_path, Sized(reserve + 999, total))
    assert blobs.room() == reserve + 999
    with pytest.raises(StorageFull) as full:
        blobs.require(1000)
    assert full.value.facts == {"free_bytes": reserve + 999, "needed_bytes": reserve + 1000}
    with pytest.raises(StorageFull):
        blobs.append("u", 0, b"x" * 1000, limit_bytes=1000)
    assert blobs.part_size("u") == 0


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (2e15, "2000.0 TB")],
)
def test_sizes_are_said_as_people_say_them(size: int, words: str):
    assert in_words(size) == words


def test_an_upload_that_came_in_one_life_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []
    monkeypatch.setattr("murmur.coordinator.blobs.folder.hash_file", lambda path: read.append(path) or hash_file(path))
    blobs = FolderBlobs(tmp_path)
    for part in "uv":
        for offset in range(0, len(DATA), PIECE):
            blobs.append(part, offset, DATA[offset : offset + PIECE], limit_bytes=len(DATA))
    blobs.finish("u", HASH)
    assert not read
    blobs.delete(HASH)
    FolderBlobs(tmp_path).finish("v", HASH)
    assert len(read) == 1


def test_the_hashes_of_too_many_uploads_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digests, "REMEMBERED", 2)
    blobs = FolderBlobs(tmp_path)
    for part in "uvw":
        blobs.append(part, 0, b"hel", limit_bytes=5)
    for part in "uvw":
        blobs.append(part, 3, b"lo", limit_bytes=5)
        assert blobs.finish(part, hashlib.sha256(b"hello").hexdigest())
        blobs.delete(hashlib.sha256(b"hello").hexdigest())


def test_after_a_failed_sync_the_bytes_have_to_come_again(tmp_path: Path):
    """The system may drop what it could not write, and say at the next sync that all is well."""
    disk = Disk()
    blobs = FolderBlobs(tmp_path, disk)
    blobs.append("u", 0, b"hello", limit_bytes=5)

    def fail(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk.sync = fail
    with pytest.raises(OSError, match="Input/output"):
        blobs.finish("u", hashlib.sha256(b"hello").hexdigest())
    assert blobs.part_size("u") == 0 and not blobs.held()
