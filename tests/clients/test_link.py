import hashlib
import http.server
import json
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from murmur.clients import channel, link as link_module
from murmur.clients.channel import BACKOFF_MAX_S, backoff_s
from murmur.clients.identity import Identity
from murmur.clients.link import Link
from murmur.clients.transport import socket_options
from murmur.protocol.errors import (
    InternalError,
    NotApproved,
    NotAuthenticated,
    PeerError,
    ProtocolMismatch,
    TooLate,
    Unavailable,
)
from murmur.protocol.messages import AgentInfo, AnswerKind, Assignment, Kind, Poll, Progress, StepKind
from murmur.protocol.recipe import Train
from murmur.protocol.signatures import verify

from .coordinator_double import Wire

KEY = Ed25519PrivateKey.generate()
POLL = Poll(info=AgentInfo(version="1"))
A = Assignment(
    id="r.1.1.alpha", fence=3, run="r", round=1, attempt=1, kind=Kind.TRAIN, task="t", model="0" * 64, model_bytes=1,
    train=Train(), mu=0, weighting="examples", max_weight=10, metrics=(), seed=0, patience_s=60, secure=None,
)  # fmt: skip
V1 = {"Murmur-Protocol": "1"}


def ok(value=None, status=200, **headers):
    content = b"" if value is None else json.dumps(value).encode()
    return httpx.Response(status, content=content, headers={**V1, **headers})


def problem(code, status, **facts):
    return ok({"code": code, "status": status, "detail": f"it is {code}", **facts}, status)


class Script:
    """Answers requests from a list, one after the other; exceptions in it are raised. Tokens are given freely."""

    def __init__(self, *answers, **options):
        self.answers, self.requests, self.slept = list(answers), [], []
        self.tokens = 0
        settings = {"sleep": self.slept.append, "draw": lambda: 0.5, "transport": Wire(self.handle)} | options
        self.link = Link("http://127.0.0.1:1", name="alpha", identity=Identity(KEY), **settings)

    def handle(self, request):
        request.read()
        if request.url.path == "/v1/token":
            self.tokens += 1
            return ok({"token": f"token{self.tokens}", "expires_s": 600})
        self.requests.append(request)
        answer = self.answers.pop(0)
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def said(self):
        return [f"{r.method} {r.url.raw_path.decode()}" for r in self.requests]


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
    assert answer.content == b'{"a":1}' and "Authorization" not in answer.headers
    target = answer.url.raw_path.decode()
    keys = {"alpha": KEY.public_key().public_bytes_raw()}
    found = verify("POST", target, answer.headers, answer.content, public_key_of=keys.get, now=time.time())
    assert found.keyid == "alpha"


def test_a_step_is_asked_for_after_the_last_one():
    script = Script(ok({"kind": "inbox", "body": "{}"}))
    assert script.link.step(A, StepKind.ROSTER).kind is StepKind.INBOX
    assert script.said == ["GET /v1/assignments/r.1.1.alpha/step?fence=3&after=roster"]


# What did not arrive


def test_a_poll_goes_on_until_it_is_answered():
    lost = [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("closed")] * 20
    script = Script(*lost, ok({"next_poll_s": 2.5}))
    assert script.link.poll(POLL).next_poll_s == 2.5
    assert len(script.slept) == 60


def test_pauses_grow_with_full_jitter_to_their_bound():
    script = Script(*[httpx.ConnectError("refused")] * 10, ok({}))
    script.link.poll(POLL)
    assert script.slept == [0.25, 0.5, 1, 2, 4, 8, 15, 15, 15, 15]
    assert backoff_s(3, 0.0) == 0 and backoff_s(10_000, 1.0) == BACKOFF_MAX_S


