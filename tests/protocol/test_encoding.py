import hashlib
import json

import pytest

from murmur.protocol.encoding import b64, canonical_json, fingerprint, parse_json, sha256_hex, unb64
from murmur.protocol.errors import BadRequest


def test_canonical_json_has_one_spelling():
    assert canonical_json({"b": [1, 2.5], "a": "ü"}) == b'{"a":"\\u00fc","b":[1,2.5]}'
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})


def test_canonical_json_has_no_nan():
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    "data",
    [
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e999",
        b'{"a": -1e400}',
        b'{"a": 1, "a": 2}',
        b'{"x": {"a": 1, "a": 1}}',
        b"",
        b"{",
        b"\xff\xfe",
        "{}".encode("utf-16"),
        "{}".encode("utf-32-le"),
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b"1" * 5000,
        b'"' + b"a" * (1 << 20) + b'"',
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_not_plain_json_is_refused(data):
    with pytest.raises(BadRequest):
        parse_json(data)


def test_plain_json_is_read():
    assert parse_json(b' {"a": [1, 2.5, true, null, "\xc3\xbc"]} ') == {"a": [1, 2.5, True, None, "ü"]}
    assert parse_json(b"1" * 20) == int("1" * 20)


def test_the_limit_counts_bytes():
    assert parse_json(b'"abc"', limit_bytes=5) == "abc"
    with pytest.raises(BadRequest, match="5 bytes of JSON, at most 4"):
        parse_json(b'"abc"', limit_bytes=4)


def test_a_digest_of_parts_knows_where_they_end():
    assert sha256_hex(b"ab", b"c") != sha256_hex(b"a", b"bc") != sha256_hex(b"abc")
    assert sha256_hex() == hashlib.sha256().hexdigest()
    assert sha256_hex(b"a") == hashlib.sha256(b"\0\0\0\0\0\0\0\1a").hexdigest()


def test_a_fingerprint_is_eight_groups_of_four():
    groups = fingerprint(bytes(32)).split(" ")
    assert [len(g) for g in groups] == [4] * 8
    assert "".join(groups) == hashlib.sha256(bytes(32)).hexdigest()[:32]


def test_base64_goes_both_ways():
    assert unb64(b64(bytes(range(256)))) == bytes(range(256))


@pytest.mark.parametrize("text", ["?", "YQ", "YQ==\n", "Y Q==", "ü", "YQ=", "_-=="])
def test_what_is_not_base64_is_refused(text):
    with pytest.raises(BadRequest):
        unb64(text)


def test_json_numbers_mean_the_same_after_a_round_trip():
    value = {"a": 0.1, "b": 1e300, "c": 2**62}
    assert parse_json(canonical_json(value)) == value == json.loads(canonical_json(value))
