import pytest

from murmur.protocol.errors import OperatorError
from murmur.protocol.joining import Join, format_join, is_loopback, parse_join

TOKEN = "abcDEF0123456789_-x"
CA = "0f" * 32


@pytest.mark.parametrize(
    ("text", "join", "url"),
    [
        (
            f"murmur://{TOKEN}@murmur.example.org:8443?ca={CA}",
            Join(token=TOKEN, host="murmur.example.org", port=8443, ca=CA),
            "https://murmur.example.org:8443",
        ),
        (
            f"murmur://{TOKEN}@murmur.example.org:443?ca=system",
            Join(token=TOKEN, host="murmur.example.org", port=443, ca="system"),
            "https://murmur.example.org:443",
        ),
        (
            f"murmur://{TOKEN}@[2001:db8::1]:1?ca={CA}",
            Join(token=TOKEN, host="2001:db8::1", port=1, ca=CA),
            "https://[2001:db8::1]:1",
        ),
        (
            f"murmur+http://{TOKEN}@127.0.0.1:65535",
            Join(token=TOKEN, host="127.0.0.1", port=65535, ca=None),
            "http://127.0.0.1:65535",
        ),
        (f"murmur+http://{TOKEN}@[::1]:80", Join(token=TOKEN, host="::1", port=80, ca=None), "http://[::1]:80"),
    ],
)
def test_a_join_string_goes_both_ways(text, join, url):
    assert parse_join(text) == join
    assert join.url == url
    assert format_join(token=join.token, host=join.host, port=join.port, ca=join.ca) == text
    assert parse_join(f"  {text}\n") == join


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "begins with murmur://"),
        (f"https://{TOKEN}@a:1?ca={CA}", "begins with murmur://"),
        (f"murmur:{TOKEN}@a:1?ca={CA}", "begins with murmur://"),
        (f"murmur://a:1?ca={CA}", "no token"),
        (f"murmur://short@a:1?ca={CA}", "no token"),
        (f"murmur://{TOKEN}:password@a:1?ca={CA}", "no token"),
        (f"murmur://{TOKEN}$@a:1?ca={CA}", "no token"),
        (f"murmur://{TOKEN}@?ca={CA}", "no host"),
        (f"murmur://{TOKEN}@a b:1?ca={CA}", "no host"),
        (f"murmur://{TOKEN}@[fe80::1%25eth0]:1?ca={CA}", "no host|cannot be read"),
        (f"murmur://{TOKEN}@[::1:1?ca={CA}", "cannot be read"),
        (f"murmur://{TOKEN}@[nonsense]:1?ca={CA}", "no host|cannot be read"),
        (f"murmur://{TOKEN}@host?ca={CA}", "no port after the host host"),
        (f"murmur://{TOKEN}@host:0?ca={CA}", "no port"),
        (f"murmur://{TOKEN}@host:70000?ca={CA}", "cannot be read"),
        (f"murmur://{TOKEN}@host:x?ca={CA}", "cannot be read"),
        (f"murmur://{TOKEN}@host:1/path?ca={CA}", "goes on where it should end"),
        (f"murmur://{TOKEN}@host:1?ca={CA}#x", "goes on where it should end"),
        (f"murmur://{TOKEN}@host:1", "was it cut"),
        (f"murmur://{TOKEN}@host:1?ca={CA[:-1]}", "was it cut"),
        (f"murmur://{TOKEN}@host:1?ca={CA.upper()}", "was it cut"),
        (f"murmur://{TOKEN}@host:1?ca={CA}&ca={CA}", "was it cut"),
        (f"murmur://{TOKEN}@host:1?ca={CA}&x=1", "was it cut"),
        (f"murmur://{TOKEN}@host:1?nonsense", "cannot be read"),
        (f"murmur+http://{TOKEN}@192.168.1.5:1", "only 127.0.0.1, ::1 and localhost"),
        (f"murmur+http://{TOKEN}@127.0.0.1.example.org:1", "only 127.0.0.1"),
        (f"murmur+http://{TOKEN}@127.0.0.1:1?ca={CA}", "has no ca"),
    ],
)
def test_a_join_string_that_cannot_work_is_refused_without_its_token(text, words):
    with pytest.raises(OperatorError, match=words) as refused:
        parse_join(text)
    assert TOKEN not in refused.value.detail


def test_a_join_string_that_nobody_could_read_back_is_not_written():
    with pytest.raises(OperatorError):
        format_join(token=TOKEN, host="192.168.1.5", port=1, ca=None)


def test_the_token_does_not_stand_in_the_repr():
    assert TOKEN not in repr(parse_join(f"murmur+http://{TOKEN}@localhost:80"))


@pytest.mark.parametrize(
    ("host", "loops"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("localhost.evil", False),
        ("", False),
    ],
)
def test_loopback_is_told_by_the_text(host, loops):
    assert is_loopback(host) is loops
