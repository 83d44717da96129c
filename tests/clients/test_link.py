import hashlib
import time

import httpx
import pytest

from murmur.clients import link as link_module
from murmur.clients.identity import Identity
from murmur.clients.link import Link
from murmur.protocol.errors import (
    PeerError,
    TooLate,
)
from murmur.protocol.messages import AnswerKind, Progress, StepKind
from murmur.protocol.signatures import verify

from .coordinator_double import Wire
from .scripted import KEY, POLL, V1, A, Script, ok, problem

# What goes over the wire


def test_addresses_and_headers_are_those_of_the_protocol():
    accepted = {"accepted": True}
    script = Script(ok({}), ok(status=204), ok(accepted), ok(accepted))
    script.link.poll(POLL)
    assert script.link.step(A, None) is None
    script.link.answer(A, AnswerKind.ADVERT, '{"a":1}')
    script.link.progress(A, Progress(phase="training"))
    assert script.said == [
        "POST /v1/poll",
        "GET /v1/assignments/r.1.1.alpha/step?fence=3&after=",
        "POST /v1/assignments/r.1.1.alpha/answers/advert?fence=3",
        "POST /v1/assignments/r.1.1.alpha/progress?fence=3",
    ]
    poll, _, answer, _ = script.requests
    assert all(r.headers["Murmur-Protocol"] == "1" for r in script.requests)
    assert poll.headers["Authorization"] == "Bearer token1" and "Signature" not in poll.headers
    assert poll.headers["Murmur-Knows"] == "total_weight"
    assert answer.content == b'{"a":1}' and "Authorization" not in answer.headers
    target = answer.url.raw_path.decode()
    keys = {"alpha": KEY.public_key().public_bytes_raw()}
    found = verify("POST", target, answer.headers, answer.content, public_key_of=keys.get, now=time.time())
    assert found.keyid == "alpha"


def test_a_step_is_asked_for_after_the_last_one():
    script = Script(ok({"kind": "inbox", "body": "{}"}))
    assert script.link.step(A, StepKind.ROSTER).kind is StepKind.INBOX
    assert script.said == ["GET /v1/assignments/r.1.1.alpha/step?fence=3&after=roster"]


def test_manifests_come_one_a_line():
    lines = b'{"round":1}\n{"round":2}\n'
    script = Script(httpx.Response(200, content=lines, headers=V1), ok())
    assert script.link.manifests("r 1") == ['{"round":1}', '{"round":2}']
    assert script.link.manifests("r 1", after=2) == []
    assert script.said == ["GET /v1/runs/r%201/manifests?after=0", "GET /v1/runs/r%201/manifests?after=2"]


# Downloads

BLOB = bytes(range(256)) * 40
SHA = hashlib.sha256(BLOB).hexdigest()


def served(cut=None, status=None, blob=BLOB):
    """A blob server's answer; `cut` ends the connection after so many bytes."""

    class Cut(httpx.SyncByteStream):
        def __init__(self, data):
            self.data = data

        def __iter__(self):
            yield self.data[:cut]
            if cut is not None:
                raise httpx.ReadError("reset")

    def answer(request):
        first = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if status == 200:
            first = 0
        code = status or (206 if "Range" in request.headers else 200)
        headers = V1 | ({"Content-Range": f"bytes {first}-{len(blob) - 1}/{len(blob)}"} if code == 206 else {})
        return httpx.Response(code, headers=headers, stream=Cut(blob[first:]))

    return answer


def test_a_download_goes_on_where_it_was_cut_off(tmp_path):
    script = Script(served(cut=1000), served(cut=2000), served())
    seen = []
    script.link.download(SHA, tmp_path / "m", size=len(BLOB), on_bytes=seen.append)
    assert (tmp_path / "m").read_bytes() == BLOB
    assert [r.headers.get("Range") for r in script.requests] == [None, "bytes=1000-", "bytes=3000-"]
    assert seen[-1] == len(BLOB) and seen == sorted(seen)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert script.slept == [0.25, 0.25]  # each brought something, so the pauses start over


