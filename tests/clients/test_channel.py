import itertools
import random
import threading
from email.utils import formatdate

import httpx
import pytest

from murmur.clients import channel
from murmur.clients.channel import BACKOFF_MAX_S, backoff_s
from murmur.clients.identity import Identity
from murmur.clients.link import Link
from murmur.protocol.errors import (
    InternalError,
    NotApproved,
    NotAuthenticated,
    PeerError,
    ProtocolMismatch,
    TooLate,
    Unavailable,
)
from murmur.protocol.messages import AnswerKind, Complete, Progress

from .coordinator_double import Wire
from .scripted import KEY, POLL, V1, A, Script, ok, problem

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
            barrier.wait(60)
            return problem("not_authenticated", 401)
        return ok({})

    link = Link("http://127.0.0.1:1", name="alpha", identity=Identity(KEY), transport=Wire(handle))
    link._renewed("")
    threads = [threading.Thread(target=link.poll, args=(POLL,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
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


# A coordinator that is away, or full


def test_a_coordinator_that_is_away_for_an_hour_is_no_error(caplog):
    """With pauses as they are drawn on average, and a clock that only they move."""
    clock = [0.0]

    def handle(request):
        request.read()
        if request.url.path == "/v1/token":
            return ok({"token": "t", "expires_s": 600})
        asked.append(clock[0])
        if clock[0] < 3600:
            raise httpx.ConnectError("refused")
        return ok({"next_poll_s": 1.5})

    def sleep(seconds):
        clock[0] += seconds

    asked, draws = [], random.Random(4)
    options = {"sleep": sleep, "draw": draws.random, "monotonic": lambda: clock[0]}
    link = Link("http://127.0.0.1:1", name="alpha", identity=Identity(KEY), transport=Wire(handle), **options)
    assert link.poll(POLL).next_poll_s == 1.5
    pauses = [b - a for a, b in itertools.pairwise(asked)]
    assert 3600 <= clock[0] < 3600 + BACKOFF_MAX_S and max(pauses) <= BACKOFF_MAX_S
    assert 150 < len(asked) < 350  # 15 s apart on average
    assert len(set(pauses)) == len(pauses)  # no two agents, and no two pauses, keep step
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert link._wait_s == 240  # a refused connection says nothing about waiting


@pytest.mark.parametrize(
    "full",
    [
        problem("storage_full", 507),
        problem("storage_full_of_a_later_release", 507),
        ok(status=507),
        httpx.Response(507, content=b"<html>", headers=V1),
    ],
    ids=["known", "unknown code", "empty", "html"],
)
def test_a_full_disk_of_the_coordinator_is_waited_for(full):
    again = httpx.Response(507, headers={**full.headers, "Retry-After": "9"}, content=full.content)
    script = Script(*[full] * 30, again, ok({"accepted": True}))
    script.link.complete(A, Complete(fence=3, sha256="0" * 64))
    assert len(script.requests) == 32 and script.slept[-1] == 15 + 9


# Long polls


def proxy(status):
    return httpx.Response(status, content=b"<html>gateway</html>")


def after(seconds, answer, clock):
    def answered(request):
        clock[0] += seconds
        return answer

    return answered


LOST = httpx.RemoteProtocolError("server disconnected")


@pytest.mark.parametrize(
    ("waited_s", "answer", "asked"),
    [
        (60, proxy(504), [240, 120]),
        (1, proxy(502), [240, 120]),
        (1, proxy(503), [240, 120]),
        (1, httpx.Response(504, content=b"", headers=V1), [240, 120]),
        (60, LOST, [240, 120]),
        (60, httpx.ReadTimeout("slow"), [240, 120]),
        (5, LOST, [240, 240]),  # a coordinator that was started anew
        (60, httpx.ConnectError("refused"), [240, 240]),
        (60, problem("unavailable", 503), [240, 240]),  # its own word
        (60, proxy(404), [240, 240]),
    ],
    ids=str,
)
def test_a_poll_that_is_cut_asks_for_half_the_wait(waited_s, answer, asked):
    clock = [0.0]
    script = Script(after(waited_s, answer, clock), ok({}), monotonic=lambda: clock[0])
    script.link.poll(POLL)
    assert [r.headers["Prefer"] for r in script.requests] == [f"wait={wait}" for wait in asked]


def test_the_wait_has_a_bottom_and_is_remembered():
    script = Script(*[proxy(504)] * 6, ok({}), ok({}))
    script.link.poll(POLL)
    script.link.poll(POLL)
    asked = [int(r.headers["Prefer"].removeprefix("wait=")) for r in script.requests]
    assert asked == [240, 120, 60, 30, 20, 20, 20, 20]


def test_an_answer_to_a_poll_may_come_forty_seconds_late_and_others_take_a_minute():
    script = Script(ok({}), proxy(504), ok({}), ok({"accepted": True}), ok(status=204))
    script.link.poll(POLL)
    script.link.poll(POLL)
    script.link.progress(A, Progress(phase="training"))
    script.link.step(A, None)
    assert [r.extensions["timeout"]["read"] for r in script.requests] == [280, 280, 160, 60, 60]
    assert {r.extensions["timeout"]["connect"] for r in script.requests} == {10}
    assert [r.headers.get("Prefer") for r in script.requests[3:]] == [None, None]