def test_retry_after_is_heeded_and_bounded():
    busy = problem("unavailable", 503)
    script = Script(
        ok({"code": "unavailable", "status": 503}, 503, **{"Retry-After": "7"}),
        ok({"code": "unavailable", "status": 503}, 503, **{"Retry-After": "999999999"}),
        ok({"code": "unavailable", "status": 503}, 503, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        busy,
        ok({}),
    )
    script.link.poll(POLL)
    assert script.slept == [7.25, 300.5, 1, 2]


def test_a_signed_post_is_signed_anew_each_time():
    script = Script(httpx.ReadError("reset"), problem("unavailable", 503), ok({"accepted": True}))
    script.link.answer(A, AnswerKind.AGREE, "{}")
    nonces = {r.headers["Signature-Input"] for r in script.requests}
    assert len(nonces) == 3 and {r.content for r in script.requests} == {b"{}"}


def test_a_sign_of_life_is_tried_once():
    script = Script(httpx.ConnectError("refused"))
    with pytest.raises(Unavailable):
        script.link.progress(A, Progress(phase="training"))
    assert script.slept == []


def test_a_coordinator_with_a_fault_is_given_up_after_five_tries():
    script = Script(*[problem("internal", 500)] * 9)
    with pytest.raises(InternalError, match="it is internal"):
        script.link.poll(POLL)
    assert len(script.requests) == 5


def test_faults_between_other_troubles_are_not_counted_together():
    script = Script(*[problem("internal", 500)] * 4, httpx.ConnectError("x"), *[problem("internal", 500)] * 4, ok({}))
    script.link.poll(POLL)


@pytest.mark.parametrize("status", [200, 204, 302, 404, 502])
def test_what_a_proxy_says_in_a_coordinators_place_is_no_answer(status):
    script = Script(httpx.Response(status, content=b"<html>login</html>"), ok({"next_poll_s": 1}))
    assert script.link.poll(POLL).next_poll_s == 1


def test_an_outage_is_logged_once_and_its_end_too(caplog):
    caplog.set_level("INFO", logger="murmur.clients.channel")
    Script(*[httpx.ConnectError("refused")] * 5, ok({})).link.poll(POLL)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "coordinator not available"),
        ("INFO", "coordinator reachable again"),
    ]


# Who we are


def test_a_token_is_renewed_when_it_is_refused_and_the_body_sent_again():
    script = Script(ok({}), problem("not_authenticated", 401), ok({"next_poll_s": 3}))
    script.link.poll(POLL)
    assert script.link.poll(POLL).next_poll_s == 3
    assert [r.headers["Authorization"] for r in script.requests] == ["Bearer token1"] * 2 + ["Bearer token2"]
    assert script.requests[2].content == script.requests[1].content != b""


def test_a_new_token_that_is_refused_too_is_the_end():
    script = Script(*[problem("not_authenticated", 401)] * 3)
    with pytest.raises(NotAuthenticated):
        script.link.poll(POLL)
    assert len(script.requests) == 2