def test_a_download_goes_on_after_a_restart(tmp_path):
    (tmp_path / "m.part").write_bytes(BLOB[:500])
    script = Script(served())
    script.link.download(SHA, tmp_path / "m", size=len(BLOB))
    assert script.requests[0].headers["Range"] == "bytes=500-" and (tmp_path / "m").read_bytes() == BLOB


@pytest.mark.parametrize("left", [b"x" * 500, b"x" * len(BLOB), b"x" * (len(BLOB) + 1)])
def test_what_an_earlier_try_left_may_be_wrong(tmp_path, left):
    (tmp_path / "m.part").write_bytes(left)
    script = Script(served(), served())
    script.link.download(SHA, tmp_path / "m", size=len(BLOB))
    assert (tmp_path / "m").read_bytes() == BLOB


def test_a_server_without_ranges_starts_over(tmp_path):
    script = Script(served(cut=1000), served(status=200))
    script.link.download(SHA, tmp_path / "m", size=len(BLOB))
    assert (tmp_path / "m").read_bytes() == BLOB


def test_a_blob_with_another_hash_never_gets_the_name(tmp_path):
    script = Script(served(blob=BLOB[::-1]))
    with pytest.raises(PeerError, match=f"{SHA} was asked for"):
        script.link.download(SHA, tmp_path / "m", size=len(BLOB))
    assert list(tmp_path.iterdir()) == []


def test_a_blob_that_does_not_end_is_not_stored(tmp_path):
    script = Script(served(blob=BLOB + b"x"))
    with pytest.raises(PeerError, match="goes on after the 10240 bytes"):
        script.link.download(SHA, tmp_path / "m", size=len(BLOB))
    assert not (tmp_path / "m").exists()


def test_a_blob_that_ends_early_is_asked_for_again(tmp_path):
    script = Script(served(blob=BLOB[:100]), served())
    script.link.download(SHA, tmp_path / "m", size=len(BLOB))
    assert (tmp_path / "m").read_bytes() == BLOB


def test_a_range_that_was_not_asked_for_is_refused(tmp_path):
    (tmp_path / "m.part").write_bytes(BLOB[:500])
    wrong = httpx.Response(206, content=BLOB[400:], headers={**V1, "Content-Range": "bytes 400-10239/10240"})
    with pytest.raises(PeerError, match="from byte 500 on, got 'bytes 400-10239/10240'"):
        Script(wrong).link.download(SHA, tmp_path / "m", size=len(BLOB))


def test_whoever_watches_a_download_can_end_it(tmp_path):
    def enough(count):
        raise TooLate("enough")

    with pytest.raises(TooLate):
        Script(served()).link.download(SHA, tmp_path / "m", size=len(BLOB), on_bytes=enough)


# Uploads


class Uploads:
    """A server that keeps what arrived, piece by piece; `cuts` are bytes after which a connection breaks."""

    def __init__(self, *cuts, stale=0):
        self.received, self.cuts, self.stale, self.log = b"", list(cuts), stale, []
        self.taken = 0
        self.link = Link(
            "http://127.0.0.1:1",
            name="alpha",
            identity=Identity(KEY),
            transport=self.transport(),
            sleep=lambda s: None,
        )

    def transport(self):
        server = self

        class Breaking(httpx.BaseTransport):
            def handle_request(self, request):
                return Wire(server.handle).handle_request(request)

        return Breaking()

    def handle(self, request):
        size = len(BLOB)
        if request.url.path == "/v1/token":
            return ok({"token": "t", "expires_s": 1})
        if request.method != "PATCH":
            self.log.append(request.method)
            request.read()
            return ok({"offset": len(self.received), "size": size})
        offset = int(request.headers["Upload-Offset"])
        self.log.append(offset)
        if self.stale:
            self.stale -= 1
            return problem("wrong_offset", 409, offset=len(self.received))
        if offset != len(self.received):
            return problem("wrong_offset", 409, offset=len(self.received))
        cut = self.cuts.pop(0) if self.cuts else None
        body = b"".join(request.stream)
        assert len(body) == int(request.headers["Content-Length"])
        assert "Transfer-Encoding" not in request.headers
        self.received += body[:cut]
        self.taken += len(body[:cut])
        if cut is not None:
            raise httpx.WriteError("broken pipe")
        return ok({"offset": len(self.received), "size": size})


