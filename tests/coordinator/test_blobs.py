import hashlib
from pathlib import Path

import pytest

from murmur.coordinator.blobs import Blobs
from murmur.protocol.errors import BadUpdate, NotFound, TooLarge, WrongOffset

HELLO = hashlib.sha256(b"hello").hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path)


def test_an_upload_in_pieces_becomes_a_blob_under_its_hash(blobs: Blobs):
    assert blobs.append("u", 0, b"hel", limit_bytes=5) == 3
    assert blobs.append("u", 3, b"lo", limit_bytes=5) == 5
    assert blobs.finish("u", HELLO).read_bytes() == b"hello"
    assert blobs.path(HELLO).parent.name == HELLO[:2]
    assert blobs.part_size("u") == 0


def test_finishing_twice_is_the_same_as_once(blobs: Blobs):
    blobs.append("u", 0, b"hello", limit_bytes=5)
    assert blobs.finish("u", HELLO) == blobs.finish("u", HELLO)


def test_bytes_at_another_offset_are_refused_and_the_answer_says_where_to_go_on(blobs: Blobs):
    blobs.append("u", 0, b"hel", limit_bytes=5)
    with pytest.raises(WrongOffset) as refused:
        blobs.append("u", 0, b"hello", limit_bytes=5)
    assert refused.value.facts["offset"] == 3
    assert blobs.part_size("u") == 3


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


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 63, "A" * 64, "", "g" * 64])
def test_only_a_hash_names_a_blob(blobs: Blobs, name: str):
    with pytest.raises(NotFound):
        blobs.path(name)


def test_a_new_file_that_is_not_adopted_is_deleted(blobs: Blobs):
    with blobs.new() as path:
        path.write_bytes(b"hello")
    assert not path.exists()
    with blobs.new() as path:
        path.write_bytes(b"hello")
        assert blobs.adopt(path) == HELLO
    assert blobs.path(HELLO).read_bytes() == b"hello"