def test_many_threads_renew_a_token_once():
    barrier, answers = threading.Barrier(8), threading.Lock()
    renewed = []

    def handle(request):
        request.read()
        if request.url.path == "/v1/token":
            with answers:
                renewed.append(1)
            return ok({"token": f"token{len(renewed)}", "expires_s": 600})
        if request.headers["Authorization"] == "Bearer token1":
            barrier.wait(10)
            return problem("not_authenticated", 401)
        return ok({})

    link = Link("http://127.0.0.1:1", name="alpha", identity=Identity(KEY), transport=Wire(handle))
    link._renewed("")
    threads = [threading.Thread(target=link.poll, args=(POLL,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(renewed) == 2


def test_a_wrong_clock_is_named():
    date = formatdate(1_700_000_000)
    script = Script(
        ok({"code": "not_authenticated", "status": 401}, 401, Date=date), clock=lambda: 1_700_000_000 - 1000
    )
    with pytest.raises(NotAuthenticated, match="clock is 1000 s behind the coordinator's"):
        script.link.answer(A, AnswerKind.AGREE, "{}")


def test_a_right_clock_is_not_blamed():
    date = formatdate(1_700_000_000)
    script = Script(ok({"code": "not_authenticated", "status": 401}, 401, Date=date), clock=lambda: 1_700_000_100)
    with pytest.raises(NotAuthenticated, match="Not authenticated"):
        script.link.answer(A, AnswerKind.AGREE, "{}")


# What the coordinator says


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (problem("too_late", 410), TooLate),
        (problem("not_approved", 403), NotApproved),
        (problem("of_the_future", 418), PeerError),
        (ok(status=404), PeerError),
        (ok({"status": 410}, 404), PeerError),
        (ok([1, 2], 400), PeerError),
        (ok({"next_poll_s": "soon"}), PeerError),
        (ok({"next_poll_s": 1, "more": 2}), PeerError),
        (httpx.Response(200, content=b'{"void": [], "void": []}', headers=V1), PeerError),
        (httpx.Response(200, content=b"<html>", headers=V1), PeerError),
        (httpx.Response(404, content=b"\xff" * 100, headers=V1), PeerError),
        (httpx.Response(200, content=b"{}", headers={"Murmur-Protocol": "2"}), ProtocolMismatch),
        (problem("protocol_mismatch", 426), ProtocolMismatch),
    ],
)
def test_an_answer_becomes_the_error_that_it_is(answer, kind):
    script = Script(answer)
    with pytest.raises(kind):
        script.link.poll(POLL)
    assert len(script.requests) == 1


def test_an_endless_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(channel, "ANSWER_BYTES", 1000)
    script = Script(httpx.Response(200, content=b"[" * 1001, headers=V1))
    with pytest.raises(PeerError, match="more than 1000 bytes"):
        script.link.poll(POLL)


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
    assert seen[:5] == [1000, 2000, 3000, 4000, 4096] and seen[-1] == len(BLOB)


def test_an_upload_that_broke_sends_no_byte_twice(blob, monkeypatch):
    monkeypatch.setattr(link_module, "PIECE_BYTES", 4096)
    server = Uploads(100, 0, 4096, 7)
    server.link.upload(A, blob)
    assert server.received == BLOB and server.taken == len(BLOB)
    assert server.log == ["POST", 0, "GET", 100, "GET", 100, "GET", 4196, "GET", 4203, 8299]


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


@pytest.mark.parametrize("state", [{"offset": 10241, "size": 10240}, {"offset": 0, "size": 5}, {"offset": -1, "size": 10240}])
def test_a_place_that_does_not_exist_is_refused(blob, state):
    with pytest.raises(PeerError):
        Script(ok(state)).link.upload(A, blob)


def test_whoever_watches_an_upload_can_end_it(blob):
    def enough(count):
        raise TooLate("enough")

    with pytest.raises(TooLate):
        Uploads().link.upload(A, blob, on_bytes=enough)


# A real socket


@contextmanager
def real_server(handle):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            handle(self)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_stop_does_not_wait_for_a_long_poll():
    parked, leave = threading.Event(), threading.Event()

    def handle(request):
        body = b'{"token":"t","expires_s":1}'
        if request.path != "/v1/token":
            parked.set()
            leave.wait(20)
        request.send_response(200)
        request.send_header("Murmur-Protocol", "1")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    with real_server(handle) as url:
        link = Link(url, name="alpha", identity=Identity(KEY))
        failed = []

        def poll():
            try:
                link.poll(POLL)
            except Unavailable as error:
                failed.append(error)

        thread = threading.Thread(target=poll)
        thread.start()
        assert parked.wait(10)
        began = time.monotonic()
        link.abort()
        thread.join(10)
        took_s = time.monotonic() - began
        leave.set()
        assert len(failed) == 1 and took_s < 2
        with pytest.raises(Unavailable):
            link.poll(POLL)
        link.close()


def test_an_abort_ends_a_pause():
    link = Link("http://127.0.0.1:1", name="alpha", identity=Identity(KEY), draw=lambda: 1.0)  # nobody listens there
    failed = []

    def poll():
        try:
            link.poll(POLL)
        except Unavailable as error:
            failed.append(error)

    thread = threading.Thread(target=poll)
    thread.start()
    time.sleep(0.2)
    link.abort()
    thread.join(5)
    assert len(failed) == 1
    link.close()


def test_connections_are_kept_alive_by_the_kernel():
    import socket

    options = {(level, name): value for level, name, value in socket_options()}
    assert options[(socket.SOL_SOCKET, socket.SO_KEEPALIVE)] == 1
    assert options[(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)] == 30