@pytest.fixture
def blob(tmp_path):
    path = tmp_path / "update"
    path.write_bytes(BLOB)
    return path


def test_an_upload_goes_in_pieces(blob, monkeypatch):
    monkeypatch.setattr(link_module, "PIECE_BYTES", 4096)
    monkeypatch.setattr(link_module, "CHUNK_BYTES", 1000)
    server, seen = Uploads(), []
    assert server.link.upload(A, blob, on_bytes=seen.append) == SHA
    assert server.received == BLOB and server.log == ["POST", 0, 4096, 8192]
    assert seen[:6] == [0, 1000, 2000, 3000, 4000, 4096] and seen[-1] == len(BLOB)


def test_an_upload_that_broke_sends_no_byte_twice(blob, monkeypatch):
    monkeypatch.setattr(link_module, "PIECE_BYTES", 4096)
    server = Uploads(100, 0, 4096, 7)
    server.link.upload(A, blob)
    assert server.received == BLOB and server.taken == len(BLOB)
    assert server.log == ["POST", 0, "GET", 100, "GET", 100, "GET", 4196, "GET", 4203, 8299]


@pytest.mark.parametrize("full", [problem("storage_full", 507), ok(status=507)], ids=["problem", "bare"])
def test_an_upload_waits_for_room_and_goes_on_at_the_byte(full, blob, monkeypatch):
    monkeypatch.setattr(link_module, "PIECE_BYTES", 4096)
    refused = {"POST": 25, 4096: 50}  # how often it has no room: at the offer, and for the second piece

    class Full(Uploads):
        def handle(self, request):
            key = request.headers.get("Upload-Offset", request.method)
            key = int(key) if key.isdigit() else key
            if request.url.path != "/v1/token" and refused.get(key):
                refused[key] -= 1
                self.log.append("full")
                return httpx.Response(full.status_code, headers=full.headers, content=full.content)
            return super().handle(request)

    server = Full()
    assert server.link.upload(A, blob) == SHA
    assert server.received == BLOB and server.taken == len(BLOB)
    assert server.log == ["full"] * 25 + ["POST", 0] + ["full", "GET"] * 50 + [4096, 8192]


def test_an_upload_that_waits_for_room_can_be_ended(blob):
    def enough(count):
        if len(script.requests) > 3:
            raise TooLate("enough")

    script = Script(*[problem("storage_full", 507)] * 9)
    with pytest.raises(TooLate):
        script.link.upload(A, blob, on_bytes=enough)
    assert len(script.requests) == 4


def test_an_upload_that_is_there_already_is_not_sent(blob):
    server = Uploads()
    server.received = BLOB
    assert server.link.upload(A, blob) == SHA
    assert server.log == ["POST"]


def test_an_upload_goes_on_where_the_coordinator_says(blob):
    server = Uploads(stale=2)
    server.link.upload(A, blob)
    assert server.received == BLOB and server.log == ["POST", 0, "GET", 0, "GET", 0]


def test_an_upload_that_stays_where_it_is_is_given_up(blob):
    server = Uploads(stale=1000)
    with pytest.raises(PeerError, match="stays at byte 0 of 10240 after 21 pieces"):
        server.link.upload(A, blob)


@pytest.mark.parametrize(
    "state", [{"offset": 10241, "size": 10240}, {"offset": 0, "size": 5}, {"offset": -1, "size": 10240}]
)
def test_a_place_that_does_not_exist_is_refused(blob, state):
    with pytest.raises(PeerError):
        Script(ok(state)).link.upload(A, blob)


def test_whoever_watches_an_upload_can_end_it(blob):
    def enough(count):
        raise TooLate("enough")

    with pytest.raises(TooLate):
        Uploads().link.upload(A, blob, on_bytes=enough)
